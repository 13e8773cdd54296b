"""A session that goes on in another engine: what `EngineSession.snapshot` gives, and `Engine.open` takes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.model import FrameBlock, Reference
from streaming.engine import Engine, EngineSession, EngineSettings, Restarts
from streaming.engine_process import ModelFailure

TOY = Path(__file__).parent.parent / "toy_model.py"
GREY = Reference(np.full((40, 50, 3), 120, np.uint8), seed=3)
QUICK = Restarts(backoff_s=0.01, longest_s=0.02)


def toy(**options: object) -> EngineSettings:
    return EngineSettings(f"{TOY}:load", options=options, restarts=QUICK)


def own(folder: Path, source: str) -> EngineSettings:
    """A model of one's own: the toy's file and something more."""
    path = folder / "own.py"
    path.write_text(TOY.read_text() + source)
    return EngineSettings(f"{path}:load", restarts=QUICK)


def sound(number: int, lookahead: int = 1280) -> AudioBlock:
    samples = np.random.default_rng(number).normal(0, 0.05, 7680).astype(np.float32)
    return AudioBlock(samples, number * 7680, 7680, np.zeros(lookahead, np.float32))


async def speak(session: EngineSession, blocks: Iterable[int]) -> list[FrameBlock]:
    lookahead = session.spec.lookahead_samples
    return [block for number in blocks for block in await session.step(sound(number, lookahead))]


def pictures(blocks: Iterable[FrameBlock]) -> NDArray[np.uint8]:
    return np.concatenate([block.frames for block in blocks])


async def whole(settings: EngineSettings, reference: Reference, blocks: int) -> NDArray[np.uint8]:
    """What a session gives that is never interrupted."""
    async with await Engine.launch(settings) as engine:
        session = await engine.open(reference)
        return pictures(await speak(session, range(blocks)) + await session.finish())


async def in_two(settings: EngineSettings, reference: Reference, at: int, blocks: int) -> NDArray[np.uint8]:
    """The same in two engines, the second of which begins before block `at`."""
    async with await Engine.launch(settings) as engine:
        session = await engine.open(reference)
        made = await speak(session, range(at))
        saved = await session.snapshot()
        # What is made after it is lost with the process, and does not change what was saved.
        await speak(session, range(at, blocks))
    async with await Engine.launch(settings) as engine:
        session = await engine.open(reference, resume=(at, saved))
        assert session.blocks == at
        return pictures(made + await speak(session, range(at, blocks)) + await session.finish())


@pytest.mark.parametrize("at", [0, 1, 5])
async def test_another_engine_goes_on_to_the_bit(at):
    np.testing.assert_array_equal(await in_two(toy(), GREY, at, 7), await whole(toy(), GREY, 7))


async def test_blocks_in_flight_go_along():
    np.testing.assert_array_equal(await in_two(toy(delay=2), GREY, 4, 7), await whole(toy(delay=2), GREY, 7))


async def test_a_snapshot_larger_than_its_shelf_is_taken_again(tmp_path):
    """The first shelf is 64 KiB; this state has 96 KiB."""
    settings = own(
        tmp_path,
        """
class Large(ToyModel):
    def start(self, reference):
        state = super().start(reference)
        state.colour = np.broadcast_to(state.colour, (64, 64, 3)).copy()
        return state

def load(size, steps, options):
    return Large((64, 64))
