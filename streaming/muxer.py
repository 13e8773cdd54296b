"""Packets in, a container out: an MP4 that is fragmented while it grows and rewritten when it is whole, or bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream

FRAGMENT_MS = 500
"""A kill loses at most this much of the finished packets, beside what x264 still looks ahead at."""

# delay_moov: the header waits for the first fragment, so that it can say where the sound's encoder delay ends. Without
# it libavformat shifts the picture by those 21 ms instead.
FRAGMENTED = {
    "movflags": "+frag_keyframe+empty_moov+delay_moov+default_base_moof",
    "frag_duration": str(FRAGMENT_MS * 1000),
    "flush_packets": "1",
}


FRAGMENT_PER_KEYFRAME = {"movflags": "+frag_keyframe+empty_moov+delay_moov+default_base_moof+skip_trailer"}

FLV = {"flvflags": "no_duration_filesize", "flush_packets": "1"}

MPEGTS = {"flush_packets": "1"}


class ByteBuffer:
    """What a muxer has written and nobody has taken yet."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


class Muxer:
    """Packets of one encoder in one container, which begins at the first picture it is given.

    That picture is at time 0, and the distance of sound and picture stays as it was to the sample. The stream's own
    beginning keeps the encoder delay of its sound, which an MP4 says to its players; where a container begins later,
    sound from before its first picture is left out.

    Args:
        target: a file, opened and emptied at the first packet, or a buffer for the bytes.
        streams: what the packets come from (`Encoder.streams`).
        metadata: tags; `encoding_tool` is the software.
        container, options: libavformat's names. The default is a fragmented MP4 that is playable up to its last
            fragment at any moment, even after kill -9.

    Every method raises av.error.FFmpegError (an OSError) when the disk does.
    """

    def __init__(
        self,
        target: Path | ByteBuffer,
        streams: Sequence[Stream],
        metadata: Mapping[str, str],
        container: str = "mp4",
        options: Mapping[str, str] = FRAGMENTED,
    ) -> None:
        self._container = _open_output(target, container, options, metadata)
        self._outputs = {stream.index: self._container.add_stream_from_template(stream) for stream in streams}
        self._begin: Fraction | None = None
        self._held: list[Packet] = []

    def mux(self, packets: Iterable[Packet]) -> None:
        """Write packets; they stay as they were, so another muxer can have them too."""
        for packet in packets:
            if self._begin is None:
                if packet.stream.type != "video":
                    # x264 looks ahead, so the sound of a picture may come before it. Never more than that much.
                    self._held.append(packet)
                    continue
                self._begin = time_of(packet)
                self._write(packet)
                for held in self._held:
                    self._write(held)
                self._held.clear()
            else:
                self._write(packet)

    def close(self) -> None:
        """Write what is buffered and what ends the container. Closing twice is harmless."""
        self._container.close()

    def _write(self, packet: Packet) -> None:
        assert self._begin is not None
        if self._begin and time_of(packet) < self._begin:
            return
        assert packet.pts is not None
        assert packet.dts is not None
        shift = round(self._begin / packet.time_base)
        # A copy: mux() rescales the packet it is given, in place, to the time base of its container.
        copy = av.Packet(bytes(packet))
        copy.pts, copy.dts, copy.duration = packet.pts - shift, packet.dts - shift, packet.duration
        copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
        copy.stream = self._outputs[packet.stream.index]
        self._container.mux(copy)


def time_of(packet: Packet) -> Fraction:
    """When a packet is shown or heard, in seconds of its encoder; there are no B-frames, so it is decoded then too."""
    assert packet.pts is not None
    return packet.pts * packet.time_base


def length_s(packets: Iterable[Packet]) -> float:
    """Seconds of stream in these packets: the time base of a picture is how long it is shown."""
    return sum(float(packet.time_base) for packet in packets if packet.stream.type == "video")


def rewrite_for_players(part: Path, whole: Path, metadata: Mapping[str, str]) -> None:
    """Copy a finished fragmented MP4 to a plain one with its index first (faststart), and see it safe on the disk."""
    with (
        av.open(f"file:{part}") as source,
        _open_output(whole, "mp4", {"movflags": "+faststart"}, metadata) as container,
    ):
        outputs = {stream.index: container.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = outputs[packet.stream.index]
                container.mux(packet)
    flush_to_disk(whole)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder, so that a rename in it is kept."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_output(
    target: Path | ByteBuffer, container: str, options: Mapping[str, str], metadata: Mapping[str, str]
) -> OutputContainer:
    # "file:" keeps a colon in a file name from being read as a protocol.
    where = f"file:{target}" if isinstance(target, Path) else target
    output = av.open(where, "w", format=container, options=dict(options))
    output.metadata.update(metadata)
    return output
