"""Outputs on the disk: one MP4, a recording in MP4s of equal length, and HLS for browsers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import quote

import av
from av.packet import Packet
from av.stream import Stream

from streaming.muxer import FRAGMENT_PER_KEYFRAME, ByteBuffer, Muxer, flush_to_disk, rewrite_for_players, time_of
from streaming.sink import SinkError, reason

R = TypeVar("R")

FILE_TYPES = (".mp4", ".m4v", ".mov")

HLS_SEGMENTS = 6
HLS_ROLLING_S = 12.0
"""A rolling playlist names at least so many segments, and at least so many seconds of them. As many more are kept for
players that are about to fetch them."""

HLS_SHORTEST_S = 0.48
"""A keyframe that comes sooner, since another output asked for it, begins no segment."""


class _OnDisk:
    """What all outputs on the disk do alike: whatever may wait for the disk happens in a thread of their own."""

    live: ClassVar[bool] = False
    pending_s, failed = 0.0, False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._muxer: Muxer | None = None
        self._output: Path | None = None
        self._closed = False
        # One thread: a write that its task no longer waits for still ends before the close that follows it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk")

    @property
    def output(self) -> Path | None:
        return self._output

    async def open(self) -> None:
        await self._in_thread(self._claim)

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        self._muxer = await self._in_thread(lambda: self._new_muxer(streams, metadata))

    async def write(self, packets: Sequence[Packet]) -> None:
        await self._in_thread(lambda: self._mux(packets))

    async def close(self, complete: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._in_thread(self._finish if complete else self._keep)
        finally:
            self._thread.shutdown(wait=False)

    def replaces(self) -> list[Path]:
        """What it writes in the place of, or takes away, where such files lie there."""
        return [self._path]

    def _claim(self) -> None:
        """Make sure of the place, in the thread."""
        raise NotImplementedError

    def _new_muxer(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> Muxer:
        raise NotImplementedError

    def _mux(self, packets: Sequence[Packet]) -> None:
        assert self._muxer is not None, "write() before start()"
        self._muxer.mux(packets)

    def _finish(self) -> None:
        """End what is complete."""
        raise NotImplementedError

    def _keep(self) -> None:
        """End what is not."""
        raise NotImplementedError

    def _check_folder(self, example: str) -> None:
        folder = self._path.parent
        if self._path.is_dir():
            raise SinkError(f"{self._path}: is a folder; name a file in it, such as {self._path / example}")
        if not folder.is_dir():
            raise SinkError(f"{self._path}: there is no folder {folder}; create it first")

    async def _in_thread(self, work: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (OSError, av.error.FFmpegError) as error:
            raise SinkError(f"{self._path}: {reason(error)}") from error


class FileSink(_OnDisk):
    """An MP4 whose final name only ever holds a finished file.

    It grows as NAME.part.mp4 in the same folder, playable at any moment. Closed as complete it is rewritten for
    players (index first) and renamed; closed as incomplete, or when the disk fails, the part stays if it has a picture.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        super().__init__(path)
        if path.suffix.lower() not in FILE_TYPES and not path.is_dir():
            kind = f"file type {path.suffix!r}" if path.suffix else "file without a type"
            raise SinkError(f"{path}: {kind} is not one we write; end the name in {' or '.join(FILE_TYPES)}")
        self._overwrite = overwrite
        self._part: Path | None = None
        self._metadata: dict[str, str] = {}

    def _claim(self) -> None:
        self._check_folder("out.mp4")
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

    def _new_muxer(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> Muxer:
        assert self._part is not None, "start() before open()"
        self._metadata = dict(metadata)
        return Muxer(self._part, streams, metadata)

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
            self._keep()
            if self._output is not None and isinstance(error, (OSError, av.error.FFmpegError, SinkError)):
                what = str(error) if isinstance(error, SinkError) else f"{self._path}: {reason(error)}"
                raise SinkError(f"{what}; the video is in {self._output}") from error
            raise
        self._output = self._path
        self._part.unlink(missing_ok=True)
        flush_to_disk(self._path.parent)

    def _keep(self) -> None:
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


class HlsSink(_OnDisk):
    """HTTP Live Streaming: a playlist and its segments (fragmented MP4) in one folder, for any web server and browser.

    A segment lasts from one keyframe to the next. Players never see half a file: segments and playlist are renamed
    when they are whole. A rolling playlist names the last segments, and older ones are deleted; an event playlist keeps
    all. Segments are counted from the seconds of the clock, so those of a session that begins anew have new names, and
    no cache between here and the player mistakes one for another.

    Args:
        now: the wall clock, for the names and for the players' own clocks.
    """

    def __init__(
        self,
        path: Path,
        event: bool = False,
        overwrite: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(path)
        self._event, self._overwrite, self._now = event, overwrite, now
        self._header = path.with_name(f"{path.stem}-init.mp4")
        self._bytes = ByteBuffer()
        self._boxes = b""
        self._keyframes: deque[Fraction] = deque()
        self._end = Fraction(0)
        self._fragments: list[bytes] = []
        self._length = Fraction(0)
        self._segments: deque[_Segment] = deque()
        self._past: deque[_Segment] = deque()
        self._target_s = 1
        self._number = 0
        self._date: datetime | None = None
        """Number and time of the segment that grows."""

    def replaces(self) -> list[Path]:
        return [self._path, self._header, *self._old_segments()]

    def _old_segments(self) -> Iterator[Path]:
        return self._path.parent.glob(f"{glob.escape(self._path.stem)}-*.m4s")

    def _claim(self) -> None:
        self._check_folder("live.m3u8")
        if self._path.exists() and not self._overwrite:
            raise SinkError(f"{self._path}: exists already; remove it, choose another name, or add --overwrite")
        if not os.access(self._path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")

    def _new_muxer(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> Muxer:
        for old in (self._path, *self._old_segments()):
            old.unlink(missing_ok=True)
        return Muxer(self._bytes, streams, metadata, "mp4", FRAGMENT_PER_KEYFRAME)

    def _mux(self, packets: Sequence[Packet]) -> None:
        assert self._muxer is not None, "write() before start()"
        if self._date is None:
            self._date = self._now()
            self._number = int(self._date.timestamp())
        for packet in packets:
            if packet.stream.type == "video":
                if packet.is_keyframe:
                    self._keyframes.append(time_of(packet))
                self._end = time_of(packet) + packet.time_base
            self._muxer.mux([packet])
        self._take_fragments()

    def _finish(self) -> None:
        if self._muxer is not None and self._keyframes:
            self._muxer.close()
            self._keyframes.append(self._end)
            self._take_fragments()
            if self._fragments:
                self._end_segment()
            self._write_playlist(ended=True)

    def _keep(self) -> None:
        # What is there plays, whether or not more should have come.
        with contextlib.suppress(OSError, av.error.FFmpegError):
            self._finish()

    def _take_fragments(self) -> None:
        """Go through what the muxer has written: its header, then for each keyframe a box of times and one of media."""
        self._boxes += self._bytes.take()
        while (size := int.from_bytes(self._boxes[:4])) and size <= len(self._boxes):
            kind = self._boxes[4:8]
            if kind == b"moof":
                media = int.from_bytes(self._boxes[size : size + 4])
                if not media or size + media > len(self._boxes):
                    return
                size += media
                self._add_fragment(self._boxes[:size])
            elif kind in (b"ftyp", b"moov"):
                self._fragments.append(self._boxes[:size])
                if kind == b"moov":
                    _write_whole(self._header, self._fragments)
                    self._fragments = []
            self._boxes = self._boxes[size:]

    def _add_fragment(self, fragment: bytes) -> None:
        self._fragments.append(fragment)
        begin = self._keyframes.popleft()
        self._length += self._keyframes[0] - begin
        if self._length >= HLS_SHORTEST_S:
            self._end_segment()

    def _end_segment(self) -> None:
        assert self._date is not None
        path = self._path.with_name(f"{self._path.stem}-{self._number}.m4s")
        _write_whole(path, self._fragments)
        self._segments.append(_Segment(path, self._length, self._date))
        self._target_s = max(self._target_s, round(self._length))
        self._number += 1
        self._date += timedelta(seconds=float(self._length))
        self._fragments, self._length = [], Fraction(0)
        while not self._event and len(self._segments) > HLS_SEGMENTS and self._rest_s() >= HLS_ROLLING_S:
            self._past.append(self._segments.popleft())
        self._write_playlist()
        # Only now, and not at once: a player may be about to fetch it.
        while len(self._past) > HLS_SEGMENTS:
            self._past.popleft().path.unlink(missing_ok=True)

    def _rest_s(self) -> float:
        return float(sum(segment.length for segment in itertools.islice(self._segments, 1, None)))

    def _write_playlist(self, ended: bool = False) -> None:
        """RFC 8216."""
        lines = ["#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{self._target_s}"]
        lines += [f"#EXT-X-MEDIA-SEQUENCE:{self._number - len(self._segments)}", "#EXT-X-INDEPENDENT-SEGMENTS"]
        lines += ["#EXT-X-PLAYLIST-TYPE:EVENT"] if self._event else []
        lines += [f'#EXT-X-MAP:URI="{quote(self._header.name)}"']
        for segment in self._segments:
            lines.append(f"#EXT-X-PROGRAM-DATE-TIME:{segment.date.isoformat(timespec='milliseconds')}")
            lines += [f"#EXTINF:{float(segment.length):.5f},", quote(segment.path.name)]
        lines += ["#EXT-X-ENDLIST"] if ended else []
        _write_whole(self._path, ["".join(f"{line}\n" for line in lines).encode()])
        self._output = self._path


@dataclass(frozen=True)
class _Segment:
    path: Path
    length: Fraction
    date: datetime


def _write_whole(path: Path, parts: Sequence[bytes]) -> None:
    """A file that is there in full or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(b"".join(parts))
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


class SegmentSink:
    """A recording in MP4s of equal length, each finished and playable by itself, cut at keyframes.

    Every picture and every packet of sound is in exactly one of them. A kill costs what it costs a single file: the
    last moment of the one that grows. A name with % fields is filled by strftime with the time a file begins; any other
    gets a number, which goes on from what lies in the folder. Nothing is ever overwritten.

    Args:
        seconds: length of a file; it ends at the first keyframe after that.
        now: the wall clock, for names.
    """

    live: ClassVar[bool] = False
    pending_s, failed = 0.0, False

    def __init__(self, path: Path, seconds: float, now: Callable[[], datetime] = datetime.now) -> None:
        self.name = f"segment:{seconds:g}:{path}"
        self._path, self._seconds, self._now = path, Fraction(seconds), now
        self._file = FileSink(self._next_path())
        self._finished: Path | None = None
        self._begin: Fraction | None = None
        self._pictures: deque[Packet] = deque()
        self._sound: deque[Packet] = deque()
        self._finishing: tuple[FileSink, asyncio.Task[None]] | None = None
        self._streams: Sequence[Stream] = ()
        self._metadata: Mapping[str, str] = {}
        self._closed = False

    @property
    def output(self) -> Path | None:
        return self._file.output or self._finished

    async def open(self) -> None:
        await self._file.open()

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        self._streams, self._metadata = streams, metadata
        await self._file.start(streams, metadata)

    async def write(self, packets: Sequence[Packet]) -> None:
        for packet in packets:
            (self._pictures if packet.stream.type == "video" else self._sound).append(packet)
        batch: list[Packet] = []
        for packet in self._in_time():
            if packet.stream.type == "video":
                time = time_of(packet)
                if self._begin is None:
                    self._begin = time
                elif packet.is_keyframe and time - self._begin >= self._seconds:
                    await self._file.write(batch)
                    self._begin = None  # one that cannot be begun is not written to when this is closed
                    await self._next_file()
                    self._begin, batch = time, []
            batch.append(packet)
        await self._file.write(batch)

    async def close(self, complete: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._begin is not None:
                await self._file.write([*self._pictures, *self._sound])
        except SinkError:
            if complete:
                raise
            # It failed before, and whoever closes it knows.
        finally:
            try:
                await self._file.close(complete)
            finally:
                await self._old_file()

    def _in_time(self) -> Iterator[Packet]:
        """Packets in the order of their times, as far as both streams have come: sound comes a little later than its
        picture, or earlier where x264 looks ahead, and a cut parts them by time."""
        while self._pictures and self._sound:
            picture_first = time_of(self._pictures[0]) <= time_of(self._sound[0])
            yield (self._pictures if picture_first else self._sound).popleft()

    async def _next_file(self) -> None:
        """Go on in a new file; the old one is finished meanwhile."""
        await self._old_file()
        old, self._file = self._file, FileSink(self._next_path())
        self._finishing = old, asyncio.create_task(old.close(complete=True), name=f"finish {old.name}")
        await self._file.open()
        await self._file.start(self._streams, self._metadata)

    async def _old_file(self) -> None:
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            file, task = finishing
            await task
            self._finished = file.output

    def _next_path(self) -> Path:
        """The first free name, counted from what lies in the folder: finished files and parts."""
        folder, stem, suffix = self._path.parent, self._path.stem, self._path.suffix
        timed = "%" in stem
        if timed:
            stem = self._now().strftime(stem)
        mine = re.compile(rf"{re.escape(stem)}(?:-(\d+))?(?:\.part(?:-\d+)?)?{re.escape(suffix)}")
        taken = [int(match[1] or 1) for name in _names(folder) if (match := mine.fullmatch(name))]
        number = max(taken, default=0) + 1
        return folder / (f"{stem}{suffix}" if timed and number == 1 else f"{stem}-{number:04}{suffix}")


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []  # opening the file will say what is wrong with it


def _has_picture(path: Path) -> bool:
    try:
        with av.open(f"file:{path}") as container:
            return next(container.decode(video=0), None) is not None
    except (OSError, av.error.FFmpegError, IndexError):
        return False
