"""The memory of one denoising step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avatar.attention import apply_rope, attention, rope_table
from avatar.cache import Conditioning, KVCache, stored
from avatar.float8 import FLOAT8
from avatar.stateful import clone, state_bytes

HEADS, DIM = 2, 8


def conditioning(rows: int = 2, columns: int = 2, motion: int = 6, batch: int = 1, layers: int = 2) -> Conditioning:
    def some(tokens: int) -> list[Tensor]:
        return [torch.randn(batch, tokens, HEADS, DIM) for _ in range(layers)]

    frame = rows * columns
    return Conditioning(some(frame), some(motion), some(frame + motion), rows, columns)


def table(given: Conditioning, position: int = 30) -> Tensor:
    return rope_table([position], range(given.rows), range(given.columns), DIM)


def conditioned(given: Conditioning, ring_frames: int) -> KVCache:
    cache = KVCache.empty(given, ring_frames)
    cache.condition(given, table(given), 30)
    return cache


def block(given: Conditioning, frames: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, given.keys[0].shape[0], frames * given.tokens_per_frame, HEADS, DIM)
    return k, v


@settings(max_examples=30, deadline=None)
@given(
    ring_blocks=st.integers(1, 6),
    frames=st.integers(1, 3),
    blocks=st.integers(1, 15),
    batch=st.integers(1, 3),
    motion=st.sampled_from([0, 6]),
)
def test_the_last_blocks_and_the_conditioning_are_attended_and_nothing_else(
    ring_blocks: int, frames: int, blocks: int, batch: int, motion: int
) -> None:
    kept = conditioning(motion=motion, batch=batch)
    cache = conditioned(kept, ring_blocks * frames)
    written: list[tuple[Tensor, Tensor]] = []
    for b in range(blocks):
        k, v = block(kept, frames)
        written.append((k, v))
        keys, values = cache.append(1, k, v, start=b * k.shape[1])
        recent = written[-ring_blocks:]
        conditioning_keys = [apply_rope(kept.keys[1], table(kept)), kept.motion_keys[1]]
        wanted_keys = torch.cat([*conditioning_keys, *(k for k, _ in recent)], dim=1)
        wanted_values = torch.cat([kept.values[1], *(v for _, v in recent)], dim=1)
        assert keys.shape == wanted_keys.shape
        q = torch.randn(batch, 5, HEADS, DIM)
        # The order of the keys differs once the ring has wrapped; what attention sees of them does not.
        torch.testing.assert_close(attention(q, keys, values), attention(q, wanted_keys, wanted_values))


def test_keys_are_read_in_place() -> None:
    kept = conditioning()
    cache = conditioned(kept, ring_frames=6)
    for start in (0, 12, 24):
        keys, values = cache.append(0, *block(kept, 3), start=start)
        assert keys.data_ptr() == cache.keys[0].data_ptr()
        assert values.data_ptr() == cache.values[0].data_ptr()


def test_before_the_first_wrap_only_the_written_part_is_given() -> None:
    kept = conditioning()
    cache = conditioned(kept, ring_frames=12)
    lengths = [cache.append(0, *block(kept, 3), start=12 * b)[0].shape[1] - kept.tokens for b in range(6)]
    assert lengths == [12, 24, 36, 48, 48, 48]


def test_a_block_computed_again_takes_its_old_place() -> None:
    kept = conditioning()
    cache = conditioned(kept, ring_frames=6)
    cache.append(0, *block(kept, 3), start=0)
    before = clone(cache)
    k, v = block(kept, 3)
    cache.append(0, k, v, start=12)
    keys, _ = cache.append(0, k, v, start=12)
    assert torch.equal(keys[:, -12:], k)
    assert torch.equal(keys[:, :-12], before.keys[0][:, : kept.tokens + 12])


def test_a_block_that_the_ring_does_not_hold_is_an_error() -> None:
    kept = conditioning()
    cache = conditioned(kept, ring_frames=4)
    with pytest.raises(ValueError, match="does not fit a ring of 16"):
        cache.append(0, *block(kept, 3), start=12)


def test_moving_the_reference_turns_its_keys_and_no_others() -> None:
    kept = conditioning()
    cache = conditioned(kept, ring_frames=3)
    cache.append(0, *block(kept, 3), start=0)
    before = clone(cache)
    moved = table(kept, position=57)
    cache.move_reference(kept, moved, 57)
    n = kept.tokens_per_frame
    for layer in range(2):
        assert torch.equal(cache.keys[layer][:, :n], apply_rope(kept.keys[layer], moved))
        assert torch.equal(cache.keys[layer][:, n:], before.keys[layer][:, n:])
        assert torch.equal(cache.values[layer], before.values[layer])
    assert cache.reference_position == 57


def test_the_reference_is_never_turned_twice() -> None:
    kept = conditioning()
    cache, fresh = conditioned(kept, ring_frames=3), conditioned(kept, ring_frames=3)
    for position in (31, 45, 1000, 33):
        cache.move_reference(kept, table(kept, position), position)
    fresh.move_reference(kept, table(kept, 33), 33)
    assert torch.equal(cache.keys[0], fresh.keys[0])


def test_new_conditioning_leaves_the_ring() -> None:
    first, second = conditioning(), conditioning()
    cache = conditioned(first, ring_frames=3)
    k, v = block(first, 3)
    cache.append(0, k, v, start=0)
    cache.condition(second, table(second), 30)
    assert torch.equal(cache.keys[0][:, second.tokens :], k)
    assert torch.equal(cache.values[0][:, : second.tokens], second.values[0])
    assert torch.equal(cache.keys[0][:, second.tokens_per_frame : second.tokens], second.motion_keys[0])


def test_conditioning_of_another_size_is_refused() -> None:
    cache = conditioned(conditioning(), ring_frames=3)
    other = conditioning(rows=4)
    with pytest.raises(ValueError, match="10 conditioning tokens, got 14"):
        cache.condition(other, table(other), 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (256, 192), (384, 704)])
def test_bytes_are_known_before_they_are_allocated(dtype: torch.dtype, width: int, height: int) -> None:
    rows, columns, ring_frames, layers = height // 16, width // 16, 12, 3
    with torch.device("meta"):
        kept = conditioning(rows, columns, motion=rows * columns * 3 // 2, layers=layers)
        kept.keys, kept.values = ([x.to(dtype) for x in given] for given in (kept.keys, kept.values))
        cache = KVCache.empty(kept, ring_frames)
    tokens = rows * columns * 5 // 2 + ring_frames * rows * columns
    assert cache.ring_tokens == ring_frames * rows * columns
    assert state_bytes(cache) == 2 * layers * tokens * HEADS * DIM * dtype.itemsize


def test_conditioning_for_eight_bits_is_rounded_once() -> None:
    exact = conditioning(layers=1)
    exact.values[0][0, 0, 0, 0] = 1000.0
    rounded = Conditioning(
        exact.keys, [stored(k, True) for k in exact.motion_keys], [stored(v, True) for v in exact.values], 2, 2
    )
    caches = [KVCache.empty(kept, 3, float8=True) for kept in (exact, rounded)]
    for cache, kept in zip(caches, (exact, rounded)):
        cache.condition(kept, table(kept), 30)
    assert caches[0].keys[0].dtype == rounded.values[0].dtype == FLOAT8
    for ours, theirs in zip(*((cache.keys[0].float(), cache.values[0].float()) for cache in caches)):
        assert torch.equal(ours, theirs)
    assert state_bytes(rounded) < state_bytes(exact) / 2


def test_a_ring_begins_with_zeros() -> None:
    kept = conditioning()
    cache = KVCache.empty(kept, ring_frames=3)
    assert not any(buffer.any() for buffer in cache.keys + cache.values)
