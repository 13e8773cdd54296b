"""Speech features of Live Avatar: all hidden states of a wav2vec2 model, brought to video frames.

The model hears 16 kHz sound and gives 50 vectors a second and layer; they are interpolated to 30 a second, and each
video frame (25 a second) takes the nearest of those: the way the reference does it, and kept because the networks were
trained on it. `offline_features` sees the whole file; `SpeechStream` sees a window that slides with the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from audio.chunk import AudioBlock

SAMPLE_RATE = 16_000
HOP = 320
"""Samples from one feature frame to the next: 50 a second. Frame k hears samples 320 k to 320 k + 400."""
RECEPTIVE_FIELD = 400
GRID_RATE = 30
"""Rate of the grid between 50 and 25 a second."""
VIDEO_RATE = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // VIDEO_RATE


def hidden_states(model: Any, samples: Tensor) -> Tensor:
    """All hidden states of a transformers Wav2Vec2Model.

    Args:
        samples: normalised sound [N], N >= 400.
    Returns: [layers + 1, T, C] in the model's dtype; first the input of layer 0, last the output after the encoder's
        final norm. (transformers 4 put it there itself; 5 leaves the norm out of `hidden_states`.)
    """
    with torch.no_grad():
        out = model(samples[None].to(dtype=next(model.parameters()).dtype), output_hidden_states=True)
    return torch.cat([*out.hidden_states[:-1], out.last_hidden_state])


def normalise(samples: Tensor) -> Tensor:
    """Zero mean and unit variance over the whole clip, as wav2vec2's feature extractor does."""
    return (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)


def to_grid(states: Tensor) -> Tensor:
    """[L, T, C] at 50 a second to float32 [L, T30, C] at 30: linear, first and last frame kept (aligned corners).

    T30 = int(T / 50.0 * 30) in floating point, which is not floor(3 T / 5) for every T.
    """
    length = int((states.shape[1] / 50.0) * GRID_RATE)
    if length < 1:
        raise ValueError(f"{states.shape[1]} feature frames are too few for one video frame")
    return F.interpolate(states.transpose(1, 2), length, mode="linear", align_corners=True).transpose(1, 2).float()


def video_index(grid_frames: int, frames_per_clip: int = 48, fps: int = VIDEO_RATE) -> NDArray[np.int64]:
    """Which grid frame each video frame takes, -1 past the end of the sound; a whole number of clips.

    The number of clips is int(grid_frames / (frames_per_clip * 30 / fps)) + 1, so there may be one of nothing but -1.
    """
    clips = int(grid_frames / (frames_per_clip * (GRID_RATE / fps))) + 1
    count = clips * frames_per_clip
    index = np.rint(np.linspace(0, count / fps, count, endpoint=False) * GRID_RATE).astype(np.int64)
    return np.where(index < grid_frames, index, -1)


def offline_features(
    model: Any, samples: NDArray[np.float32], *, frames_per_clip: int = 48, normalised: bool = True
) -> Tensor:
    """Features of a whole file, exactly as the reference computes them.

    Args:
        samples: mono, 16 kHz; 800 samples at least.
        frames_per_clip: the result is a whole number of clips long.
        normalised: whether the sound is brought to zero mean and unit variance (the checkpoint's preprocessor says).
    Returns: [1, layers + 1, C, frames] in the model's dtype; all zeros in frames past the end of the sound.
    """
    parameter = next(model.parameters())
    sound = torch.from_numpy(samples).to(parameter.device)
    grid = to_grid(hidden_states(model, normalise(sound) if normalised else sound))
    index = torch.from_numpy(video_index(grid.shape[1], frames_per_clip)).to(grid.device)
    picked = grid[:, index.clamp(min=0)] * (index >= 0)[None, :, None]
    return picked.transpose(1, 2)[None].to(parameter.dtype)


