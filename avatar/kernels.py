"""Passes over rows of tokens that PyTorch would make one operation at a time, each as one kernel.

A row is a token, and stays in registers from its first load to its last store; so a pass moves the bytes it must and no
more. All arithmetic is float32; what is stored is rounded once. Triton compiles a kernel at its first call, in a second
or so, and keeps it on disk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from avatar.float8 import FLOAT8

TINY = tl.constexpr(1e-12)
LARGEST = tl.constexpr(448.0)


class Rounded(NamedTuple):
    """Rows as e4m3 [N, D], and float32 [N, 1] to multiply them by."""

    values: Tensor
    scale: Tensor


class Norm(NamedTuple):
    """Layer norm, then * gain + shift, float32 or bfloat16 [groups, D] each; consecutive rows share a group.

    unit: gain is 1 + gain.
    """

    gain: Tensor
    shift: Tensor
    eps: float
    unit: bool


def residual_norm(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    stream: torch.dtype | None = None,
    norm: Norm | None = None,
    float8: bool = False,
) -> tuple[Tensor | None, Tensor | Rounded | None]:
    """r = x + gate * y, and the norm of r: what stands between two matrix products.

    Args:
        x: [N, D], bfloat16 or float32; y: bfloat16 [N, D], or None for zero; gate: float32 [groups, D], or None for 1.
        stream: type in which r is given back; None: it is not wanted.
        norm: None: r itself is what goes on.
        float8: whether what goes on is rounded to e4m3, row by row; else it is bfloat16.
    Returns: r [N, D] or None; the normed rows, or None where neither norm nor rounding is asked for.
    """
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=stream, device=x.device) if stream is not None else None
    wanted = norm is not None or float8
    values = torch.empty(rows, dim, dtype=FLOAT8 if float8 else torch.bfloat16, device=x.device) if wanted else None
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if float8 else None
    _residual_norm[(rows,)](
        x,
        y,
        gate,
        out,
        norm.gain if norm else None,
        norm.shift if norm else None,
        values,
        scale,
        rows // len(gate) if gate is not None else rows,
        rows // len(norm.gain) if norm else rows,
        norm.eps if norm else 0.0,
        dim,
        norm.unit if norm else False,
        triton.next_power_of_2(dim),
        num_warps=4,
    )
    return out, values if scale is None or values is None else Rounded(values, scale)


@triton.jit
def _residual_norm(  # type: ignore[no-untyped-def]
    x, y, gate, out, gain, shift, values, scale,
    gate_rows, norm_rows, eps, dim: tl.constexpr, unit: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < dim
    here = row * dim + column
    r = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        step = tl.load(y + here, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            step *= tl.load(gate + (row // gate_rows) * dim + column, mask=inside, other=0.0).to(tl.float32)
        r += step
    if out is not None:
        tl.store(out + here, r.to(out.dtype.element_ty), mask=inside)
    if gain is not None:
        mean = tl.sum(r) / dim
        centred = tl.where(inside, r - mean, 0.0)
        r = centred * tl.rsqrt(tl.sum(centred * centred) / dim + eps)
        group = (row // norm_rows) * dim + column
        factor = tl.load(gain + group, mask=inside, other=0.0).to(tl.float32)
        if unit:
            factor += 1.0
        r = r * factor + tl.load(shift + group, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        largest = tl.maximum(tl.max(tl.abs(tl.where(inside, r, 0.0))), TINY) / LARGEST
        tl.store(scale + row, largest)
        r = r / largest
    if values is not None:
        tl.store(values + here, r.to(values.dtype.element_ty), mask=inside)


def gelu(x: Tensor) -> Rounded:
    """GELU (tanh approximation) of x [N, D], rounded to e4m3 row by row."""
    rows, dim = x.shape
    values = torch.empty(rows, dim, dtype=FLOAT8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _gelu[(rows,)](x, values, scale, dim, triton.next_power_of_2(dim), num_warps=16)
    return Rounded(values, scale)


@triton.jit
def _gelu(x, values, scale, dim: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < dim
    a = tl.load(x + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    # 1/2 (1 + tanh(u)) = sigmoid(2 u), with u = sqrt(2 / pi) (a + 0.044715 a^3)
    r = a * tl.sigmoid(a * (1.5957691216057308 + 0.07135481282717577 * a * a))
    largest = tl.maximum(tl.max(tl.abs(r)), TINY) / LARGEST
    tl.store(scale + row, largest)
    tl.store(values + row * dim + column, (r / largest).to(values.dtype.element_ty), mask=inside)


def rotate(
    x: Tensor,
    table: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Queries or keys as attention wants them: RMS norm over the whole width, then `avatar.attention.apply_rope`.

    Args:
        x: bfloat16 [N, D].
        table: float32 [N, dim / 2, 2]; None: nothing is turned.
        weight: [D], of the norm; None: x is normed already.
        out: [N, heads, dim] in any layout whose last side is dense, bfloat16 or e4m3, which is rounded from bfloat16;
            a new [N, D] without it.
    Returns: out.
    """
    rows, dim = x.shape
    there = torch.empty(rows, 1, dim, dtype=x.dtype, device=x.device) if out is None else out
    _rotate[(rows,)](
        x,
        weight,
        table,
        there,
        there.stride(0),
        there.stride(1),
        eps,
        dim,
        there.shape[2],
        table.shape[1] if table is not None else 1,
        triton.next_power_of_2(dim),
        num_warps=8,
    )
    return there[:, 0] if out is None else out


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x, weight, table, out, out_stride, head_stride, eps,
    dim: tl.constexpr, head_dim: tl.constexpr, pairs: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < dim
    r = tl.load(x + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        r = r * tl.rsqrt(tl.sum(r * r) / dim + eps) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if table is not None:
        r = _turn(r, table + row * pairs * 2, pairs, block)
    there = row * out_stride + (column // head_dim) * head_stride + column % head_dim
    tl.store(out + there, r.to(x.dtype.element_ty).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn(r, table, pairs: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    a, b = tl.split(tl.reshape(r, [block // 2, 2]))
    pair = tl.arange(0, block // 2) % pairs
    cosine, sine = tl.load(table + 2 * pair), tl.load(table + 2 * pair + 1)
    return tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), [block])


def split_heads(
    qkv: Tensor, table: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, q: Tensor, k: Tensor, v: Tensor
) -> None:
    """Queries, keys and values out of their joint product, queries and keys as by `rotate`; into q, k and v, in place.

    Args:
        qkv: bfloat16 [N, 3 D]; table: float32 [N, dim / 2, 2]; q_weight, k_weight: [D].
        q, k, v: [N, heads, dim], of one type, bfloat16 or e4m3; the last side of q and k is dense. That of v is, or
            else its tokens lie side by side.
    """
    rows, heads, head_dim = q.shape
    together = v.stride(2) == 1
    _split_heads[(rows, 3 if together else 2)](
        qkv,
        q_weight,
        k_weight,
        table,
        q,
        k,
        v,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        eps,
        heads * head_dim,
        head_dim,
        triton.next_power_of_2(heads * head_dim),
        num_warps=4,
    )
    if not together:
        _store_values[(triton.cdiv(rows, 64), heads)](
            qkv[:, 2 * heads * head_dim :],
            v,
            rows,
            qkv.stride(0),
            v.stride(1),
            v.stride(2),
            head_dim,
            triton.next_power_of_2(head_dim),
            num_warps=4,
        )


@triton.jit
def _split_heads(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, table, q, k, v, q_stride, q_head_stride, stride, head_stride, eps,
    dim: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, block)
    inside = column < dim
    r = tl.load(qkv + (row * 3 + part) * dim + column, mask=inside, other=0.0).to(tl.float32)
    head, channel = column // head_dim, column % head_dim
    if part == 2:
        tl.store(v + row * stride + head * head_stride + channel, r.to(v.dtype.element_ty), mask=inside)
    else:
        r = r * tl.rsqrt(tl.sum(r * r) / dim + eps)
        weight = q_weight if part == 0 else k_weight
        r = r * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        r = _turn(r, table + row * head_dim, head_dim // 2, block)
        if part == 0:
            tl.store(q + row * q_stride + head * q_head_stride + channel, r.to(q.dtype.element_ty), mask=inside)
        else:
            tl.store(k + row * stride + head * head_stride + channel, r.to(k.dtype.element_ty), mask=inside)


@triton.jit
def _store_values(  # type: ignore[no-untyped-def]
    x, out, rows, x_stride, head_stride, dim_stride, head_dim: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0) * 64 + tl.arange(0, 64)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, block)
    inside = (token < rows)[:, None] & (column < head_dim)[None]
    v = tl.load(x + token[:, None] * x_stride + head * head_dim + column[None], mask=inside, other=0.0)
    there = head * head_stride + column[:, None] * dim_stride + token[None]
    tl.store(out + there, tl.trans(v.to(tl.float32)).to(out.dtype.element_ty), mask=tl.trans(inside))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of 8-bit queries, keys and values, which are taken as they are: no scales.

    Softmax is float32; its weights are rounded to e4m3, times 256 so that small ones keep their precision.

    Args:
        q: [1, N, heads, dim], e4m3; k: the same with M tokens, a view of [heads, room, dim]; v: a view of
            [heads, dim, room], room a multiple of 128. dim is a power of 2.
    Returns: bfloat16 [1, N, heads, dim].
    """
    _, queries, heads, dim = q.shape
    tokens, room = k.shape[1], k.stride(2) // dim
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    q, k, v = q[0], k[0].transpose(0, 1), v[0].permute(1, 2, 0)
    keys = TensorDescriptor(k, [heads * room, dim], [dim, 1], [KEYS, dim])
    values = TensorDescriptor(v, [heads * dim, room], [room, 1], [dim, KEYS])
    _attend[(triton.cdiv(queries, QUERIES), heads)](
        q, keys, values, out, queries, tokens, room, q.stride(0), q.stride(1), heads * dim,
        dim**-0.5 * 1.4426950408889634, dim, QUERIES, KEYS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


QUERIES, KEYS = 64, 128
"""Size of a tile of scores."""


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, out, queries, tokens, room, q_stride, q_head_stride, out_stride, scale,
    dim: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, dim)
    inside = (row < queries)[:, None]
    a = tl.load(q + row[:, None] * q_stride + head * q_head_stride + column[None], mask=inside, other=0.0)
    # 2^8 p instead of p: the same after the division at the end.
    largest = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, dim], tl.float32)
    whole = tokens // BN * BN
    for first in tl.range(0, whole, BN):
        scores = tl.dot(a, keys.load([head * room + first, 0]).T)
        above = tl.maximum(largest, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - (above - 8.0)[:, None])
        fade = tl.exp2(largest - above)
        total = total * fade + tl.sum(p, 1)
        sums = sums * fade[:, None]
        sums = tl.dot(p.to(a.dtype), values.load([head * dim, first]).T, sums)
        largest = above
    if whole < tokens:
        scores = tl.dot(a, keys.load([head * room + whole, 0]).T)
        scores = tl.where((whole + tl.arange(0, BN) < tokens)[None], scores, -1e30)
        above = tl.maximum(largest, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - (above - 8.0)[:, None])
        fade = tl.exp2(largest - above)
        total = total * fade + tl.sum(p, 1)
        sums = sums * fade[:, None]
        sums = tl.dot(p.to(a.dtype), values.load([head * dim, whole]).T, sums)
    there = row[:, None] * out_stride + head * dim + column[None]
    tl.store(out + there, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


def attend_few(q: Tensor, k: Tensor, v: Tensor, repeats: int = 1) -> Tensor:
    """Attention to so few keys that a library's kernel would mostly wait; the last key stands for `repeats` equal ones.

    Args:
        q: bfloat16 [B, N, heads, dim]; k, v: bfloat16 [B, M, heads, dim]. Heads follow each other densely in all three;
            dim is a power of 2.
    Returns: bfloat16 [B, N, heads, dim].
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile = min(64, max(16, triton.next_power_of_2(keys - 1)))
    _attend_few[(triton.cdiv(queries, 64), heads, batch)](
        q, k, v, out, queries, keys, q.stride(1), k.stride(1), v.stride(1), heads * dim, q.stride(0), k.stride(0),
        v.stride(0), math.log2(repeats), dim**-0.5 * 1.4426950408889634, dim, 64, tile, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _attend_few(  # type: ignore[no-untyped-def]
    q, k, v, out, queries, keys, q_stride, k_stride, v_stride, out_stride, q_batch, k_batch, v_batch, more, scale,
    dim: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = head * dim + tl.arange(0, dim)
    inside = (row < queries)[:, None]
    q += batch * q_batch
    k += batch * k_batch
    v += batch * v_batch
    a = tl.load(q + row[:, None] * q_stride + column[None], mask=inside, other=0.0)
    # The last key is where sums begin; the others come in tiles.
    last = keys - 1
    k_last = tl.load(k + last * k_stride + column).to(tl.float32)
    largest = tl.sum(a.to(tl.float32) * k_last[None], 1) * scale + more
    total = tl.full([BM], 1.0, tl.float32)
    sums = tl.zeros([BM, dim], tl.float32) + tl.load(v + last * v_stride + column).to(tl.float32)[None]
    for first in range(0, last, BN):
        key = first + tl.arange(0, BN)
        there = (key < last)[:, None]
        b = tl.load(k + key[:, None] * k_stride + column[None], mask=there, other=0.0)
        scores = tl.where((key < last)[None], tl.dot(a, tl.trans(b)) * scale, -1e30)
        above = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - above[:, None])
        fade = tl.exp2(largest - above)
        total = total * fade + tl.sum(p, 1)
        c = tl.load(v + key[:, None] * v_stride + column[None], mask=there, other=0.0)
        sums = tl.dot(p.to(a.dtype), c, sums * fade[:, None])
        largest = above
    there = (batch * queries + row[:, None]) * out_stride + column[None]
    tl.store(out + there, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
