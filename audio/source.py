"""What a session reads its sound from: an async iteration of chunks that never blocks the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from audio.chunk import AudioChunk
from audio.decode import SoundFile

CHUNKS_PER_BATCH = 8  # about two seconds of a file: one change of thread for it


class SourceClosed(Exception):
    """Nobody reads any more, or the end was announced before: the sound was not taken."""


class FileSource:
    """A file's sound, decoded in a worker thread as fast as it is read: `async for chunk in FileSource(sound, 16_000)`.

    Raises while iterating: AudioError, as `SoundFile.chunks`, after the sound that came before it.
    """

    def __init__(self, sound: SoundFile, sample_rate: int) -> None:
        self.sound = sound
        self.sample_rate = sample_rate

    async def __aiter__(self) -> AsyncIterator[AudioChunk]:
        chunks = self.sound.chunks(self.sample_rate)
        error: BaseException | None = None
        while error is None:
            # A reader that is cancelled leaves the thread to end its batch; with that the last reference to `chunks`
            # goes, and the file is closed.
            batch, error = await asyncio.to_thread(_take, chunks, CHUNKS_PER_BATCH)
            for chunk in batch:
                yield chunk
        if not isinstance(error, StopIteration):
            raise error


def _take(chunks: Iterator[AudioChunk], count: int) -> tuple[list[AudioChunk], Exception | None]:
    """Up to `count` chunks, and what ended the iteration, if it ended: an error must not lose the sound before it."""
    taken: list[AudioChunk] = []
    try:
        taken.extend(islice(chunks, count))
    except Exception as error:
        return taken, error
    return taken, None if len(taken) == count else StopIteration()


async def silence(
    sample_rate: int, duration_s: float | None = None, chunk_s: float = 0.48
) -> AsyncIterator[AudioChunk]:
    """Silence as fast as it is read, in chunks of chunk_s; without end where no duration is given."""
    left = None if duration_s is None else round(duration_s * sample_rate)
    length = max(1, round(chunk_s * sample_rate))
    while left is None or left > 0:
        n = length if left is None else min(length, left)
        left = None if left is None else left - n
        yield AudioChunk(np.zeros(n, np.float32), sample_rate)
        await asyncio.sleep(0)


class PushSource:
    """Sound that someone else brings: `push` on one side, `async for` on the other, tasks of one event loop.

    Never holds more than `ahead_s` seconds. The end, and the error that it was closed with, come after all that was
    pushed before. Every wait ends when the other side ends; `close` and `abandon` never wait.
    """

    def __init__(self, sample_rate: int, ahead_s: float = 2.0) -> None:
        self.sample_rate = sample_rate
        self.dropped_samples = 0
        self._limit = max(1, round(ahead_s * sample_rate))
        self._chunks: deque[NDArray[np.float32]] = deque()
        self._waiting = 0
        self._in_utterance = False
        self._closed = False
        self._error: BaseException | None = None
        self._room = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def waiting_s(self) -> float:
        """Seconds of sound pushed and not read yet."""
        return self._waiting / self.sample_rate

    @property
    def full(self) -> bool:
        """Whether who pushes has to wait now."""
        return self._waiting >= self._limit

    async def push(self, chunk: AudioChunk) -> None:
        """Add sound (copied; what is not a number becomes silence), waiting while too much of it waits to be read.

        A chunk longer than the room goes in parts; cancelled in the wait, the parts added so far stay.
        Raises: SourceClosed: the source is closed, or was closed during the wait. ValueError: another sample rate.
        """
        samples = self._checked(chunk)
        while samples.size:
            if self._closed:
                raise SourceClosed
            if not self.full:
                room = self._limit - self._waiting
                self._add(samples[:room])
                samples = samples[room:]
            else:
                self._room.clear()
                await self._room.wait()

    def end_utterance(self) -> None:
        """What was pushed so far is whole, and need not wait for more: the reader gets an empty chunk after it.

        Never waits; without effect once closed, or where no sound came since the last time.
        """
        if not self._closed and self._in_utterance:
            self._chunks.append(np.zeros(0, np.float32))
            self._in_utterance = False
            self._news.set()

    def push_newest(self, chunk: AudioChunk) -> int:
        """Add sound (copied) without waiting; the oldest makes room for it. Gives how many samples were dropped.

        Raises: SourceClosed, ValueError: as `push`.
        """
        samples = self._checked(chunk)
        if self._closed:
            raise SourceClosed
        dropped = max(0, samples.size - self._limit)
        samples = samples[dropped:]
        excess = max(0, self._waiting + samples.size - self._limit)
        dropped += excess
        while excess:
            oldest = self._chunks.popleft()
            taken = min(excess, oldest.size)
            excess -= taken
            self._waiting -= taken
            if taken < oldest.size:
                self._chunks.appendleft(oldest[taken:])
        self._add(samples)
        self.dropped_samples += dropped
        return dropped

    def drop(self) -> int:
        """Forget all that waits to be read (the listener interrupted); gives how many samples that were."""
        dropped = self._waiting
        self._chunks.clear()
        self._waiting = 0
        self._in_utterance = False
        self._room.set()
        return dropped

    def close(self, error: BaseException | None = None) -> None:
        """No more sound comes: the reader ends, or raises `error`, after what was pushed. The first call counts."""
        if self._closed:
            return
        self._closed = True
        self._error = error
        self._news.set()
        self._room.set()

    def abandon(self) -> None:
        """The reader has left: what waits is forgotten, and whoever pushes gets SourceClosed."""
        self.close()
        self.drop()

    async def read(self) -> AudioChunk | None:
        """All the sound that waits, in one chunk, waiting for some; None at the end.

        At most up to the end of an utterance, which is then told by an empty chunk.
        Raises: the error that the source was closed with, after the sound, on this and every later call.
        """
        while not self._chunks and not self._closed:
            self._news.clear()
            await self._news.wait()
        if self._chunks:
            taken = [self._chunks.popleft()]
            while taken[-1].size and self._chunks and self._chunks[0].size:
                taken.append(self._chunks.popleft())
            samples = taken[0] if len(taken) == 1 else np.concatenate(taken)
            self._waiting -= samples.size
            self._room.set()
            return AudioChunk(samples, self.sample_rate)
        if self._error is not None:
            raise self._error
        return None

    async def __aiter__(self) -> AsyncIterator[AudioChunk]:
        while (chunk := await self.read()) is not None:
            yield chunk

    def _checked(self, chunk: AudioChunk) -> NDArray[np.float32]:
        if chunk.sample_rate != self.sample_rate:
            raise ValueError(f"a chunk at {chunk.sample_rate} Hz for a source at {self.sample_rate} Hz")
        return chunk.samples

    def _add(self, samples: NDArray[np.float32]) -> None:
        if samples.size:
            numbers = np.nan_to_num(np.array(samples, np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            self._chunks.append(numbers.clip(-1.0, 1.0, out=numbers))
            self._waiting += samples.size
            self._in_utterance = True
            self._news.set()
