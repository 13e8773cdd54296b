"""Frames and sound in, packets out. Blocking and free of asyncio: its caller gives it a thread."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.audio.stream import AudioStream
from av.packet import Packet
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from audio.errors import AvatardError
from avatar.model import FrameBlock

log = logging.getLogger(__name__)

SOUND_RATE = 48_000
"""Hz of every sound track we write: the rate that players, browsers and RTMP servers all take."""

BT709 = 1
"""The number of BT.709 in H.273, the same for primaries, transfer and matrix."""

VBV_S = 1.0
"""Seconds of its bit rate that a constant-rate stream may save up and spend at once."""


@dataclass(frozen=True)
class EncoderSettings:
    """What a rendition is encoded with; the defaults are for files.

    preset: of x264; crf: constant rate factor, 0 (lossless) to 51, where no bit rate is given; bitrate_kbps: of the
    picture, constant over one second (VBV), as RTMP servers want it; keyframe_interval_s: distance of keyframes in
    seconds; audio_kbps: AAC bit rate in kbit/s for each channel; threads: of x264.
    live: nothing is looked ahead at, so a frame leaves as soon as it came, and keyframes come at their time only.
    codec: h264_nvenc where the machine has it; libx264 takes its place where it has not.
    width, height, fps, channels: of what comes out; None is as what goes in. One side alone keeps the shape. Where both
    ask for another shape the picture fills it and is cropped evenly: never stretched, never with bars.
    """

    preset: str = "veryfast"
    crf: float = 18.0
    keyframe_interval_s: float = 2.0
    audio_kbps: int = 80
    threads: int = 1
    bitrate_kbps: int | None = None
    live: bool = False
    codec: Literal["libx264", "h264_nvenc"] = "libx264"
    width: int | None = None
    height: int | None = None
    fps: int | None = None
    channels: int | None = None


class Encoder:
    """H.264 (yuv420p, BT.709, limited range) and AAC at 48 kHz, one encoder for each rendition.

    Packets are for muxers made from `streams`. Output frame i has pts i in units of 1 / fps of the rendition; sound has
    its pts in samples. There are no B-frames: dts equals pts, so a player that ignores edit lists is in time all the
    same. At another frame rate than the source's, each output frame is the newest that the source had by its time.

    Args:
        width, height, fps, channels: of what goes in: frames in pixels, both even; sound of 1 or 2 channels.

    Raises: AvatardError: a side is odd.
    """

    def __init__(self, width: int, height: int, fps: int, channels: int, settings: EncoderSettings) -> None:
        if width % 2 or height % 2:
            even = f"{width + width % 2}x{height + height % 2}"
            raise AvatardError(f"pictures of {width}x{height} cannot be encoded: sides must be even, such as {even}")
        assert channels in (1, 2), f"{channels} channels of sound"
        self._source = (height, width, 3)
        self._source_fps, self._source_channels = fps, channels
        self.width, self.height = _rendition_size(width, height, settings)
        self.fps = settings.fps or fps
        self.channels = settings.channels or channels
        self.codec = settings.codec if _opens(settings.codec) else "libx264"
        self._crop = _crop(width, height, self.width, self.height)
        self._layout = "mono" if self.channels == 1 else "stereo"
        self._frame_time, self._sample_time = Fraction(1, self.fps), Fraction(1, SOUND_RATE)
        self._samples = 0
        self._keyframe_wanted = False
        # The codecs live in a container that writes nowhere; the real containers are made from its streams.
        self._container = av.open(os.devnull, "w", format="null")
        self._video = self._add_video(settings)
        self._audio = self._add_audio(settings)
        self._container.start_encoding()
        self._reformatter = VideoReformatter()

    @property
    def streams(self) -> tuple[VideoStream, AudioStream]:
        """Templates (codec parameters, extradata) for the containers that the packets go to."""
        return self._video, self._audio

    def want_keyframe(self) -> None:
        """The next frame becomes a keyframe (IDR), where a new viewer can begin. May be called from any thread."""
        self._keyframe_wanted = True

    def encode(self, block: FrameBlock, sound: NDArray[np.float32]) -> list[Packet]:
        """Encode any number of frames. Unless it is live, x264 holds back about ten of them for its look-ahead.

        Args:
            block: frames uint8 [F, height, width, 3] RGB; `start` follows the block before.
            sound: float32 [S, channels] at 48 kHz, the original that goes with these frames.
        """
        assert block.frames.shape[1:] == self._source, block.frames.shape
        packets: list[Packet] = []
        for index, image in enumerate(block.frames, block.start):
            # Output frames whose time lies in [index, index + 1) of the source's.
            first, after = (-(-i * self.fps // self._source_fps) for i in (index, index + 1))
            if first == after:
                continue
            frame = self._converted(image)
            for number in range(first, after):
                wanted, self._keyframe_wanted = self._keyframe_wanted, False
                frame.pict_type = PictureType.I if wanted else PictureType.NONE
                frame.pts, frame.time_base = number, self._frame_time
                packets += self._video.encode(frame)
        packets += self._encode_sound(sound)
        return packets

    def flush(self) -> list[Packet]:
        """What the encoders still hold; after it nothing more can be encoded."""
        return [*self._video.encode(None), *self._audio.encode(None)]

    def close(self) -> None:
        self._container.close()

    def _converted(self, image: NDArray[np.uint8]) -> av.VideoFrame:
        """An RGB picture as the encoder takes it, cropped and scaled."""
        rows, columns = self._crop
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[rows, columns]), format="rgb24")
        # Plain reformat() would use BT.601 and leave the matrix unsaid, so that players shift the hues.
        return self._reformatter.reformat(
            frame,
            self.width,
            self.height,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )

    def _encode_sound(self, sound: NDArray[np.float32]) -> Iterator[Packet]:
        assert sound.shape[1:] == (self._source_channels,), sound.shape
        if len(sound) == 0:
            return
        if self.channels < self._source_channels:
            sound = sound.mean(1, keepdims=True)
        sound = np.broadcast_to(sound, (len(sound), self.channels))
        planes = np.ascontiguousarray(np.clip(sound, -1.0, 1.0).T, dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, self._samples, self._sample_time
        self._samples += len(sound)
        yield from self._audio.encode(frame)

    def _add_video(self, settings: EncoderSettings) -> VideoStream:
        options = {
            **(_nvenc_options(settings) if self.codec == "h264_nvenc" else _x264_options(settings)),
            "bf": "0",
            "forced-idr": "1",
            "g": str(max(1, round(settings.keyframe_interval_s * self.fps))),
        }
        if settings.bitrate_kbps:
            rate = settings.bitrate_kbps * 1000
            options |= {"b": str(rate), "maxrate": str(rate), "bufsize": str(round(rate * VBV_S))}
        stream = self._container.add_stream(self.codec, rate=self.fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        stream.time_base = self._frame_time
        codec = stream.codec_context
        codec.time_base = self._frame_time
        codec.thread_count = settings.threads
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = ColorRange.MPEG
        codec.flags |= av.codec.context.Flags.global_header
        return stream

    def _add_audio(self, settings: EncoderSettings) -> AudioStream:
        stream = self._container.add_stream("aac", rate=SOUND_RATE, layout=self._layout)
        assert isinstance(stream, AudioStream)
        codec = stream.codec_context
        codec.bit_rate = settings.audio_kbps * 1000 * self.channels
        codec.time_base = self._sample_time
        codec.flags |= av.codec.context.Flags.global_header
        return stream


def _x264_options(settings: EncoderSettings) -> dict[str, str]:
    options = {"preset": settings.preset}
    if not settings.bitrate_kbps:
        options["crf"] = f"{settings.crf:g}"
    if settings.live:
        # A scene cut would be a keyframe out of turn; segments of HLS are as long as the distance of keyframes.
        options |= {"tune": "zerolatency", "sc_threshold": "0"}
    return options


def _nvenc_options(settings: EncoderSettings) -> dict[str, str]:
    options = {"rc": "cbr"} if settings.bitrate_kbps else {"rc": "vbr", "cq": f"{settings.crf:g}"}
    if settings.live:
        options |= {"tune": "ull", "zerolatency": "1", "delay": "0", "no-scenecut": "1"}
    return options


@functools.cache
def _opens(codec: str) -> bool:
    """Whether a codec really encodes here: that it was compiled in says nothing of the driver and the chip."""
    if codec == "libx264":
        return True
    try:
        with av.open(os.devnull, "w", format="null") as container:
            stream = container.add_stream(codec, rate=25)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
            frame = av.VideoFrame(256, 256, "yuv420p")
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            if stream.encode(frame) + stream.encode(None):
                return True
            reason = "it gave no packet"
    except (av.error.FFmpegError, ValueError) as error:
        reason = str(error)
    log.warning("%s does not encode on this machine (%s); libx264 takes its place", codec, reason)
    return False


def _rendition_size(width: int, height: int, settings: EncoderSettings) -> tuple[int, int]:
    """Width and height of what comes out, both even."""
    wanted = (settings.width, settings.height)
    match wanted:
        case (None, None):
            return width, height
        case (int(w), None):
            return _even(w), _even(w * height / width)
        case (None, int(h)):
            return _even(h * width / height), _even(h)
        case (int(w), int(h)):
            return _even(w), _even(h)
    raise AssertionError(wanted)


def _even(side: float) -> int:
    return max(2, round(side / 2) * 2)


def _crop(width: int, height: int, to_width: int, to_height: int) -> tuple[slice, slice]:
    """Rows and columns of the largest middle part of a picture that has the shape of another size."""
    # A pixel more or less is the rounding of sides to even numbers, not another shape.
    keep_width = min(width, round(height * to_width / to_height))
    keep_height = min(height, round(width * to_height / to_width))
    top, left = (height - keep_height) // 2, (width - keep_width) // 2
    return slice(top, top + keep_height), slice(left, left + keep_width)
