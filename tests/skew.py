"""The reader at the far side: how far picture and sound are apart in a stream, and what else is wrong with it.

The model of the tests flashes where it hears a click (`toy_model.flash`), so each flash and its click belong to one
moment. This reader decodes anything PyAV opens (file, playlist, RTMP, a recording that is still growing), finds both,
and measures. Nothing is kept but numbers: an hour takes 0.1 MB, and of an FLV 4 MB more, since FFmpeg makes an index.

    python tests/skew.py TARGET [SECONDS]      prints what it saw as JSON
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from numpy.typing import NDArray

WHITE = 160
"""Mean luma of a flash's upper quarter, from here up."""

BLACK = 24
"""Mean luma of a black picture, up to here; 16 is the blackest."""

LOUD = 0.45
"""A click reaches this, speech does not."""

CLICKS_APART_S = 0.15
PAIR_WITHIN_S = 0.45
"""A flash and a click further apart do not belong together."""

SAME = 0.2
"""Mean difference of luma between two decoded pictures, up to which they are the same picture.

At 300 kbit/s a picture that stands still is refined by up to 0.18 a frame, by 0.01 at 2500; the idle host moves by 0.27
and more in all frames but one of twenty.
"""

FROZEN_S = 0.2
SILENT = 1e-3
KEPT = 50
"""How many of the longest gaps and freezes are listed; all are counted."""


@dataclass
class Worst:
    """The longest of many stretches of time, and how many there were: (at_s, length_s)."""

    count: int = 0
    max_s: float = 0.0
    _heap: list[tuple[float, float]] = field(default_factory=list)

    def add(self, at_s: float, length_s: float) -> None:
        self.count += 1
        self.max_s = max(self.max_s, length_s)
        (heapq.heappush if len(self._heap) < KEPT else heapq.heappushpop)(self._heap, (length_s, at_s))

    @property
    def listed(self) -> list[tuple[float, float]]:
        """In order of time."""
        return sorted((at, length) for length, at in self._heap)


@dataclass
class Track:
    """The timestamps of one stream, in seconds.

    gaps: time in which nothing is shown or heard, between a packet's end and the next one's start; overlap_s: the most
    that a packet began before the end of the one before; backward: packets whose dts was not above the last one's.
    """

    packets: int = 0
    first_s: float | None = None
    end_s: float = 0.0
    gaps: Worst = field(default_factory=Worst)
    overlap_s: float = 0.0
    backward: int = 0
    keyframes: int = 0
    keyframe_distance_s: float = 0.0
    _dts: int | None = None
    _keyframe_s: float | None = None

    def take(self, packet: av.Packet, length_s: float, tolerance_s: float) -> None:
        """Look at one packet, which should last `length_s`; differences up to the tolerance are rounding."""
        assert packet.pts is not None
        assert packet.dts is not None
        start = float(packet.pts * packet.time_base)
        self.packets += 1
        self.backward += self._dts is not None and packet.dts <= self._dts
        self._dts = packet.dts
        if self.first_s is None:
            self.first_s = start
        elif start - self.end_s > tolerance_s:
            self.gaps.add(self.end_s, start - self.end_s)
        else:
            self.overlap_s = max(self.overlap_s, self.end_s - start)
        self.end_s = start + length_s
        if packet.is_keyframe:
            self.keyframes += 1
            if self._keyframe_s is not None:
                self.keyframe_distance_s = max(self.keyframe_distance_s, start - self._keyframe_s)
            self._keyframe_s = start


@dataclass(frozen=True)
class Skew:
    """How far the picture is behind the sound, in ms; negative: ahead of it.

    ms: of every pair, in order of time. p95 and max are of its size whatever its sign; drift: ms an hour, by a line
    through all pairs, which means something from some minutes up.
    """

    at_s: NDArray[np.float64]
    ms: NDArray[np.float64]

    @property
    def pairs(self) -> int:
        return len(self.ms)

    @property
    def p50(self) -> float:
        """The median, with its sign."""
        return float(np.median(self.ms)) if self.pairs else float("nan")

    @property
    def p95(self) -> float:
        return float(np.quantile(np.abs(self.ms), 0.95)) if self.pairs else float("nan")

    @property
    def max(self) -> float:
        return float(np.abs(self.ms).max()) if self.pairs else float("nan")

    @property
    def drift(self) -> float:
        if self.pairs < 2:
            return 0.0
        return float(np.polyfit(self.at_s, self.ms, 1)[0] * 3600)


