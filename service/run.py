"""`avatard run`: one picture and one sound to one finished file.

The model's process is started first and loads while the files are opened here, so that the first frame comes soon.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from audio.errors import AvatardError
from service import VERSION
from service.config import Settings
from service.models import resolve_model
from streaming.engine import Engine, EngineSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from audio.decode import SoundFile
    from streaming.lane import Lane
    from streaming.session import Progress, SessionResult

R = TypeVar("R")


@dataclass(frozen=True)
class RunRequest:
    """What to make: the picture of a person, what they say, and where the video goes (at least one target)."""

    image: Path
    audio: Path
    targets: tuple[str, ...]
    overwrite: bool = False


@dataclass(frozen=True)
class RunResult:
    """What was made, in frames and in seconds of wall time since the command began.

    outputs: what lies on the disk now, finished or the part that was made; lost: those that ended early by an error of
    their own; complete: nothing was stopped, and none was lost; stopped: asked to end early; seconds: of video; fps:
    frames per second of wall time from the first block on; times_real_time: seconds of video for each second from the
    command to the finished file; first_frame_s: from the command to the first encoded block; load_s, model_s, encode_s:
    spent loading, generating, and reading sound and encoding, in parallel.
    """

    outputs: list[str]
    lost: list[str]
    complete: bool
    stopped: bool
    frames: int
    seconds: float
    width: int
    height: int
    fps: float
    times_real_time: float
    wall_s: float
    first_frame_s: float | None
    load_s: float
    model_s: float
    encode_s: float
    model: str
    seed: int
    warnings: list[str]


class Stopped(Exception):
    """Ctrl-C (or a request to end) came before there was a frame."""


class Watcher:
    """Who is told how a run goes: nobody. A progress bar overrides these."""

    def began(self, sound: SoundFile, total_frames: int | None, fps: int) -> None:
        """The model is ready; total_frames is None when the file does not say how long it is."""

    def advanced(self, progress: Progress) -> None:
        """More frames are encoded."""


def run(
    request: RunRequest, settings: Settings, watcher: Watcher, began: float, clock: Callable[[], float] = time.monotonic
) -> RunResult:
    """Make one video; `began` is when the command was given, on `clock`.

    The first SIGINT or SIGTERM ends the run with all that was made so far in a playable part; the second at once.
    Raises: AvatardError; Stopped.
    """
    return asyncio.run(_Run(request, settings, watcher, began, clock).run())


class _Run:
    def __init__(
        self, request: RunRequest, settings: Settings, watcher: Watcher, began: float, clock: Callable[[], float]
    ) -> None:
        self._request, self._settings, self._watcher = request, settings, watcher
        self._began, self._clock = began, clock
        self._stop = asyncio.Event()
        self._engine: Engine | None = None

    async def run(self) -> RunResult:
        spare_sources(self._request.targets, self._request.image, str(self._request.audio))
        with stopping_signals(self._stop, lambda: self._engine):
            async with await Engine.launch(engine_settings(self._settings)) as engine:
                self._engine = engine
                return await self._speak(engine)

    async def _speak(self, engine: Engine) -> RunResult:
        # After the launch: these imports and the files take as long as the child takes to import its own.
        from audio.source import FileSource
        from avatar.model import Reference
        from avatar.picture import cover
        from streaming.encoder import EncoderSettings
        from streaming.session import run_session

        settings, request = self._settings, self._request
        lanes = [file_lane(target, request.overwrite) for target in request.targets]
        try:
            image, sound = await or_stop(self._stop, self._open(lanes))
            spec = await or_stop(self._stop, engine.ready())
            picture = await asyncio.to_thread(cover, image, spec.width, spec.height)
            reference = Reference(picture, settings.model.prompt, settings.model.seed)
            session = await or_stop(self._stop, engine.open(reference))
            total = None if sound.declared_s is None else max(1, round(sound.declared_s * spec.fps))
            self._watcher.began(sound, total, spec.fps)
            with contextlib.closing(sound.original()) as original:
                result = await run_session(
                    FileSource(sound, spec.sample_rate),
                    original,
                    session,
                    lanes,
                    encoder_settings=EncoderSettings(**settings.encoder.model_dump()),
                    metadata=metadata(settings, lanes[0].name),
                    on_progress=self._watcher.advanced,
                    stop=self._stop,
                    clock=self._clock,
                )
        except Exception as error:
            await _close(lanes)
            untold = [path for path in _outputs(lanes) if path not in str(error)]
            if not untold:
                raise
            kept = f"the video up to there is in {', '.join(untold)}"
            if isinstance(error, AvatardError):
                raise AvatardError(f"{error}; {kept}") from error
            error.add_note(kept)
            raise
        finally:
            await _close(lanes)
        if result.stopped and not result.frames:
            raise Stopped
        warnings = [f"{request.audio}: {warning}" for warning in sound.report.warnings()]
        lost = lost_outputs(lanes)
        seconds = result.frames / spec.fps
        wall_s = self._clock() - self._began
        return RunResult(
            outputs=_outputs(lanes),
            lost=lost,
            complete=not (result.stopped or lost),
            stopped=result.stopped,
            frames=result.frames,
            seconds=round(seconds, 3),
            width=spec.width,
            height=spec.height,
            fps=round(self._steady_fps(result, spec.frames_per_block), 2),
            times_real_time=round(seconds / wall_s, 3),
            wall_s=round(wall_s, 3),
            first_frame_s=None if result.first_frame_at is None else round(result.first_frame_at - self._began, 3),
            load_s=round(engine.load_s, 3),
            model_s=round(session.busy_s, 3),
            encode_s=round(result.encode_s, 3),
            model=settings.model.name,
            seed=settings.model.seed,
            warnings=warnings,
        )

    def _steady_fps(self, result: SessionResult, first_block: int) -> float:
        """Frames per second after the first block; of all there is when there is no more than that."""
        assert result.first_frame_at is not None
        rest = result.frames - first_block
        since = result.first_frame_at if rest > 0 else self._began
        return (rest if rest > 0 else result.frames) / max(self._clock() - since, 1e-6)

    async def _open(self, lanes: Sequence[Lane]) -> tuple[NDArray[np.uint8], SoundFile]:
        """The picture and the sound, with the targets tried, all at once; of failures the first in this order."""
        request = self._request
        image, sound, *targets = await asyncio.gather(
            asyncio.to_thread(read_image, request.image, self._settings),
            asyncio.to_thread(self._open_sound),
            *(lane.open() for lane in lanes),
            # A thread cannot be left behind, so all of them end before the first failure is told.
            return_exceptions=True,
        )
        for failure in (image, sound, *targets):
            if isinstance(failure, BaseException):
                raise failure
        assert not isinstance(image, BaseException)
        assert not isinstance(sound, BaseException)
        return image, sound

    def _open_sound(self) -> SoundFile:
        from audio.decode import open_sound

        return open_sound(self._request.audio, self._settings.limits.audio_hours * 3600)


def spare_sources(targets: Sequence[str], image: Path, audio: str) -> None:
    """Raises: SinkError: a target would take the place of what the video is made from, --overwrite or not."""
    from streaming.files import FileSink, HlsSink
    from streaming.sink import SinkError
    from streaming.sinks import open_sink

    sources = [("picture", f"--image {image}", _status(str(image))), ("sound", f"--audio {audio}", _status(audio))]
    for target in targets:
        sink = open_sink(target)
        for path in sink.replaces() if isinstance(sink, FileSink | HlsSink) else ():
            there = _status(str(path))
            for what, option, read in sources:
                if there is not None and read is not None and os.path.samestat(there, read):
                    raise SinkError(f"{target}: would replace the {what} itself ({option}); choose another name")


def is_there(audio: str) -> bool:
    """Whether what stdin or fd:N stands for was given to us; to be asked before anything else takes the number."""
    return not (audio == "-" or audio.startswith("fd:")) or _status(audio) is not None


def _status(source: str) -> os.stat_result | None:
    """Of a path or an open descriptor, as they are written after --audio; None of what is neither."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        if source == "-" or source.startswith("fd:"):
            return os.fstat(0 if source == "-" else int(source.removeprefix("fd:")))
        return os.stat(unquote(urlsplit(source).path) if source.startswith("file://") else source)
    return None


