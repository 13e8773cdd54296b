"""Engine: the toy model in a real process, one session or many. What happens when it dies is in test_engine_faults."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.model import Reference
from streaming.engine import Engine, EngineError, EngineSettings
from streaming.engine_process import SLOTS, ModelFailure

TOY = str(Path(__file__).parent.parent / "toy_model.py") + ":load"
GREY = Reference(np.full((40, 50, 3), 120, np.uint8), seed=3)


def toy(**options: object) -> EngineSettings:
    return EngineSettings(TOY, options=options)


def sound(number: int, valid: int = 7680, seed: int = 0) -> AudioBlock:
    samples = np.random.default_rng([seed, number]).normal(0, 0.05, 7680).astype(np.float32)
    return AudioBlock(samples, number * 7680, valid, np.zeros(1280, np.float32))


def loud(number: int) -> AudioBlock:
    return replace(sound(number), samples=np.ones(7680, np.float32))


PICKY = """
class Picky(ToyModel):
    def step(self, state, audio):
        blocks = super().step(state, audio)
        if audio.samples.max() >= 1:
            raise AvatardError("too loud")
        return blocks

def load(size, steps, options):
    return Picky((64, 64))
"""


def own_model(folder: Path, source: str) -> EngineSettings:
    """A model file made of the toy's and something more, as one module: its states can be saved."""
    path = folder / "own.py"
    path.write_text(Path(TOY.removesuffix(":load")).read_text() + source)
    return EngineSettings(f"{path}:load")


async def frames_of(engine: Engine, blocks: int, seed: int = 0) -> np.ndarray:
    session = await engine.open(replace(GREY, seed=seed))
    made = [block for n in range(blocks) for block in await session.step(sound(n, seed=seed))]
    made += await session.finish()
    await session.close()
    return np.concatenate([block.frames for block in made])


async def test_frames_and_their_place_come_through_shared_memory():
    async with await Engine.launch(toy()) as engine:
        spec = await engine.ready()
        session = await engine.open(GREY)
        blocks = [block for n in range(3) for block in await session.step(sound(n))]
        tail = await session.step(sound(3, valid=1300))
    assert (spec.width, spec.height) == (64, 64)
    assert [block.start for block in blocks] == [0, 12, 24]
    assert blocks[0].frames.shape == (12, 64, 64, 3)
    assert not np.array_equal(blocks[0].frames, blocks[1].frames)
    assert tail[0].frames.shape[0] == 3
    np.testing.assert_array_equal(tail[0].audio, sound(3).samples[:1300])


async def test_half_of_the_pictures_can_be_asked_for_block_by_block():
    async with await Engine.launch(toy()) as engine:
        assert (await engine.ready()).half_rate
        whole, session = await engine.open(GREY), await engine.open(GREY)
        for n, half_rate in enumerate([True, False, True]):
            (every,) = await whole.step(sound(n))
            (made,) = await session.step(sound(n), half_rate=half_rate)
            shown = every.frames[::2].repeat(2, axis=0) if half_rate else every.frames
            np.testing.assert_array_equal(made.frames, shown)


async def test_two_sessions_at_once_give_what_each_gives_alone():
    async with await Engine.launch(toy()) as engine:
        together = await asyncio.gather(frames_of(engine, 4, seed=1), frames_of(engine, 4, seed=2))
    async with await Engine.launch(toy()) as engine:
        alone = [await frames_of(engine, 4, seed=1), await frames_of(engine, 4, seed=2)]
    np.testing.assert_array_equal(together[0], alone[0])
    np.testing.assert_array_equal(together[1], alone[1])


async def test_sessions_take_turns():
    async with await Engine.launch(toy(step_s=0.01)) as engine:
        sessions = [await engine.open(replace(GREY, seed=seed)) for seed in range(3)]
        made: list[int] = []

        async def speak(which: int) -> None:
            for number in range(8):
                await sessions[which].step(sound(number))
                made.append(which)

        await asyncio.gather(*(speak(which) for which in range(3)))
    rounds = [sorted(made[at : at + 3]) for at in range(0, 24, 3)]
    assert rounds == [[0, 1, 2]] * 8


async def test_waiting_for_others_is_not_hanging():
    settings = replace(toy(step_s=0.2), step_timeout_s=0.5)
    async with await Engine.launch(settings) as engine:
        sessions = [await engine.open(GREY) for _ in range(4)]
        await asyncio.gather(*(session.step(sound(0)) for session in sessions))
        assert engine.restarts == 0


