"""A live session: on air from its first frame to its last, whatever happens to sound, model or outputs.

    PushSource -> LiveCutter -(on the clock)-> model -> frames by their number -(when due)-> Encoder -> lanes

Everything hangs on one clock. Frame n is due at start + n / fps. The sound of a block is cut a little before its first
frame is due, and from then on it is fixed: the listener hears it at its time, whether or not the model made pictures
of it in time. A picture that is not there is replaced by the one before it, and a picture that comes too late is not
shown. So the delay cannot grow, and picture and sound cannot part.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from av.packet import Packet
from numpy.typing import NDArray

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from audio.live import LISTENER_RATE, LiveBlock, LiveCutter, truncated
from audio.source import PushSource
from avatar.model import FrameBlock, Reference, StreamSpec
from streaming.encoder import Encoder, EncoderSettings
from streaming.lane import Lane, LaneStatus
from streaming.pacing import Pacer

log = logging.getLogger(__name__)

MEASURED_BLOCKS = 5
"""Blocks of silence made before going on air, after those with which a model settles, to know what a block takes: with
the first of them it may still be found how many threads it takes."""

RECENT_STEPS = 20
MARGIN_S = 0.02
"""Between a frame being ready and being due, beside the time it is known to take."""

GRACE_S = 0.02
"""How long a frame that is due waits for its picture: shown half a frame late it is nothing to see, missing it is."""

PENDING_S = 1.0
"""Sound in the cutter after which no more is read: who pushes has to wait, and a pipe fills."""

EARLY_S = 8.0
"""Of sound that is ready made, read before a session is on air, beside what lay there; a pipe holds four of a voice."""

EARLY_PACE_S = 1.0
"""Over which the pace of early sound is judged."""

HOLD_S = 1.0
"""A source that still has room after not being read for so long brings no more than a voice says: all of it is read."""

HOPE = 0.8
"""By how much less than usual a block is expected to take, for each in a row that was given up, five times at most."""

CROWDED = 0.85
"""Of its length a block may take and leave encoders their part, of which nothing is seen before going on air."""

LATE_BLOCKS, RECENT_BLOCKS = 5, 50
"""Where so many of the last ones were given up, and a block takes too long, every other picture is made, if the model
can do that."""

CALM_BLOCKS, CALM_LOAD = 125, 0.5
"""After so many blocks, twice as many after each time, that took no more than that of their length, all are again."""

FAILURES = 3
"""Blocks in a row that the model may refuse, each time begun anew from its reference, before the session ends."""


class LiveModel(Protocol):
    """What generates for a live session: an `EngineSession` that can be rewound.

    blocks: how many steps were made, which is the number of the next one.
    """

    spec: StreamSpec
    blocks: int

    async def step(
        self, audio: AudioBlock, on_frames: Callable[[FrameBlock], None], half_rate: bool = False
    ) -> list[FrameBlock]: ...

    async def rewind(self, block: int) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class LiveSettings:
    """lead_s: how much earlier than needed sound is cut and pictures are made. None for a voice, since it adds to
    the delay; seconds for a file, whose future is known. stay: idle on when the sound has ended.
    """

    lead_s: float = 0.0
    stay: bool = False


@dataclass(frozen=True)
class Interruption:
    """What an interruption did. played_s: what was heard since the voice began; dropped_s: what never will be."""

    played_s: float
    dropped_s: float


@dataclass(frozen=True)
class LiveStatus:
    """How a session stands.

    frames: sent to the encoder; held: of them, shown again because there was no newer; skipped: blocks that the model
    never made, since they would have come too late; ahead_s: from the last frame sent to the last one that is ready;
    step_s: a block takes the model, median of the last ones; load: that over a block's length, live needs less than 1;
    skew_s: length of the pictures sent less that of the sound sent; waiting_s: sound that waits for its turn;
    slips: times the clock began anew after the process stood still; half_rate: the model makes every other picture now,
    since it is too slow for all; repeated: frames that for this reason were the second showing of theirs.
    """

    on_air: bool
    speaking: bool
    frames: int
    held: int
    repeated: int
    skipped: int
    ahead_s: float
    step_s: float
    load: float
    skew_s: float
    waiting_s: float
    slips: int
    half_rate: bool
    interruptions: int
    outputs: tuple[LaneStatus, ...]


class _Rate:
    """Whether the model makes every picture or, where it is too slow for that, every other one."""

    def __init__(self) -> None:
        self.half = False
        self._late: deque[bool] = deque(maxlen=RECENT_BLOCKS)
        self._calm, self._needed = 0, CALM_BLOCKS

    def halve(self) -> None:
        self.half, self._calm = True, 0
        self._late.clear()

    def given_up(self) -> bool:
        """A block came too late; whether there are too many of those."""
        self._late.append(True)
        return not self.half and sum(self._late) >= LATE_BLOCKS

    def made(self, load: float) -> bool:
        """A block was made, and took so much of its length; whether all pictures are made again from now on."""
        self._late.append(False)
        self._calm = self._calm + 1 if load <= CALM_LOAD else 0
        if not self.half or self._calm < self._needed:
            return False
        self.half, self._needed = False, 2 * self._needed
        return True


@dataclass
class _Block:
    """One block of the programme: its sound since it was cut, its pictures as far as the model has made them.

    number, model: which step of which model made it or is making it; None before, and when it was skipped.
    heard: the sound that this step was given; the sound of the block may have been cut off since.
    """

    cut: LiveBlock
    heard: AudioBlock | None = None
    pictures: list[NDArray[np.uint8]] = dataclasses.field(default_factory=list)
    number: int | None = None
    model: LiveModel | None = None
    settled: bool = False
    """Made, being made, or given up: the model need not look at it."""
    half_rate: bool = False


@dataclass(frozen=True)
class _Opened:
    """A model, and what it was opened on."""

    model: LiveModel
    reference: Reference


class LiveSession:
    """One person on air.

    Args:
        source: mono sound at 48 kHz. Its end ends the session once all of it was heard, unless the settings say stay.
        open_model: starts the model on a reference; called again for `set`, and when the model failed.
        clock: monotonic seconds, of the loop that runs the session.
        on_change: called after something worth telling (on air, speaking or idle, too slow).
    """

    def __init__(
        self,
        source: PushSource,
        open_model: Callable[[Reference], Awaitable[LiveModel]],
        reference: Reference,
        lanes: Sequence[Lane],
        *,
        encoder_settings: EncoderSettings | None = None,
        metadata: Mapping[str, str] | None = None,
        settings: LiveSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._source, self._open_model, self._reference = source, open_model, reference
        self._lanes, self._metadata = list(lanes), dict(metadata or {})
        self._encoder_settings = encoder_settings or EncoderSettings()
        self._settings = settings or LiveSettings()
        self._clock, self._on_change = clock, on_change
        self._blocks: dict[int, _Block] = {}
        self._next_block = 0
        self._frame = 0
        self._on_air = self._speaking = self._at_work = False
        self._held = self._repeated = self._skipped = self._given_up = self._interruptions = 0
        self._rate = _Rate()
        self._played = 0
        self._sound_sent = 0
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._needs: deque[float] = deque(maxlen=RECENT_STEPS)
        """How long before its first frame was due a block had to be begun, for each of its frames to be in time."""
        self._redo_from: int | None = None
        self._replacement: _Opened | None = None
        """What `set` has opened, to be at work from the next block on."""
        self._previous: _Opened | None = None
        """What was at work before it, until the other has made its first block."""
        self._source_ended = False
        self._ended = asyncio.Event()
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self._heard = asyncio.Event()
        self._begun = asyncio.Event()
        self._drawn = asyncio.Event()
        self._early = _EarlySound()
        self._most_pending_s = PENDING_S
        self._source_error: AvatardError | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._encoder: Encoder | None = None
        self._model: LiveModel

    async def run(self, stop: asyncio.Event) -> LiveStatus:
        """Warm up, go on air, and stay there until `stop` is set or the sound has ended.

        Stopped before it was on air it has sent no frame. Every output is finished and closed on the way out.
        Raises: AvatardError or a bug's exception: the model could not be started, or failed again and again, or no
        output is left.
        """
        preparing = asyncio.create_task(self._prepare(), name="prepare")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({preparing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():
                return self.status
            await preparing
            return await self._broadcast(stop)
        finally:
            preparing.cancel()
            stopping.cancel()
            await asyncio.gather(preparing, stopping, return_exceptions=True)
            self._source.abandon()
            for lane in self._lanes:
                lane.close(complete=False)
            await asyncio.gather(*(lane.wait_closed() for lane in self._lanes), return_exceptions=True)

    @property
    def status(self) -> LiveStatus:
        """As of now."""
        step_s = _quantile(self._steps, 0.5)
        block_s = self._spec.block_seconds if self._steps else math.nan
        return LiveStatus(
            on_air=self._on_air,
            speaking=self._speaking,
            frames=self._frame,
            held=self._held,
            repeated=self._repeated,
            skipped=self._skipped,
            half_rate=self._rate.half,
            ahead_s=self._ahead_s() if self._on_air else 0.0,
            step_s=step_s,
            load=step_s / block_s,
            skew_s=self._frame / self._spec.fps - self._sound_sent / LISTENER_RATE if self._steps else 0.0,
            waiting_s=self._source.waiting_s + self._early.seconds + (self._cutter.pending_s if self._steps else 0.0),
            slips=self._pacer.slips if self._begun.is_set() else 0,
            interruptions=self._interruptions,
            outputs=tuple(lane.status for lane in self._lanes),
        )

    @property
    def quiet_s(self) -> float:
        """Seconds until the model is needed next; 0 while it is at work or something waits for it."""
        waiting = self._redo_from is not None or any(not block.settled for block in self._blocks.values())
        if not self._on_air or self._at_work or waiting:
            return 0.0
        due = self._pacer.due(self._next_block * self._spec.frames_per_block)
        return max(0.0, due - self._lead_s() - self._clock())

    def interrupt(self) -> Interruption:
        """Be silent at once, and close the mouth as soon as the model can.

        Sound that was not heard yet is forgotten. The model goes back to the block on the screen and makes the rest
        of it anew; where too little of it is left for that, it makes the next one anew.
        """
        dropped = self._source.drop() + self._early.drop()
        if not self._on_air:
            return Interruption(0.0, dropped / LISTENER_RATE)
        dropped += self._cutter.drop()
        frames = self._spec.frames_per_block
        current, shown = divmod(self._frame, frames)
        samples = shown * self._samples_per_frame
        for index in [i for i in self._blocks if i >= current]:
            block = self._blocks[index]
            # What is on the screen fades out: from its first sample on, since none would be a click.
            keep = max(samples, 1) if index == current else 0
            unheard = block.cut.spoken_after(keep)
            dropped += unheard
            if unheard:
                block.cut = truncated(block.cut, keep)
                self._make_again(index)
        self._interruptions += 1
        self._taken.set()
        return Interruption(self._played / LISTENER_RATE, dropped / LISTENER_RATE)

    @property
    def reference(self) -> Reference:
        """What it was begun with, or the last that `set` took: at work, or to be from the next block on."""
        return self._reference if self._replacement is None else self._replacement.reference

    async def set(self, reference: Reference) -> None:
        """Change the picture or the prompt at the next block that is not made yet.

        Where the model then cannot make even one block of it, the session goes back to what it had.
        Raises: AvatardError: the model refuses it; the session goes on with what it had.
        """
        model = await self._open_model(reference)
        unused, self._replacement = self._replacement, _Opened(model, reference)
        self._news.set()
        if unused is not None:
            await unused.model.close()

    def want_keyframe(self) -> None:
        """The next frame shall be one with which a viewer can begin."""
        if self._encoder is not None:
            self._encoder.want_keyframe()

    def add_output(self, lane: Lane) -> None:
        """One more output, from its next keyframe on. It tries its target by itself."""
        self._lanes.append(lane)
        if self._tasks is not None:
            self._tasks.create_task(self._run_lane(lane), name=f"lane {lane.name}")
            self.want_keyframe()

    def remove_output(self, name: str) -> None:
        """Finish and forget the output of that name. Raises: KeyError."""
        lane = next((lane for lane in self._lanes if lane.name == name), None)
        if lane is None:
            raise KeyError(name)
        lane.close(complete=True)
        self._lanes.remove(lane)

    # Before going on air

    async def _prepare(self) -> None:
        """Try the outputs, start the model and warm it up."""
        collecting = asyncio.create_task(self._collect(), name="collect")
        try:
            await asyncio.gather(*(lane.open() for lane in self._lanes))
            self._model = await self._open_model(self._reference)
            spec = self._spec = self._model.spec
            self._cutter = LiveCutter(spec.samples_per_block, spec.lookahead_samples, spec.sample_rate)
            await self._warm_up()
            # While sound is still collected: an encoder in hardware can take its time.
            self._encoder = await asyncio.to_thread(
                Encoder, spec.width, spec.height, spec.fps, 1, self._encoder_settings
            )
        finally:
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)  # an error of the source is raised to every reader

    async def _collect(self) -> None:
        """Sound that comes before the session is on air; once enough of it is ready made, the rest may wait."""
        while not self._early.full(self._clock()) and (chunk := await self._source.read()) is not None:
            self._early.add(chunk.samples, self._clock())

    async def _warm_up(self) -> None:
        """Measure what a block takes, make fewer pictures when that is too long, and say so."""
        spec = self._spec
        await self._measure(spec.settled_after + MEASURED_BLOCKS)
        if self._crowded() and spec.half_rate:
            self._halve()
            await self._measure(MEASURED_BLOCKS)
        typical = self._typical_s()
        if typical > spec.block_seconds:
            log.warning(
                "too slow to be live: a block takes the model %.0f ms of the %.0f ms it lasts (%.1f of %d frames/s); "
                "pictures will be held while the sound goes on",
                *(1000 * typical, 1000 * spec.block_seconds, spec.frames_per_block / typical, spec.fps),
            )
            self._on_change("too slow")

    async def _measure(self, blocks: int) -> None:
        """Make so many of silence; the last ones are what a block takes."""
        spec = self._spec
        for number in range(blocks):
            silence = AudioBlock(
                np.zeros(spec.samples_per_block, np.float32),
                self._model.blocks * spec.samples_per_block,
                spec.samples_per_block,
                np.zeros(spec.lookahead_samples, np.float32),
            )
            watch = _Stopwatch(self._clock, spec)
            for made in await self._model.step(silence, watch.frames_came, self._rate.half):
                self._picture = made.frames[-1]
            if number >= blocks - MEASURED_BLOCKS:
                self._note_step(watch)

    def _halve(self) -> None:
        """Have every other picture made from now on."""
        log.warning(
            "a block takes the model %.0f ms of the %.0f ms it lasts: every other picture is made, and shown twice",
            *(1000 * self._typical_s(), 1000 * self._spec.block_seconds),
        )
        self._rate.halve()
        self._forget_steps(min)
        self._on_change("half rate")

    def _forget_steps(self, kept: Callable[[Iterable[float]], float]) -> None:
        """What blocks took that were made otherwise, but for one: what to expect until the next are made."""
        for times in (self._steps, self._needs):
            expected = kept(times)
            times.clear()
            times.append(expected)
        self._given_up = 0

    async def _broadcast(self, stop: asyncio.Event) -> LiveStatus:
        spec = self._spec
        self._samples_per_frame = LISTENER_RATE // spec.fps
        encoder = self._encoder
        assert encoder is not None
        self._pacer = Pacer(spec.fps, self._clock)
        with ThreadPoolExecutor(1, thread_name_prefix="encoder") as self._encoder_thread:
            try:
                async with asyncio.TaskGroup() as self._tasks:
                    for lane in self._lanes:
                        self._tasks.create_task(self._run_lane(lane), name=f"lane {lane.name}")
                    helpers = [
                        self._tasks.create_task(self._listen(), name="listen"),
                        self._tasks.create_task(self._cut(), name="cut"),
                        self._tasks.create_task(self._generate(), name="generate"),
                        self._tasks.create_task(self._watch(stop), name="stop"),
                    ]
                    await self._tasks.create_task(self._deliver(encoder), name="deliver")
                    for task in helpers:
                        task.cancel()
                    for lane in self._lanes:
                        lane.close(complete=self._frame > 0 and (self._source_error is None or self._settings.stay))
            except BaseExceptionGroup as group:
                raise _first(group) from None
            finally:
                self._on_air = False
                self._tasks = None
                self._encoder_thread.submit(encoder.close)
        if self._source_error is not None and not self._settings.stay:
            raise self._source_error
        return self.status

    # The tasks

    async def _listen(self) -> None:
        """Sound from the source into the cutter, as much as is soon needed."""
        if self._settings.lead_s == 0 and self._early.spoken(self._clock()):
            # Said into a microphone before it was on air: kept, it would be delay for ever.
            self._early.drop()
            self._source.drop()
        try:
            for samples, came_s in self._early.take():
                self._hear(samples, came_s)
            while (chunk := await self._source.read()) is not None:
                self._hear(chunk.samples, self._clock())
                await self._have_room()
        except AvatardError as error:
            # What came before it is spoken first. Who does not stay is told at the end.
            log.log(
                logging.WARNING if self._settings.stay else logging.INFO, "%s; no more sound comes from there", error
            )
            self._source_error = error
        self._source_ended = True
        self._cutter.utterance_ended()
        self._heard.set()

    def _hear(self, samples: NDArray[np.float32], came_s: float) -> None:
        if samples.size:
            self._cutter.push(samples, came_s)
        else:
            self._cutter.utterance_ended()
        self._heard.set()

    async def _have_room(self) -> None:
        """While much is pending nothing is read, and who has more ready has to wait.

        A voice that a network kept back, and then gave all at once, has no more. It is read as it comes again: read at
        our pace, its clock would not be known, and a delay would grow.
        """
        if self._cutter.pending_s < PENDING_S:
            self._most_pending_s = PENDING_S
        full_s = self._clock()
        while self._cutter.pending_s >= self._most_pending_s:
            self._taken.clear()
            await self._taken.wait()
            if self._source.full:
                full_s = self._clock()
                self._cutter.source_waits()
            elif self._clock() - full_s >= HOLD_S:
                self._most_pending_s = self._cutter.pending_s + self._source.waiting_s + HOLD_S

    async def _watch(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._ended.set()

    async def _cut(self) -> None:
        """Fix the sound of each block when its time has come."""
        await self._hear_more(self._settings.lead_s)
        self._pacer.begin(self._lead_s())
        self._on_air = True
        self._begun.set()
        self._on_change("on air")
        while True:
            first = self._next_block * self._spec.frames_per_block
            due = self._pacer.due(first)
            if (wait_s := due - self._lead_s() - self._clock()) > 0:
                await asyncio.sleep(wait_s)  # and look again: the lead may have changed meanwhile
            elif (first - self._frame) / self._spec.fps > self._lead_s() + self._spec.block_seconds:
                # The process stood still. What is cut now would be silence that everybody has to sit through.
                await asyncio.sleep(1 / self._spec.fps)
            elif (spare_s := due - self._needed_s() - self._clock()) > 0 and self._reading():
                await self._hear_more(spare_s)
            else:
                self._cut_next()
                await asyncio.sleep(0)

    def _reading(self) -> bool:
        """A file is being read and the next block is not there yet: silence is for a voice that does not speak."""
        return self._settings.lead_s > 0 and not self._source_ended and self._cutter.missing_s > 0

    async def _hear_more(self, limit_s: float) -> None:
        if limit_s > 0 and self._reading():
            self._heard.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._heard.wait(), limit_s)

    def _cut_next(self) -> None:
        self._blocks[self._next_block] = _Block(self._cutter.cut(self._clock()))
        self._next_block += 1
        self._taken.set()
        self._news.set()

    async def _generate(self) -> None:
        """Sound that is cut -> pictures, one block after the other; never one that can only come too late."""
        failures = 0
        while True:
            await self._settle_requests()
            index = self._next_to_make()
            if index is None:
                self._news.clear()
                await self._news.wait()
                continue
            block, model = self._blocks[index], self._model
            block.settled, block.number, block.model = True, model.blocks, model
            block.heard, block.half_rate = block.cut.audio, self._rate.half
            audio = dataclasses.replace(block.heard, start=model.blocks * self._spec.samples_per_block)
            watch = _Stopwatch(self._clock, self._spec, functools.partial(self._show, model))
            self._at_work = True
            try:
                made = await model.step(audio, watch.frames_came, block.half_rate)
            except Exception as error:
                with contextlib.suppress(AvatardError):
                    await model.close()
                if self._previous is not None:
                    log.warning("%s; goes back to the picture and the prompt before", error)
                    self._go_back(block)
                    continue
                failures += 1
                if failures == FAILURES:
                    raise
                log.warning("%s; begins anew from the picture", error)
                self._model = await self._open_model(self._reference)
                continue
            finally:
                self._at_work = False
            if not made:
                continue  # a wavefront's pictures come later, and a failure may come before them
            failures = 0
            if self._previous is not None:
                previous, self._previous = self._previous, None
                await previous.model.close()
                self._on_change("changed")
            self._note_step(watch)
            if self._rate.made(self._typical_s() / self._spec.block_seconds):
                self._forget_steps(max)
                self._on_change("full rate")

    def _go_back(self, block: _Block) -> None:
        """What `set` put to work has failed at its first block: have what was there before make it."""
        assert self._previous is not None
        self._model, self._reference = self._previous.model, self._previous.reference
        self._previous = None
        block.settled, block.number = False, None
        self._on_change("not changed")

    def _show(self, model: LiveModel, made: FrameBlock) -> None:
        """Put pictures where they belong, unless the sound they were made of was cut off meanwhile.

        On the screen they are shown all the same, until others are made: a face that stands still is no better.
        """
        frames = self._spec.frames_per_block
        number, first = divmod(made.start, frames)
        for index, block in self._blocks.items():
            current = block.heard is block.cut.audio or index * frames <= self._frame
            if block.model is model and block.number == number and current:
                # In place of those that were there, where they came twice or are made anew.
                block.pictures[first : first + len(made.frames)] = made.frames
                self._drawn.set()

    def _note_step(self, watch: _Stopwatch) -> None:
        self._steps.append(watch.taken_s)
        self._needs.append(watch.need_s)

    async def _settle_requests(self) -> None:
        """Between two steps: go back after an interruption, change to another model."""
        if self._redo_from is not None:
            # The model goes back no further than it will make anew: to what is on the screen now, if that is worth it.
            current = self._frame // self._spec.frames_per_block
            first, self._redo_from = max(self._redo_from, current), None
            shown = self._blocks.get(current)
            if first == current and shown is not None and shown.pictures and not self._in_time(current):
                first += 1
            again = {index: block for index, block in self._blocks.items() if index >= first}
            # One that was replaced makes nothing again; the one before the one at work may have to go on.
            models = [self._model] if self._previous is None else [self._model, self._previous.model]
            for model in models:
                own = [b.number for b in again.values() if b.model is model and b.number is not None]
                if own:
                    await model.rewind(min(own))
            for index, block in again.items():
                block.settled, block.number = False, None
                if index * self._spec.frames_per_block > self._frame:
                    block.pictures = []
        if self._replacement is not None:
            if self._previous is None:
                self._previous = _Opened(self._model, self._reference)
            else:
                await self._model.close()  # changed again before it made a block
            self._model, self._reference = self._replacement.model, self._replacement.reference
            self._replacement = None

    def _make_again(self, index: int) -> None:
        """The sound of a block has changed: note from where on the model has to go back."""
        self._redo_from = index if self._redo_from is None else min(index, self._redo_from)
        self._news.set()

    def _in_time(self, index: int) -> bool:
        """Whether half of a block could still be shown, were it begun now."""
        half = self._spec.frames_per_block // 2
        # In pieces the first half is there before the whole is.
        expected_s = min(self._typical_s(), _quantile(self._needs, 0.5) + half / self._spec.fps)
        # With each block in a row that was given up it hopes for a faster one: else nothing would be measured
        # again, and one slow moment would be believed for ever.
        expected_s *= HOPE ** min(self._given_up, 5)
        return self._pacer.late_s(index * self._spec.frames_per_block + half) + expected_s < 0

    def _next_to_make(self) -> int | None:
        """The first block that is cut, not made, and of which half can still be shown; earlier ones are given up."""
        for index in sorted(self._blocks):
            block = self._blocks[index]
            if block.settled:
                continue
            if self._in_time(index):
                self._given_up = 0
                return index
            block.settled = True
            self._skipped += 1
            self._given_up += 1
            if self._rate.given_up() and self._spec.half_rate and self._crowded():
                self._halve()
        return None

    async def _deliver(self, encoder: Encoder) -> None:
        """When a frame is due: it, or the last one again, and its sound, to the encoder and on to every lane."""
        frames = self._spec.frames_per_block
        await self._begun.wait()
        while not self._finished():
            await self._pacer.wait(self._frame)
            index, shown = divmod(self._frame, frames)
            while index >= self._next_block:
                self._cut_next()
            block = self._blocks[index]
            await self._wait_for_picture(block, shown)
            if shown < len(block.pictures):
                self._picture = block.pictures[shown]
                self._repeated += block.half_rate and shown % 2
            elif self._frame:
                self._held += 1
            begin = shown * self._samples_per_frame
            sound = block.cut.sound[begin : begin + self._samples_per_frame]
            self._note_speaking(block.cut.spoken_after(begin) > 0)
            self._played += block.cut.spoken_after(begin) - block.cut.spoken_after(begin + self._samples_per_frame)
            frame, self._frame = self._frame, self._frame + 1
            self._hand_out(await self._in_encoder(self._encode, encoder, frame, self._picture, sound))
            self._sound_sent += len(sound)
            for old in [i for i in self._blocks if i < index]:
                self._skipped += not self._blocks.pop(old).settled
        self._hand_out(await self._in_encoder(encoder.flush))

    async def _wait_for_picture(self, block: _Block, shown: int) -> None:
        """A little, where it is being made: see GRACE_S."""
        left_s = GRACE_S - self._pacer.late_s(self._frame)
        if left_s <= 0 or block.number is None or not self._at_work:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                while shown >= len(block.pictures):
                    self._drawn.clear()
                    await self._drawn.wait()

    # Small things

    def _finished(self) -> bool:
        """Asked to end; or, at a block's border, all the sound there will ever be was heard."""
        if self._ended.is_set():
            return True
        if not self._source_ended or self._settings.stay or self._frame % self._spec.frames_per_block:
            return False
        ahead = (block for index, block in self._blocks.items() if index * self._spec.frames_per_block >= self._frame)
        return not self._cutter.pending_s and not any(block.cut.spoken_after(0) for block in ahead)

    def _note_speaking(self, speaking: bool) -> None:
        if speaking != self._speaking:
            self._speaking = speaking
            self._played = 0 if speaking else self._played
            self._on_change("speaking" if speaking else "idle")

    def _encode(
        self, encoder: Encoder, frame: int, picture: NDArray[np.uint8], sound: NDArray[np.float32]
    ) -> list[Packet]:
        return encoder.encode(FrameBlock(picture[None], np.zeros(0, np.float32), frame), sound[:, None])

    def _hand_out(self, packets: list[Packet]) -> None:
        for lane in self._lanes:
            lane.offer(packets)

    async def _run_lane(self, lane: Lane) -> None:
        """A lane that ends by an error takes nothing with it, unless it was the last one."""
        try:
            assert self._encoder is not None
            await lane.run(self._encoder.streams, self._metadata)
        except AvatardError as error:
            left = sum(not other.status.failed for other in self._lanes)
            log.warning("%s; %d of %d outputs go on", error, left, len(self._lanes))
            if not left:
                raise

    def _typical_s(self) -> float:
        return _quantile(self._steps, 0.5)

    def _crowded(self) -> bool:
        """Whether the last blocks took too long, and not one of them much too long."""
        return _quantile(list(self._steps)[-LATE_BLOCKS:], 0.5) > CROWDED * self._spec.block_seconds

    def _needed_s(self) -> float:
        """How long before it is due a block must be cut to be made in time; beyond a block nothing gets better."""
        return min(_quantile(self._needs, 0.9) + MARGIN_S, self._spec.block_seconds)

    def _lead_s(self) -> float:
        return self._needed_s() + self._settings.lead_s

    def _ahead_s(self) -> float:
        ready = self._frame
        frames = self._spec.frames_per_block
        while (block := self._blocks.get(ready // frames)) is not None and len(block.pictures) > ready % frames:
            ready += len(block.pictures) - ready % frames
        return (ready - self._frame) / self._spec.fps

    async def _in_encoder(self, work: Callable[..., list[Packet]], *arguments: object) -> list[Packet]:
        return await asyncio.get_running_loop().run_in_executor(self._encoder_thread, work, *arguments)


class _EarlySound:
    """What came before the session was on air, with the times at which it came; of a voice the newest second.

    A voice is what came in the last second at the pace at which it is spoken, whatever had gathered in a pipe before;
    it goes on whether or not anybody listens. What is known to be whole was made for us, and so was what came faster.
    """

    PACE = 0.8, 1.25  # of real time
    LEAST_S = 0.3  # less is too little to tell

    def __init__(self) -> None:
        self._chunks: deque[tuple[NDArray[np.float32], float]] = deque()
        self._samples = 0
        self._recent = self._recent_samples = 0
        """How many of the chunks came in the last second, as of the last look, and their samples."""
        self._whole = False

    @property
    def seconds(self) -> float:
        return self._samples / LISTENER_RATE

    def full(self, now_s: float) -> bool:
        """So much is ready made, and more of it comes, that the rest may wait."""
        since_s, came_s = self._recently(now_s)
        lay = self._chunks[0][0].size if self._chunks else 0
        return self._samples - lay >= EARLY_S * LISTENER_RATE and came_s > self.PACE[1] * since_s

    def spoken(self, now_s: float) -> bool:
        """Whether it is a voice."""
        since_s, came_s = self._recently(now_s)
        slowest, fastest = self.PACE
        return not self._whole and since_s >= self.LEAST_S and slowest * since_s <= came_s <= fastest * since_s

    def _recently(self, now_s: float) -> tuple[float, float]:
        """How long ago the first came that came in the last second, and how much came after it, in seconds."""
        while self._recent:
            first, came_s = self._chunks[-self._recent]
            if came_s > now_s - EARLY_PACE_S:
                return now_s - came_s, (self._recent_samples - first.size) / LISTENER_RATE
            self._recent -= 1
            self._recent_samples -= first.size
        return 0.0, 0.0

    def add(self, samples: NDArray[np.float32], came_s: float) -> None:
        """Sound, or the end of an utterance: no samples."""
        self._chunks.append((samples, came_s))
        self._recent += 1
        self._samples += samples.size
        self._recent_samples += samples.size
        self._whole = self._whole or not samples.size
        while self.spoken(came_s) and self._chunks[0][1] <= came_s - EARLY_PACE_S:
            self._samples -= self._chunks.popleft()[0].size

    def take(self) -> list[tuple[NDArray[np.float32], float]]:
        """All of it, and forget it."""
        chunks = list(self._chunks)
        self._chunks.clear()
        self._samples = self._recent = self._recent_samples = 0
        self._whole = False
        return chunks

    def drop(self) -> int:
        """Forget it; gives how many samples that were."""
        return sum(samples.size for samples, _ in self.take())


class _Stopwatch:
    """One step of the model, from now on.

    taken_s: until its last frame came; need_s: the most by which a frame came later than it is shown after the first.
    """

    def __init__(
        self, clock: Callable[[], float], spec: StreamSpec, pass_on: Callable[[FrameBlock], None] = lambda made: None
    ) -> None:
        self._clock, self._spec, self._pass_on = clock, spec, pass_on
        self._began = clock()
        self.taken_s = self.need_s = 0.0

    def frames_came(self, made: FrameBlock) -> None:
        self.taken_s = self._clock() - self._began
        place = made.start % self._spec.frames_per_block
        self.need_s = max(self.need_s, self.taken_s - place / self._spec.fps)
        self._pass_on(made)


def _quantile(values: Sequence[float] | deque[float], q: float) -> float:
    return float(np.quantile(values, q)) if values else 0.0


def _first(group: BaseExceptionGroup) -> BaseException:
    """What ended the session: the first failure, since a task group cancels all others then."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