""",
    )
    np.testing.assert_array_equal(await in_two(settings, GREY, 3, 5), await whole(settings, GREY, 5))


async def test_the_process_may_die_before_and_after_a_snapshot_and_after_it_was_resumed():
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(GREY)
        made = await speak(session, range(3))
        os.kill(engine.pid, signal.SIGKILL)
        saved = await session.snapshot()
        os.kill(engine.pid, signal.SIGKILL)
        made += await speak(session, [3])
        assert engine.restarts == 2
        other = await engine.open(GREY, resume=(3, saved))
        again = await speak(other, [3])
        os.kill(engine.pid, signal.SIGKILL)
        again += await speak(other, range(4, 6))
    expected = await whole(toy(), GREY, 6)
    np.testing.assert_array_equal(pictures(made), expected[:48])
    np.testing.assert_array_equal(pictures(again), expected[36:])


async def test_a_snapshot_spares_the_session_the_replay_of_what_was_before(tmp_path):
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(GREY, snapshot_every_s=60)
        await speak(session, range(6))
        await session.snapshot()
        await speak(session, [6])
        assert sorted(session._sound) == [6]
        assert [kept.block for kept in session._snapshots] == [6]


async def test_snapshots_leave_no_shelf_behind():
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(GREY)
        for number in range(10):
            await speak(session, [number])
            await session.snapshot()
        await session.close()
        assert engine.shelves._end <= 4 * engine.shelves.SMALLEST


async def test_a_snapshot_that_is_cancelled_does_no_harm():
    async with await Engine.launch(toy(step_s=0.05)) as engine:
        session = await engine.open(GREY)
        made = await speak(session, range(2))
        taking = asyncio.ensure_future(session.snapshot())
        await asyncio.sleep(0)
        taking.cancel()
        made += await speak(session, range(2, 4))
    np.testing.assert_array_equal(pictures(made), await whole(toy(), GREY, 4))


async def test_a_session_that_was_resumed_goes_back_no_further_than_its_beginning():
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(GREY)
        await speak(session, range(4))
        other = await engine.open(GREY, resume=(4, await session.snapshot()), rewind_blocks=3)
        made = await speak(other, [4])
        await other.rewind(4)
        again = await speak(other, [4])
        with pytest.raises(ValueError, match=r"block 3 is not within 4\.\.5"):
            await other.rewind(3)
    np.testing.assert_array_equal(pictures(made), pictures(again))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda saved: saved[: len(saved) // 2], "saved state"),
        (lambda saved: b"", "saved state"),
        (lambda saved: saved.replace(b"ToyState", b"ToyStaff"), "no class that a state here may hold"),
    ],
)
async def test_a_snapshot_that_is_none_is_one_line_and_the_engine_goes_on(damage, what):
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(GREY)
        await speak(session, range(2))
        saved = damage(await session.snapshot())
        with pytest.raises(AvatardError, match=what):
            await engine.open(GREY, resume=(2, saved))
        await speak(session, [2])
        assert engine.restarts == 0


async def test_a_model_that_cannot_be_saved_says_so_and_goes_on(tmp_path):
    settings = own(
        tmp_path,
        """
class Odd(ToyModel):
    def step(self, state, audio):
        state.waiting = []
        blocks = super().step(state, audio)
        state.waiting = {1, 2}
        return blocks

def load(size, steps, options):
    return Odd((64, 64))
""",
    )
    async with await Engine.launch(settings) as engine:
        session = await engine.open(GREY)
        await speak(session, range(2))
        with pytest.raises(ModelFailure, match="which cannot be saved"):
            await session.snapshot()
        assert len(await speak(session, range(2, 4))) == 2


async def test_the_embedded_model_goes_on_to_the_bit_in_another_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    picture = np.full((256, 256, 3), 120, np.uint8)
    picture[60:180, 80:176] = (220, 180, 150)
    drawn, settings = Reference(picture, seed=1), EngineSettings("pocket")
    np.testing.assert_array_equal(await in_two(settings, drawn, 2, 3), await whole(settings, drawn, 3))


async def test_a_model_with_snapshots_of_its_own_resumes_from_them(tmp_path):
    settings = own(
        tmp_path,
        """
class Resuming(ToyModel):
    def snapshot(self, state):
        return {"blocks": state.blocks, "loudness": state.loudness, "rng": state.rng}

    def resume(self, reference, saved):
        state = self.start(reference)
        state.blocks, state.loudness, state.rng = saved["blocks"], saved["loudness"], saved["rng"]
        return state

def load(size, steps, options):
    return Resuming((64, 64))
""",
    )
    reference = replace(GREY, seed=7)
    np.testing.assert_array_equal(await in_two(settings, reference, 3, 5), await whole(toy(), reference, 5))
