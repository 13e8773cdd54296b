"""One finished file from a picture and a sound, made in pieces, so that it survives whatever ends its process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import heapq
import json
import logging
import os
import shutil
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import av
import numpy as np
from numpy.typing import NDArray

from audio.blocks import BlockCutter
from audio.chunk import AudioBlock
from audio.decode import SoundFile
from audio.errors import AvatardError
from audio.source import FileSource
from avatar.model import FrameBlock, Reference, StreamSpec
from avatar.picture import cover
from service import VERSION, isolated
from service.models import resolve_model
from service.run import Stopped, metadata, or_stop
from streaming.channel import Channel
from streaming.encoder import SOUND_RATE, Encoder, EncoderSettings
from streaming.engine import Engine, EngineError, EngineSession
from streaming.engine_process import ModelFailure
from streaming.files import FILE_TYPES
from streaming.muxer import Muxer, flush_to_disk, time_of
from streaming.packets import Track
from streaming.sink import SinkError, reason

if TYPE_CHECKING:
    from service.config import Settings

__all__ = ["DiskFull", "RenderRequest", "RenderResult", "Stopped", "discard", "render", "withdraw"]

log = logging.getLogger(__name__)

T = TypeVar("T")

Turn = Callable[[float], AbstractAsyncContextManager[None]]
"""Leave to use the model for about so many seconds."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

BLOCKS_AHEAD = 2
"""Blocks of sound cut but not generated yet."""

SOUND_HELD_BYTES = 1 << 20
"""Of encoded sound in memory, about a minute; more goes into the folder."""

RESULT = "result.json"
"""In the folder: what the finished file is, written before that has its name. By it a render knows its own file."""

LATELY = 8
"""Blocks by whose median the next one is expected."""


class DiskFull(SinkError):
    """There was no room for what was made; what had been saved before is there, and the next call goes on from it."""


@dataclass(frozen=True)
class RenderRequest:
    """What to make.

    target: the finished file; folder: of the work in progress, of this render alone; prompt, seed: of the session;
    title: in the file's metadata; overwrite: whether a file that is there already is replaced, whosoever it is; what an
    earlier call with the same folder has made is in any case.
    """

    image: Path
    audio: Path
    target: Path
    folder: Path
    prompt: str = ""
    seed: int = 0
    title: str = ""
    overwrite: bool = True


@dataclass(frozen=True)
class RenderResult:
    """What was made: frames, seconds of video, pixels, frames per second of video, bytes.

    resumed_from: frames that were there from an earlier call; model_s, encode_s: seconds that this call spent
    generating, and encoding the picture.
    """

    path: Path
    frames: int
    seconds: float
    width: int
    height: int
    fps: int
    sha256: str
    bytes: int
    warnings: tuple[str, ...]
    resumed_from: int
    model_s: float
    encode_s: float


@contextlib.asynccontextmanager
async def at_once(expected_s: float) -> AsyncIterator[None]:
    """The model is ours alone."""
    yield


