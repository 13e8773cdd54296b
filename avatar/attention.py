"""Attention and rotary positions: the two things every network here shares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avatar.float8 import FLOAT8, LARGEST, has_float8_products

THETA = 10_000.0

EXPLICIT_SCORES = 1 << 22
"""Up to this many scores a CPU keeps them in its cache; beyond, the fused kernel needs less memory."""


LONG = 256
"""From this many keys on, a GPU's attention is cuDNN's."""

TILE, MANY = 128, 4096
"""Keys that cuDNN takes at a time; from how many on it is worth while to give it whole tiles."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, scale 1 / sqrt(dim).

    Args:
        q: [B, N, heads, dim]; k, v: [B, M, heads, dim], read in place, so views of a larger buffer cost no copy.
        mask: None, or anything that broadcasts to [B, heads, N, M]: True where a query may look.
    k and v may be e4m3, laid out as `KVCache` does; q is then rounded to it as well.
    Returns: [B, N, heads, dim] in the type of q; bfloat16 where q is e4m3.
    """
    if k.dtype == FLOAT8:
        return _float8_attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.is_cpu and q.dtype == torch.bfloat16 and mask is None and scores <= EXPLICIT_SCORES:
        # Two products and a softmax: 1.0 ms where the fused kernel takes 2.1 (192 queries, 832 keys, 4 x 64, one core
        # with AVX-512 BF16), with the same distance from the float32 model.
        weights = torch.softmax(torch.matmul(q * q.shape[-1] ** -0.5, k.mT), dim=-1)
        return torch.matmul(weights, v).transpose(1, 2)
    if q.is_cuda and mask is None and not torch.is_grad_enabled() and q.element_size() == 2 and k.shape[2] >= LONG:
        return _cudnn_attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [B, heads, N, dim]; k, v: [B, heads, M, dim]. cuDNN's kernel by name, since PyTorch's own order of preference
    would take one of half the rate."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    whole = k.shape[2] // TILE * TILE
    if whole == k.shape[2] or whole < MANY:
        return attend(q, k, v, None, False)[0]
    # A number of keys that fills no whole tiles costs this kernel 8 %; the rest apart and blended in costs 4.
    (most, most_sum, *_), (rest, rest_sum, *_) = (
        attend(q, k[:, :, keys], v[:, :, keys], None, True) for keys in (slice(whole), slice(whole, None))
    )
    share = torch.sigmoid(rest_sum.float() - most_sum.float()).reshape(*q.shape[:3], 1)
    return torch.lerp(most, rest, share.to(most.dtype))


def _float8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dtype = torch.bfloat16 if q.dtype == FLOAT8 else q.dtype
    rounded = q if q.dtype == FLOAT8 else q.clamp(-LARGEST, LARGEST).to(FLOAT8)
    if q.is_cuda and has_float8_products(q):
        from avatar.kernels import attend

        made = [attend(rounded[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))]
        return (made[0] if len(made) == 1 else torch.cat(made)).to(dtype)
    return attention(rounded.to(dtype), k.to(dtype), v.to(dtype))


def sampled_positions(start: int, extent: int, count: int) -> list[int]:
    """`count` whole positions, evenly spread from `start` to `start + extent - 1`, both included, cut towards zero."""
    return [int(position) for position in np.linspace(start, start + extent - 1, count)]


def rope_angles(positions: Sequence[int], channels: int) -> np.ndarray:
    """float64 [len(positions), channels / 2]: position * 10000^(-2k / channels)."""
    frequencies = THETA ** (-np.arange(0, channels, 2, dtype=np.float64) / channels)
    return np.outer(np.asarray(positions, dtype=np.float64), frequencies)


def rope_table(
    frames: Sequence[int],
    rows: Sequence[int],
    columns: Sequence[int],
    head_dim: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Rotations of a grid of tokens: float32 [frames * rows * columns, head_dim / 2, (cos, sin)], columns fastest.

    Angles are computed here in float64, so a position may be any integer. cos and sin are rounded to float16 as the
    reference implementation stores them; the network was trained with these values.
    """
    return _rope_table(tuple(frames), tuple(rows), tuple(columns), head_dim, device)


# The steps of a block and the blocks of a grid ask for the same few tables again and again.
@lru_cache(maxsize=16)
def _rope_table(
    frames: tuple[int, ...],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    head_dim: int,
    device: torch.device | str | None,
) -> Tensor:
    spatial = 2 * (head_dim // 6)
    temporal = head_dim - 2 * spatial
    shape = (len(frames), len(rows), len(columns))
    axes = []
    # A table outlives the call that made it: made as an inference tensor it could not serve a training step later.
    with torch.inference_mode(False):
        for axis, (positions, channels) in enumerate(zip((frames, rows, columns), (temporal, spatial, spatial))):
            angles = rope_angles(positions, channels)
            rotation = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32).astype(np.float16)
            view = [1, 1, 1, channels // 2, 2]
            view[axis] = len(positions)
            axes.append(_sent(torch.from_numpy(rotation), device).view(view).expand(*shape, -1, -1))
        return torch.cat(axes, dim=3).flatten(0, 2).float()


def _sent(x: Tensor, device: torch.device | str | None) -> Tensor:
    """To a device, without waiting for what that is at work on: a table is made for nearly every step."""
    if device is not None and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the adjacent channel pairs of x [B, N, heads, dim] by table [N, dim / 2, 2], in float32."""
    if torch.compiler.is_compiling():
        # The compiler makes no code for complex numbers; eagerly they are one kernel instead of six.
        return rotate_pairs(x, table)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    rotated = pairs * torch.view_as_complex(table)[:, None]
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """`apply_rope` in real numbers."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table[:, None].split(1, dim=-1)
    return (pairs * cos + pairs.flip(-1) * torch.cat([-sin, sin], dim=-1)).flatten(-2).to(x.dtype)
