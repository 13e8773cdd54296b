"""Engine: every way its process can end, and that the sessions do not notice."""

from __future__ import annotations

import asyncio
import logging
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
from streaming.engine import Backoff, Engine, EngineError, EngineSession, EngineSettings, Restarts
from streaming.engine_process import ModelFailure

TOY = Path(__file__).parent.parent / "toy_model.py"
GREY = Reference(np.full((40, 50, 3), 120, np.uint8), seed=3)
QUICK = Restarts(backoff_s=0.01, longest_s=0.02)

DRAWN = np.full((256, 256, 3), 120, np.uint8)
DRAWN[60:180, 80:176] = (220, 180, 150)


def toy(restarts: Restarts = QUICK, **options: object) -> EngineSettings:
    return EngineSettings(f"{TOY}:load", options=options, restarts=restarts)


def dying(folder: Path, *deaths: int | str, restarts: Restarts = QUICK, **options: object) -> EngineSettings:
    """The toy, of which the n-th process dies at the n-th of these blocks, or when it loads; the ones after go on."""
    return toy(restarts, deaths=list(deaths), diary=str(folder / "lives"), **options)


def own(folder: Path, source: str) -> EngineSettings:
    """A model of one's own: the toy's file and something more."""
    path = folder / "own.py"
    path.write_text(TOY.read_text() + source)
    return EngineSettings(f"{path}:load", restarts=QUICK)


def sound(number: int, seed: int = 0, lookahead: int = 1280) -> AudioBlock:
    samples = np.random.default_rng([seed, number]).normal(0, 0.05, 7680).astype(np.float32)
    return AudioBlock(samples, number * 7680, 7680, np.zeros(lookahead, np.float32))


def pictures(blocks: Iterable[FrameBlock]) -> NDArray[np.uint8]:
    return np.concatenate([block.frames for block in blocks])


async def speak(session: EngineSession, blocks: Iterable[int], seed: int = 0) -> list[FrameBlock]:
    lookahead = session.spec.lookahead_samples
    return [block for number in blocks for block in await session.step(sound(number, seed, lookahead))]


async def undisturbed(blocks: int, seed: int = 0, **options: object) -> NDArray[np.uint8]:
    async with await Engine.launch(toy(**options)) as engine:
        session = await engine.open(replace(GREY, seed=seed))
        return pictures(await speak(session, range(blocks), seed) + await session.finish())


async def told(settings: EngineSettings, blocks: int) -> tuple[NDArray[np.uint8], Engine]:
    """What a session of that many blocks gives."""
    async with await Engine.launch(settings) as engine:
        session = await engine.open(replace(GREY, seed=0))
        return pictures(await speak(session, range(blocks)) + await session.finish()), engine


