"""A live session for viewers in a browser: an MP4 without end, in fragments, from memory."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import av
from av.packet import Packet
from av.stream import Stream

from streaming.muxer import ByteBuffer, Muxer
from streaming.sink import SinkError, reason

FRAGMENTS = {
    "movflags": "+frag_keyframe+empty_moov+delay_moov+default_base_moof+skip_trailer",
    # microseconds; a frame or two in each, with its sound
    "frag_duration": "30000",
    "flush_packets": "1",
}

ANY_TYPE = 'video/mp4; codecs="avc1.640028, mp4a.40.2"'
"""What a view is before there is a picture: H.264 of the high profile up to 1080p, and AAC."""

FRESH_S = 1.0
"""A keyframe no older is where who joins begins. After an older one a new one is asked for, since who begins with the
old one stays that much behind."""

BEHIND_S, BEHIND_BYTES = 1.5, 8_000_000
"""What may wait for one viewer. With more of it, all is left out up to the next keyframe."""

STUCK_S = 10.0
"""A viewer who takes nothing for so long is watching no more."""

_NOT_SYNC = 0x10000
"""In the flags of a sample (ISO/IEC 14496-12, 8.8.3.1): it is no keyframe."""


class Viewer:
    """One who watches: `async for piece in viewer`, first the beginning of the MP4, then fragments from a keyframe on.

    It ends when the session does, after `aclose`, and for who does not read. skipped: fragments left out, since they
    were not taken in time; after them comes one with a keyframe.
    """

    def __init__(self, clock: Callable[[], float], on_end: Callable[[Viewer], None]) -> None:
        self._clock, self._on_end = clock, on_end
        self._header: bytes | None = None
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._in_step = False
        """It was given the keyframe before, and all since."""
        self._reading = False
        self._read_at = clock()
        self._over = False
        self._changed = asyncio.Event()
        self.skipped = 0

    def __aiter__(self) -> Viewer:
        return self

    async def __anext__(self) -> bytes:
        self._reading = True
        try:
            while self._header is None and not self._waiting and not self._over:
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._reading = False
            self._read_at = self._clock()
        if self._header is not None:
            header, self._header = self._header, None
            return header
        if self._waiting:
            _, fragment = self._waiting.popleft()
            self._bytes -= len(fragment)
            return fragment
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """As `leave`, for who treats it like any other iterator."""
        self.leave()

    def leave(self) -> None:
        """Watch no more."""
        self._header = None
        self._forget()
        self.end()

    def begin(self, header: bytes) -> None:
        self._header = header
        self._changed.set()

    def offer(self, fragment: bytes, keyframe: bool) -> None:
        """What is new; it is taken or left out, and never waited for."""
        now = self._clock()
        if not self._reading and now - self._read_at > STUCK_S:
            self.leave()
            return
        if self._waiting and (now - self._waiting[0][0] > BEHIND_S or self._bytes + len(fragment) > BEHIND_BYTES):
            self._forget()
        self._in_step = self._in_step or keyframe
        if not self._in_step:
            self.skipped += 1
            return
        self._waiting.append((now, fragment))
        self._bytes += len(fragment)
        self._changed.set()

    def end(self) -> None:
        """There will be no more; what waits is still given."""
        self._over = True
        self._changed.set()
        self._on_end(self)

    def _forget(self) -> None:
        self.skipped += len(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        self._in_step = False


class ViewSink:
    """Muxes a session once, and hands each fragment to whoever watches, without waiting for anybody.

    All viewers share one MP4: the times of who joins late begin where the session is. Closed, it can be opened again;
    its viewers have ended then.

    Args:
        want_keyframe: asks the encoder for one.
        clock: monotonic seconds.
    """

    live: ClassVar[bool] = True
    pending_s, failed = 0.0, False

    def __init__(self, want_keyframe: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.name = "view"
        self.type = ANY_TYPE
        """Media type with codecs, for `MediaSource.addSourceBuffer`."""
        self._want_keyframe, self._clock = want_keyframe, clock
        self._viewers: set[Viewer] = set()
        self._muxer: Muxer | None = None
        self._written = ByteBuffer()
        self._boxes = b""
        self._header = b""
        self._whole = False
        """The header is complete."""
        self._since: list[bytes] = []
        """The fragments from the last keyframe on."""
        self._keyframe_at = -FRESH_S

    @property
    def output(self) -> Path | None:
        return None

    @property
    def viewers(self) -> int:
        """How many watch."""
        return len(self._viewers)

    def view(self) -> Viewer:
        """One more viewer."""
        viewer = Viewer(self._clock, self._viewers.discard)
        self._viewers.add(viewer)
        if self._whole:
            viewer.begin(self._header)
            if self._clock() - self._keyframe_at <= FRESH_S:
                for number, fragment in enumerate(self._since):
                    viewer.offer(fragment, keyframe=number == 0)
            else:
                self._want_keyframe()
        return viewer

    async def open(self) -> None:
        """Nothing has to be tried."""

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        self._written, self._boxes, self._header, self._whole = ByteBuffer(), b"", b"", False
        self._muxer = Muxer(self._written, streams, metadata, "mp4", FRAGMENTS)

    async def write(self, packets: Sequence[Packet]) -> None:
        assert self._muxer is not None, "write() before start()"
        try:
            # On the loop: it takes a tenth of a millisecond.
            self._muxer.mux(packets)
        except av.error.FFmpegError as error:
            raise SinkError(f"{self.name}: cannot be written ({reason(error)})") from error
        self._hand_out()

    async def close(self, complete: bool) -> None:
        muxer, self._muxer = self._muxer, None
        try:
            if muxer is not None:
                muxer.close()
                self._hand_out()
        except av.error.FFmpegError as error:
            raise SinkError(f"{self.name}: cannot be finished ({reason(error)})") from error
        finally:
            self._since, self._whole = [], False
            for viewer in list(self._viewers):
                viewer.end()

    def _hand_out(self) -> None:
        """What the muxer has written: the header in two boxes, then for each fragment one of times and one of media."""
        self._boxes += self._written.take()
        while (size := int.from_bytes(self._boxes[:4])) and size <= len(self._boxes):
            kind = self._boxes[4:8]
            if kind == b"moof":
                media = int.from_bytes(self._boxes[size : size + 4])
                if not media or size + media > len(self._boxes):
                    return
                times, size = self._boxes[:size], size + media
                self._add(self._boxes[:size], _begins_with_keyframe(times))
            elif not self._whole:
                self._header += self._boxes[:size]
                if kind == b"moov":
                    self._begin()
            self._boxes = self._boxes[size:]

    def _begin(self) -> None:
        self._whole = True
        self.type = _type_of(self._header)
        for viewer in self._viewers:
            viewer.begin(self._header)

    def _add(self, fragment: bytes, keyframe: bool) -> None:
        if keyframe:
            self._since, self._keyframe_at = [fragment], self._clock()
        elif self._since:
            self._since.append(fragment)
            if sum(map(len, self._since)) > BEHIND_BYTES:
                self._since = []
        for viewer in list(self._viewers):
            viewer.offer(fragment, keyframe)


def _type_of(header: bytes) -> str:
    """Profile, constraints and level stand behind the version in the decoder's configuration (ISO/IEC 14496-15)."""
    at = header.index(b"avcC") + 5
    return f'video/mp4; codecs="avc1.{header[at : at + 3].hex()}, mp4a.40.2"'


