"""Sound as people bring it, to samples as a model hears them: files of any kind, and bytes of PCM.

Everything streams: a file is opened, decoded, mixed down and resampled piece by piece, so an hour costs no more memory
than a second. Files are opened by PyAV (FFmpeg) and resampled by soxr's streaming resampler, whose pieces are together
exactly what it gives for the whole.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
import soxr
from av.stream import Discard
from numpy.typing import NDArray

from audio.chunk import AudioChunk
from audio.errors import AvatardError

Samples = NDArray[np.float32]

MAX_DURATION_S = 24 * 3600.0
PIECE_S = 0.25  # sound given to the resampler at once: large enough that Python's share of the work is small
GAP_S = 0.05  # a smaller hole between two timestamps is jitter of a recorder's clock
LONGEST_GAP_S = 10.0  # a larger hole is a broken timestamp rather than lost sound
MAX_CHANNELS = 64
MAX_PICTURE_PIXELS = 40_000_000  # of a film whose sound is wanted: 8K and a little
LEAST_BITS_PER_S = 200  # of any codec, silence included: what claims less than this lies about its length


class AudioError(AvatardError):
    """The sound cannot be used; the line says why and what to do."""


@dataclass
class SoundReport:
    """What was wrong with a sound that could be used all the same; grows while it is decoded."""

    decoded_s: float = 0.0
    skipped_packets: int = 0  # could not be decoded
    filled_s: float = 0.0  # silence put where sound was lost
    not_numbers: int = 0  # samples that were NaN or infinite, now silence
    clamped: int = 0  # samples beyond full scale, now at full scale
    peak: float = 0.0
    missing_s: float = 0.0  # how much shorter than the file announces
    broke_off: str = ""  # why reading ended before the end of the file

    def warnings(self) -> list[str]:
        """One line for each thing a person may want to know; empty for a sound in good order."""
        lines = []
        if self.broke_off:
            lines.append(f"reading broke off after {self.decoded_s:.2f} s ({self.broke_off}); what came before is used")
        elif self.missing_s > 0:
            lines.append(
                f"{self.missing_s:.2f} s shorter than the file announces, cut off perhaps; what is there is used"
            )
        if self.skipped_packets:
            lines.append(f"{self.skipped_packets} damaged packets skipped")
        if self.filled_s > 0:
            lines.append(f"{self.filled_s:.2f} s of lost sound filled with silence")
        if self.not_numbers:
            lines.append(f"{self.not_numbers} samples were NaN or infinite; they are silence now")
        if self.clamped:
            hint = "; it looks like integers stored as floats, divide them by 32768" if self.peak > 100 else ""
            lines.append(f"{self.clamped} samples beyond full scale (peak {self.peak:.3g}) clamped to it{hint}")
        if self.decoded_s > 0 and self.peak == 0:
            lines.append("all silence")
        return lines


@dataclass
class SoundFile:
    """A file whose sound can be decoded; made by `open_sound`, holds nothing open.

    declared_s is the length its container claims, None where it claims none: good for a progress bar, not to be relied
    on. `report` tells of the latest pass of `chunks` and is complete when that has ended.
    """

    path: Path
    sample_rate: int
    channels: int
    codec: str
    declared_s: float | None
    max_duration_s: float = MAX_DURATION_S
    report: SoundReport = field(default_factory=SoundReport, compare=False)

    def chunks(self, sample_rate: int) -> Iterator[AudioChunk]:
        """Decode the whole file from its beginning to mono at that rate, chunk by chunk, about a quarter second each.

        Raises: AudioError: the file is longer than max_duration_s (after that much sound), or can no longer be read.
        """
        self.report = SoundReport()
        for samples in _resampled(_mixed(_decoded(self, self.report), 1), 1, sample_rate):
            yield AudioChunk(samples[:, 0], sample_rate)

    def original(self, sample_rate: int = 48_000, max_channels: int = 2) -> SoundReader:
        """The sound as it was, for the listener: up to stereo, aligned to `chunks` sample by sample.

        A pass of its own over the file, read as it is asked for.
        """
        channels = min(self.channels, max_channels, 2)
        pieces = _resampled(_mixed(_decoded(self, SoundReport()), channels), channels, sample_rate)
        return SoundReader(pieces, sample_rate, channels)


class SoundReader:
    """Samples in the amounts a reader wants, from pieces of any length."""

    def __init__(self, pieces: Iterator[Samples], sample_rate: int, channels: int) -> None:
        self.sample_rate = sample_rate
        self.channels = channels
        self._pieces = pieces
        self._rest: Samples = np.zeros((0, channels), np.float32)

    def read(self, samples: int) -> Samples:
        """The next samples, float32 [n, channels]: as many as asked for, fewer at the end, none after it."""
        got, ready = [self._rest], len(self._rest)
        while ready < samples and (piece := next(self._pieces, None)) is not None:
            got.append(piece)
            ready += len(piece)
        whole = np.concatenate(got)
        self._rest = whole[samples:].copy()
        return whole[:samples]

    def close(self) -> None:
        """Close the file; `read` gives what was decoded already, then nothing."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