class States:
    """What an engine says of itself."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.why = ""
        self._news = asyncio.Condition()
        self._tell: set[asyncio.Task[None]] = set()

    def __call__(self, state: str, why: str) -> None:
        self.seen.append(state)
        self.why += f"{why}\n"
        self._tell.add(asyncio.ensure_future(self._notify()))

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def reach(self, state: str, times: int = 1) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self.seen.count(state) >= times)


# Deaths of every kind.


@pytest.mark.parametrize(
    "deaths",
    [
        (0,),  # before anything was made
        (2,),  # before the first snapshot
        (7,),  # after it
        (7, 5),  # in the second process while it is told what was said
        (7, 7),
        (7, "load", "load"),
        (3, 6, 9, 10),
        tuple(range(10)),
    ],
)
async def test_frames_are_those_of_a_process_that_never_died(tmp_path, deaths):
    frames, engine = await told(dying(tmp_path, *deaths), 12)
    assert engine.restarts == len(deaths)
    np.testing.assert_array_equal(frames, await undisturbed(12))


async def test_ten_deaths_in_a_row_at_one_block(tmp_path):
    restarts = replace(QUICK, deaths_per_block=11)
    frames, engine = await told(dying(tmp_path, *[5] * 10, restarts=restarts), 6)
    assert engine.restarts == 10
    np.testing.assert_array_equal(frames, await undisturbed(6))


async def test_blocks_in_flight_are_not_lost(tmp_path):
    frames, engine = await told(dying(tmp_path, 6, 8, delay=2), 8)
    assert engine.restarts == 1
    np.testing.assert_array_equal(frames, await undisturbed(8))


async def test_a_process_that_hangs_is_replaced(tmp_path):
    settings = replace(dying(tmp_path, 5, how="hang"), step_timeout_s=0.3)
    frames, engine = await told(settings, 7)
    assert engine.restarts == 1
    np.testing.assert_array_equal(frames, await undisturbed(7))


async def test_a_process_that_is_stopped_is_replaced():
    settings = replace(toy(), step_timeout_s=0.3)
    async with await Engine.launch(settings) as engine:
        session = await engine.open(replace(GREY, seed=0))
        made = await speak(session, range(5))
        os.kill(engine.pid, signal.SIGSTOP)
        made += await speak(session, [5])
    np.testing.assert_array_equal(pictures(made), await undisturbed(6))


async def test_a_process_killed_while_idle_is_not_noticed():
    states = States()
    async with await Engine.launch(toy(), on_change=states) as engine:
        session = await engine.open(replace(GREY, seed=0))
        made = await speak(session, range(2))
        os.kill(engine.pid, signal.SIGTERM)
        made += await speak(session, [2])
        assert (engine.state, engine.restarts) == ("ready", 1)
    np.testing.assert_array_equal(pictures(made), await undisturbed(3))
    assert states.seen == ["ready", "restarting", "ready", "ended"]
    assert "its process died of SIGTERM; it is started again at once" in states.why


async def test_two_sessions_outlive_deaths_in_the_middle_of_steps():
    async def session_of(engine: Engine, seed: int) -> NDArray[np.uint8]:
        session = await engine.open(replace(GREY, seed=seed))
        made = await speak(session, range(12), seed)
        await session.close()
        return pictures(made)

    async with await Engine.launch(toy(step_s=0.02)) as engine:
        sessions = asyncio.gather(session_of(engine, 1), session_of(engine, 2))
        for _ in range(2):
            await asyncio.sleep(0.35)
            os.kill(engine.pid, signal.SIGKILL)
        first, second = await sessions
        assert engine.restarts == 2
    np.testing.assert_array_equal(first, await undisturbed(12, seed=1))
    np.testing.assert_array_equal(second, await undisturbed(12, seed=2))


# Where it ends.


async def test_a_block_that_always_kills_is_an_error_and_the_engine_goes_on(tmp_path):
    async with await Engine.launch(dying(tmp_path, 2, 2, 2)) as engine:
        session, other = await engine.open(GREY), await engine.open(replace(GREY, seed=0))
        made = await speak(other, range(1))
        await speak(session, range(2))
        with pytest.raises(EngineError, match=r"its process was killed; .*; 3 times in a row at block 2 \(0\.96 s\)$"):
            await session.step(sound(2))
        assert session.blocks == 2
        made += await speak(other, range(1, 4))
    np.testing.assert_array_equal(pictures(made), await undisturbed(4))


async def test_a_process_that_never_loads_is_an_error_at_once():
    settings = toy(how="kill", deaths=["load"], diary=os.devnull)
    async with await Engine.launch(settings) as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match="its process was killed"):
                await engine.ready()
        assert (engine.state, engine.restarts) == ("ended", 0)


async def test_a_process_that_does_not_load_again_is_an_error_in_the_end(tmp_path):
    async with await Engine.launch(dying(tmp_path, 2, "load", "load", "load")) as engine:
        session = await engine.open(GREY)
        await speak(session, range(2))
        for _ in range(2):
            with pytest.raises(EngineError, match=r"was killed; .*; starting it again failed 3 times in a row"):
                await session.step(sound(2))
        with pytest.raises(EngineError):
            await engine.open(GREY)


async def test_a_live_engine_never_gives_up(tmp_path):
    restarts = replace(QUICK, failed_loads=None)
    frames, engine = await told(dying(tmp_path, 2, *["load"] * 5, restarts=restarts), 3)
    assert engine.restarts == 6
    np.testing.assert_array_equal(frames, await undisturbed(3))


async def test_errors_of_the_model_are_no_reason_to_restart():
    async with await Engine.launch(toy(fail_at=1, how="bug")) as engine:
        session = await engine.open(GREY)
        await speak(session, range(1))
        for _ in range(2):
            with pytest.raises(ModelFailure, match="the toy broke"):
                await session.step(sound(1))
        assert engine.restarts == 0


async def test_an_engine_is_closed_while_it_waits_to_start_again(tmp_path):
    states = States()
    settings = dying(tmp_path, 0, 0, restarts=Restarts(backoff_s=60, longest_s=60))
    engine = await Engine.launch(settings, on_change=states)
    session = await engine.open(GREY)
    stepping = asyncio.ensure_future(session.step(sound(0)))
    await states.reach("restarting", 2)
    await asyncio.wait_for(engine.close(), 2)
    with pytest.raises(EngineError, match="was closed"):
        await stepping


async def test_an_engine_that_is_killed_is_not_started_again():
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(GREY)
        engine.kill()
        with pytest.raises(EngineError):
            await session.step(sound(0))
        assert engine.state == "ended"


def test_the_first_restart_is_at_once_and_the_others_ever_later():
    backoff = Backoff(Restarts())
    assert [backoff.next_s(1.0) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff.next_s(lived_s) for lived_s in (59, 60, 1, 1, 3600)] == [30, 0, 1, 2, 0]


# Callers that go away in the middle.


async def test_a_step_that_is_cancelled_while_the_engine_restarts_counts(tmp_path):
    states = States()
    async with await Engine.launch(dying(tmp_path, 5), on_change=states) as engine:
        session = await engine.open(replace(GREY, seed=0))
        made = await speak(session, range(5))
        stepping = asyncio.ensure_future(session.step(sound(5)))
        await states.reach("restarting")
        stepping.cancel()
        made += await speak(session, [6])
    whole = await undisturbed(7)
    np.testing.assert_array_equal(pictures(made), np.delete(whole, range(60, 72), 0))


@pytest.mark.parametrize("after_s", [0.0, 0.03, 0.1, 0.3])
async def test_a_step_that_is_cancelled_at_any_time_counts(tmp_path, after_s):
    async with await Engine.launch(dying(tmp_path, 5, step_s=0.03)) as engine:
        session = await engine.open(replace(GREY, seed=0))
        await speak(session, range(5))
        stepping = asyncio.ensure_future(session.step(sound(5)))
        await asyncio.sleep(after_s)
        stepping.cancel()
        await asyncio.wait([stepping])
        cancelled = stepping.cancelled()
        made = await speak(session, [6] if session.blocks == 6 else [5, 6])
    assert cancelled or not stepping.exception()
    np.testing.assert_array_equal(pictures(made)[-12:], (await undisturbed(7))[-12:])


async def test_a_cancelled_step_that_the_model_refuses_is_told_at_the_next(tmp_path):
    async with await Engine.launch(toy(fail_at=1, how="user", step_s=0.01)) as engine:
        session = await engine.open(GREY)
        await speak(session, range(1))
        stepping = asyncio.ensure_future(session.step(sound(1)))
        await asyncio.sleep(0)
        stepping.cancel()
        with pytest.raises(AvatardError, match="not to my taste"):
            await session.step(sound(2))


# Going back.


async def with_detour(settings: EngineSettings, kill_at: str) -> tuple[NDArray[np.uint8], Engine]:
    """Nine blocks, of which the last three are made with other sound first."""
    async with await Engine.launch(settings) as engine:
        session = await engine.open(replace(GREY, seed=0), rewind_blocks=3)
        made = await speak(session, range(6))
        await speak(session, range(6, 9), seed=9)
        if kill_at == "before":
            os.kill(engine.pid, signal.SIGKILL)
        await session.rewind(6)
        if kill_at == "after":
            os.kill(engine.pid, signal.SIGKILL)
        assert session.blocks == 6
        made += await speak(session, [6])
        await session.rewind(6)
        return pictures(made[:6] + await speak(session, range(6, 9))), engine


@pytest.mark.parametrize("kill_at", ["never", "before", "after"])
async def test_a_session_goes_back_and_on_as_if_nothing_had_been(kill_at):
    frames, engine = await with_detour(toy(), kill_at)
    assert engine.restarts == (kill_at != "never")
    np.testing.assert_array_equal(frames, await undisturbed(9))


async def test_how_far_back_a_session_goes():
    async with await Engine.launch(toy()) as engine:
        session, file = await engine.open(GREY, rewind_blocks=2), await engine.open(GREY)
        await speak(session, range(5))
        await session.rewind(4)
        await session.rewind(3)
        for block in (2, 4):
            with pytest.raises(ValueError, match=rf"block {block} is not within 3\.\.3"):
                await session.rewind(block)
        await speak(file, range(2))
        with pytest.raises(ValueError, match="block 1 is not within"):
            await file.rewind(1)


async def test_a_session_goes_back_beyond_what_its_process_has_seen():
    """The snapshot it was restored from is of block 8; block 6 is made from the one before."""
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(replace(GREY, seed=0), rewind_blocks=4)
        made = await speak(session, range(6))
        await speak(session, range(6, 9), seed=9)
        assert [snapshot.block for snapshot in session._snapshots] == [4, 8]
        os.kill(engine.pid, signal.SIGKILL)
        await speak(session, [9], seed=9)
        await session.rewind(6)
        made += await speak(session, range(6, 9))
    np.testing.assert_array_equal(pictures(made), await undisturbed(9))


async def test_a_storm_of_going_back_does_no_harm():
    async with await Engine.launch(toy()) as engine:
        session = await engine.open(replace(GREY, seed=0), rewind_blocks=3)
        rng = np.random.default_rng(0)
        made: dict[int, FrameBlock] = {}
        while session.blocks < 40:
            await session.rewind(max(0, session.blocks - int(rng.integers(0, 3)), session._first_needed))
            number = session.blocks
            made[number] = (await speak(session, [number]))[0]
            if number in (17, 33) and engine.restarts < 2:
                os.kill(engine.pid, signal.SIGKILL)
        assert len(session._snapshots) <= 3
        assert len(session._sound) <= 10
    np.testing.assert_array_equal(pictures(made[number] for number in range(40)), await undisturbed(40))


# What it costs.


async def test_what_is_kept_does_not_grow():
    async with await Engine.launch(toy()) as engine:
        for _ in range(3):
            session, other = await engine.open(GREY), await engine.open(GREY)
            for number in range(20):
                await session.step(sound(number))
                await other.step(sound(number))
                assert len(session._sound) <= 2 * session._snapshot_every
            await asyncio.wait([saving for saving in (session._saving, other._saving) if saving])
            await session.close()
            await other.close()
        assert engine.shelves._end <= 4 * engine.shelves.SMALLEST
        assert engine.shelves.take().offset == 0


async def test_a_session_replaces_another_beside_it():
    async with await Engine.launch(toy()) as engine:
        first = await engine.open(GREY)
        await speak(first, range(5))
        second = await engine.open(replace(GREY, seed=0))
        await first.close()
        made = await speak(second, range(5))
        os.kill(engine.pid, signal.SIGKILL)
        made += await speak(second, range(5, 7))
        await second.close()
    np.testing.assert_array_equal(pictures(made), await undisturbed(7))


# Models of one's own.

ODD = """
class Odd(ToyModel):
    def start(self, reference):
        state = super().start(reference)
        state.waiting = {state.colour.sum()}
        return state

    def step(self, state, audio):
        state.waiting = []
        blocks = super().step(state, audio)
        state.waiting = {1, 2}
        return blocks

