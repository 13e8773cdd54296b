"""`avatard run`, live: a voice spoken while it arrives, into outputs that are watched meanwhile."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import math
import os
import signal
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio.errors import AvatardError
from service.config import Settings
from service.run import (
    Stopped,
    engine_settings,
    is_there,
    lost_outputs,
    metadata,
    or_stop,
    read_image,
    spare_sources,
    stopping_signals,
    unswept,
)
from streaming.engine import Engine, EngineSettings, Restarts

if TYPE_CHECKING:
    from audio.reader import Reader
    from streaming.encoder import EncoderSettings
    from streaming.engine import EngineSession
    from streaming.lane import Lane
    from streaming.live import LiveSession, LiveStatus

STATUS_EVERY_S = 5.0


@dataclass(frozen=True)
class LiveRequest:
    """Who speaks, where the voice comes from, and where it goes.

    audio: "-" for stdin, a file, a FIFO, or a URL or device that PyAV opens; pcm: the format of raw samples, needed for
    stdin and a FIFO; stay: idle on when the voice has ended.
    """

    image: Path
    audio: str
    targets: tuple[str, ...]
    pcm: str | None = None
    overwrite: bool = False
    stay: bool = False


@dataclass(frozen=True)
class LiveResult:
    """What was broadcast, in frames and seconds of it; counts as in `LiveStatus`.

    lost: outputs that ended early by an error of their own; complete: there was a broadcast, and none was lost.
    """

    outputs: list[str]
    lost: list[str]
    complete: bool
    frames: int
    seconds: float
    held: int
    repeated: int
    skipped: int
    interruptions: int
    engine_restarts: int
    wall_s: float


Event = dict[str, Any]


class LiveWatcher:
    """Who is told how a broadcast goes: nobody. The command's status line and its JSON override this."""

    def event(self, event: Event) -> None:
        """Something happened, or `event["event"]` is "status" and some seconds have passed."""


def is_live(audio: str, targets: tuple[str, ...], pcm: str | None) -> bool:
    """Whether a run has to keep time: its sound comes while it is spoken, or somebody watches meanwhile.

    Raises: SinkError: a target of a kind that there is not.
    """
    from streaming.sinks import open_sink

    kept = audio == "-" or _is_fifo(audio) or audio.startswith(("fd:", "alsa:", "pulse:")) or _is_url(audio)
    return pcm is not None or kept or any(open_sink(target).live for target in targets)


def broadcast(
    request: LiveRequest,
    settings: Settings,
    watcher: LiveWatcher,
    began: float,
    clock: Callable[[], float] = time.monotonic,
) -> LiveResult:
    """Go on air, and stay there until the voice ends, or the first SIGINT or SIGTERM; the second ends at once.

    SIGUSR1 interrupts what is being said. Asked to end before there was a frame, it has none, and that is no error.
    Raises: AvatardError.
    """
    if not is_there(request.audio):
        closed = "is closed, so there is nothing to read" if request.audio == "-" else "is not an open file descriptor"
        raise AvatardError(f"{request.audio}: {closed}; start avatard with a pipe or a file there")
    return asyncio.run(_Broadcast(request, settings, watcher, began, clock).run())


