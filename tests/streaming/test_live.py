"""LiveSession: on the clock whatever happens. Time is virtual; model, cutter, encoder and files are real."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mp4 import Mp4, clicks_at, read_mp4
from toy_model import ToyModel, ToyState
from virtual_loop import VirtualLoop, run_virtual

from audio.chunk import AudioChunk
from audio.errors import AvatardError
from audio.source import PushSource
from avatar.model import FrameBlock, Reference
from avatar.stateful import clone, restore
from streaming.lane import Lane, LanePolicy
from streaming.live import CALM_BLOCKS, LATE_BLOCKS, LiveSession, LiveSettings, LiveStatus
from streaming.sinks import FileSink, Sink, SinkError

GREY = Reference(np.full((8, 8, 3), 120, np.uint8))
BRIGHT = Reference(np.full((8, 8, 3), 250, np.uint8))
BLOCK_S = 0.48


class InVirtualTime:
    """The toy as an engine's session, a step of which takes virtual seconds."""

    def __init__(
        self,
        reference: Reference,
        step_s: float,
        times: dict[int, float],
        failures: set[int],
        delay: int,
        frames_at_once: int,
        half_s: float | None,
    ) -> None:
        self.toy = ToyModel((64, 64), delay=delay)
        self.spec, self.half_s = replace(self.toy.spec, half_rate=half_s is not None), half_s
        self.state: ToyState = self.toy.start(reference)
        self.step_s, self.times, self.failures = step_s, times, failures
        self.frames_at_once = frames_at_once
        self.before: list[ToyState] = []
        self.rewound: list[int] = []
        self.closed = False

    @property
    def blocks(self) -> int:
        return self.state.blocks

    async def step(self, audio, on_frames, half_rate=False):
        assert not self.closed
        size = self.frames_at_once
        step_s = self.half_s if half_rate and self.half_s else self.times.get(self.blocks, self.step_s)
        piece_s = step_s * size / self.spec.frames_per_block
        await asyncio.sleep(piece_s)
        if self.blocks in self.failures:
            raise AvatardError(f"toy: block {self.blocks} is not to my taste")
        self.before.append(clone(self.state))
        made = (self.toy.step_at_half_rate if half_rate else self.toy.step)(self.state, audio)
        for block in made:
            for at in range(0, len(block.frames), size):
                await asyncio.sleep(piece_s if at else 0)
                on_frames(FrameBlock(block.frames[at : at + size], block.audio, block.start + at))
        return made

    async def rewind(self, block: int) -> None:
        assert self.blocks - block <= 3
        self.rewound.append(block)
        self.state = restore(self.state, self.before[block])
        del self.before[block:]

    async def close(self) -> None:
        self.closed = True