def load(size, steps, options):
    return Odd((64, 64))
"""


async def test_a_model_that_cannot_be_saved_works_until_its_process_dies(tmp_path, caplog):
    async with await Engine.launch(own(tmp_path, ODD)) as engine:
        session = await engine.open(GREY)
        with caplog.at_level(logging.WARNING):
            await speak(session, range(8))
        assert "cannot be saved" in caplog.text
        assert "a builtins.set" in caplog.text
        assert not session._sound
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"the session is lost, since its state was never saved: .*set"):
            await session.step(sound(8))
        await speak(await engine.open(GREY), range(2))


RESUMING = """
class Resuming(ToyModel):
    def snapshot(self, state):
        return {"blocks": state.blocks, "loudness": state.loudness, "rng": state.rng}

    def resume(self, reference, saved):
        _death([-1, "resume"], DIARY) == "resume" and os.kill(os.getpid(), signal.SIGKILL)
        state = self.start(reference)
        state.blocks, state.loudness, state.rng = saved["blocks"], saved["loudness"], saved["rng"]
        return state

def load(size, steps, options):
    return Resuming((64, 64))
"""


async def test_a_model_with_its_own_snapshots_may_even_die_while_it_resumes(tmp_path):
    diary = tmp_path / "resumed"
    async with await Engine.launch(own(tmp_path, RESUMING + f"\nDIARY = {str(diary)!r}\n")) as engine:
        session = await engine.open(replace(GREY, seed=0), rewind_blocks=2)
        made = await speak(session, range(6))
        await session.rewind(5)
        made[5:] = await speak(session, range(5, 7))
        os.kill(engine.pid, signal.SIGKILL)
        made += await speak(session, [7])
        assert engine.restarts == 2
    assert diary.read_bytes() == b"..."
    np.testing.assert_array_equal(pictures(made), await undisturbed(8))


FAULTY = """
import torch

