"""Where packets go: `open_sink` turns what a user wrote after --to into a Sink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from av.packet import Packet
from av.stream import Stream

from streaming.files import FILE_TYPES, FileSink, HlsSink, SegmentSink
from streaming.network import CONTAINERS, LookUp, NetworkSink
from streaming.sink import Sink, SinkError, TargetAbsent, TargetRefused

__all__ = [
    "FileSink",
    "HlsSink",
    "NetworkSink",
    "NullSink",
    "SegmentSink",
    "Sink",
    "SinkError",
    "TargetAbsent",
    "TargetRefused",
    "open_sink",
]

KINDS = (
    f"a file ({', '.join(FILE_TYPES)}), segment:SECONDS:FILE.mp4, a playlist (.m3u8), event:PLAYLIST.m3u8, "
    "rtmp://, rtmps://, srt:// or null://"
)


def open_sink(target: str, overwrite: bool = False, look_up: LookUp | None = None) -> Sink:
    """The sink for a path or URL, not opened yet. look_up: see `NetworkSink`.

        FILE.mp4                  one file
        segment:SECONDS:FILE.mp4  files of that length, FILE-0001.mp4 and so on, or a name with % fields for strftime
        LIST.m3u8                 HLS, the last segments of it
        event:LIST.m3u8           HLS, all of it
        rtmp://HOST/APPLICATION/KEY, rtmps://..., srt://...
        null://                   nowhere

    Raises: SinkError: a scheme or file type that nobody here writes.
    """
    scheme, separator, _ = target.partition("://")
    if separator and scheme.isalnum():
        if scheme == "file":
            return _on_disk(urlsplit(target).path, overwrite)
        if scheme == "null":
            return NullSink()
        if scheme in CONTAINERS:
            return NetworkSink(target, look_up=look_up)
        # Only the scheme: what follows may hold a stream key.
        raise SinkError(f"{scheme}://: no such output; there is {KINDS}")
    return _on_disk(target, overwrite)


def _on_disk(target: str, overwrite: bool) -> Sink:
    kind, _, rest = target.partition(":")
    if kind == "segment":
        length, _, name = rest.partition(":")
        try:
            seconds = float(length)
        except ValueError:
            seconds = 0.0
        if not 1 <= seconds < float("inf") or not name:
            raise SinkError(
                f"{target}: write segment:SECONDS:FILE.mp4, such as segment:600:show.mp4; at least 1 second"
            )
        return SegmentSink(Path(name), seconds)
    if kind == "event" and rest.lower().endswith(".m3u8"):
        return HlsSink(Path(rest), event=True, overwrite=overwrite)
    if target.lower().endswith(".m3u8"):
        return HlsSink(Path(target), overwrite=overwrite)
    return FileSink(Path(target), overwrite)


class NullSink:
    """Counts what it is given and keeps nothing: for measuring."""

    live: ClassVar[bool] = False
    pending_s, failed = 0.0, False

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