@dataclass
class Reading:
    """What was seen of a stream so far; it may be looked at while the reader is at work.

    Times are those of the stream, in seconds. flashes, clicks: when the picture shows the moment of a click, and when
    the sound clicks. freezes: how long one picture stayed, from FROZEN_S up; silences: stretches without any sound.
    arrivals: for a recording that grows, when each flash had arrived (monotonic seconds, same order), else empty.
    ended: "end", "enough" (of what was asked for), "stopped", or what FFmpeg said; None: still reading.
    """

    video: Track = field(default_factory=Track)
    audio: Track = field(default_factory=Track)
    flashes: array[float] = field(default_factory=lambda: array("d"))
    clicks: array[float] = field(default_factory=lambda: array("d"))
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    freezes: Worst = field(default_factory=Worst)
    silences: Worst = field(default_factory=Worst)
    frames: int = 0
    black: int = 0
    broken: int = 0
    size: tuple[int, int] = (0, 0)
    codecs: tuple[str, ...] = ()
    first_arrival_s: float | None = None
    ended: str | None = None

    @property
    def skew(self) -> Skew:
        """Of the flashes and clicks that belong together: each is the other's nearest."""
        flashes, clicks = np.sort(self.flashes), np.sort(self.clicks)
        if not len(flashes) or not len(clicks):
            return Skew(np.zeros(0), np.zeros(0))
        click = _nearest(flashes, clicks)
        flash = _nearest(clicks, flashes)
        paired = (flash[click] == np.arange(len(flashes))) & (np.abs(flashes - clicks[click]) <= PAIR_WITHIN_S)
        times = clicks[click[paired]]
        return Skew(times, (flashes[paired] - times) * 1000)

    @property
    def lone_flashes(self) -> int:
        """Flashes without a click."""
        return len(self.flashes) - self.skew.pairs

    @property
    def lone_clicks(self) -> int:
        """Clicks without a flash: the model never saw them, or the picture came too late and was dropped."""
        return len(self.clicks) - self.skew.pairs

    def summary(self) -> dict[str, Any]:
        """The figures, for a report."""
        skew = self.skew
        found: dict[str, Any] = {
            "ended": self.ended,
            "size": self.size,
            "codecs": self.codecs,
            "frames": self.frames,
            "video_s": self.video.end_s - (self.video.first_s or 0.0),
            "audio_s": self.audio.end_s - (self.audio.first_s or 0.0),
            "pairs": skew.pairs,
            "skew_p50_ms": skew.p50,
            "skew_p95_ms": skew.p95,
            "skew_max_ms": skew.max,
            "drift_ms_per_h": skew.drift,
            "lone_flashes": self.lone_flashes,
            "lone_clicks": self.lone_clicks,
            "black_frames": self.black,
            "freezes": self.freezes.count,
            "longest_freeze_s": self.freezes.max_s,
            "longest_silence_s": self.silences.max_s,
            "video_gaps": self.video.gaps.count,
            "video_gap_max_s": self.video.gaps.max_s,
            "audio_gaps": self.audio.gaps.count,
            "audio_gap_max_s": self.audio.gaps.max_s,
            "backward_dts": self.video.backward + self.audio.backward,
            "keyframe_distance_s": self.video.keyframe_distance_s,
            "broken_packets": self.broken,
        }
        for name, value in found.items():
            if isinstance(value, float):
                found[name] = None if math.isnan(value) else round(value, 4)
        return found


@dataclass(frozen=True)
class Picture:
    """One decoded picture for who wants to look closer: its luma [height, width], which is only lent.

    arrived_s: as in `Reading.arrivals`, or the time at which it was decoded.
    """

    time_s: float
    arrived_s: float
    luma: NDArray[np.uint8]


class Tail:
    """A file that is still being written, as a file to read from: at its end it waits for more.

    A recording of a server has as much in it as has arrived, so this knows when each byte came (to LOOK_EVERY_S).
    """

    LOOK_EVERY_S = 0.003

    def __init__(self, path: Path, ended: Callable[[], bool]) -> None:
        self._file = path.open("rb")
        self._ended = ended
        self._at = 0
        self._size = 0
        self._grown: deque[tuple[int, float]] = deque()

    def read(self, count: int) -> bytes:
        """At least one byte, or none at the very end."""
        while True:
            # Asked before looking: what was written until then is still read.
            over = self._ended()
            size = os.fstat(self._file.fileno()).st_size
            if size > self._size:
                self._size = size
                self._grown.append((size, time.monotonic()))
            if size > self._at or over:
                data = self._file.read(min(count, size - self._at))
                self._at += len(data)
                return data
            time.sleep(self.LOOK_EVERY_S)

    def arrived_at(self, offset: int) -> float:
        """When the file had reached that many bytes. To be asked in rising order."""
        while len(self._grown) > 1 and self._grown[0][0] < offset:
            self._grown.popleft()
        return self._grown[0][1]

    def close(self) -> None:
        self._file.close()