def open_sound(path: str | os.PathLike[str], max_duration_s: float = MAX_DURATION_S) -> SoundFile:
    """Look into an audio or video file and make sure that there is sound in it, by decoding its first samples.

    Raises: AudioError: missing, a folder, unreadable, empty, not a file FFmpeg can open, without an audio track, with
    nothing in it that can be decoded, or longer than max_duration_s.
    """
    path = Path(path)
    _check_is_file(path)
    report = SoundReport()
    with _open(path) as container:
        stream = _audio_stream(container, path)
        declared_s = _declared_s(container, stream, path)
        first = next(_frames(container, stream, declared_s, report), None)
        if first is None:
            if report.skipped_packets or report.broke_off:
                raise AudioError(f"{path}: {_UNDECODABLE}")
            raise AudioError(f"{path}: the audio track is empty (0 samples); record or export it again")
        sound = SoundFile(
            path=path,
            sample_rate=first.sample_rate,
            channels=len(first.channels),
            codec=stream.codec_context.name,
            declared_s=declared_s,
            max_duration_s=max_duration_s,
        )
    if declared_s is not None and declared_s > max_duration_s:
        raise AudioError(_too_long(sound, f"{_hours(declared_s)} long"))
    return sound


def decode_live(container: Any, name: str, sample_rate: int, report: SoundReport) -> Iterator[AudioChunk]:
    """Decode what a live source sends, from a PyAV container opened for reading: mono chunks, a packet's worth each.

    A hole between two timestamps is not filled, as it is in a file: by the time it is seen it has been heard already.
    It ends where the source does; `report.broke_off` then says why, if that was not its proper end.
    Raises: AudioError: there is no sound in it, told with `name`.
    """
    stream = _audio_stream(container, name)
    for samples in _resampled(_mixed(_frames(container, stream, None, report), 1), 1, sample_rate, live=True):
        yield AudioChunk(samples[:, 0], sample_rate)


# What is between the file and the samples

_UNDECODABLE = "no sound in it could be decoded; it is damaged, protected or no sound file: save it anew as WAV or FLAC"


