"""Numbers of 8 bits: which kind, how large, and where they can be multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


def has_float8_products(x: Tensor) -> bool:
    """Whether x lies where e4m3 matrices can be multiplied."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)
