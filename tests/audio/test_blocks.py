"""Cutting a stream of sound into blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.blocks import BlockCutter
from audio.chunk import AudioBlock, AudioChunk

RATE = 16_000


def chunk(samples: np.ndarray | list[float]) -> AudioChunk:
    return AudioChunk(np.asarray(samples, np.float32), RATE)


def ramp(length: int) -> np.ndarray:
    return np.arange(1, length + 1, dtype=np.float32)


def cut(cutter: BlockCutter, pieces: list[np.ndarray]) -> list[AudioBlock]:
    blocks = [block for piece in pieces for block in cutter.push(chunk(piece))]
    return blocks + cutter.flush()


def as_tuples(blocks: list[AudioBlock]) -> list[tuple[object, ...]]:
    return [(block.samples.tolist(), block.start, block.valid, block.ahead.tolist()) for block in blocks]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    samples_per_block=st.integers(1, 24),
    lookahead=st.integers(0, 60),
)
def test_any_chunking_gives_the_same_blocks(lengths, samples_per_block, lookahead):
    sound = ramp(sum(lengths))
    pieces = np.split(sound, np.cumsum(lengths)[:-1]) if lengths else []
    blocks = cut(BlockCutter(samples_per_block, lookahead), pieces)
    whole = cut(BlockCutter(samples_per_block, lookahead), [sound])

    assert as_tuples(blocks) == as_tuples(whole)
    assert sum(block.valid for block in blocks) == len(sound)
    padded = np.concatenate([sound, np.zeros(samples_per_block + lookahead, np.float32)])
    for i, block in enumerate(blocks):
        end = (i + 1) * samples_per_block
        assert block.start == i * samples_per_block
        assert block.samples.shape == (samples_per_block,)
        assert block.samples.dtype == np.float32
        np.testing.assert_array_equal(block.samples, padded[block.start : end])
        np.testing.assert_array_equal(block.ahead, padded[end : end + lookahead])


def test_a_block_comes_out_with_the_sample_that_completes_its_lookahead():
    cutter = BlockCutter(4, 3)
    assert cutter.push(chunk(ramp(6))) == []
    assert cutter.missing == 1
    (block,) = cutter.push(chunk([7]))
    assert block.samples.tolist() == [1, 2, 3, 4]
    assert block.ahead.tolist() == [5, 6, 7]
    assert cutter.missing == 4


def test_the_last_block_is_padded_and_says_how_much_of_it_is_sound():
    *_, last = cut(BlockCutter(4, 2), [ramp(9)])
    assert (last.samples.tolist(), last.start, last.valid, last.ahead.tolist()) == ([9, 0, 0, 0], 8, 1, [0, 0])


def test_an_empty_stream_gives_no_block():
    assert cut(BlockCutter(4, 2), []) == []
    assert cut(BlockCutter(4, 2), [ramp(0)]) == []


@pytest.mark.parametrize("lookahead", [0, 1, 4, 9])
def test_an_exact_multiple_gives_no_extra_block(lookahead):
    blocks = cut(BlockCutter(4, lookahead), [ramp(12)])
    assert [block.valid for block in blocks] == [4, 4, 4]


def test_ten_seconds_in_one_chunk_and_in_single_samples_are_the_same():
    sound = np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32)
    whole = cut(BlockCutter(7680, 3200), [sound])
    single = cut(BlockCutter(7680, 3200), np.split(sound, 10 * RATE))
    assert len(whole) == 21
    for one, other in zip(whole, single, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)
        np.testing.assert_array_equal(one.ahead, other.ahead)


def test_what_is_kept_is_less_than_a_block_and_its_lookahead():
    cutter = BlockCutter(100, 30)
    for length in [1, 1000, 7, 129, 130, 131]:
        cutter.push(chunk(np.zeros(length)))
        assert cutter.pending < 130
        assert sum(piece.base.size if piece.base is not None else piece.size for piece in cutter._pending) < 130


def test_a_buffer_that_the_caller_uses_again_does_not_change_the_block():
    cutter = BlockCutter(4)
    buffer = np.ones(2, np.float32)
    cutter.push(AudioChunk(buffer, RATE))
    buffer[:] = 9
    (block,) = cutter.push(AudioChunk(buffer, RATE))
    assert block.samples.tolist() == [1, 1, 9, 9]


def test_dropped_sound_is_in_no_block_and_leaves_no_hole_in_the_stream():
    cutter = BlockCutter(4, 2)
    assert len(cutter.push(chunk(ramp(9)))) == 1
    assert cutter.drop() == 5
    assert cutter.pending == 0
    (block,) = cutter.push(chunk([50, 51, 52, 53, 54, 55]))
    assert (block.start, block.samples.tolist()) == (4, [50, 51, 52, 53])


def test_the_missing_samples_of_silence_complete_a_block():
    cutter = BlockCutter(4, 2)
    cutter.push(chunk([1, 2, 3]))
    (block,) = cutter.push(chunk(np.zeros(cutter.missing)))
    assert (block.samples.tolist(), block.valid) == ([1, 2, 3, 0], 4)


def test_a_second_utterance_begins_at_the_next_block():
    cutter = BlockCutter(4, 2)
    cut(cutter, [ramp(5)])
    (block,) = cut(cutter, [ramp(3)])
    assert (block.start, block.samples.tolist(), block.valid) == (8, [1, 2, 3, 0], 3)


def test_a_change_of_rate_and_a_second_channel_are_refused():
    cutter = BlockCutter(4)
    cutter.push(chunk([1]))
    with pytest.raises(ValueError, match="8000 Hz in a stream at 16000 Hz"):
        cutter.push(AudioChunk(np.zeros(1, np.float32), 8000))
    with pytest.raises(ValueError, match="mono"):
        cutter.push(chunk(np.zeros((2, 2))))
