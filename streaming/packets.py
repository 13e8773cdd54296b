"""Encoded packets that wait for their container: in memory, and on the disk when that is told to keep them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
from av.packet import Packet
from av.stream import Stream

RECORD = struct.Struct("<qI?I")
"""Before each packet in the file: its pts and its duration in the stream's time base, keyframe or not, its bytes."""

PIECE = 1 << 20
"""Bytes of the file read at once."""


@dataclass(frozen=True)
class _Record:
    pts: int
    duration: int
    is_keyframe: bool
    content: bytes


class Track:
    """The packets of one stream, one after the other, exactly as its encoders gave them; there are no B-frames.

    Args:
        path: of the file, which is made when the first packets are put there.
        stream: what the packets are given as, whichever encoder of the same settings made them.
        kept_bytes: so many of the file, from its beginning on, are true; what lies behind them is cut off.
    """

    def __init__(self, path: Path, stream: Stream, kept_bytes: int = 0) -> None:
        self._path, self._stream = path, stream
        self._records: list[_Record] = []
        self.held_bytes = 0
        """In memory."""
        self.kept_bytes = kept_bytes
        """In the file."""

    def add(self, packets: Iterable[Packet]) -> None:
        for packet in packets:
            assert packet.pts is not None
            assert packet.pts == packet.dts, f"{packet} is decoded at another time than it is shown"
            self._records.append(_Record(packet.pts, packet.duration or 0, packet.is_keyframe, bytes(packet)))
            self.held_bytes += packet.size

    def keep(self, flush: bool) -> None:
        """Put what is held into the file, and see it safe on the disk where `flush` says so. Raises: OSError."""
        with _for_appending(self._path, self.kept_bytes) as file:
            for record in self._records:
                file.write(RECORD.pack(record.pts, record.duration, record.is_keyframe, len(record.content)))
                file.write(record.content)
            file.flush()
            if flush:
                os.fsync(file.fileno())
            self.kept_bytes = file.tell()
        self._records.clear()
        self.held_bytes = 0

    def __iter__(self) -> Iterator[Packet]:
        """All of them, from the first one on. Raises: OSError."""
        for record in self._read():
            yield self._packet(record)
        for record in self._records:
            yield self._packet(record)

    def _read(self) -> Iterator[_Record]:
        if not self.kept_bytes:
            return
        with self._path.open("rb", buffering=PIECE) as file:
            while file.tell() < self.kept_bytes:
                pts, duration, is_keyframe, size = RECORD.unpack(file.read(RECORD.size))
                yield _Record(pts, duration, is_keyframe, file.read(size))

    def _packet(self, record: _Record) -> Packet:
        packet = av.Packet(record.content)
        packet.stream = self._stream
        packet.time_base = self._stream.time_base
        packet.pts = packet.dts = record.pts
        packet.duration, packet.is_keyframe = record.duration, record.is_keyframe
        return packet


def _for_appending(path: Path, kept_bytes: int) -> BinaryIO:
    """The file, of which only the beginning is left, open behind that."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, kept_bytes)
        os.lseek(descriptor, kept_bytes, os.SEEK_SET)
        return os.fdopen(descriptor, "wb")
    except BaseException:
        os.close(descriptor)
        raise