def file_lane(target: str, overwrite: bool) -> Lane:
    """An output that is waited for. Raises: SinkError: a target of a kind that there is not."""
    from streaming.lane import Lane, LanePolicy
    from streaming.sinks import open_sink

    return Lane(lambda: open_sink(target, overwrite), policy=LanePolicy.FILE, want_keyframe=lambda: None)


async def _close(lanes: Sequence[Lane]) -> None:
    """Close what is open still, as incomplete; its failure would hide what led here."""
    for lane in lanes:
        lane.close(complete=False)
    await asyncio.gather(*(lane.wait_closed() for lane in lanes), return_exceptions=True)


def _outputs(lanes: Sequence[Lane]) -> list[str]:
    return [str(lane.output) for lane in lanes if lane.output is not None]


def lost_outputs(lanes: Sequence[Lane]) -> list[str]:
    """The names of outputs that ended early by an error of their own; the others went on."""
    return [lane.name for lane in lanes if lane.status.failed]


def engine_settings(settings: Settings) -> EngineSettings:
    """What the engine is started with."""
    model = settings.model
    return EngineSettings(
        model=resolve_model(model.name, settings),
        size=(model.width, model.height) if model.width and model.height else None,
        steps=model.steps,
        options=model.options,
        load_timeout_s=model.load_timeout_s,
        step_timeout_s=model.step_timeout_s,
    )


def read_image(path: Path, settings: Settings) -> NDArray[np.uint8]:
    """The picture, upright, uint8 [H, W, 3]. Blocking."""
    from avatar.picture import read_picture

    return read_picture(path, max_pixels=round(settings.limits.picture_megapixels * 1e6))


def metadata(settings: Settings, title: str) -> dict[str, str]:
    """What an output says of itself. That it is made by a machine stands where players and platforms show it."""
    from service.batch_plan import shown  # a name may hold any bytes

    software = f"avatard {VERSION}"
    model = Path(settings.model.name).name  # of a folder of one's own no more than the last name
    return {
        "title": shown(Path(title).stem),
        "encoding_tool": software,
        "comment": f"AI-generated: a model ({model}) moved the person in one picture to a "
        f"sound recording; made with {software}",
    }


async def or_stop(stop: asyncio.Event, work: Awaitable[R]) -> R:
    """The result of `work`, unless the user wants to end first. Raises: Stopped."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Stopped
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


@contextlib.contextmanager
def unswept() -> Iterator[None]:
    """The collector of garbage leaves alone what is there already: to walk through it all takes longer than a frame."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def stopping_signals(stop: asyncio.Event, engine: Callable[[], Engine | None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`; the second ends the process, and the engine's, at once."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            # The second one insists. What was written plays as it lies there.
            if (running := engine()) is not None:
                running.kill()
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