@dataclass
class Loudness:
    """Running mean and second moment of the sound; blocks of silence do not count."""

    mean: float = 0.0
    power: float = 0.0
    weight: float = 0.0

    HORIZON = 30.0 * SAMPLE_RATE
    SILENCE = 1e-3
    FLOOR = 1e-2

    def heard(self, samples: NDArray[np.float32]) -> Loudness:
        """With these samples counted in; the older ones fade with a horizon of 30 s."""
        power = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
        if power < self.SILENCE**2:
            return self
        weight = min(self.weight, self.HORIZON)
        share = len(samples) / (weight + len(samples))
        return Loudness(
            self.mean + share * (float(np.mean(samples, dtype=np.float64)) - self.mean),
            self.power + share * (power - self.power),
            weight + len(samples),
        )

    def apply(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """The samples less the mean, over the deviation; the deviation has a floor, so that silence stays silent."""
        deviation = max(max(self.power - self.mean**2, 0.0) ** 0.5, self.FLOOR)
        return ((samples - self.mean) / deviation).astype(np.float32)


@dataclass
class SpeechState:
    """past: the last samples before the next block, a multiple of 320 once there are enough; position: its start."""

    past: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    position: int = 0
    loudness: Loudness = field(default_factory=Loudness)


class SpeechStream:
    """Features block by block, from a window of some past, the block, and some sound after it.

    Windows begin on the absolute grid of 320 samples, so a feature frame is the same frame in each window that holds
    it. Before the stream there is nothing: the first windows are shorter. What a file's length does to the reference
    (the stretch of aligned corners, at most 13 ms; mean and variance of the whole) is replaced by the grid 5/3 and by
    running values.

    Args:
        model: a transformers Wav2Vec2Model.
        normalised: as for `offline_features`.
        past_samples: context before the block, a multiple of 320.
        lookahead_samples: sound after the block that is waited for (`AudioBlock.ahead`). The last feature frame needs
            80 samples; where there are fewer it hears silence.
    """

    NEEDED_AHEAD = RECEPTIVE_FIELD - HOP

    def __init__(
        self, model: Any, *, normalised: bool = True, past_samples: int = 122_880, lookahead_samples: int = 3_200
    ) -> None:
        if past_samples % HOP or past_samples < 0 or lookahead_samples < 0:
            raise ValueError(f"past_samples {past_samples} is not a multiple of {HOP}, or lookahead is negative")
        self.model = model
        self.normalised = normalised
        self.past_samples = past_samples
        self.lookahead_samples = lookahead_samples

    def init_state(self) -> SpeechState:
        return SpeechState()

    def features(self, state: SpeechState, block: AudioBlock) -> Tensor:
        """Advance `state` in place by one block.

        Args:
            block: follows the one before; a multiple of 640 samples.
        Returns: [1, layers + 1, C, frames] in the model's dtype, one frame for 640 samples.
        Raises: ValueError: the block does not start where the last one ended.
        """
        if block.start != state.position or len(block.samples) % SAMPLES_PER_FRAME:
            raise ValueError(
                f"block of {len(block.samples)} samples at {block.start}: want whole video frames at {state.position}"
            )
        ahead = block.ahead[: self.lookahead_samples]
        silence = np.zeros(max(0, self.NEEDED_AHEAD - len(ahead)), np.float32)
        window = np.concatenate([state.past, block.samples, ahead, silence])
        loudness = state.loudness.heard(block.samples)
        if self.normalised:
            window = loudness.heard(ahead).apply(window)
        parameter = next(self.model.parameters())
        states = hidden_states(self.model, torch.from_numpy(window).to(parameter.device))
        low, high, share = self._grid(block, (block.start - len(state.past)) // HOP)
        share_ = torch.tensor(share, device=states.device)[None, :, None]
        picked = states[:, low].float() * (1 - share_) + states[:, high].float() * share_
        kept = np.concatenate([state.past, block.samples])
        state.past = kept[max(0, len(kept) - self.past_samples) :].copy()
        state.position = block.start + len(block.samples)
        state.loudness = loudness
        return picked.transpose(1, 2)[None].to(parameter.dtype)

    @staticmethod
    def _grid(block: AudioBlock, first: int) -> tuple[list[int], list[int], list[float]]:
        """Neighbours in the window, and the share of the upper one, for each video frame of the block.

        Video frame i takes grid frame j = (6 i + 2) // 5, which lies at 5 j / 3 among the feature frames.
        """
        start = block.start // SAMPLES_PER_FRAME
        grid = [(6 * i + 2) // 5 for i in range(start, start + len(block.samples) // SAMPLES_PER_FRAME)]
        low = [max(5 * j // 3 - first, 0) for j in grid]
        high = [max(-(-5 * j // 3) - first, 0) for j in grid]
        return low, high, [5 * j % 3 / 3 for j in grid]
