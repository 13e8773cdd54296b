"""Frames and sound in, packets out. Blocking and free of asyncio: its caller gives it a thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.audio.stream import AudioStream
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from avatar.model import FrameBlock

SOUND_RATE = 48_000
"""Hz of every sound track we write: the rate that players, browsers and RTMP servers all take."""

BT709 = 1
"""The number of BT.709 in H.273, the same for primaries, transfer and matrix."""


@dataclass(frozen=True)
class EncoderSettings:
    """What a rendition is encoded with; the defaults are for files.

    crf: constant rate factor of x264, 0 (lossless) to 51; keyframe_interval_s: distance of keyframes in seconds;
    audio_kbps: AAC bit rate in kbit/s for each channel; threads: of x264.
    """

    preset: str = "veryfast"
    crf: float = 18.0
    keyframe_interval_s: float = 2.0
    audio_kbps: int = 80
    threads: int = 1


class Encoder:
    """H.264 (yuv420p, BT.709, limited range) and AAC at 48 kHz, one encoder for each rendition.

    Packets are for muxers made from `streams`. Frame i of the stream has pts i in units of 1 / fps; sound has its pts
    in samples. There are no B-frames: dts equals pts, so a player that ignores edit lists is in time all the same.

    Args:
        width, height: of the frames in pixels, both even.
        channels: of the sound, 1 or 2.
    """

    def __init__(self, width: int, height: int, fps: int, channels: int, settings: EncoderSettings) -> None:
        assert width % 2 == height % 2 == 0, f"yuv420p needs even sides, not {width}x{height}"
        assert channels in (1, 2), f"{channels} channels of sound"
        self._width, self._height, self._channels = width, height, channels
        self._layout = "mono" if channels == 1 else "stereo"
        self._frame_time, self._sample_time = Fraction(1, fps), Fraction(1, SOUND_RATE)
        self._samples = 0
        # The codecs live in a container that writes nowhere; the real containers are made from its streams.
        self._container = av.open(os.devnull, "w", format="null")
        self._video = self._add_video(fps, settings)
        self._audio = self._add_audio(settings)
        self._container.start_encoding()
        self._reformatter = VideoReformatter()

    @property
    def streams(self) -> tuple[VideoStream, AudioStream]:
        """Templates (codec parameters, extradata) for the containers that the packets go to."""
        return self._video, self._audio

    def encode(self, block: FrameBlock, sound: NDArray[np.float32]) -> list[Packet]:
        """Encode one block; x264 holds back about ten frames for its look-ahead.

        Args:
            block: frames uint8 [F, height, width, 3] RGB; `start` follows the block before.
            sound: float32 [S, channels] at 48 kHz, the original that goes with these frames.
        """
        assert block.frames.shape[1:] == (self._height, self._width, 3), block.frames.shape
        packets: list[Packet] = []
        for index, image in enumerate(block.frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            # Plain reformat() would use BT.601 and leave the matrix unsaid, so that players shift the hues.
            frame = self._reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = block.start + index, self._frame_time
            packets += self._video.encode(frame)
        packets += self._encode_sound(sound)
        return packets

    def flush(self) -> list[Packet]:
        """What the encoders still hold; after it nothing more can be encoded."""
        return [*self._video.encode(None), *self._audio.encode(None)]

    def close(self) -> None:
        self._container.close()

    def _encode_sound(self, sound: NDArray[np.float32]) -> Iterator[Packet]:
        assert sound.shape[1:] == (self._channels,), sound.shape
        if len(sound) == 0:
            return
        planes = np.ascontiguousarray(np.clip(sound, -1.0, 1.0).T, dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, self._samples, self._sample_time
        self._samples += len(sound)
        yield from self._audio.encode(frame)

    def _add_video(self, fps: int, settings: EncoderSettings) -> VideoStream:
        options = {
            "preset": settings.preset,
            "crf": f"{settings.crf:g}",
            "bf": "0",
            "g": str(max(1, round(settings.keyframe_interval_s * fps))),
        }
        stream = self._container.add_stream("libx264", rate=fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = self._width, self._height, "yuv420p"
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
        codec.bit_rate = settings.audio_kbps * 1000 * self._channels
        codec.time_base = self._sample_time
        codec.flags |= av.codec.context.Flags.global_header
        return stream
