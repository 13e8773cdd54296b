"""Finished files, read back."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np


@dataclass
class Mp4:
    """What is in a file: pts in seconds of every frame; brightness (mean luma) of every frame; sound [S, channels]."""

    times: list[float]
    brightness: np.ndarray
    sound: np.ndarray
    sound_start: float
    metadata: dict[str, str]
    codecs: tuple[str, str]
    pix_fmt: str
    colours: tuple[int, int, int, int]
    duration_s: float

    @property
    def frames(self) -> int:
        return len(self.times)

    @property
    def sound_s(self) -> float:
        return len(self.sound) / 48_000

    def flashes(self) -> list[float]:
        """When the picture turns white, in seconds."""
        white = self.brightness > 160
        return [self.times[i] for i in np.flatnonzero(white & ~np.r_[False, white[:-1]])]

    def clicks(self) -> list[float]:
        """When the sound clicks, in seconds; silence of 0.1 s parts one click from the next."""
        loud = np.flatnonzero(np.abs(self.sound).max(1) > 0.4)
        first = loud[np.r_[True, np.diff(loud) > 4800]] if len(loud) else loud
        return [float(sample / 48_000 + self.sound_start) for sample in first]


def read_mp4(path: Path, cut_off: bool = False) -> Mp4:
    """Decode the whole file; of one that is cut off, all that comes before the cut."""
    times, brightness, sounds = [], [], []
    sound_start = None
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        for frame in _decoded(container, cut_off):
            if isinstance(frame, av.VideoFrame):
                times.append(frame.time)
                brightness.append(frame.to_ndarray(format="gray").mean())
                colours = (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range)
            else:
                sound_start = frame.time if sound_start is None else sound_start
                sounds.append(frame.to_ndarray().T)
        return Mp4(
            times=times,
            brightness=np.array(brightness),
            sound=np.concatenate(sounds),
            sound_start=sound_start or 0.0,
            metadata=dict(container.metadata),
            codecs=(video.codec_context.name, audio.codec_context.name),
            pix_fmt=video.codec_context.pix_fmt or "",
            colours=tuple(int(colour) for colour in colours),
            duration_s=container.duration / 1e6,
        )


def _decoded(container: av.container.InputContainer, cut_off: bool) -> Iterator[av.VideoFrame | av.AudioFrame]:
    for packet in container.demux(video=0, audio=0):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            if not cut_off:
                raise


def boxes(path: Path) -> list[str]:
    """The names of the top-level boxes, in order."""
    names = []
    data = path.read_bytes()
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        names.append(name.decode())
        if size == 1:
            (size,) = struct.unpack(">Q", data[at + 8 : at + 16])
        if size == 0:
            break
        at += size
    return names


def write_sound(path: Path, sound: np.ndarray, sample_rate: int) -> Path:
    """A 16-bit sound file of float samples [n] or [n, channels]."""
    import soundfile

    soundfile.write(path, sound, sample_rate)
    return path


def clicks_at(seconds: Iterable[float], length_s: float, sample_rate: int = 16_000) -> np.ndarray:
    """Quiet noise with clicks (5 ms of full scale) at these times."""
    sound = np.random.default_rng(0).normal(0, 0.01, round(length_s * sample_rate))
    for second in seconds:
        at = round(second * sample_rate)
        sound[at : at + sample_rate // 200] = 0.9
    return sound.astype(np.float32)
