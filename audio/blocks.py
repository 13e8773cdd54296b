"""Chunks of any length in, blocks of one length out: pure arithmetic, no I/O and nothing to await."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from audio.chunk import AudioBlock, AudioChunk


class BlockCutter:
    """Cut a stream of sound into the blocks a model takes.

    A block comes out as soon as its samples and the lookahead that follows it have arrived; `flush` gives the rest.
    What is kept between calls is less than one block and one lookahead, however long the stream.

    For a live session: `missing` samples of silence complete the next block when its time has come and nobody spoke,
    and `drop` forgets what was not cut yet when the listener interrupts.
    """

    def __init__(self, samples_per_block: int, lookahead_samples: int = 0) -> None:
        if samples_per_block < 1 or lookahead_samples < 0:
            raise ValueError(f"no block of {samples_per_block} samples with a lookahead of {lookahead_samples}")
        self.samples_per_block = samples_per_block
        self.lookahead_samples = lookahead_samples
        self._start = 0
        self._sample_rate: int | None = None
        self._pending: list[NDArray[np.float32]] = []
        self._pending_samples = 0

    @property
    def start(self) -> int:
        """Where the next block begins, in samples: a multiple of samples_per_block."""
        return self._start

    @property
    def pending(self) -> int:
        """How many samples have arrived and are in no block yet."""
        return self._pending_samples

    @property
    def missing(self) -> int:
        """How many samples have to arrive before the next block comes out."""
        return self.samples_per_block + self.lookahead_samples - self._pending_samples

    def push(self, chunk: AudioChunk) -> list[AudioBlock]:
        """Take in any number of samples (copied); give the blocks they complete, in order.

        Raises: ValueError: the chunk is not mono, or its rate is not that of the chunks before it.
        """
        if chunk.samples.ndim != 1:
            raise ValueError(f"a chunk holds mono samples [n], not {list(chunk.samples.shape)}")
        if self._sample_rate is None:
            self._sample_rate = chunk.sample_rate
        if chunk.sample_rate != self._sample_rate:
            raise ValueError(f"a chunk at {chunk.sample_rate} Hz in a stream at {self._sample_rate} Hz")
        if chunk.samples.size:
            self._pending.append(np.array(chunk.samples, np.float32))
            self._pending_samples += chunk.samples.size
        if self.missing > 0:
            return []
        return self._cut(self.samples_per_block + self.lookahead_samples)

    def flush(self) -> list[AudioBlock]:
        """The stream has ended: give what is left, the last block padded with silence.

        Sound pushed after this begins the next block, so the cutter can serve one utterance after another.
        """
        return self._cut(1)

    def drop(self) -> int:
        """Forget the sound that is in no block yet, though it may have been heard as lookahead; give its length."""
        dropped = self._pending_samples
        self._pending, self._pending_samples = [], 0
        return dropped

    def _cut(self, needed: int) -> list[AudioBlock]:
        """Blocks for as long as at least `needed` samples remain."""
        samples = np.concatenate(self._pending) if self._pending else np.zeros(0, np.float32)
        blocks: list[AudioBlock] = []
        cut = 0
        while samples.size - cut >= needed:
            end = cut + self.samples_per_block
            block = samples[cut:end]
            blocks.append(
                AudioBlock(
                    samples=_padded(block, self.samples_per_block),
                    start=self._start,
                    valid=block.size,
                    ahead=_padded(samples[end : end + self.lookahead_samples], self.lookahead_samples),
                )
            )
            self._start += self.samples_per_block
            cut = min(end, samples.size)
        rest = samples[cut:].copy()  # a view would keep the whole of a long chunk alive
        self._pending, self._pending_samples = ([rest] if rest.size else []), rest.size
        return blocks


def _padded(samples: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """A copy of that length, with silence after the samples."""
    padded = np.zeros(length, np.float32)
    padded[: samples.size] = samples
    return padded
