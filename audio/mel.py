"""Log-mel spectra at 100 frames a second, of whole recordings and of streams, block by block.

Frame k is centred on (k + 0.5) * 10 ms and covers samples [160 k - 120, 160 k + 280), so that four frames lie exactly
within one picture at 25 frames a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from audio.chunk import AudioBlock

SAMPLE_RATE = 16_000
HOP = 160
WINDOW = 400
FFT_SIZE = 512
MEL_BINS = 80
MIN_HZ, MAX_HZ = 40.0, 7800.0
POWER_FLOOR = 1e-5
LOG_FLOOR = -5.0
"""log10 of the floor: what silence looks like."""

LEAD = (WINDOW - HOP) // 2
"""Samples by which a frame's window reaches out of the frame's own 160, on either side."""


@dataclass
class MelState:
    """What a stream remembers: the samples before the next block, float32, as many as past frames need."""

    samples: NDArray[np.float32]


def init_state() -> MelState:
    """The state before the first block: silence has gone before."""
    return MelState(np.zeros(0, np.float32))


def lookahead_samples(ahead_frames: int) -> int:
    """How many samples after a block its last `ahead_frames` mel frames cover: 1,400 for eight."""
    return ahead_frames * HOP + LEAD


def log_mel(samples: Tensor) -> Tensor:
    """Log10 mel power of whole recordings, which are taken to lie in silence.

    Args:
        samples: [..., N] float32 at 16 kHz.
    Returns: [..., N // 160, 80], not below -5.
    """
    frames = samples.shape[-1] // HOP
    return _spectra(F.pad(samples[..., : frames * HOP + LEAD], (LEAD, max(0, frames * HOP + LEAD - samples.shape[-1]))))


def block_mel(audio: AudioBlock, state: MelState, past_frames: int, ahead_frames: int) -> Tensor:
    """Log10 mel power of one block with its surroundings; equal to what `log_mel` makes of the whole stream.

    Args:
        audio: a block whose length is a multiple of 160 samples, with at least `lookahead_samples(ahead_frames)` ahead.
        state: advanced by one block, in place.
        past_frames, ahead_frames: mel frames wanted before and after the block's own.
    Returns: [past_frames + own + ahead_frames, 80]; own = 48 for a block of 7,680 samples.
    Raises: ValueError: the block is no whole number of frames, or too little sound is ahead of it.
    """
    wanted = lookahead_samples(ahead_frames)
    if len(audio.samples) % HOP:
        raise ValueError(f"audio block: {len(audio.samples)} samples; a block must be a multiple of {HOP}")
    if len(audio.ahead) < wanted:
        raise ValueError(f"audio block: {len(audio.ahead)} samples ahead; {ahead_frames} mel frames need {wanted}")
    context = past_frames * HOP + LEAD
    before = state.samples[-context:]
    before = np.concatenate([np.zeros(context - len(before), np.float32), before])
    heard = np.concatenate([before, audio.samples])
    state.samples = heard[-context:].copy()
    return _spectra(torch.from_numpy(np.concatenate([heard, audio.ahead[:wanted]])))


def _spectra(samples: Tensor) -> Tensor:
    """One spectrum for each window that fits: [..., LEAD + 160 n + LEAD] to [..., n, 80]."""
    windows = samples.unfold(-1, WINDOW, HOP) * _window(samples.device)
    power = torch.fft.rfft(windows, FFT_SIZE).abs().square()
    return (power @ _filters(samples.device)).clamp_min(POWER_FLOOR).log10()


@cache
def _window(where: torch.device) -> Tensor:
    return torch.hann_window(WINDOW, periodic=True, dtype=torch.float64).float().to(where)


@cache
def _filters(where: torch.device) -> Tensor:
    return torch.from_numpy(mel_filters()).to(where)


def mel_filters() -> NDArray[np.float32]:
    """Triangles of unit area, evenly spaced on Slaney's mel scale: [257, 80], from power spectrum to mel bins.

    Source: Slaney, Auditory Toolbox (1998), as librosa has made it the common choice.
    """
    edges = _mel_to_hz(np.linspace(_hz_to_mel(MIN_HZ), _hz_to_mel(MAX_HZ), MEL_BINS + 2))
    hz = np.arange(FFT_SIZE // 2 + 1)[:, None] * (SAMPLE_RATE / FFT_SIZE)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((hz - low) / (middle - low), (high - hz) / (high - middle)).clip(0.0)
    return (triangles * 2.0 / (high - low)).astype(np.float32)


# Slaney's scale is linear up to 1 kHz (15 mel) and logarithmic above: 27 mel for a factor of 6.4.
_KNEE_HZ, _KNEE_MEL, _STEP = 1000.0, 15.0, np.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    return hz * _KNEE_MEL / _KNEE_HZ if hz < _KNEE_HZ else _KNEE_MEL + float(np.log(hz / _KNEE_HZ)) / _STEP


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _KNEE_HZ * np.exp(_STEP * (np.maximum(mel, _KNEE_MEL) - _KNEE_MEL))
    return np.where(mel < _KNEE_MEL, mel * _KNEE_HZ / _KNEE_MEL, above)