def _check_is_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise AudioError(f"{path}: is a folder; name one sound file in it")
        if not path.exists():
            raise AudioError(f"{path}: no such file; check the path of the sound")
        if not path.is_file():
            raise AudioError(f"{path}: is a pipe or a device; save the sound to a file first")
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise AudioError(f"{path}: cannot be read ({_reason(error)}); check the path and its permissions") from error
    if size == 0:
        raise AudioError(f"{path}: is empty (0 bytes); record or export the sound again")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An input container over the file and nothing else.

    A Python file rather than a name: a name may be a pattern or an address to FFmpeg, and what looks like a sound file
    may be a playlist that opens other files or addresses of this machine. The white list forbids both.
    """
    try:
        file: BinaryIO = path.open("rb")
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({_reason(error)}); check its permissions") from error
    with file:
        try:
            container = av.open(
                file,
                "r",
                container_options={"protocol_whitelist": "none"},
                # FFmpeg decodes a picture of each track to learn what it is; a small file may hold an enormous one.
                options={"max_pixels": str(MAX_PICTURE_PIXELS)},
                metadata_errors="replace",
            )
        except (av.error.FFmpegError, ValueError) as error:
            raise AudioError(
                f"{path}: is not a sound or video file that FFmpeg can open, or it was cut off; "
                "save it as WAV, FLAC, MP3, Opus or MP4"
            ) from error
        with container:
            yield container


def _audio_stream(container: Any, path: Path | str) -> Any:
    stream = container.streams.best("audio")
    if stream is None:
        kinds = sorted({other.type for other in container.streams})
        if "audio" in kinds:
            raise AudioError(f"{path}: {_UNDECODABLE}")
        what = f"only {' and '.join(kinds)}" if kinds else "nothing"
        raise AudioError(f"{path}: there is no sound in it ({what}); choose a file with an audio track")
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all  # a film's pictures need not be read to hear it
    return stream


def _declared_s(container: Any, stream: Any, path: Path) -> float | None:
    """The length the container claims, or None where it claims none or one its size cannot hold."""
    size = path.stat().st_size
    if stream.duration and stream.time_base:
        declared_s = float(stream.duration * stream.time_base)
    elif container.duration:
        declared_s = container.duration / av.time_base
    else:
        return None
    if declared_s <= 0 or size * 8 / declared_s < LEAST_BITS_PER_S:
        return None
    if container.format.name == "wav":
        declared_s *= _riff_size(path) / size
    return declared_s


def _riff_size(path: Path) -> int:
    """How long a WAV file says it is, in bytes; FFmpeg makes a cut-off one believe it was meant to be so short.

    The length of the file where it says nothing true: a recorder that writes to a pipe leaves a very large number.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(8)
    said = int.from_bytes(header[4:8], "little") + 8
    return said if header[:4] == b"RIFF" and size < said < 2**31 - 2**16 else size


@dataclass(frozen=True)
class _Piece:
    """Some sound as it was decoded: samples float32 [n, channels]; names of the channels as FFmpeg gives them.

    lost_s: how much sound was lost before it.
    """

    samples: Samples
    sample_rate: int
    channels: tuple[str, ...]
    lost_s: float = 0.0


def _frames(container: Any, stream: Any, declared_s: float | None, report: SoundReport) -> Iterator[_Piece]:
    """The sound frame by frame, as the codec cut it. What cannot be decoded is skipped."""
    end_s = math.inf if declared_s is None else declared_s  # a timestamp beyond it is damaged
    origin: Fraction | None = None
    packers: dict[tuple[str, str, int], Any] = {}
    expected: Fraction | None = None
    damaged = False
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, IndexError):
            return  # IndexError: how PyAV (18.1) ends a file in which another track began on the way
        except (av.error.FFmpegError, OSError) as error:
            report.broke_off = _reason(error)
            return
        try:
            frames = [(frame, _float_samples(frame, packers)) for frame in packet.decode() if frame.samples]
        except av.error.EOFError:
            return
        except (av.error.FFmpegError, ValueError):
            report.skipped_packets += 1
            damaged = True
            continue
        for frame, samples in frames:
            lost_s = 0.0
            if frame.pts is not None and frame.time_base:
                begins = frame.pts * frame.time_base
                origin = begins if origin is None else origin
                if expected is not None and begins - origin < end_s:
                    hole = float(begins - expected)
                    if (0.001 if damaged else GAP_S) < hole <= LONGEST_GAP_S:
                        lost_s = hole
                expected = begins
            if expected is not None:
                expected += Fraction(frame.samples, frame.sample_rate)
            damaged = False
            names = tuple(channel.name for channel in frame.layout.channels)
            yield _Piece(_clean(samples, report), frame.sample_rate, names, lost_s)