async def render(
    request: RenderRequest,
    engine: Engine,
    settings: Settings,
    *,
    turn: Turn = at_once,
    on_progress: Callable[[int, int | None], None] = lambda frames, total: None,
    stop: asyncio.Event | None = None,
    segment_s: float = 12.0,
    clock: Callable[[], float] = time.monotonic,
) -> RenderResult:
    """Make the file, or go on where an earlier call for the same one was ended, be it by kill -9.

    The file is the same, bit for bit, as if that had not been, as far as the model resumes exactly. While it is made,
    `folder` holds what a later call goes on from; it is made when there is something to keep, so with `overwrite` never
    for a sound shorter than segment_s. After the end it holds a record of the result at most, by which a second call
    knows the file and answers at once: the caller removes it (`discard`) when the result is noted elsewhere.

    Args:
        turn: entered around each use of the model, with the seconds that this will take, as far as is known.
        on_progress: frames that are encoded, and of how many (None: the sound does not say how long it is).
        stop: when set, the render ends at once, and the folder stays; but not when all frames are there.
        segment_s: of video, from one point to resume from to the next.
    Raises: AvatardError: a picture, sound, target or model that cannot be used; DiskFull; Stopped; a bug as it comes.
        A render whose task is cancelled can be gone on with as well.
    """
    stop = stop or asyncio.Event()
    await asyncio.to_thread(_check_target, request)
    picture, sound = await or_stop(stop, _open(request, settings))
    spec = await or_stop(stop, engine.ready())
    folder = _Folder(request.folder, _Identity(request, settings, spec, segment_s))
    if (done := await asyncio.to_thread(folder.noted, request.target)) is not None:
        await asyncio.to_thread(_settle, request)
        return done
    if not request.overwrite:
        # Made by an earlier call, with other settings. While the record of it is still there.
        await asyncio.to_thread(withdraw, request)
    await asyncio.to_thread(_check_free, request)
    reference = Reference(
        await asyncio.to_thread(cover, picture, spec.width, spec.height), request.prompt, request.seed
    )
    costs = _costs_on(engine)
    async with contextlib.AsyncExitStack() as stack:
        session, checkpoint = await or_stop(stop, _begin(engine, reference, folder, turn, costs, stack))
        work = _Work(
            request, settings, spec, sound, session, folder, checkpoint, turn, costs, on_progress, segment_s, clock
        )
        stack.push_async_callback(work.close)
        await or_stop(stop, work.make())
        # From here on it is sooner done than undone.
        return await work.finish()


def discard(request: RenderRequest) -> None:
    """Remove what a render left behind that is not to be gone on with, or whose result is noted. Blocking."""
    shutil.rmtree(request.folder, ignore_errors=True)
    _part(request).unlink(missing_ok=True)


def withdraw(request: RenderRequest) -> None:
    """Remove the finished file, where it is the one that was made. Blocking.

    Before `discard`, which removes the record that tells. Raises: SinkError.
    """
    made = _read_json(request.folder / RESULT)
    with _told(request.target):
        try:
            if made is None or _sha256(request.target) != made.get("sha256"):
                return
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return
        request.target.unlink(missing_ok=True)
        flush_to_disk(request.target.parent)


@dataclass(frozen=True)
class _Checkpoint:
    """What a render goes on from, written when all it speaks of is safe on the disk.

    identity: of what the frames depend on; blocks: that the model has made; frames: of them that are encoded, in the
    first video_bytes of the file of packets; state_bytes: of the model's state before the next block.
    """

    identity: str
    blocks: int
    frames: int
    video_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class _Border:
    """Between two segments: so many blocks were made before it; the model's state there, where it can be saved."""

    blocks: int
    state: bytes | None


class _Folder:
    """The files of the work in progress. Blocking; what its disk refuses comes as OSError or SinkError."""

    def __init__(self, path: Path, identity: Callable[[], str]) -> None:
        self.path, self.identity = path, identity
        self.video, self.sound = path / "video.packets", path / "sound.packets"
        self._checkpoint, self._result = path / "checkpoint.json", path / RESULT

    def make(self) -> None:
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in reversed(missing):
            # What is kept in it is only as safe as its name.
            flush_to_disk(folder.parent)

    def load(self) -> tuple[_Checkpoint, bytes] | None:
        """The last checkpoint and the model's state there; None where there is none of this render."""
        written = _read_json(self._checkpoint)
        if written is None:
            return None
        try:
            checkpoint = _Checkpoint(**written)
            state = self._state(checkpoint.blocks).read_bytes()
            whole = len(state) == checkpoint.state_bytes and self.video.stat().st_size >= checkpoint.video_bytes
        except (OSError, TypeError):
            whole = False
        if not whole or checkpoint.identity != self.identity():
            log.info("%s: what is there is of another render, or damaged; beginning anew", self.path)
            return None
        return checkpoint, state

    def save(self, blocks: int, frames: int, video_bytes: int, state: bytes) -> None:
        """Write a checkpoint whose packets are safe; a kill on the way leaves the one before."""
        checkpoint = _Checkpoint(self.identity(), blocks, frames, video_bytes, len(state))
        write_whole(self._state(checkpoint.blocks), state)
        write_whole(self._checkpoint, json.dumps(asdict(checkpoint)).encode())
        for old in self.path.glob("state-*"):
            if old != self._state(checkpoint.blocks):
                old.unlink()

    def clear(self) -> None:
        """Nothing here is to be gone on with."""
        with _told(self.path):
            for name in (self._checkpoint, self._result):
                if name.exists():
                    name.unlink()
                    flush_to_disk(self.path)

    def note(self, result: RenderResult) -> None:
        """Write down what will be the result as soon as the finished file has its name."""
        record = {"identity": self.identity(), **asdict(result), "path": str(result.path)}
        write_whole(self._result, json.dumps(record).encode())

    def noted(self, target: Path) -> RenderResult | None:
        """The result of an earlier call that was ended after its file was finished, where that is there still."""
        record = _read_json(self._result)
        if record is None or record.pop("identity", None) != self.identity():
            return None
        try:
            result = RenderResult(**record | {"path": target, "warnings": tuple(record["warnings"])})
            return result if _sha256(target) == result.sha256 else None
        except (OSError, TypeError, KeyError):
            return None

    def clear_away(self) -> None:
        """All but the record of the result."""
        for path in list(self.path.iterdir()):
            if path != self._result:
                path.unlink()

    def _state(self, blocks: int) -> Path:
        return self.path / f"state-{blocks}"


