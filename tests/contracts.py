"""What every model and every sink must keep: called by the tests of each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from audio.blocks import BlockCutter
from audio.chunk import AudioChunk
from avatar.model import AvatarModel, FrameBlock, HalfRate, Piecewise, Reference, Resumable, StreamSpec
from avatar.stateful import clone, load, save
from streaming.encoder import SOUND_RATE, Encoder, EncoderSettings
from streaming.sinks import Sink


def check_model(model: AvatarModel, blocks: int = 3, tail_frames: int = 5) -> None:
    """A model keeps the contract of `avatar.model`.

    The frames do not depend on how the sound was chunked, nor on what other sessions do; one seed gives one video;
    blocks have the sizes and starts that they should; a state that is copied can be gone on with, and so can one that
    was saved in another process.
    """
    spec = model.spec
    reference = _reference(seed=5)
    sound = _speech(spec, blocks * spec.frames_per_block + tail_frames, seed=1)
    whole = _speak(model, reference, sound, [len(sound)])

    frames = np.concatenate([block.frames for block in whole])
    assert frames.dtype == np.uint8
    assert frames.shape == (math.ceil(len(sound) / spec.samples_per_frame), spec.height, spec.width, 3)
    assert [block.start for block in whole] == [n * spec.frames_per_block for n in range(blocks + 1)]
    assert [len(block.frames) for block in whole] == [spec.frames_per_block] * blocks + [tail_frames]
    np.testing.assert_allclose(np.concatenate([block.audio for block in whole]), sound, atol=1e-6)

    if isinstance(model, Piecewise):
        _check_pieces(model, reference, sound, whole)
    assert isinstance(model, HalfRate) == spec.half_rate
    if isinstance(model, HalfRate):
        _check_half_rate(model, reference, sound, whole)
    _same(_speak(model, reference, sound, [777]), whole, "the frames depend on how the sound was chunked")
    _same(_speak(model, reference, sound, [len(sound)]), whole, "the same seed gave other frames")
    _check_sessions_are_isolated(model, reference, sound, whole)
    _check_a_copy_goes_on(model, reference, sound, whole)
    _check_a_saved_state_goes_on(model, reference, sound, whole)


async def check_sink(make: Callable[[], Sink], read: Callable[[Sink], list[float]]) -> None:
    """A sink keeps the contract of `streaming.sinks`.

    Packets stay as they were, frames keep their pts (`read` gives the times in seconds of what arrived), closing twice
    is safe, and so is closing what was opened and never started.
    """
    unused = make()
    await unused.open()
    await unused.close(complete=False)
    await unused.close(complete=False)
    assert unused.output is None

    sink = make()
    encoder = Encoder(64, 64, 25, 1, EncoderSettings())
    await sink.open()
    await sink.start(encoder.streams, {"title": "a test"})
    for start in range(0, 48, 12):
        frames = np.full((12, 64, 64, 3), start, np.uint8)
        packets = encoder.encode(
            FrameBlock(frames, np.zeros(0, np.float32), start),
            np.zeros((12 * SOUND_RATE // 25, 1), np.float32),
        )
        before = [(packet.pts, packet.dts, packet.time_base, packet.size) for packet in packets]
        await sink.write(packets)
        assert [(packet.pts, packet.dts, packet.time_base, packet.size) for packet in packets] == before
        assert sink.pending_s >= 0
    await sink.write(encoder.flush())
    await sink.close(complete=True)
    await sink.close(complete=True)
    encoder.close()
    assert read(sink) == pytest.approx([n / 25 for n in range(48)])


def _check_sessions_are_isolated(
    model: AvatarModel, reference: Reference, sound: np.ndarray, alone: Sequence[FrameBlock]
) -> None:
    """Two sessions, block by block in turn, on one set of weights."""
    other = _reference(seed=6)
    other_sound = _speech(model.spec, math.ceil(len(sound) / model.spec.samples_per_frame), seed=2)
    states = model.start(reference), model.start(other)
    made: tuple[list[FrameBlock], list[FrameBlock]] = ([], [])
    for mine, theirs in zip(_cut(model.spec, sound, [len(sound)]), _cut(model.spec, other_sound, [len(sound)])):
        made[0].extend(model.step(states[0], mine))
        made[1].extend(model.step(states[1], theirs))
    for state, blocks in zip(states, made):
        blocks.extend(model.finish(state))
    _same(made[0], alone, "another session changed the frames of this one")
    assert not np.array_equal(made[0][0].frames, made[1][0].frames), "two sessions gave the same frames"


def _check_a_copy_goes_on(
    model: AvatarModel, reference: Reference, sound: np.ndarray, whole: Sequence[FrameBlock]
) -> None:
    """A state copied after the first block, and gone on with after the original has run on."""
    first, *rest = _cut(model.spec, sound, [len(sound)])
    state = model.start(reference)
    before = model.step(state, first)
    kept = clone(state)
    for block in rest:
        model.step(state, block)
    again = [made for block in rest for made in model.step(kept, block)]
    _same([*before, *again, *model.finish(kept)], whole, "a copied state did not go on as the original did")


def _check_a_saved_state_goes_on(
    model: AvatarModel, reference: Reference, sound: np.ndarray, whole: Sequence[FrameBlock]
) -> None:
    """A state saved as bytes after the first block, and gone on with beside the original.

    A family that rebuilds a state from a part of it does so exactly this near to the beginning.
    """
    first, *rest = _cut(model.spec, sound, [len(sound)])
    state = model.start(reference)
    before = model.step(state, first)
    resumable = isinstance(model, Resumable)
    modules = {type(state).__module__}
    saved = b"".join(save(model.snapshot(state) if resumable else state, modules))
    loaded = load(saved, modules)
    other = model.resume(reference, loaded) if resumable else loaded
    for one, what in ((state, "saving a state changed it"), (other, "a saved state did not go on as the original did")):
        again = [made for block in rest for made in model.step(one, block)]
        _same([*before, *again, *model.finish(one)], whole, what)


def _check_pieces(model: Any, reference: Reference, sound: np.ndarray, whole: Sequence[FrameBlock]) -> None:
    """The pieces of a block are the block: the same frames, to a rounding of the last level, and the same sound."""
    state = model.start(reference)
    pieces = [piece for audio in _cut(model.spec, sound, [len(sound)]) for piece in model.step_in_pieces(state, audio)]
    pieces += model.finish(state)
    assert len(pieces) > len(whole)
    at = 0
    for piece in pieces:
        assert piece.start == at, "pieces follow each other"
        at += len(piece.frames)
    frames, expected = (np.concatenate([part.frames for part in parts]).astype(int) for parts in (pieces, whole))
    assert np.abs(frames - expected).max() <= 1, "the frames depend on whether they come in pieces"
    np.testing.assert_array_equal(*(np.concatenate([part.audio for part in parts]) for parts in (pieces, whole)))


def _check_half_rate(model: Any, reference: Reference, sound: np.ndarray, whole: Sequence[FrameBlock]) -> None:
    """At half rate a block has each second frame twice, and nothing that follows is any other."""
    state, made = model.start(reference), []
    for number, audio in enumerate(_cut(model.spec, sound, [len(sound)])):
        made += (model.step, model.step_at_half_rate)[number % 2](state, audio)
    made += model.finish(state)
    halved = [number for number, (ours, theirs) in enumerate(zip(made, whole, strict=True)) if not _equal(ours, theirs)]
    assert halved, "no block at half rate"
    for ours, theirs in zip(made, whole):
        if _equal(ours, theirs):
            continue
        shown = theirs.frames[::2].repeat(2, axis=0)[: len(theirs.frames)].astype(int)
        assert np.abs(ours.frames - shown).max() <= 1, "other frames than each second one"
        np.testing.assert_array_equal(ours.audio, theirs.audio)
        assert ours.start == theirs.start


def _equal(ours: FrameBlock, theirs: FrameBlock) -> bool:
    return len(ours.frames) == len(theirs.frames) and bool((np.abs(ours.frames.astype(int) - theirs.frames) <= 1).all())


def _speak(model: AvatarModel, reference: Reference, sound: np.ndarray, lengths: Sequence[int]) -> list[FrameBlock]:
    state = model.start(reference)
    made = [block for audio in _cut(model.spec, sound, lengths) for block in model.step(state, audio)]
    return made + model.finish(state)


def _cut(spec: StreamSpec, sound: np.ndarray, lengths: Sequence[int]) -> list:
    """Blocks of the sound, chunked in turn by `lengths` samples."""
    cutter = BlockCutter(spec.samples_per_block, spec.lookahead_samples)
    blocks, at, turn = [], 0, 0
    while at < len(sound):
        length = lengths[turn % len(lengths)]
        blocks += cutter.push(AudioChunk(sound[at : at + length], spec.sample_rate))
        at, turn = at + length, turn + 1
    return blocks + cutter.flush()


def _same(left: Sequence[FrameBlock], right: Sequence[FrameBlock], what: str) -> None:
    assert [block.start for block in left] == [block.start for block in right], what
    for mine, theirs in zip(left, right):
        np.testing.assert_array_equal(mine.frames, theirs.frames, err_msg=what)


def _reference(seed: int) -> Reference:
    """A head and shoulders in two colours: enough of a picture for every model."""
    rng = np.random.default_rng(seed)
    image = np.empty((256, 256, 3), np.uint8)
    image[:] = rng.integers(60, 200, 3)
    y, x = np.mgrid[0:256, 0:256]
    image[(x - 128) ** 2 / 60**2 + (y - 110) ** 2 / 80**2 < 1] = (220, 180, 150)
    image[150:156, 108:148] = (150, 60, 60)
    return Reference(image, prompt="a person speaks", seed=seed)


def _speech(spec: StreamSpec, frames: int, seed: int) -> np.ndarray:
    """Syllables of a buzzing voice: float32 [frames * samples_per_frame]."""
    time = np.arange(frames * spec.samples_per_frame) / spec.sample_rate
    voice = np.sign(np.sin(2 * np.pi * (110 + 10 * seed) * time)) * np.sin(2 * np.pi * 700 * time)
    return (0.3 * voice * np.clip(np.sin(2 * np.pi * 3 * time + seed), 0, 1)).astype(np.float32)