class _Broadcast:
    def __init__(
        self,
        request: LiveRequest,
        settings: Settings,
        watcher: LiveWatcher,
        began: float,
        clock: Callable[[], float],
    ) -> None:
        self._request, self._settings, self._watcher = request, settings, watcher
        self._began, self._clock = began, clock
        self._stop = asyncio.Event()
        self._engine: Engine | None = None
        self._session: LiveSession | None = None
        self._reader: Reader | None = None

    async def run(self) -> LiveResult:
        spare_sources(self._request.targets, self._request.image, self._request.audio)
        with self._late_signals(), stopping_signals(self._stop, lambda: self._engine), self._interruptions():
            async with await Engine.launch(self._engine_settings(), on_change=self._on_engine) as engine:
                self._engine = engine
                try:
                    return await self._go_on_air(engine)
                except Stopped:
                    return self._result(engine)

    def _engine_settings(self) -> EngineSettings:
        """As for a file, but a step that hangs is seen soon, and there is no end to starting again."""
        return dataclasses.replace(
            engine_settings(self._settings),
            live=True,
            step_timeout_s=self._settings.live.step_timeout_s,
            restarts=Restarts(failed_loads=None),
        )

    async def _go_on_air(self, engine: Engine) -> LiveResult:
        # After the launch: these imports take as long as the child takes to import its own.
        from audio.reader import open_live
        from audio.source import PushSource
        from avatar.model import Reference
        from avatar.picture import cover
        from streaming.live import LISTENER_RATE, LiveSession, LiveSettings

        settings, request, live = self._settings, self._request, self._settings.live
        lanes = [self._lane(target) for target in request.targets]
        source = PushSource(LISTENER_RATE, ahead_s=live.waiting_s)
        image, reader = await or_stop(
            self._stop,
            asyncio.gather(
                asyncio.to_thread(read_image, request.image, settings),
                asyncio.to_thread(open_live, request.audio, request.pcm, source),
            ),
        )
        spec = await or_stop(self._stop, engine.ready())
        picture = await asyncio.to_thread(cover, image, spec.width, spec.height)
        lead_s = live.file_lead_s if reader.is_file else 0.0

        def open_model(reference: Reference) -> Awaitable[EngineSession]:
            rewind_blocks = 3 + math.ceil(lead_s / spec.block_seconds)
            return engine.open(reference, rewind_blocks=rewind_blocks, snapshot_every_s=live.snapshot_every_s)

        self._session = session = LiveSession(
            source,
            open_model,
            Reference(picture, settings.model.prompt, settings.model.seed),
            lanes,
            encoder_settings=self._encoder_settings(),
            # Not from a target: what follows rtmp:// is a secret.
            metadata=metadata(settings, f"{request.image.stem}, live"),
            settings=LiveSettings(lead_s=lead_s, stay=request.stay),
            clock=self._clock,
            on_change=self._tell,
        )
        self._reader = reader
        tellers = [asyncio.create_task(self._read(reader), name="reader"), asyncio.create_task(self._report())]
        try:
            with unswept():
                status = await session.run(self._stop)
        finally:
            for task in tellers:
                task.cancel()
            await asyncio.gather(*tellers, return_exceptions=True)
        if reader.failure is not None and not (reader.status.received_s or request.stay):
            raise reader.failure
        if not (reader.status.received_s or request.stay or self._stop.is_set()):
            kept = ", ".join(str(lane.output) for lane in lanes if lane.output is not None)
            idle = f"; the person sits idle in {kept}" if kept else "; is it the right source?"
            raise AvatardError(f"{reader.name}: ended without any sound{idle}")
        return self._result(engine, lanes, status, spec.fps)

    async def _read(self, reader: Reader) -> None:
        await reader.run()
        if reader.failure is not None and not (reader.status.received_s or self._request.stay):
            # No sound came, and none will: not on air yet, it need not go there to say so.
            self._stop.set()

    def _result(
        self, engine: Engine, lanes: Sequence[Lane] = (), status: LiveStatus | None = None, fps: int = 1
    ) -> LiveResult:
        """Without a status: nothing was broadcast."""
        lost = lost_outputs(lanes)
        return LiveResult(
            outputs=[str(lane.output) for lane in lanes if lane.output is not None],
            lost=lost,
            complete=status is not None and status.frames > 0 and not lost,
            frames=status.frames if status else 0,
            seconds=round(status.frames / fps, 3) if status else 0.0,
            held=status.held if status else 0,
            repeated=status.repeated if status else 0,
            skipped=status.skipped if status else 0,
            interruptions=status.interruptions if status else 0,
            engine_restarts=engine.restarts,
            wall_s=round(self._clock() - self._began, 3),
        )

    def _lane(self, target: str) -> Lane:
        from streaming.lane import Lane, LanePolicy
        from streaming.sinks import open_sink

        live = open_sink(target).live
        return Lane(
            lambda: open_sink(target, self._request.overwrite),
            policy=LanePolicy.LIVE if live else LanePolicy.FILE_IN_LIVE,
            want_keyframe=lambda: self._session.want_keyframe() if self._session is not None else None,
            clock=self._clock,
        )

    def _encoder_settings(self) -> EncoderSettings:
        """A network wants a constant rate; files alone are better off with a constant quality."""
        from streaming.encoder import EncoderSettings
        from streaming.sinks import open_sink

        live = self._settings.live
        return EncoderSettings(
            **self._settings.encoder.model_dump(),
            live=True,
            codec=live.codec,
            width=live.width,
            height=live.height,
            fps=live.fps,
            channels=live.channels,
            bitrate_kbps=live.bitrate_kbps if any(open_sink(target).live for target in self._request.targets) else None,
        )

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(STATUS_EVERY_S)
            self._tell("status")

    def _tell(self, what: str) -> None:
        assert self._session is not None
        assert self._engine is not None
        assert self._reader is not None
        self._event(
            what,
            **_plain(self._session.status),
            source=dataclasses.asdict(self._reader.status),
            engine=self._engine.state,
            engine_restarts=self._engine.restarts,
        )

    def _on_engine(self, state: str, why: str) -> None:
        self._event("engine", state=state, why=why)

    def _event(self, what: str, **more: Any) -> None:
        self._watcher.event({"event": what, "wall_s": round(self._clock() - self._began, 3), **more})

    @contextlib.contextmanager
    def _late_signals(self) -> Iterator[None]:
        """Between the end of the broadcast and that of the command the first one still counts as asking to end.

        What a loop leaves behind instead would make a killed command of one that has finished its files; and so
        would the interpreter, which takes its handlers away well before the process is gone.
        """

        def on_signal(number: int, _: object) -> None:
            if self._stop.is_set():
                os._exit(128 + number)
            self._stop.set()

        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, on_signal)
                atexit.register(signal.signal, number, signal.SIG_IGN)

    @contextlib.contextmanager
    def _interruptions(self) -> Iterator[None]:
        """SIGUSR1, for who has no other way to say it."""
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if self._session is not None and self._session.status.on_air:
                told = self._session.interrupt()
                self._event("interrupted", **dataclasses.asdict(told))

        loop.add_signal_handler(signal.SIGUSR1, on_signal)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)


def _plain(status: LiveStatus) -> Event:
    found = dataclasses.asdict(status)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def _is_fifo(audio: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISFIFO(os.stat(audio).st_mode)
    return False


def _is_url(audio: str) -> bool:
    return "://" in audio and not audio.startswith("file://")