class _Identity:
    """What the frames depend on, as one short text: found out once, and only where it is asked for."""

    def __init__(self, request: RenderRequest, settings: Settings, spec: StreamSpec, segment_s: float) -> None:
        self._request, self._settings, self._spec, self._segment_s = request, settings, spec, segment_s

    def __call__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        model, request = self._settings.model, self._request
        with _told(request.image):
            image = _sha256(request.image)
        with _told(request.audio):
            audio = _sha256(request.audio)
        depends = {
            "software": [VERSION, sorted(av.library_versions.items())],
            "model": [resolve_model(model.name, self._settings), model.steps, model.options],
            "spec": asdict(self._spec),
            "image": image,
            "audio": audio,
            "limits": self._settings.limits.model_dump(),
            "prompt": request.prompt,
            "seed": request.seed,
            "encoder": self._settings.encoder.model_dump(),
            "segment_s": self._segment_s,
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class _Costs:
    """What the model takes on one engine, so that the first block of a render is no surprise to who waits for its turn.

    open_s, state_s, finish_s, block_s: seconds of its work for a session's beginning, for its state, for its end, and
    for a block lately.
    """

    open_s: float = 0.0
    state_s: float = 0.0
    finish_s: float = 0.0
    _blocks: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))

    @property
    def block_s(self) -> float:
        # Not the longest: one that was made again after a death of the process says nothing of the next.
        return statistics.median(self._blocks) if self._blocks else 0.0

    def note_block(self, seconds: float) -> None:
        self._blocks.append(seconds)


_known_costs: WeakKeyDictionary[Engine, _Costs] = WeakKeyDictionary()


def _costs_on(engine: Engine) -> _Costs:
    return _known_costs.setdefault(engine, _Costs())


# Before the first block.


def _check_target(request: RenderRequest) -> None:
    target = request.target
    if target.is_dir():
        raise SinkError(f"{target}: is a folder; name a file in it, such as {target / 'out.mp4'}")
    if target.suffix.lower() not in FILE_TYPES:
        raise SinkError(
            f"{target}: file type {target.suffix!r} is not one we write; end the name in {' or '.join(FILE_TYPES)}"
        )
    if not request.folder.exists():  # otherwise it may be what an earlier call has made
        _check_free(request)
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")


def _check_free(request: RenderRequest) -> None:
    if os.path.lexists(request.target) and not request.overwrite:
        raise _taken(request)


def _taken(request: RenderRequest) -> SinkError:
    return SinkError(f"{request.target}: exists already; remove it or choose another name")