def _begins_with_keyframe(moof: bytes) -> bool:
    """Whether the first picture of a fragment is one (ISO/IEC 14496-12, 8.8: traf, tfhd, trun)."""
    for traf in _inside(moof, b"traf"):
        tfhd, trun = next(_inside(traf, b"tfhd")), next(_inside(traf, b"trun"))
        if int.from_bytes(tfhd[12:16]) != 1:
            continue  # the sound: the first track of the encoder is the picture
        has, given = int.from_bytes(tfhd[9:12]), int.from_bytes(trun[9:12])
        if given & 0x4:
            at = 16 + 4 * bool(given & 0x1)
            flags = int.from_bytes(trun[at : at + 4])
        elif given & 0x400:
            at = 16 + 4 * (bool(given & 0x1) + bool(given & 0x100) + bool(given & 0x200))
            flags = int.from_bytes(trun[at : at + 4])
        else:
            assert has & 0x20, "a fragment does not say what its samples are"
            at = 16 + 8 * bool(has & 0x1) + 4 * (bool(has & 0x2) + bool(has & 0x8) + bool(has & 0x10))
            flags = int.from_bytes(tfhd[at : at + 4])
        return not flags & _NOT_SYNC
    return False


def _inside(box: bytes, kind: bytes) -> Iterator[bytes]:
    """The boxes of that kind directly inside of another."""
    at = 8
    while at < len(box):
        size = int.from_bytes(box[at : at + 4])
        if box[at + 4 : at + 8] == kind:
            yield box[at : at + size]
        at += size