def _decoded(sound: SoundFile, report: SoundReport) -> Iterator[_Piece]:
    """The file's sound in pieces of PIECE_S; a new piece begins where rate or channels change in mid-file."""
    _check_is_file(sound.path)
    with _open(sound.path) as container:
        stream = _audio_stream(container, sound.path)
        gathered: list[Samples] = []
        names: tuple[str, ...] = ()
        length = rate = 0
        for frame in _frames(container, stream, sound.declared_s, report):
            if gathered and (
                (frame.sample_rate, frame.channels) != (rate, names) or length >= frame.sample_rate * PIECE_S
            ):
                yield _Piece(np.concatenate(gathered), rate, names)
                gathered, length = [], 0
            rate, names = frame.sample_rate, frame.channels
            if frame.lost_s:
                gathered.append(np.zeros((round(frame.lost_s * rate), len(names)), np.float32))
                report.filled_s += frame.lost_s
            gathered.append(frame.samples)
            length = sum(map(len, gathered))
            report.decoded_s += frame.lost_s + len(frame.samples) / rate
            if report.decoded_s > sound.max_duration_s:
                raise AudioError(_too_long(sound, f"more than {_hours(sound.max_duration_s)} long"))
        if gathered:
            yield _Piece(np.concatenate(gathered), rate, names)
    if sound.declared_s is not None and report.decoded_s < sound.declared_s - 0.5:
        report.missing_s = sound.declared_s - report.decoded_s


def _float_samples(frame: Any, packers: dict[tuple[str, str, int], Any]) -> Samples:
    """A frame's samples in [-1, 1] as float32 [n, channels], whatever they are stored as.

    packers: converters for what PyAV cannot hand over, kept from frame to frame.
    Raises: ValueError: the frame tells no sense of itself, as a damaged one does.
    """
    channels = frame.layout.nb_channels
    if not (1 <= channels <= MAX_CHANNELS and _rate_is_sane(frame.sample_rate)):
        raise ValueError(f"{channels} channels at {frame.sample_rate} Hz")
    if frame.format.name not in _SCALES or (frame.format.is_planar and channels >= 8):
        # PyAV (18.1) looks for the end of a list of planes that has none when there are eight: it reads on into memory
        # that is not the frame's, and the process dies. In one plane it cannot.
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form not in packers:
            packers[form] = av.AudioResampler(format="dbl", layout=frame.layout, rate=frame.sample_rate)
        (frame,) = packers[form].resample(frame)
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, channels)
    offset, scale = _SCALES[frame.format.name]
    if scale == 1.0:
        # a double beyond float32's range becomes infinite, and is counted with the others
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    return (values.astype(np.float32) - np.float32(offset)) * np.float32(1 / scale)


_SCALES: dict[str, tuple[float, float]] = {
    name + planar: scale
    for name, scale in {
        "u8": (128.0, 128.0),
        "s16": (0.0, 2.0**15),
        "s32": (0.0, 2.0**31),  # 24 bits are kept in its upper part
        "flt": (0.0, 1.0),
        "dbl": (0.0, 1.0),
    }.items()
    for planar in ("", "p")
}


def _rate_is_sane(sample_rate: int) -> bool:
    return 1000 <= sample_rate <= 1_536_000


def _clean(samples: Samples, report: SoundReport) -> Samples:
    """Samples that are all numbers within full scale; what was not is counted."""
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        broken = ~np.isfinite(samples)
        report.not_numbers += int(broken.sum())
        samples = np.where(broken, np.float32(0), samples)
        peak = float(np.abs(samples).max(initial=0.0))
    report.peak = max(report.peak, peak)
    if peak > 1.0:
        report.clamped += int((np.abs(samples) > 1.0).sum())
        samples = np.clip(samples, -1.0, 1.0)
    return samples


# Mixing and resampling

