"""Packets in, an MP4 out: fragmented while it grows, rewritten for players when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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


class Muxer:
    """A fragmented MP4 that is playable up to its last fragment at any moment, even after kill -9.

    Args:
        path: opened and emptied at the first packet.
        streams: what the packets come from (`Encoder.streams`).
        metadata: tags of the file; `encoding_tool` is the software.

    Every method raises av.error.FFmpegError (an OSError) when the disk does.
    """

    def __init__(self, path: Path, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        self._container = _open_output(path, FRAGMENTED, metadata)
        self._outputs = {stream.index: self._container.add_stream_from_template(stream) for stream in streams}

    def mux(self, packets: Iterable[Packet]) -> None:
        """Write packets; they stay as they were, so another muxer can have them too."""
        for packet in packets:
            # A copy: mux() rescales the packet it is given, in place, to the time base of its container.
            copy = av.Packet(bytes(packet))
            copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
            copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
            copy.stream = self._outputs[packet.stream.index]
            self._container.mux(copy)

    def close(self) -> None:
        """Write what is buffered and the index of the fragments. Closing twice is harmless."""
        self._container.close()


def rewrite_for_players(part: Path, whole: Path, metadata: Mapping[str, str]) -> None:
    """Copy a finished fragmented MP4 to a plain one with its index first (faststart), and see it safe on the disk."""
    with av.open(f"file:{part}") as source, _open_output(whole, {"movflags": "+faststart"}, metadata) as container:
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


def _open_output(path: Path, options: Mapping[str, str], metadata: Mapping[str, str]) -> OutputContainer:
    # "file:" keeps a colon in a file name from being read as a protocol.
    container = av.open(f"file:{path}", "w", format="mp4", options=dict(options))
    container.metadata.update(metadata)
    return container