def read(
    target: str | Path | Tail,
    *,
    fps: float = 25.0,
    seconds: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    options: dict[str, str] | None = None,
    open_timeout_s: float = 10.0,
    read_timeout_s: float = 10.0,
    look: Callable[[Picture], object] | None = None,
    reading: Reading | None = None,
) -> Reading:
    """Read a stream to its end.

    Args:
        target: a path, a URL, or a growing file. fps: what it should have, for its gaps.
        seconds: of the stream, after which it is enough; stop: asked at each packet, ends the reading when true.
        look: called with each picture. reading: the one to write into, so that it can be watched.
    What goes wrong is in `ended` of the result; what was read up to there is in it too.
    """
    reading = Reading() if reading is None else reading
    try:
        source: Any = target if isinstance(target, Tail) else str(target)
        timeout = None if isinstance(target, Tail) else (open_timeout_s, read_timeout_s)
        with av.open(source, options=options or {}, timeout=timeout) as container:
            reading.ended = _Eye(container, reading, target, fps, look).run(seconds, stop)
    except (av.error.FFmpegError, OSError) as error:
        reading.ended = error.strerror or str(error) or type(error).__name__
    return reading


class _Eye:
    """What `read` remembers from one picture and one stretch of sound to the next."""

    def __init__(
        self,
        container: av.container.InputContainer,
        reading: Reading,
        target: object,
        fps: float,
        look: Callable[[Picture], object] | None,
    ) -> None:
        self._container, self._reading, self._look = container, reading, look
        self._tail = target if isinstance(target, Tail) else None
        self._frame_s = 1 / fps
        self._white = False
        self._small: NDArray[np.uint8] | None = None
        self._since_s = 0.0
        self._shown_until_s = 0.0
        self._last_loud_s = float("-inf")
        self._silent_since_s: float | None = None
        self._heard_until_s = 0.0

    def run(self, seconds: float | None, stop: Callable[[], bool]) -> str:
        """How it ended."""
        reading = self._reading
        streams = [*self._container.streams.video[:1], *self._container.streams.audio[:1]]
        reading.codecs = tuple(stream.codec_context.name for stream in streams)
        for stream in streams:
            stream.codec_context.thread_count = 1
        ended = "end"
        for packet in self._container.demux(streams):
            if stop():
                ended = "stopped"
                break
            if packet.dts is None or packet.pts is None:
                self._decode(packet)
                continue
            arrived_s = self._arrival(packet)
            self._take(packet)
            self._decode(packet, arrived_s)
            if seconds is not None and min(reading.video.end_s, reading.audio.end_s) >= seconds:
                ended = "enough"
                break
        self._close_stretches()
        return ended

    def _take(self, packet: av.Packet) -> None:
        # Milliseconds are all that FLV has. A packet of sound is as long as its samples, whatever was rounded.
        tolerance_s = 0.0021
        if packet.stream.type == "video":
            self._reading.video.take(packet, self._frame_s, tolerance_s)
        else:
            codec = cast(av.AudioCodecContext, packet.stream.codec_context)
            length_s = codec.frame_size / codec.sample_rate if codec.frame_size else self._length(packet)
            self._reading.audio.take(packet, length_s, tolerance_s)

    @staticmethod
    def _length(packet: av.Packet) -> float:
        return float((packet.duration or 0) * packet.time_base)

    def _arrival(self, packet: av.Packet) -> float:
        if self._tail is None or packet.pos is None:
            arrived = time.monotonic()
        else:
            arrived = self._tail.arrived_at(packet.pos + packet.size)
        if self._reading.first_arrival_s is None and packet.is_keyframe and packet.stream.type == "video":
            self._reading.first_arrival_s = arrived
        return arrived

    def _decode(self, packet: av.Packet, arrived_s: float = 0.0) -> None:
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            self._reading.broken += 1
            return
        for frame in frames:
            if frame.pts is None:
                continue
            if isinstance(frame, av.VideoFrame):
                self._see(frame, arrived_s)
            else:
                self._hear(cast(av.AudioFrame, frame))

    def _see(self, frame: av.VideoFrame, arrived_s: float) -> None:
        reading = self._reading
        time_s = _time(frame)
        luma = _luma(frame)
        reading.frames += 1
        reading.size = (frame.width, frame.height)
        top = float(luma[: frame.height // 4 : 2, ::2].mean())
        white = top >= WHITE
        if white and not self._white:
            reading.flashes.append(time_s + _vernier(luma, top) * self._frame_s)
            if self._tail is not None:
                reading.arrivals.append(arrived_s)
        self._white = white
        step = max(1, frame.width // 64)
        small = luma[::step, ::step]
        reading.black += not white and float(small.mean()) <= BLACK
        if self._small is None:
            self._since_s = time_s
        elif np.abs(small.astype(np.int16) - self._small).mean() > SAME:
            self._note_freeze(time_s)
            self._since_s = time_s
        self._small = small.copy()
        self._shown_until_s = time_s + self._frame_s
        if self._look is not None:
            self._look(Picture(time_s, arrived_s, luma))

    def _note_freeze(self, until_s: float) -> None:
        if until_s - self._since_s >= FROZEN_S:
            self._reading.freezes.add(self._since_s, until_s - self._since_s)

    def _hear(self, frame: av.AudioFrame) -> None:
        reading = self._reading
        start_s = _time(frame)
        sound = frame.to_ndarray()
        if sound.dtype.kind == "i":
            sound = sound / np.float32(np.iinfo(sound.dtype).max)
        # Packed formats come as one row with the channels in turn, planar ones as a row for each.
        rows = sound.reshape(-1, len(frame.layout.channels)).T if len(sound) == 1 else sound
        level = np.abs(rows).max(0)
        peak = float(level.max(initial=0))
        end_s = start_s + frame.samples / frame.sample_rate
        if peak >= LOUD:
            for index in np.flatnonzero(level >= LOUD):
                at_s = start_s + float(index) / frame.sample_rate
                if at_s - self._last_loud_s > CLICKS_APART_S:
                    reading.clicks.append(at_s)
                self._last_loud_s = at_s
        if peak > SILENT:
            self._note_silence(start_s)
        elif self._silent_since_s is None:
            self._silent_since_s = start_s
        self._heard_until_s = end_s

    def _note_silence(self, until_s: float) -> None:
        if self._silent_since_s is not None:
            self._reading.silences.add(self._silent_since_s, until_s - self._silent_since_s)
            self._silent_since_s = None

    def _close_stretches(self) -> None:
        if self._small is not None:
            self._note_freeze(self._shown_until_s)
        self._note_silence(self._heard_until_s)


class Watch:
    """Reads a stream in a thread while it goes on: `reading` grows meanwhile. Use as a context manager.

    A growing file is read to what is there when the watch ends.
    """

    def __init__(self, target: str | Path, *, growing: bool = False, **how: Any) -> None:
        self.reading = Reading()
        self._over = threading.Event()
        self._target, self._growing, self._how = target, growing, how
        self._thread = threading.Thread(target=self._run, name="far side", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self, limit_s: float = 20.0) -> Reading:
        """Stop, and give what was seen."""
        self._over.set()
        self._thread.join(limit_s)
        return self.reading

    def _run(self) -> None:
        if self._growing:
            with contextlib.closing(Tail(Path(self._target), self._over.is_set)) as tail:
                read(tail, reading=self.reading, **self._how)
        else:
            read(self._target, stop=self._over.is_set, reading=self.reading, **self._how)


def _time(frame: av.VideoFrame | av.AudioFrame) -> float:
    assert frame.pts is not None
    return float(frame.pts * Fraction(frame.time_base))


def _luma(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """[height, width], without a copy where the format keeps luma apart."""
    if frame.format.name not in ("yuv420p", "yuvj420p", "nv12", "yuv444p", "gray"):
        frame = frame.reformat(format="yuv420p")
    plane = frame.planes[0]
    rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width]


def _vernier(luma: NDArray[np.uint8], white: float) -> float:
    """The part of a flash's frame that had passed when it clicked: how much of its middle is dark."""
    height = len(luma)
    middle = float(luma[7 * height // 16 : 9 * height // 16].mean())
    return min(1.0, max(0.0, (white - middle) / (white - 16)))


def _nearest(these: NDArray[np.float64], among: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each of these the index of the nearest among others, which are sorted."""
    after = np.searchsorted(among, these).clip(1, max(1, len(among) - 1))
    if len(among) == 1:
        return np.zeros(len(these), np.int64)
    left = these - among[after - 1] <= among[after] - these
    return np.where(left, after - 1, after)


def main() -> None:
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(read(sys.argv[1], seconds=seconds).summary(), indent=2))


if __name__ == "__main__":
    main()