async def _open(request: RenderRequest, settings: Settings) -> tuple[NDArray[np.uint8], SoundFile]:
    picture, sound = await asyncio.gather(
        asyncio.to_thread(isolated.picture, request.image, settings.limits),
        asyncio.to_thread(isolated.sound, request.audio, settings.limits),
        # A thread cannot be left behind, so both end before the first failure is told.
        return_exceptions=True,
    )
    if isinstance(picture, BaseException):
        raise picture
    if isinstance(sound, BaseException):
        raise sound
    return picture, sound


async def _begin(
    engine: Engine,
    reference: Reference,
    folder: _Folder,
    turn: Turn,
    costs: _Costs,
    stack: contextlib.AsyncExitStack,
) -> tuple[EngineSession, _Checkpoint | None]:
    """A session at the last checkpoint, or at the beginning with nothing left of what was there; `stack` closes it."""
    point = await asyncio.to_thread(folder.load)
    async with turn(costs.open_s):
        if point is not None:
            checkpoint, state = point
            try:
                session = await engine.open(reference, resume=(checkpoint.blocks, state))
                stack.push_async_callback(session.close)
                return session, checkpoint
            except EngineError:
                raise
            except AvatardError as error:
                log.warning("%s: cannot be gone on with (%s); beginning anew", folder.path, error)
        await asyncio.to_thread(folder.clear)
        session = await engine.open(reference)
        stack.push_async_callback(session.close)
    costs.open_s = session.busy_s
    return session, None


