"""Sound in two shapes: chunks as they arrive, blocks as a model takes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def _no_samples() -> NDArray[np.float32]:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class AudioChunk:
    """Mono float32 samples in [-1, 1], any number of them, with their rate in Hz."""

    samples: NDArray[np.float32]
    sample_rate: int


@dataclass(frozen=True)
class AudioBlock:
    """One block of sound and its place in the stream.

    samples: float32 [samples_per_block]; start: index of its first sample in the stream; valid: how many of them are
    sound (after that it is padding, at the end of a stream); ahead: float32 [lookahead_samples], the sound that
    follows the block (silence where the stream has ended).
    """

    samples: NDArray[np.float32]
    start: int
    valid: int
    ahead: NDArray[np.float32] = field(default_factory=_no_samples)
