"""Compilation by regions: a piece of one block is compiled once and serves all blocks of its kind.

The pieces hold no state and no Python number that changes from call to call; rings, positions and attention over the
rings stay outside. So there is one graph for each piece and shape, its kernels are kept on disk by the compiler, and a
start with warm caches takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def compile_methods(modules: Iterable[nn.Module], *names: str) -> None:
    """Put a compiled function in the place of each named method, in place. Modules of one class share the code."""
    for module in modules:
        for name in names:
            setattr(module, name, torch.compile(getattr(module, name), fullgraph=True, dynamic=False))


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with everything compiled inside it run as it was written: for what runs once, in other shapes."""
    return torch.compiler.set_stance("force_eager")(function)