class Faulty(ToyModel):
    def step(self, state, audio):
        if _death([2], DIARY) == 2:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nand more")
        return super().step(state, audio)

def load(size, steps, options):
    return Faulty((64, 64))
"""


async def test_a_process_whose_device_failed_is_replaced(tmp_path):
    diary, states = str(tmp_path / "steps"), States()
    settings = own(tmp_path, FAULTY + f"\nDIARY = {diary!r}\n")
    async with await Engine.launch(settings, on_change=states) as engine:
        session = await engine.open(replace(GREY, seed=0))
        made = await speak(session, range(2))
        assert engine.restarts == 1
    np.testing.assert_array_equal(pictures(made), await undisturbed(2))
    assert "lost its device (AcceleratorError: CUDA error: an illegal memory access was encountered);" in states.why


CHATTY = """
def load(size, steps, options):
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, bytes(8) + b"hello")
        except OSError:
            pass
    return ToyModel((64, 64))
"""


async def test_a_process_that_talks_nonsense_is_replaced(tmp_path):
    """Whatever a library may write into the pipe of the answers."""
    async with await Engine.launch(own(tmp_path, CHATTY)) as engine:
        with pytest.raises(EngineError, match="gave an answer that makes no sense"):
            await engine.ready()


# The embedded model.


async def test_the_embedded_model_goes_on_to_the_bit_after_a_kill_in_mid_speech(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    drawn = Reference(DRAWN, seed=1)
    async with await Engine.launch(EngineSettings("pocket", restarts=QUICK)) as engine:
        session, other = await engine.open(drawn, snapshot_every_s=0.48, rewind_blocks=1), await engine.open(drawn)
        made = await speak(session, range(3))
        assert [snapshot.block for snapshot in session._snapshots] == [2]
        stepping = asyncio.ensure_future(speak(session, [3]))
        await asyncio.sleep(0.05)
        os.kill(engine.pid, signal.SIGKILL)
        made += await stepping
        assert engine.restarts == 1
        alone = await speak(other, range(4))
        await session.rewind(3)
        again = await speak(session, [3])
    np.testing.assert_array_equal(pictures(made), pictures(alone))
    np.testing.assert_array_equal(pictures(again), pictures(alone)[-12:])
