"""Attention and rotary positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from avatar.attention import apply_rope, attention, rope_angles, rope_table, rotate_pairs, sampled_positions


@pytest.mark.parametrize(("file", "head_dim"), [("rope", 32), ("rope_hd128", 128)])
def test_tables_are_those_of_the_reference_bit_for_bit(golden: Any, file: str, head_dim: int) -> None:
    tensors = golden.tensors(f"{file}.safetensors")
    for case in golden.json(f"{file}.json"):
        tables = []
        for start, end, extent in case["groups"]:
            counts = [b - a for a, b in zip(start, end)]
            axes = [sampled_positions(a, e, n) for a, e, n in zip(start, extent, counts)]
            tables.append(rope_table(*axes, head_dim))
        assert torch.equal(torch.cat(tables), tensors[case["name"]]), case["name"]


@pytest.mark.parametrize(
    ("rows", "count", "positions"),
    [
        (22, 11, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 21]),
        (44, 11, [0, 4, 8, 12, 17, 21, 25, 30, 34, 38, 43]),
        (24, 6, [0, 4, 9, 13, 18, 23]),
        (40, 10, [0, 4, 8, 13, 17, 21, 26, 30, 34, 39]),
    ],
)
def test_positions_are_spread_over_the_whole_grid(rows: int, count: int, positions: list[int]) -> None:
    assert sampled_positions(0, rows, count) == positions


def test_positions_before_the_stream_are_cut_towards_zero() -> None:
    assert sampled_positions(-19, 16, 4) == [-19, -14, -9, -4]
    assert sampled_positions(-3, 2, 1) == [-3]


def test_a_negative_position_turns_the_other_way() -> None:
    forth, back = rope_table([7], [0], [0], 32), rope_table([-7], [0], [0], 32)
    assert torch.equal(forth * torch.tensor([1.0, -1.0]), back)


def test_there_is_no_last_position() -> None:
    # The reference's table ends at 45,000 latent frames, which is two hours.
    far = 10_000_000
    table = rope_table([far, far + 1], [0], [0], 128)
    expected = math.cos(far)
    assert table[0, 0, 0] == torch.tensor(expected).half().float()
    assert not torch.equal(table[0], table[1])


def test_angles_keep_their_precision_at_large_positions() -> None:
    assert rope_angles([10**9], 44)[0, 0] == 1e9


def test_a_table_made_for_inference_serves_training_too() -> None:
    with torch.inference_mode():
        rope_table([123_456], [0], [0], 32)
    x = torch.randn(1, 1, 1, 32, requires_grad=True)
    apply_rope(x, rope_table([123_456], [0], [0], 32)).sum().backward()
    assert x.grad is not None


def test_rotation_turns_adjacent_pairs() -> None:
    x = torch.zeros(1, 1, 1, 32)
    x[..., 0] = 1.0
    rotated = apply_rope(x, rope_table([1], [0], [0], 32))
    torch.testing.assert_close(rotated[0, 0, 0, :2], torch.tensor([math.cos(1), math.sin(1)]), rtol=1e-3, atol=1e-3)
    assert not rotated[..., 2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_and_complex_arithmetic_rotate_alike(dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 3, 32).to(dtype)
    table = rope_table([5, 6, 7], range(2), range(2), 32)
    torch.testing.assert_close(rotate_pairs(x, table), apply_rope(x, table))


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 2, 64), torch.randn(1, 1, 2, 64)

    def score(a: int, b: int) -> torch.Tensor:
        return (apply_rope(q, rope_table([a], [2], [3], 64)) * apply_rope(k, rope_table([b], [5], [1], 64))).sum(-1)

    torch.testing.assert_close(score(3, 10), score(903, 910), rtol=0, atol=0.02)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [1, 5, 40])
def test_attention_is_softmax_attention(dtype: torch.dtype, limit: float, masked: bool, keys: int) -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 12, 3, 16).to(dtype), torch.randn(2, 2, keys, 3, 16).to(dtype)
    mask = torch.rand(12, keys) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    out = attention(q, k, v, mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), plain_attention(q, k, v, mask), rtol=limit, atol=limit)


def test_many_scores_and_few_scores_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 64, 2, 32).bfloat16()
    few = attention(q, k, v)
    monkeypatch.setattr("avatar.attention.EXPLICIT_SCORES", 0)
    torch.testing.assert_close(few, attention(q, k, v), rtol=2e-2, atol=2e-2)