class _Work:
    """A render from its first block to its file: cut -> generate -> encode, and the sound beside them."""

    def __init__(
        self,
        request: RenderRequest,
        settings: Settings,
        spec: StreamSpec,
        sound: SoundFile,
        session: EngineSession,
        folder: _Folder,
        checkpoint: _Checkpoint | None,
        turn: Turn,
        costs: _Costs,
        on_progress: Callable[[int, int | None], None],
        segment_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._request, self._settings, self._spec = request, settings, spec
        self._sound, self._session, self._folder = sound, session, folder
        self._turn, self._costs, self._on_progress, self._clock = turn, costs, on_progress, clock
        self._segment_blocks = max(1, round(segment_s / spec.block_seconds))
        self._total = None if sound.declared_s is None else max(1, round(sound.declared_s * spec.fps))
        self._blocks = Channel[AudioBlock](BLOCKS_AHEAD)
        self._made = Channel[FrameBlock | _Border](1)
        # One thread for the picture and the files, one for the sound, which has much to catch up with after a kill.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._sound_thread = ThreadPoolExecutor(1, thread_name_prefix="render sound")
        self._original = sound.original()
        self._checkpoint = checkpoint
        self._sound_encoder: Encoder | None = None
        """Of the whole sound; its streams are what the packets are given as."""
        self._encoder: Encoder | None = None
        """Of the pictures of the segment under way."""
        self._video: Track
        self._speech: Track
        self._encode_s = 0.0
        self._resumed_from = checkpoint.frames if checkpoint else 0
        self._frames = self._resumed_from
        """That are encoded."""
        self._all_made = False
        self._more = asyncio.Event()
        """There are more frames, or all of them."""

    async def make(self) -> None:
        """All frames and all sound, encoded."""
        await _in(self._thread, self._open_tracks)
        if self._frames:
            self._on_progress(self._frames, self._total)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._cut(self._session.blocks), name="cut")
                tasks.create_task(self._generate(self._session.blocks), name="generate")
                tasks.create_task(self._deliver(), name="deliver")
                tasks.create_task(self._hear(), name="hear")
        except BaseExceptionGroup as group:
            # The others were cancelled for it.
            first = group.exceptions[0]
            raise first from first.__cause__
        if not self._frames:
            raise AvatardError(f"{self._request.audio}: the sound is empty: there is nothing to speak")

    async def finish(self) -> RenderResult:
        """All of it in one file with its index first, safe on the disk under its name."""
        return await _in(self._thread, self._join)

    async def close(self) -> None:
        """Let go of everything but the files."""
        self._original.close()
        for encoder in (self._sound_encoder, self._encoder):
            if encoder is not None:
                encoder.close()
        self._thread.shutdown(wait=False)
        self._sound_thread.shutdown(wait=False)

    # From block to block.

    async def _cut(self, begin: int) -> None:
        """The sound in blocks, from that one on: a resampler has to hear all that was before."""
        spec = self._spec
        cutter = BlockCutter(spec.samples_per_block, spec.lookahead_samples)
        async for chunk in FileSource(self._sound, spec.sample_rate):
            for block in cutter.push(chunk):
                if block.start >= begin * spec.samples_per_block:
                    await self._blocks.put(block)
        for block in cutter.flush():
            if block.start >= begin * spec.samples_per_block:
                await self._blocks.put(block)
        self._blocks.close()

    async def _generate(self, begin: int) -> None:
        session, costs, can_save = self._session, self._costs, True
        async for audio in self._blocks:
            # Before a block and not after one, so that a sound of one segment's length needs no checkpoint.
            number = session.blocks
            border = number > begin and number % self._segment_blocks == 0
            saves, state = border and can_save, None
            async with self._turn(costs.block_s + (costs.state_s if saves else 0.0)):
                if saves:
                    state = await self._state()
                    can_save = state is not None
                before_s = session.busy_s
                made = await session.step(audio)
                costs.note_block(session.busy_s - before_s)
            if border:
                await self._made.put(_Border(number, state))
            for block in made:
                await self._made.put(block)
        async with self._turn(costs.finish_s):
            before_s = session.busy_s
            made = await session.finish()
            costs.finish_s = session.busy_s - before_s
        for block in made:
            await self._made.put(block)
        self._made.close()

    async def _state(self) -> bytes | None:
        began = self._clock()
        try:
            state = await self._session.snapshot()
        except ModelFailure as failure:
            log.warning("%s: cannot be gone on with after a kill: %s", self._request.target, failure)
            return None
        self._costs.state_s = self._clock() - began
        return state

    async def _deliver(self) -> None:
        async for item in self._made:
            if isinstance(item, _Border):
                await _in(self._thread, self._end_segment, item)
                continue
            assert item.start == self._frames, f"block at {item.start}, expected {self._frames}"
            await _in(self._thread, self._encode, item)
            self._frames += len(item.frames)
            self._more.set()
            self._on_progress(self._frames, self._total)
        await _in(self._thread, self._end_encoder)
        self._all_made = True
        self._more.set()

    async def _hear(self) -> None:
        """Encode as much sound as there are frames; after a kill from its beginning, since AAC cannot be resumed."""
        heard = 0
        await self._more.wait()  # what there is to catch up with shall not keep the model from its first block
        while heard < self._frames or not self._all_made:
            if heard == self._frames:
                self._more.clear()
                await self._more.wait()
                continue
            frames = min(self._spec.frames_per_block, self._frames - heard)
            await _in(self._sound_thread, self._encode_sound, frames)
            heard += frames
        await _in(self._sound_thread, self._end_sound)

    # In the threads.

    def _open_tracks(self) -> None:
        checkpoint, folder = self._checkpoint, self._folder
        self._sound_encoder = self._new_encoder()
        pictures, sound = self._sound_encoder.streams
        self._video = Track(folder.video, pictures, checkpoint.video_bytes if checkpoint else 0)
        self._speech = Track(folder.sound, sound)

    def _new_encoder(self) -> Encoder:
        spec, settings = self._spec, EncoderSettings(**self._settings.encoder.model_dump())
        return Encoder(spec.width, spec.height, spec.fps, self._original.channels, settings)

    def _encode(self, block: FrameBlock) -> None:
        began = self._clock()
        if self._encoder is None:
            self._encoder = self._new_encoder()
        silent = np.zeros((0, self._original.channels), np.float32)
        self._video.add(self._encoder.encode(block, silent))
        self._encode_s += self._clock() - began

    def _encode_sound(self, frames: int) -> None:
        assert self._sound_encoder is not None
        spec = self._spec
        sound = self._original.read(frames * SOUND_RATE // spec.fps)
        unseen = np.zeros((0, spec.height, spec.width, 3), np.uint8)
        self._speech.add(self._sound_encoder.encode(FrameBlock(unseen, sound[:0, 0], 0), sound))
        if self._speech.held_bytes > SOUND_HELD_BYTES:
            with _told(self._folder.path):
                self._folder.make()
                self._speech.keep(flush=False)

    def _end_sound(self) -> None:
        assert self._sound_encoder is not None
        self._speech.add(self._sound_encoder.flush())

    def _end_encoder(self) -> None:
        if self._encoder is not None:
            self._video.add(self._encoder.flush())
            self._encoder.close()
            self._encoder = None

    def _end_segment(self, border: _Border) -> None:
        """What is encoded goes to the disk, and after it a checkpoint that says so."""
        self._end_encoder()
        with _told(self._folder.path):
            self._folder.make()
            self._video.keep(flush=True)
            if border.state is not None:
                self._folder.save(border.blocks, self._frames, self._video.kept_bytes, border.state)

    def _join(self) -> RenderResult:
        request, part = self._request, _part(self._request)
        with _told(request.target):
            # After a kill in `_place` it is another name of what that one has made.
            part.unlink(missing_ok=True)
            try:
                self._mux(part)
                result = self._result(part)
                if request.folder.exists() or not request.overwrite:
                    self._folder.make()
                    self._folder.note(result)
                _place(part, request)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        _settle(request)
        with _told(request.target):
            if request.folder.exists():
                self._folder.clear_away()
        return result

    def _mux(self, part: Path) -> None:
        assert self._sound_encoder is not None
        request = self._request
        tags = {**metadata(self._settings, request.target.name), "title": request.title or request.target.stem}
        muxer = Muxer(part, self._sound_encoder.streams, tags, "mp4", {"movflags": "+faststart"})
        try:
            muxer.mux(heapq.merge(self._video, self._speech, key=lambda packet: float(time_of(packet))))
        finally:
            muxer.close()
        flush_to_disk(part)

    def _result(self, part: Path) -> RenderResult:
        spec, sound = self._spec, self._request.audio
        return RenderResult(
            path=self._request.target,
            frames=self._frames,
            seconds=round(self._frames / spec.fps, 3),
            width=spec.width,
            height=spec.height,
            fps=spec.fps,
            sha256=_sha256(part),
            bytes=part.stat().st_size,
            warnings=tuple(f"{sound}: {warning}" for warning in self._sound.report.warnings()),
            resumed_from=self._resumed_from,
            model_s=round(self._session.busy_s, 3),
            encode_s=round(self._encode_s, 3),
        )


def _part(request: RenderRequest) -> Path:
    """Where the finished file grows, beside its target: two renders for one target do not meet there."""
    own = hashlib.sha256(os.fsencode(request.folder.absolute())).hexdigest()[:16]
    return request.target.with_name(f".avatard-{own}.part")


def _place(part: Path, request: RenderRequest) -> None:
    """Give the finished file its name. Raises: SinkError: another file has it, and is not to be replaced; OSError."""
    if not request.overwrite:
        try:
            # Unlike a rename it fails where there is a file, also one that came just now.
            return os.link(part, request.target)
        except FileExistsError:
            raise _taken(request) from None
        except OSError:
            _check_free(request)  # a file system without hard links
    os.replace(part, request.target)


def _settle(request: RenderRequest) -> None:
    """The finished file has its name: see that it keeps it, and has no other. Blocking."""
    with _told(request.target):
        _part(request).unlink(missing_ok=True)
        flush_to_disk(request.target.parent)


async def _in(thread: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    """Do `work` there; who is cancelled waits until it is over, since nobody else may touch its files before."""
    working = asyncio.get_running_loop().run_in_executor(thread, work, *arguments)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What a disk refuses, as an error for people."""
    try:
        yield
    except (OSError, av.error.FFmpegError) as error:
        if getattr(error, "errno", None) in FULL:
            raise DiskFull(
                f"{path}: {reason(error)}; make room and start it again: it goes on from what was saved"
            ) from error
        raise SinkError(f"{path}: {reason(error)}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    """An object out of a file; None where there is none, or a damaged one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there in full or not at all, whatever happens, and stays. Raises: OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)