class OnAir:
    """A session into a file, driven by a test: `async def show(air)` runs while it is on air, then it is stopped."""

    def __init__(
        self,
        folder: Path,
        step_s: float = 0.15,
        times: dict[int, float] | None = None,
        failures: set[int] | None = None,
        settings: LiveSettings | None = None,
        delay: int = 0,
        frames_at_once: int = 12,
        half_s: float | None = None,
    ) -> None:
        self.path = folder / "live.mp4"
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, VirtualLoop)
        self.source = PushSource(48_000, ahead_s=60)
        self.models: list[InVirtualTime] = []
        self.changes: list[tuple[float, str]] = []
        self.how = (step_s, times or {}, failures or set(), delay, frames_at_once, half_s)
        self.stop = asyncio.Event()
        self.lane = file_lane(self.path, self.loop.time)
        self.session = LiveSession(
            self.source,
            self.open_model,
            GREY,
            [self.lane],
            settings=settings,
            clock=self.loop.time,
            on_change=self.note,
        )
        self.happened = {what: asyncio.Event() for what in ("on air", "speaking")}

    def note(self, what: str) -> None:
        self.changes.append((self.loop.time(), what))
        if what in self.happened:
            self.happened[what].set()

    async def open_model(self, reference: Reference) -> InVirtualTime:
        if reference.prompt == "refused":
            raise AvatardError("toy: I do not do that")
        self.models.append(InVirtualTime(reference, *self.how))
        return self.models[-1]

    @property
    def now(self) -> float:
        """Seconds on air: frame i is due at i / 25."""
        return self.loop.time() - self.session._pacer.due(0)

    async def until(self, moment: float) -> None:
        await asyncio.sleep(moment - self.now)

    async def say(self, sound: np.ndarray, chunk_s: float | None = None) -> None:
        """Push 48 kHz sound: at once, or in chunks at the pace of a voice."""
        size = len(sound) if chunk_s is None else round(chunk_s * 48_000)
        for begin in range(0, len(sound), max(size, 1)):
            await self.source.push(AudioChunk(sound[begin : begin + size].astype(np.float32), 48_000))
            if chunk_s is not None:
                await asyncio.sleep(chunk_s)

    async def run(self, show: Callable[[OnAir], Coroutine[Any, Any, None]] | None) -> LiveStatus:
        on_air = asyncio.create_task(self.session.run(self.stop))
        begun = asyncio.create_task(self.happened["on air"].wait())
        await asyncio.wait({on_air, begun}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if show is not None and not on_air.done():
            try:
                await show(self)
            finally:
                self.stop.set()
        return await on_air


def file_lane(path: Path, clock: Callable[[], float]) -> Lane:
    return Lane(lambda: FileSink(path), policy=LanePolicy.FILE_IN_LIVE, want_keyframe=lambda: None, clock=clock)


def broadcast(
    folder: Path, show: Callable[[OnAir], Coroutine[Any, Any, None]] | None, **how: Any
) -> tuple[Mp4, LiveStatus, OnAir]:
    """Run a show; give what was recorded, how the session ended, and who ran it."""

    async def run() -> tuple[LiveStatus, OnAir]:
        air = OnAir(folder, **how)
        return await air.run(show), air

    status, air = run_virtual(run())
    return read_mp4(air.path), status, air


def voice(seconds: float) -> np.ndarray:
    """Loud enough to brighten the toy's picture, too quiet to flash."""
    return 0.4 * np.sign(np.sin(2 * np.pi * 200 * np.arange(round(seconds * 48_000)) / 48_000)).astype(np.float32)


def loudness(file: Mp4) -> np.ndarray:
    """Peak of the sound under each frame."""
    count = len(file.sound) // 1920
    return np.abs(file.sound[: count * 1920, 0]).reshape(count, 1920).max(1)


def test_with_no_sound_it_idles_and_holds_no_frame(tmp_path):
    async def show(air):
        await air.until(10.0)

    file, status, _ = broadcast(tmp_path, show)
    assert status.held == status.skipped == status.slips == 0
    assert file.frames == status.frames == pytest.approx(250, abs=1)
    assert file.times == pytest.approx([i / 25 for i in range(file.frames)])
    assert file.sound_s == pytest.approx(file.frames / 25, abs=0.03)
    assert (file.brightness > 20).all(), "a black frame"


@pytest.mark.parametrize("chunk_s", [None, 0.02, 0.333], ids=["one burst", "20 ms chunks", "333 ms chunks"])
def test_a_flash_is_seen_when_its_click_is_heard(tmp_path, chunk_s):
    async def show(air):
        await air.until(1.1)
        await air.say(clicks_at([0.0, 1.3, 2.0, 3.9], 4.0, 48_000), chunk_s)
        await air.until(8.0)

    file, status, _ = broadcast(tmp_path, show)
    assert len(file.clicks()) == len(file.flashes()) == 4
    for flash, click in zip(file.flashes(), file.clicks()):
        assert -0.005 <= click - flash <= 0.045
    assert np.diff(file.clicks()) == pytest.approx([1.3, 0.7, 1.9], abs=0.002), "a hole in the voice"
    assert status.held == 0
    assert status.skew_s == pytest.approx(0, abs=1e-6)


def test_pictures_of_a_wavefront_are_shown_with_the_sound_they_were_made_of(tmp_path):
    async def show(air):
        await air.say(clicks_at([2.3, 4.0, 7.1], 14.0, 48_000))
        await air.until(10.0)

    file, status, _ = broadcast(tmp_path, show, delay=2, settings=LiveSettings(lead_s=1.2))
    assert len(file.clicks()) == len(file.flashes()) == 3
    for flash, click in zip(file.flashes(), file.clicks()):
        assert -0.005 <= click - flash <= 0.045
    assert status.held <= 24, "while the wavefront fills"


def test_stopped_while_it_warms_up_it_has_sent_nothing(tmp_path):
    async def run():
        air = OnAir(tmp_path, step_s=5.0)
        air.loop.call_later(7.0, air.stop.set)
        return await air.session.run(air.stop)

    assert run_virtual(run()).frames == 0
    assert list(tmp_path.iterdir()) == []


def test_speech_begins_within_a_block_and_what_a_block_takes(tmp_path):
    said: list[float] = []

    async def show(air):
        for number in range(30):
            await air.until(2.0 * number + 2 + 0.037 * number)
            said.append(air.now)
            await air.say(clicks_at([0.0], 0.3, 48_000))
        await air.until(63.0)

    file, _, _ = broadcast(tmp_path, show)
    delays = np.array(file.flashes()) - np.array(said)
    assert delays.max() <= BLOCK_S + 0.25
    assert delays.min() > 0


def test_a_voice_in_real_time_is_late_by_no_more_than_a_block_and_what_a_block_takes(tmp_path):
    async def show(air):
        await air.until(2.2)
        await air.say(clicks_at([0.5, 3.0], 4.0, 48_000), 0.02)
        await air.until(9.0)

    file, _, _ = broadcast(tmp_path, show)
    for click, said in zip(file.clicks(), (2.7, 5.2), strict=True):
        assert 0 < click - said <= BLOCK_S + 0.36


def said_before(
    folder: Path, sound: np.ndarray, pace: float, gathered_s: float = 0.0, **how: Any
) -> tuple[Mp4, list[float]]:
    """A session to which sound is brought, in 20 ms, from the moment it is started; also how much waits, every second.

    pace: 1 in real time, 2 twice as fast; gathered_s: of it lay in a pipe already.
    """
    waiting: list[float] = []

    async def run() -> OnAir:
        air = OnAir(folder, **how)

        async def say() -> None:
            for begin in range(0, len(sound), 960):
                await air.source.push(AudioChunk(sound[begin : begin + 960], 48_000))
                if begin >= gathered_s * 48_000:
                    await asyncio.sleep(0.02 / pace)

        saying = asyncio.create_task(say())

        async def show(air: OnAir) -> None:
            for second in range(1, 20):
                await air.until(second)
                waiting.append(air.session.status.waiting_s)

        try:
            await air.run(show)
        finally:
            saying.cancel()
        return air

    return read_mp4(run_virtual(run()).path), waiting


@pytest.mark.parametrize(("gathered_s", "step_s"), [(0, 0.15), (0, 0.4), (20, 0.4)])
def test_what_was_said_into_a_microphone_before_it_was_on_air_is_no_delay(tmp_path, gathered_s, step_s):
    said = clicks_at(np.arange(0.1, 40.0, 0.4), 40.0, 48_000)
    file, waiting = said_before(tmp_path, said, 1, gathered_s, step_s=step_s)
    assert max(waiting) < 1.0
    assert file.clicks()[0] < 0.9
    assert np.diff(file.clicks()) == pytest.approx(0.4, abs=0.003)


@pytest.mark.parametrize("pace", [100_000, 1000, 5, 1.5])
def test_what_was_made_for_it_before_it_was_on_air_is_heard(tmp_path, pace):
    said = np.arange(0.1, 6.0, 0.4)
    file, _ = said_before(tmp_path, clicks_at(said, 6.0, 48_000), pace)
    assert np.diff(file.clicks()) == pytest.approx(np.diff(said), abs=0.003)


def test_a_voice_that_a_network_kept_back_is_read_as_it_comes_again(tmp_path):
    """Three seconds of it come in one piece. Read at the pace of the programme it would have no clock and stay late."""

    async def show(air):
        await air.until(2.0)
        await air.say(voice(2.0), 0.02)
        await asyncio.sleep(3.0)
        await air.say(voice(3.0))
        at, late = air.loop.time(), []
        for piece in range(60 * 50):
            await asyncio.sleep(at + piece / 50 - air.loop.time())
            await air.source.push(AudioChunk(voice(0.02), 48_000))
            if piece % 50 == 0:
                late.append((air.source.waiting_s, air.session.status.waiting_s))
        waited = np.array(late)
        assert waited[10:, 0].max() < 0.05, "it waits to be read"
        assert waited[10, 1] > 2
        assert waited[-1, 1] < waited[10, 1] - 0.05

    broadcast(tmp_path, show)


def test_the_first_frames_of_a_block_are_not_kept_waiting_for_its_last(tmp_path):
    async def show(air):
        await air.until(2.2)
        await air.say(clicks_at([0.5], 2.0, 48_000), 0.02)
        await air.until(6.0)

    heard = {}
    for frames_at_once in (12, 4):
        (tmp_path / str(frames_at_once)).mkdir()
        how = {"step_s": 0.3, "frames_at_once": frames_at_once}
        file, status, _ = broadcast(tmp_path / str(frames_at_once), show, **how)
        assert status.held == 0
        assert file.flashes() == pytest.approx(file.clicks(), abs=0.04)
        heard[frames_at_once] = file.clicks()[0]
    assert heard[4] == pytest.approx(heard[12] - 1.1 * 0.2, abs=0.03)


async def twenty_seconds_of_clicks(air: OnAir) -> None:
    await air.until(1.0)
    await air.say(clicks_at(np.arange(0.0, 20.0, 0.4), 20.0, 48_000))
    await air.until(24.0)


def test_a_model_too_slow_for_every_picture_makes_every_other_one(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        file, status, air = broadcast(tmp_path, twenty_seconds_of_clicks, step_s=0.7, half_s=0.4)
    assert "a block takes the model 700 ms of the 480 ms it lasts: every other picture is made" in caplog.text
    assert "too slow to be live" not in caplog.text
    told = [what for _, what in air.changes]
    assert told.index("half rate") < told.index("on air")
    assert status.half_rate
    assert (status.held, status.skipped) == (0, 0)
    assert status.repeated == pytest.approx(status.frames / 2, abs=1)
    assert np.diff(file.clicks()) == pytest.approx(0.4, abs=0.002)


def test_pictures_are_halved_while_a_machine_is_busy_and_no_longer(tmp_path):
    busy = range(30, 60)

    async def show(air):
        await air.until(60.0)
        assert air.session.status.half_rate
        await air.until(170.0)

    _, status, air = broadcast(tmp_path, show, step_s=0.2, times=dict.fromkeys(busy, 0.7), half_s=0.15)
    at = {what: moment for moment, what in air.changes}
    blocks = (at["full rate"] - at["half rate"]) / BLOCK_S
    assert blocks == pytest.approx(CALM_BLOCKS, abs=2)
    assert not status.half_rate
    assert status.repeated == pytest.approx(6 * CALM_BLOCKS, abs=24)
    assert status.skipped == pytest.approx(LATE_BLOCKS, abs=2)
    # Those given up, and of those made in between what came too late.
    assert status.held < 12 * 3 * LATE_BLOCKS


def test_a_model_that_is_too_slow_is_told_of_and_never_delays_the_sound(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        file, status, air = broadcast(tmp_path, twenty_seconds_of_clicks, step_s=0.7)
    assert "too slow to be live: a block takes the model 700 ms of the 480 ms it lasts" in caplog.text
    assert [what for _, what in air.changes].index("too slow") < [what for _, what in air.changes].index("on air")
    assert status.load == pytest.approx(0.7 / BLOCK_S, rel=0.01)
    assert file.frames == pytest.approx(600, abs=2)
    assert np.diff(file.clicks()) == pytest.approx(0.4, abs=0.002)
    assert status.held > 100
    assert status.skipped > 10
    # what is shown is shown in time: no flash without its click
    assert len(file.flashes()) > 8
    for flash in file.flashes():
        assert min(abs(click - flash) for click in file.clicks()) <= 0.041


def test_a_hiccup_of_the_model_holds_the_picture_and_leaves_no_delay(tmp_path):
    async def show(air):
        await air.until(1.0)
        await air.say(clicks_at([0.2, 9.0], 10.0, 48_000))
        await air.until(13.0)

    file, status, _ = broadcast(tmp_path, show, times={12: 3.0}, half_s=0.1)
    assert not status.repeated
    assert 40 < status.held < 90
    assert status.skipped >= 4
    assert len(file.clicks()) == len(file.flashes()) == 2
    assert np.diff(file.clicks()) == pytest.approx(8.8, abs=0.002)
    assert abs(file.flashes()[1] - file.clicks()[1]) <= 0.041


@pytest.mark.parametrize("frames_at_once", [2, 4, 12])
def test_a_model_that_needs_most_of_the_time_there_is_makes_every_block(tmp_path, frames_at_once):
    async def show(air):
        await air.until(15.0)

    _, status, _ = broadcast(tmp_path, show, step_s=0.42, frames_at_once=frames_at_once)
    assert (status.skipped, status.held) == (0, 0)


def test_a_slow_beginning_is_not_believed_for_ever(tmp_path):
    async def show(air):
        await air.until(12.0)

    _, status, _ = broadcast(tmp_path, show, times=dict.fromkeys(range(5), 1.2))
    assert status.held < 150
    assert status.step_s == pytest.approx(0.15)


def test_an_interruption_silences_at_once_and_tells_what_was_heard(tmp_path):
    heard = []

    async def show(air):
        await air.until(1.0)
        await air.say(voice(10.0))
        await air.happened["speaking"].wait()
        began = air.now
        await asyncio.sleep(2.0)
        heard.append((air.now - began, air.session.interrupt(), air.now))
        await air.until(8.0)

    file, _, _ = broadcast(tmp_path, show)
    played, told, at = heard[0]
    assert told.played_s == pytest.approx(played, abs=0.05)
    assert told.played_s + told.dropped_s == pytest.approx(10.0, abs=0.002)
    loud = np.flatnonzero(loudness(file) > 0.2)
    assert loud[-1] / 25 <= at + 0.08, "the voice goes on"


@pytest.mark.parametrize("phase", [0.0, 0.06, 0.12, 0.18, 0.24, 0.3, 0.36, 0.42])
def test_after_an_interruption_the_model_hears_silence_within_a_block_and_what_a_block_takes(tmp_path, phase):
    """The toy grows darker from the first frame that it makes of silence."""
    at = []

    async def show(air):
        await air.until(1.0)
        await air.say(voice(10.0))
        await air.until(4.8 + phase)
        at.append(air.now)
        air.session.interrupt()
        await air.until(9.0)

    file, status, air = broadcast(tmp_path, show)
    bright = file.brightness
    after = round(at[0] * 25)
    darker = next(i for i in range(after, file.frames) if bright[i] < bright[after] - 2)
    assert darker / 25 - at[0] <= BLOCK_S + 0.25
    assert status.held <= 8
    assert len(air.models) == 1


@pytest.mark.parametrize("frames_at_once", [12, 4, 2])
@pytest.mark.parametrize("step_s", [0.05, 0.15, 0.3])
def test_the_model_goes_back_no_further_than_it_makes_anew_and_no_face_stands_still(tmp_path, step_s, frames_at_once):
    """Whatever moment of a block is interrupted: one that the model was taken back before and that is not made again
    would be on the screen, and the next one would not follow from it."""

    async def show(air):
        for number, phase in enumerate(np.arange(0.02, BLOCK_S, 0.06)):
            begin = (3 + 4 * number) * BLOCK_S
            await air.until(begin)
            await air.say(voice(2.0))
            await air.until(begin + 2 * BLOCK_S + phase)
            air.session.interrupt()
        await air.until(begin + 6 * BLOCK_S)

    _, status, air = broadcast(tmp_path, show, step_s=step_s, frames_at_once=frames_at_once)
    assert status.interruptions == 8
    assert air.models[0].rewound or step_s > 0.05
    assert (status.skipped, status.held) == (0, 0)


def test_a_storm_of_interruptions_does_no_harm(tmp_path):
    async def show(air):
        for number in range(100):
            await air.until(1.0 + 0.1 * number)
            await air.say(voice(0.5))
            air.session.interrupt()
        await air.until(13.0)
        await air.say(clicks_at([0.1, 1.5], 2.0, 48_000))
        await air.until(18.0)

    file, status, air = broadcast(tmp_path, show)
    assert status.interruptions == 100
    assert file.frames == pytest.approx(450, abs=2)
    assert len(file.clicks()) == len(file.flashes()) == 2
    for flash, click in zip(file.flashes(), file.clicks()):
        assert -0.005 <= click - flash <= 0.045
    assert len(air.models) == 1


def test_an_interruption_of_silence_remakes_nothing(tmp_path):
    async def show(air):
        await air.until(2.0)
        steps = air.models[0].blocks
        for _ in range(20):
            told = air.session.interrupt()
            assert told.dropped_s == 0
            await asyncio.sleep(0.01)
        assert air.models[0].blocks - steps <= 1
        await air.until(3.0)

    _, status, _ = broadcast(tmp_path, show)
    assert status.held == 0


def test_another_picture_comes_at_the_border_of_a_block_and_the_old_model_is_closed(tmp_path):
    async def show(air):
        await air.until(3.0)
        await air.session.set(BRIGHT)
        await air.until(6.0)

    file, status, air = broadcast(tmp_path, show)
    change = int(np.argmax(np.diff(file.brightness))) + 1
    assert file.brightness[change] > file.brightness[change - 1] + 15
    assert change % 12 == 0
    assert 3.0 <= change / 25 <= 3.0 + 2 * BLOCK_S + 0.25
    assert [model.closed for model in air.models[:-1]] == [True]
    assert status.held == 0


def test_a_picture_that_the_model_refuses_changes_nothing(tmp_path):
    async def show(air):
        await air.until(2.0)
        with pytest.raises(AvatardError, match="I do not do that"):
            await air.session.set(Reference(BRIGHT.image, "refused"))
        await air.until(4.0)

    file, _, air = broadcast(tmp_path, show)
    assert file.brightness.max() - file.brightness.min() < 5
    assert len(air.models) == 1


def test_a_picture_of_which_the_model_makes_not_one_block_gives_way_to_the_one_before(tmp_path, caplog):
    async def show(air):
        await air.until(2.0)
        failing = set(range(100))
        air.how = (*air.how[:2], failing, *air.how[3:])
        await air.session.set(BRIGHT)
        assert air.session.reference is BRIGHT
        await air.until(3.5)
        assert air.session.reference is GREY
        failing.clear()
        await air.say(clicks_at([0.1], 1.0, 48_000))
        await air.until(5.0)
        await air.session.set(BRIGHT)
        await air.until(7.0)
        assert air.session.reference is BRIGHT

    file, status, air = broadcast(tmp_path, show)
    assert "is not to my taste; goes back to the picture and the prompt before" in caplog.text
    before = file.brightness[: 4 * 25]
    assert np.median(before) == pytest.approx(before[0], abs=3)
    assert len(file.flashes()) == 1, "the model before goes on where it was"
    assert file.brightness[-1] > before[0] + 15
    assert [model.closed for model in air.models] == [True, True, False]
    assert [what for _, what in air.changes if "changed" in what] == ["not changed", "changed"]
    assert status.skipped == 0


def test_a_wavefronts_picture_that_fails_before_its_first_frame_gives_way_to_the_one_before(tmp_path):
    async def show(air):
        await air.until(3.0)
        air.how = (*air.how[:2], {1}, *air.how[3:])
        await air.session.set(BRIGHT)
        await air.until(6.0)

    file, _, air = broadcast(tmp_path, show, delay=1, settings=LiveSettings(lead_s=1.0, stay=True))
    assert [what for _, what in air.changes if "changed" in what] == ["not changed"]
    assert file.brightness.max() - file.brightness.min() < 5


def test_what_is_gone_back_to_was_interrupted_as_well(tmp_path):
    """Made ahead of a file, cut off while another picture waits for its first block, which then cannot be made."""
    numbers = []

    async def show(air):
        await air.say(voice(20))
        await air.until(4.1)
        assert air.session.quiet_s > 0, "it has made all that there is to make"
        air.how = (*air.how[:2], {0}, *air.how[3:])
        await air.session.set(BRIGHT)
        await asyncio.sleep(0.001)
        numbers.append(air.models[0].blocks)
        air.session.interrupt()
        await air.until(7.0)

    _, _, air = broadcast(tmp_path, show, settings=LiveSettings(lead_s=1.0, stay=True))
    assert [what for _, what in air.changes if "changed" in what] == ["not changed"]
    assert len(air.models[0].rewound) == 1
    assert air.models[0].rewound[0] < numbers[0], "what was made of sound that nobody heard did not happen"


def test_of_pictures_that_change_before_a_block_is_made_only_the_last_is_kept(tmp_path):
    async def show(air):
        await air.until(2.0)
        for reference in (GREY, BRIGHT, GREY, BRIGHT):
            await air.session.set(reference)
        await air.until(4.0)

    _, status, air = broadcast(tmp_path, show)
    assert [model.closed for model in air.models] == [True, True, True, True, False]
    assert [what for _, what in air.changes if "changed" in what] == ["changed"]
    assert status.held == 0


def test_a_model_that_fails_once_begins_anew_and_the_show_goes_on(tmp_path, caplog):
    async def show(air):
        await air.until(2.0)
        air.models[0].failures.add(air.models[0].blocks)
        await air.until(4.0)
        air.models[-1].failures.clear()
        await air.say(clicks_at([0.1], 1.0, 48_000))
        await air.until(7.0)

    file, _, air = broadcast(tmp_path, show)
    assert len(air.models) == 2
    assert "is not to my taste; begins anew from the picture" in caplog.text
    assert file.frames == pytest.approx(175, abs=2)
    assert len(file.flashes()) == 1


def test_a_model_that_fails_again_and_again_ends_the_session_and_the_file_is_kept(tmp_path):
    async def show(air):
        await air.until(1.0)
        for model in air.models:
            model.failures |= set(range(100))
        await air.until(9.0)

    with pytest.raises(AvatardError, match="is not to my taste"):
        broadcast(tmp_path, show)
    assert read_mp4(tmp_path / "live.part.mp4").frames >= 20


def test_the_end_of_the_sound_ends_the_session_when_all_was_heard(tmp_path):
    async def end_of_sound(air):
        await air.say(clicks_at([0.1, 2.9], 3.0, 48_000))
        air.source.close()
        await asyncio.sleep(60)

    async def run():
        air = OnAir(tmp_path)
        task = asyncio.create_task(end_of_sound(air))
        status = await air.run(None)
        task.cancel()
        return status

    status = run_virtual(run())
    file = read_mp4(tmp_path / "live.mp4")
    assert len(file.clicks()) == len(file.flashes()) == 2
    assert 3.0 <= file.frames / 25 <= 3.0 + 2 * BLOCK_S
    assert status.frames == file.frames


def test_asked_to_stay_it_stays_when_the_sound_has_failed_and_its_file_is_finished(tmp_path):
    async def show(air):
        await air.until(1.0)
        await air.say(voice(1.0))
        air.source.close(AvatardError("voice: damaged"))
        await air.until(6.0)

    file, _, _ = broadcast(tmp_path, show, settings=LiveSettings(stay=True))
    assert file.frames == pytest.approx(150, abs=2)


def test_asked_to_stay_it_idles_when_the_sound_has_ended(tmp_path):
    async def show(air):
        await air.say(clicks_at([0.1], 1.0, 48_000))
        air.source.close()
        await air.until(5.0)

    file, _, _ = broadcast(tmp_path, show, settings=LiveSettings(stay=True))
    assert file.frames == pytest.approx(125, abs=1)


def test_a_file_is_made_ahead_so_that_a_hiccup_holds_nothing(tmp_path):
    async def show(air):
        feeding = asyncio.create_task(air.say(clicks_at(np.arange(0.5, 20.0, 1.0), 20.0, 48_000), 0.48))
        for _ in range(3):
            feeding.cancel()
        sound = clicks_at(np.arange(0.5, 20.0, 1.0), 20.0, 48_000)
        await air.say(sound)
        await air.until(22.0)

    file, status, _ = broadcast(tmp_path, show, settings=LiveSettings(lead_s=3.0), times={12: 2.0})
    assert status.held == 0
    assert len(file.clicks()) == len(file.flashes()) == 20


def test_after_the_process_stood_still_the_clock_begins_anew(tmp_path):
    said = []

    async def show(air):
        await air.until(2.0)
        air.loop.now += 30.0
        await asyncio.sleep(3.0)
        said.append(air.now)
        await air.say(clicks_at([0.1], 1.0, 48_000))
        await asyncio.sleep(4.0)

    file, status, _ = broadcast(tmp_path, show)
    assert status.slips >= 1
    assert file.frames < 300
    assert file.flashes()[0] - said[0] <= BLOCK_S + 0.4, "the time it stood still is made up for by nobody"
    assert abs(file.flashes()[0] - file.clicks()[0]) <= 0.041


def test_the_last_output_that_fails_ends_the_session(tmp_path):
    class Full(FileSink):
        async def write(self, packets):
            raise SinkError("live.mp4: no space left on device")

    async def run():
        air = OnAir(tmp_path)
        lane = Lane(
            lambda: Full(tmp_path / "full.mp4"),
            policy=LanePolicy.FILE_IN_LIVE,
            want_keyframe=lambda: None,
            clock=air.loop.time,
        )
        air.session._lanes[:] = [lane]
        await air.run(lambda air: air.until(10.0))

    with pytest.raises(SinkError, match="no space left"):
        run_virtual(run())


def test_outputs_come_and_go_while_it_is_on_air(tmp_path):
    async def show(air):
        await air.until(2.0)
        lane = file_lane(tmp_path / "second.mp4", air.loop.time)
        air.session.add_output(lane)
        await air.until(4.0)
        air.session.remove_output(lane.name)
        with pytest.raises(KeyError):
            air.session.remove_output("nobody")
        await air.until(6.0)

    file, _, _ = broadcast(tmp_path, show)
    assert file.frames == pytest.approx(150, abs=1)
    assert read_mp4(tmp_path / "second.mp4").frames == pytest.approx(50, abs=4)


def sink(path: Path) -> Sink:
    return FileSink(path)
