"""Where packets go: `open_sink` turns what a user wrote after --to into a Sink."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar
from urllib.parse import urlsplit

import av
from av.packet import Packet
from av.stream import Stream

from audio.errors import AvatardError
from streaming.muxer import Muxer, flush_to_disk, rewrite_for_players

R = TypeVar("R")

FILE_TYPES = (".mp4", ".m4v", ".mov")


class SinkError(AvatardError):
    """An output cannot be opened, written or finished: one line that names it and says what is left."""


class Sink(Protocol):
    """One output: open, start, write ..., close. Nothing here blocks the event loop.

    A live sink (`live`) is never waited for; a file always is.
    """

    name: str
    live: ClassVar[bool]

    @property
    def output(self) -> Path | None:
        """Where something playable is by now: the finished file, or the part of it; None when there is nothing."""
        ...

    async def open(self) -> None:
        """Try the target, before any model works. Raises: SinkError."""
        ...

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        """Say what the packets will be and what the file says of itself. Raises: SinkError."""
        ...

    async def write(self, packets: Sequence[Packet]) -> None:
        """Take packets of all streams, in decoding order; they stay as they are. Raises: SinkError."""
        ...

    async def close(self, complete: bool) -> None:
        """End the output; `complete` says that nothing is missing. The second call does nothing. Raises: SinkError."""
        ...


def open_sink(target: str, overwrite: bool = False) -> Sink:
    """The sink for a path or URL, not opened yet.

    Raises: SinkError: a scheme or file type that nobody here writes.
    """
    scheme, separator, _ = target.partition("://")
    if not separator:
        return FileSink(Path(target), overwrite)
    if scheme == "file":
        return FileSink(Path(urlsplit(target).path), overwrite)
    if scheme == "null":
        return NullSink()
    # Only the scheme: what follows may hold a stream key.
    raise SinkError(f"{scheme}://: no such output; write to a file ({', '.join(FILE_TYPES)}) or to null://")


class NullSink:
    """Counts what it is given and keeps nothing: for measuring."""

    live: ClassVar[bool] = False

    def __init__(self) -> None:
        self.name = "null://"
        self.packets = 0
        self.bytes = 0

    @property
    def output(self) -> Path | None:
        return None

    async def open(self) -> None:
        pass

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        pass

    async def write(self, packets: Sequence[Packet]) -> None:
        self.packets += len(packets)
        self.bytes += sum(packet.size for packet in packets)

    async def close(self, complete: bool) -> None:
        pass


class FileSink:
    """An MP4 whose final name only ever holds a finished file.

    It grows as NAME.part.mp4 in the same folder, playable at any moment. Closed as complete it is rewritten for
    players (index first) and renamed; closed as incomplete, or when the disk fails, the part stays if it has a picture.
    """

    live: ClassVar[bool] = False

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        if path.suffix.lower() not in FILE_TYPES and not path.is_dir():
            kind = f"file type {path.suffix!r}" if path.suffix else "file without a type"
            raise SinkError(f"{path}: {kind} is not one we write; end the name in {' or '.join(FILE_TYPES)}")
        self.name = str(path)
        self._path = path
        self._overwrite = overwrite
        self._part: Path | None = None
        self._muxer: Muxer | None = None
        self._metadata: dict[str, str] = {}
        self._output: Path | None = None
        self._closed = False
        # One thread: a write that its task no longer waits for still ends before the close that follows it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="file-sink")

    @property
    def output(self) -> Path | None:
        return self._output

    async def open(self) -> None:
        await self._in_thread(self._create_part)

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        assert self._part is not None, "start() before open()"
        self._metadata = dict(metadata)
        part = self._part
        self._muxer = await self._in_thread(lambda: Muxer(part, streams, metadata))

    async def write(self, packets: Sequence[Packet]) -> None:
        assert self._muxer is not None, "write() before start()"
        muxer = self._muxer
        await self._in_thread(lambda: muxer.mux(packets))

    async def close(self, complete: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._in_thread(self._finish if complete else self._keep_part)
        finally:
            self._thread.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (OSError, av.error.FFmpegError) as error:
            raise SinkError(f"{self._path}: {_reason(error)}") from error

    def _create_part(self) -> None:
        folder = self._path.parent
        if self._path.is_dir():
            raise SinkError(f"{self._path}: is a folder; name a file in it, such as {self._path / 'out.mp4'}")
        if not folder.is_dir():
            raise SinkError(f"{self._path}: there is no folder {folder}; create it first")
        self._check_target()
        # Never the name of an older part: it may be all that is left of someone's hour.
        for number in range(1, 1000):
            middle = ".part" if number == 1 else f".part-{number}"
            part = self._path.with_name(f"{self._path.stem}{middle}{self._path.suffix}")
            try:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            except FileExistsError:
                continue
            self._part = part
            return
        raise SinkError(f"{self._path}: a thousand unfinished parts lie beside it; remove some")

    def _check_target(self) -> None:
        if self._path.exists() and not self._overwrite:
            raise SinkError(f"{self._path}: exists already; remove it, choose another name, or add --overwrite")

    def _finish(self) -> None:
        assert self._part is not None
        assert self._muxer is not None
        whole = self._part.with_name(f".{self._part.name}")
        try:
            self._muxer.close()
            rewrite_for_players(self._part, whole, self._metadata)
            self._check_target()
            os.replace(whole, self._path)
        except BaseException as error:
            whole.unlink(missing_ok=True)
            self._keep_part()
            if self._output is not None and isinstance(error, (OSError, av.error.FFmpegError, SinkError)):
                what = str(error) if isinstance(error, SinkError) else f"{self._path}: {_reason(error)}"
                raise SinkError(f"{what}; the video is in {self._output}") from error
            raise
        self._output = self._path
        self._part.unlink(missing_ok=True)
        flush_to_disk(self._path.parent)

    def _keep_part(self) -> None:
        if self._part is None:
            return
        if self._muxer is not None:
            # After a failed write the trailer fails as well; the fragments written so far are what counts.
            with contextlib.suppress(OSError, av.error.FFmpegError):
                self._muxer.close()
        if _has_picture(self._part):
            self._output = self._part
        else:
            self._part.unlink(missing_ok=True)


def _has_picture(path: Path) -> bool:
    try:
        with av.open(f"file:{path}") as container:
            return next(container.decode(video=0), None) is not None
    except (OSError, av.error.FFmpegError, IndexError):
        return False


def _reason(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    # FFmpeg's own errors have numbers far above those of the system.
    return os.strerror(number).lower() if isinstance(number, int) and 0 < number < 1000 else str(error)