_SIDE = math.sqrt(0.5)
_MIX: dict[str, tuple[float, float]] = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (_SIDE, _SIDE),
    "FLC": (1.0, 0.0),
    "FRC": (0.0, 1.0),
    "BL": (_SIDE, 0.0),
    "BR": (0.0, _SIDE),
    "SL": (_SIDE, 0.0),
    "SR": (0.0, _SIDE),
    "BC": (0.5, 0.5),
    "LFE": (0.0, 0.0),
    "DL": (1.0, 0.0),
    "DR": (0.0, 1.0),
}


def mix_matrix(names: tuple[str, ...], channels: int) -> Samples:
    """What to multiply samples [n, len(names)] by to have them in `channels` (1 or 2): float32 [len(names), channels].

    The weights are those of ITU-R BS.775 (centre and surround at -3 dB, no LFE), divided by their sum, so that full
    scale in every channel is full scale in the mix and nothing can clip; mono is the average of left and right, so
    stereo to mono is (L + R) / 2. Channels without a known place are averaged.
    """
    if len(names) == channels:
        return np.eye(channels, dtype=np.float32)
    known = all(name in _MIX for name in names)
    weights = np.array([_MIX[name] if known else (1.0, 1.0) for name in names])
    if not weights.any(axis=0).all():
        weights = np.ones_like(weights)
    weights = weights / weights.sum(axis=0)
    if channels == 1:
        weights = weights.mean(axis=1, keepdims=True)
    return weights.astype(np.float32)


def _mixed(pieces: Iterator[_Piece], channels: int) -> Iterator[tuple[Samples, int]]:
    """Each piece mixed to that many channels, with its rate."""
    for piece in pieces:
        if len(piece.channels) == channels:
            yield piece.samples, piece.sample_rate
        else:
            yield piece.samples @ mix_matrix(piece.channels, channels), piece.sample_rate


def _resampled(
    pieces: Iterator[tuple[Samples, int]], channels: int, sample_rate: int, live: bool = False
) -> Iterator[Samples]:
    """The pieces at that rate, float32 [n, channels] in [-1, 1]; together the same as resampling the whole.

    live: they are mono, and come as soon as they can.
    """
    resampler: StreamResampler | LiveResampler | None = None
    for samples, rate in pieces:
        if resampler is None or resampler.from_rate != rate:
            if resampler is not None and len(rest := resampler.flush()):
                yield rest
            resampler = LiveResampler(rate, sample_rate) if live else StreamResampler(rate, sample_rate, channels)
        if len(out := resampler.push(samples)):
            yield out
    if resampler is not None and len(rest := resampler.flush()):
        yield rest


class StreamResampler:
    """soxr's streaming resampler: pieces [n, channels] in, pieces out, kept within full scale.

    Towards 48 kHz it takes long strides: of sound that comes 20 ms at a time it keeps 6 to 37 ms at 16 kHz and 16 to
    175 ms at 8 kHz. Its noise is at -130 dB.
    """

    def __init__(self, from_rate: int, to_rate: int, channels: int) -> None:
        self.from_rate = from_rate
        self.channels = channels
        # equal rates pass through: soxr would only add its delay
        same = from_rate == to_rate
        self._stream = None if same else soxr.ResampleStream(from_rate, to_rate, channels, "float32")

    def push(self, samples: Samples) -> Samples:
        """What is ready after these samples; soxr keeps some milliseconds until it has heard what follows."""
        if self._stream is None or not len(samples):
            return samples
        return _within(self._stream.resample_chunk(np.ascontiguousarray(samples)), self.channels)

    def flush(self) -> Samples:
        """What was kept; the end of the stream."""
        nothing = np.zeros((0, self.channels), np.float32)
        if self._stream is None:
            return nothing
        return _within(self._stream.resample_chunk(nothing, last=True), self.channels)


