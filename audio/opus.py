"""Opus packets as they come from a browser or a telephone, one in each message, to sound."""

from __future__ import annotations

import av
import av.error
import numpy as np

from audio.chunk import AudioChunk
from audio.decode import AudioError, LiveResampler

OPUS_RATE = 48_000
"""Hz at which Opus is decoded, whatever was encoded."""

LONGEST_PACKET = 3 * 1276 + 7
"""Bytes. 120 ms, two channels (RFC 6716, 3.2); what is longer is something else."""


class OpusDecoder:
    """Opus packets to mono chunks at the rate that is wanted; the counterpart of `PcmDecoder`.

    Stereo is averaged, and little is held back, see `LiveResampler`.
    """

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self._codec = _new_codec()
        self._resampler = self._new_resampler()

    def feed(self, packet: bytes) -> AudioChunk:
        """The sound of one packet; an empty one has none.

        Raises: AudioError: it is not Opus; the next packet may be.
        """
        if not packet:
            return self._chunk(np.zeros((0, 1), np.float32))
        if len(packet) > LONGEST_PACKET:
            raise AudioError(f"this message has {len(packet)} bytes, too many for an Opus packet; send one in each")
        try:
            frames = self._codec.decode(av.Packet(packet))
        except (av.error.FFmpegError, ValueError) as error:
            # One that was refused may leave the decoder at its end.
            self._codec = _new_codec()
            raise AudioError(
                "this message is not an Opus packet; send them bare, without Ogg or WebM around them"
            ) from error
        sound = [frame.to_ndarray().astype(np.float32).mean(axis=0)[:, None] for frame in frames]
        return self._chunk(self._resampler.push(np.concatenate([np.zeros((0, 1), np.float32), *sound])))

    def pause(self) -> AudioChunk:
        """Nothing comes for a while: the samples held back, as if silence followed."""
        rest = self._resampler.flush()
        self._resampler = self._new_resampler()
        return self._chunk(rest)

    def _new_resampler(self) -> LiveResampler:
        return LiveResampler(OPUS_RATE, self.sample_rate)

    def _chunk(self, samples: np.ndarray) -> AudioChunk:
        return AudioChunk(samples[:, 0], self.sample_rate)


def _new_codec() -> av.AudioCodecContext:
    codec = av.CodecContext.create("opus", "r")
    assert isinstance(codec, av.AudioCodecContext)
    # Mono packets are decoded to both channels.
    codec.sample_rate, codec.layout = OPUS_RATE, "stereo"
    return codec