async def test_more_blocks_at_once_than_the_shared_memory_holds_all_arrive():
    held_back = SLOTS + 3
    async with await Engine.launch(toy(delay=held_back)) as engine:
        session = await engine.open(GREY)
        for number in range(held_back):
            assert await session.step(sound(number)) == []
        blocks = await session.finish()
    assert [block.start for block in blocks] == [12 * n for n in range(held_back)]
    assert len({block.frames.tobytes() for block in blocks}) == held_back


async def test_what_the_user_can_mend_arrives_as_the_same_one_line():
    async with await Engine.launch(toy(fail_at=1, how="user")) as engine:
        session = await engine.open(GREY)
        await session.step(sound(0))
        with pytest.raises(AvatardError, match=r"^toy: this block is not to my taste; give me another$"):
            await session.step(sound(1))


async def test_a_step_that_the_model_refused_did_not_happen(tmp_path):
    async with await Engine.launch(own_model(tmp_path, PICKY)) as engine:
        session = await engine.open(replace(GREY, seed=0))
        await session.step(sound(0))
        with pytest.raises(AvatardError, match="too loud"):
            await session.step(loud(1))
        assert session.blocks == 1
        made = await session.step(sound(1))
        await session.step(sound(2))
        assert engine.restarts == 0
    async with await Engine.launch(toy()) as engine:
        np.testing.assert_array_equal(made[0].frames, (await frames_of(engine, 2))[12:])


async def test_a_bug_in_the_model_arrives_with_the_traceback_of_its_process():
    async with await Engine.launch(toy(fail_at=0, how="bug")) as engine:
        session = await engine.open(GREY)
        with pytest.raises(ModelFailure, match="RuntimeError: the toy broke") as caught:
            await session.step(sound(0))
    assert "toy_model.py" in caught.value.__notes__[0]


async def test_an_unknown_option_is_refused_when_the_model_loads():
    async with await Engine.launch(toy(speed=9)) as engine:
        with pytest.raises(AvatardError, match=r"model\.options\.speed: unknown setting"):
            await engine.ready()


async def test_a_model_file_that_is_not_there_is_named():
    async with await Engine.launch(EngineSettings("/nowhere/model.py:load")) as engine:
        with pytest.raises(AvatardError, match=r"there is no file /nowhere/model\.py"):
            await engine.ready()


async def test_a_cancelled_step_leaves_the_engine_serving():
    async with await Engine.launch(toy(step_s=0.1)) as engine:
        session = await engine.open(GREY)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.step(sound(0)), 0.02)
        for number in range(1, 1 + 2 * SLOTS):
            assert [block.start for block in await session.step(sound(number))] == [12 * number]


async def test_closing_twice_and_in_mid_step_leaves_no_process():
    engine = await Engine.launch(toy(fail_at=0, how="hang"))
    session = await engine.open(GREY)
    stepping = asyncio.ensure_future(session.step(sound(0)))
    await asyncio.sleep(0)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineError):
        await stepping
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


async def test_an_engine_that_is_still_loading_is_closed_at_once(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\n\ndef load(**_):\n    time.sleep(600)\n")
    engine = await Engine.launch(EngineSettings(f"{slow}:load"))
    await asyncio.wait_for(engine.close(), 5)
    with pytest.raises(EngineError):
        await engine.ready()


async def test_a_collection_of_garbage_has_next_to_nothing_to_walk_through(tmp_path):
    counting = """
class Counting(ToyModel):
    def step(self, state, audio):
        raise AvatardError(f"{len(gc.get_objects())} {gc.get_freeze_count()}")

def load(size, steps, options):
    return Counting((64, 64))
"""
    async with await Engine.launch(own_model(tmp_path, "\nimport gc\n" + counting)) as engine:
        session = await engine.open(GREY)
        with pytest.raises(AvatardError) as error:
            await session.step(sound(0))
    walked, kept = map(int, re.findall(r"\d+", str(error.value))[-2:])
    assert walked < kept / 10


async def test_engines_that_come_and_go_leave_no_descriptor_behind():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def once() -> None:
        async with await Engine.launch(toy()) as engine:
            await frames_of(engine, 1)

    await once()
    before = descriptors()
    for _ in range(3):
        await once()
    assert descriptors() <= before


async def test_the_parent_never_imports_torch():
    probe = "import streaming.engine, streaming.session, streaming.sinks, sys; sys.exit('torch' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", probe)
    assert await process.wait() == 0