class LiveResampler:
    """FFmpeg's resampler, for one channel: pieces [n, 1] in, pieces out, kept within full scale.

    It keeps back 16 samples, of the lower rate: 1 ms at 16 kHz, always. Its noise is at -90 dB near the end of the
    band and at -106 dB below 3 kHz.
    """

    FILTER = 32
    """Samples of the lower rate: of fewer it gives nothing, not even at the end."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self.from_rate, self._to_rate = from_rate, to_rate
        same = from_rate == to_rate
        self._stream = None if same else av.AudioResampler(format="flt", layout="mono", rate=to_rate)
        self._came = self._went = 0

    def push(self, samples: Samples) -> Samples:
        """What is ready after these samples."""
        if self._stream is None or not len(samples):
            return samples
        self._came += len(samples)
        made = self._resampled(samples)
        self._went += len(made)
        return made

    def flush(self) -> Samples:
        """What was kept, as if silence followed; the end of the stream."""
        left = round(self._came * self._to_rate / self.from_rate) - self._went
        if self._stream is None or left <= 0:
            return np.zeros((0, 1), np.float32)
        silence = self.FILTER * max(1, math.ceil(self.from_rate / self._to_rate))
        return self._resampled(np.zeros((silence, 1), np.float32))[:left]

    def _resampled(self, samples: Samples) -> Samples:
        assert self._stream is not None
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="flt", layout="mono")
        frame.sample_rate = self.from_rate
        made = [np.zeros((1, 0), np.float32), *(frame.to_ndarray() for frame in self._stream.resample(frame))]
        return _within(np.concatenate(made, axis=1), 1)


def _within(samples: Samples, channels: int) -> Samples:
    # the filter overshoots at steps of full scale
    return np.clip(samples.reshape(-1, channels), -1.0, 1.0)


# Bytes of PCM


@dataclass(frozen=True)
class PcmFormat:
    """How samples lie in a byte stream: the encoding of one, their rate in Hz, and interleaved channels."""

    encoding: str
    sample_rate: int
    channels: int = 1

    def __post_init__(self) -> None:
        if self.encoding not in PCM_ENCODINGS:
            close = get_close_matches(self.encoding.removeprefix("pcm_"), PCM_ENCODINGS, 1)
            hint = f"did you mean '{close[0]}'? There are" if close else "use one of"
            raise AudioError(f"PCM format '{self.encoding}': unknown; {hint} {', '.join(PCM_ENCODINGS)}")
        if not 1000 <= self.sample_rate <= 768_000:
            raise AudioError(f"PCM sample rate {self.sample_rate}: not within 1000 and 768000 Hz")
        if not 1 <= self.channels <= 64:
            raise AudioError(f"PCM channels {self.channels}: not within 1 and 64")

    @classmethod
    def parse(cls, text: str) -> PcmFormat:
        """Read `encoding[:sample_rate[:channels]]`, such as s16le:16000:1; 16000 Hz and mono where not said.

        Raises: AudioError: an unknown encoding, or what is not a number.
        """
        encoding, *numbers = text.strip().lower().split(":")
        try:
            if len(numbers) > 2:
                raise ValueError(text)
            rate, channels = [int(number) for number in numbers] + [16_000, 1][len(numbers) :]
        except ValueError as error:
            raise AudioError(f"PCM format '{text}': not encoding:rate:channels, such as s16le:16000:1") from error
        return cls(encoding, rate, channels)

    def __str__(self) -> str:
        return f"{self.encoding}:{self.sample_rate}:{self.channels}"

    @property
    def bytes_per_frame(self) -> int:
        """Bytes of one sample of every channel."""
        return PCM_ENCODINGS[self.encoding] * self.channels


PCM_ENCODINGS = {"s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4, "u8": 1, "mulaw": 1, "alaw": 1}


class PcmDecoder:
    """Bytes of PCM as they come from a socket or a pipe, cut anywhere, to mono chunks at the rate a model hears.

    Channels are averaged. `report` counts what was not a number or beyond full scale (f32le only). live: little is
    held back, see LiveResampler.
    """

    def __init__(self, pcm: PcmFormat, sample_rate: int, live: bool = False) -> None:
        self.pcm = pcm
        self.sample_rate = sample_rate
        self.live = live
        self.report = SoundReport()
        self._odd = b""
        self._resampler = self._new_resampler()

    def feed(self, data: bytes | bytearray | memoryview) -> AudioChunk:
        """Take in any number of bytes; give the samples that are ready, possibly none.

        Bytes of a sample that is not complete wait for the rest. Some milliseconds of sound are held back when the
        rates differ.
        """
        data = self._odd + bytes(data)
        whole = len(data) - len(data) % self.pcm.bytes_per_frame
        self._odd = data[whole:]
        samples = _pcm_samples(data[:whole], self.pcm.encoding).reshape(-1, self.pcm.channels)
        samples = _clean(samples, self.report)
        self.report.decoded_s += len(samples) / self.pcm.sample_rate
        return self._chunk(self._resampler.push(samples.mean(axis=1, keepdims=True, dtype=np.float32)))

    def flush(self) -> AudioChunk:
        """The stream has ended: the last samples. Bytes of a sample that never became complete are forgotten."""
        self._odd = b""
        return self.pause()

    def pause(self) -> AudioChunk:
        """Nothing comes for a while: the samples held back, as if silence followed. Half a sample still waits."""
        rest = self._resampler.flush()
        self._resampler = self._new_resampler()
        return self._chunk(rest)

    def _new_resampler(self) -> StreamResampler | LiveResampler:
        if self.live:
            return LiveResampler(self.pcm.sample_rate, self.sample_rate)
        return StreamResampler(self.pcm.sample_rate, self.sample_rate, 1)

    def _chunk(self, samples: Samples) -> AudioChunk:
        return AudioChunk(samples[:, 0], self.sample_rate)


def _pcm_samples(data: bytes, encoding: str) -> Samples:
    """Whole samples in bytes to float32 [n] in [-1, 1]."""
    match encoding:
        case "s16le":
            return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(2**15)
        case "s24le":
            padded = np.zeros((len(data) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)  # the upper three bytes of 32 bits
            return padded.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
        case "s32le":
            return np.frombuffer(data, "<i4").astype(np.float32) / np.float32(2**31)
        case "f32le":
            return np.frombuffer(data, "<f4").astype(np.float32)
        case "u8":
            return (np.frombuffer(data, np.uint8).astype(np.float32) - np.float32(128)) / np.float32(128)
        case "mulaw":
            return _MULAW[np.frombuffer(data, np.uint8)]
        case _:
            return _ALAW[np.frombuffer(data, np.uint8)]


def _mulaw_table() -> Samples:
    """The 256 values of G.711 mu-law, 14 bits scaled to 16."""
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4 & 7).astype(int), (code & 15).astype(int)
    magnitude = ((2 * mantissa + 33 << exponent) - 33) * 4
    return (np.where(code & 128, -magnitude, magnitude) / 2**15).astype(np.float32)


def _alaw_table() -> Samples:
    """The 256 values of G.711 A-law, 13 bits scaled to 16."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = (code >> 4 & 7).astype(int), (code & 15).astype(int)
    magnitude = np.where(exponent == 0, 2 * mantissa + 1, 2 * mantissa + 33 << np.maximum(exponent - 1, 0)) * 8
    return (np.where(code & 128, magnitude, -magnitude) / 2**15).astype(np.float32)


_MULAW = _mulaw_table()
_ALAW = _alaw_table()


# Words for people


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds:.3g} s"


def _too_long(sound: SoundFile, length: str) -> str:
    return f"{sound.path}: {length}, the limit is {_hours(sound.max_duration_s)}; cut it into parts or raise the limit"


def _reason(error: BaseException) -> str:
    if isinstance(error, av.error.ExitError):
        return "nothing came in time"  # how PyAV tells that its timeout has passed
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        return os.strerror(error.errno).lower()
    return str(getattr(error, "strerror", None) or error or type(error).__name__).lower()
