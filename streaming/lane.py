"""One output's way from the encoder to its target, in its own time: whatever happens there, the rest goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from av.packet import Packet
from av.stream import Stream

from streaming.muxer import length_s, time_of
from streaming.sink import Sink, SinkError, TargetAbsent, TargetRefused

log = logging.getLogger(__name__)

State = Literal["waiting", "sending", "behind", "refused", "failed", "ended"]


@dataclass(frozen=True)
class LanePolicy:
    """What a lane does when its target does not keep up, and when it is lost. Three of them are all there is need for.

    backlog_s: how much of the stream may wait for its target. What does not fit: with `live` the lane drops all of it
    and goes on at the next keyframe; otherwise `offer` ends the lane, and `put` waits.

    A live target is tried again for ever:
    look_s: while nobody is there, between two looks, which are cheap. The first keyframe must come soon after a server.
    lost_s: after a connection was lost, twice; the first time in a healthy minute, and every other time.
    refused_s, factor, longest_s: after a server has answered and not taken the stream, growing.
    aired_s: a connection that is shorter was as good as refused. healthy_s: one that is longer makes all well again.
    jitter: waits are longer by up to this share, so that many lanes do not come at once; those of a look are shorter.
    refusals: so many in a row are told as a refusal, not as something that may pass.
    resume_s: how little of the stream may be on its way when a lane that had dropped goes on.
    close_s: how long an end waits for what is still to be sent.
    """

    backlog_s: float
    live: bool = False
    look_s: float = 1.0
    lost_s: tuple[float, float] = (0.5, 2.0)
    refused_s: float = 2.0
    factor: float = 1.5
    longest_s: float = 30.0
    aired_s: float = 1.0
    healthy_s: float = 60.0
    jitter: float = 0.1
    refusals: int = 3
    resume_s: float = 0.3
    close_s: float = 3.0

    FILE: ClassVar[LanePolicy]
    FILE_IN_LIVE: ClassVar[LanePolicy]
    LIVE: ClassVar[LanePolicy]


LanePolicy.FILE = LanePolicy(backlog_s=1.0)
LanePolicy.FILE_IN_LIVE = LanePolicy(backlog_s=30.0)
LanePolicy.LIVE = LanePolicy(backlog_s=0.9, live=True)


@dataclass(frozen=True)
class LaneStatus:
    """How an output stands.

    waiting: nobody is there, or it was lost, or not begun yet; behind: it takes less than it is given, and frames are
    dropped; refused: the server answers and does not take it, and is asked again every half minute or so.
    sent_s: seconds of the stream that have left; backlog_s: seconds that have not; dropped_frames: offered and never
    sent; reconnects: connections after the first.
    """

    name: str
    state: State
    sent_s: float
    backlog_s: float
    dropped_frames: int
    reconnects: int
    last_error: str | None

    @property
    def failed(self) -> bool:
        """It has ended by an error, and nothing will be sent any more."""
        return self.state == "failed"


class Lane:
    """Takes packets at the encoder's pace and gives them to sinks at theirs.

    Args:
        make_sink: a new sink for the same target; a live lane makes one for each connection. Raises: SinkError.
        want_keyframe: asks the encoder for a keyframe, with which every connection begins.
        clock: monotonic seconds. sleep: what waits between two connections. rng: for jitter.
    """

    def __init__(
        self,
        make_sink: Callable[[], Sink],
        *,
        policy: LanePolicy,
        want_keyframe: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._make_sink, self._policy, self._want_keyframe = make_sink, policy, want_keyframe
        self._clock, self._sleep, self._rng = clock, sleep, rng or random.Random()
        self._sink = make_sink()
        self.name = self._sink.name
        self._opened = self._connected = False
        self._expected = False
        """Its target has answered and is being connected to for the first time: what comes now is kept for it."""
        self._queue: deque[Packet] = deque()
        self._writing: list[Packet] = []
        self._needs_keyframe = True
        self._behind = False
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._closing, self._ended = asyncio.Event(), asyncio.Event()
        self._complete = False
        self._running = False
        self._error: BaseException | None = None
        self._last_error: str | None = None
        self._begun_at: float | None = None
        self._sent_s = 0.0
        self._losses = self._refusals = self._connections = self._dropped = 0

    async def open(self) -> None:
        """Try the target, before the model works. Raises: SinkError, but not for a live target that may come later."""
        try:
            await self._sink.open()
            self._opened = self._expected = True
        except (TargetAbsent, TargetRefused) as error:
            if not self._policy.live:
                raise
            await self._lost(error)
            log.warning("%s; it is tried again and again", error)

    def offer(self, packets: Sequence[Packet]) -> None:
        """Hand over packets without waiting. What a live target cannot take is dropped, to the next keyframe."""
        for packet in packets:
            self._accept(packet)
        if self.backlog_s > self._policy.backlog_s and self._queue:
            if self._policy.live and not self._connected:
                # It takes its time: it begins where the stream is when it is there.
                self._expected = False
                self._forget(self._queue)
                self._needs_keyframe = True
            elif self._policy.live:
                self._fall_behind()
            elif self._error is None:
                self._error = SinkError(
                    f"{self.name}: is {self._policy.backlog_s:g} s behind the stream; is the disk too slow?"
                )
                self._queue.clear()
        self._news.set()

    async def put(self, packets: Sequence[Packet]) -> None:
        """Hand over packets, waiting for the target. A lane that has ended takes them and forgets them."""
        while self.backlog_s > self._policy.backlog_s and not self._gone():
            self._room.clear()
            await self._room.wait()
        for packet in packets:
            self._accept(packet)
        self._news.set()

    async def run(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        """Be the lane's task until `close`. A live lane stays, whatever happens to its target.

        Raises: SinkError, or a bug's exception: the output has ended early; what there is of it is kept.
        """
        self._running = True
        work = asyncio.create_task(self._serve(streams, metadata), name=f"serve {self.name}")
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({work, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and self._policy.live:
                # Nobody waits for a live target: not for one that is not there, and not for long for one that is.
                await asyncio.wait({work}, timeout=self._policy.close_s if self._connected else 0)
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled() and (error := work.exception()) is not None:
                self._error, self._last_error = self._error or error, str(error)
                raise error
        finally:
            closing.cancel()
            work.cancel()
            await asyncio.wait({work})
            self._queue.clear()
            self._ended.set()
            self._room.set()

    def close(self, complete: bool) -> None:
        """No more packets will come; `complete` says that nothing is missing. What is queued is still written."""
        if not self._closing.is_set():
            self._complete = complete
            self._closing.set()
            self._news.set()

    async def wait_closed(self) -> None:
        """Wait until everything is closed, after `close`; also where `run` was never called."""
        if self._running:
            await self._ended.wait()
        else:
            await self._sink.close(complete=False)
            self._ended.set()

    @property
    def output(self) -> Path | None:
        """Where something playable is by now, for an output on the disk."""
        return self._sink.output

    @property
    def backlog_s(self) -> float:
        """Seconds of the stream that were offered and have not left this machine."""
        first = self._writing[0] if self._writing else self._queue[0] if self._queue else None
        last = self._queue[-1] if self._queue else self._writing[-1] if self._writing else None
        waiting_s = max(0.0, float(time_of(last) - time_of(first))) if first is not None and last is not None else 0.0
        return self._sink.pending_s + waiting_s

    @property
    def status(self) -> LaneStatus:
        return LaneStatus(
            name=self.name,
            state=self._state(),
            sent_s=max(0.0, self._sent_s - self._sink.pending_s),
            backlog_s=self.backlog_s,
            dropped_frames=self._dropped,
            reconnects=max(0, self._connections - 1),
            last_error=self._last_error,
        )

    # What comes in

    def _accept(self, packet: Packet) -> None:
        video = _is_picture(packet)
        if self._behind and (self._sink.failed or self._sink.pending_s <= self._policy.resume_s):
            # Of one that has failed nothing leaves any more; who writes to it is told.
            self._behind = False
            self._want_keyframe()
        there = self._connected or self._expected or not self._policy.live
        taken = not self._gone() and not self._behind and there
        if video and taken and self._needs_keyframe:
            taken = packet.is_keyframe
            self._needs_keyframe = not taken
        if taken:
            self._queue.append(packet)
        else:
            self._dropped += video

    def _fall_behind(self) -> None:
        self._forget(self._queue)
        self._behind = self._needs_keyframe = True

    def _forget(self, packets: deque[Packet] | list[Packet]) -> None:
        self._dropped += sum(map(_is_picture, packets))
        packets.clear()

    # What goes out

    async def _serve(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        while True:
            try:
                await self._connection(streams, metadata)
                return
            except Exception as error:
                if not self._policy.live:
                    raise
                await self._wait_for_next(error)

    async def _connection(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        """One sink from its beginning to its end. Raises: what ended it early; it is closed then."""
        sink = self._sink
        try:
            if not self._opened:
                await sink.open()
            await sink.start(streams, metadata)
            self._connected = True
            self._connections += 1
            if self._policy.live:
                log.info("%s: connected", self.name)
                if not self._queue:
                    self._want_keyframe()
            while (batch := await self._next()) is not None:
                await sink.write(batch)
                self._wrote()
            await sink.close(self._complete)
        except BaseException:
            with contextlib.suppress(SinkError):
                await sink.close(complete=False)
            raise

    async def _next(self) -> list[Packet] | None:
        """The next packets, or None at the end. For a live target one at a time: what is queued can be dropped."""
        while not self._queue:
            if self._error is not None:
                raise self._error
            if self._closing.is_set():
                return None
            self._news.clear()
            await self._news.wait()
        self._writing = [self._queue.popleft() for _ in range(1 if self._policy.live else len(self._queue))]
        return self._writing

    def _wrote(self) -> None:
        if self._begun_at is None:
            self._begun_at = self._clock()
        self._sent_s += length_s(self._writing)
        self._writing = []
        self._room.set()

    async def _wait_for_next(self, error: Exception) -> None:
        """After a connection was lost, or was none."""
        known = self._begun_at is None and str(error) == self._last_error
        delay_s = self._delay_s(error)
        await self._lost(error)
        if isinstance(error, SinkError):
            # Once for each thing that happens, not for each time it is looked at.
            log.log(logging.DEBUG if known else logging.WARNING, "%s; next try in %.1f s", self._last_error, delay_s)
        else:
            log.error("%s: a bug ended this connection; next try in %.1f s", self.name, delay_s, exc_info=error)
        await self._sleep(delay_s)

    async def _lost(self, error: Exception) -> None:
        """Forget a connection, and make ready for the next."""
        self._sent_s -= self._sink.pending_s
        await self._sink.close(complete=False)
        self._sink = self._make_sink()
        self._last_error = str(error)
        self._begun_at = None
        self._opened = self._connected = self._expected = self._behind = False
        self._needs_keyframe = True
        self._forget(self._writing)
        self._forget(self._queue)

    def _delay_s(self, error: Exception) -> float:
        """How long to wait after a connection that ended so."""
        policy = self._policy
        aired_s = self._clock() - self._begun_at if self._begun_at is not None else 0.0
        if aired_s >= policy.healthy_s:
            self._losses = self._refusals = 0
        if isinstance(error, TargetAbsent):
            self._refusals = 0
            return policy.look_s * self._rng.uniform(1 - policy.jitter, 1)
        if aired_s >= policy.aired_s:
            self._refusals = 0
            self._losses += 1
            delay_s = policy.lost_s[self._losses > 1]
        else:
            self._refusals += 1
            delay_s = min(policy.refused_s * policy.factor ** (self._refusals - 1), policy.longest_s)
        return delay_s * self._rng.uniform(1, 1 + policy.jitter)

    def _gone(self) -> bool:
        return self._error is not None or self._ended.is_set()

    def _state(self) -> State:
        if self._error is not None:
            return "failed"
        if self._ended.is_set():
            return "ended"
        if self._behind:
            return "behind"
        if self._connected:
            return "sending"
        return "refused" if self._refusals >= self._policy.refusals else "waiting"


def _is_picture(packet: Packet) -> bool:
    return packet.stream.type == "video"
