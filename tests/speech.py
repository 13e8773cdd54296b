"""A voice to test with: endless sound like speech, with clicks at known times, said into a pipe at any speed."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
PITCH_HZ = 125
SYLLABLE_S = 0.24

VOWELS = ((730, 1090), (270, 2290), (300, 870), (530, 1840), (570, 840))
"""The first two formants in Hz of a, i, u, e, o."""

LOUDNESS = 0.25
"""Peak of the voice; a click is CLICK loud, so that nobody takes the one for the other."""

CLICK = 0.9
CLICK_S = 0.005

JITTER_S = (0.0, 0.187, 0.063, 0.139, 0.022, 0.101, 0.17)
"""Clicks do not come at even times: one taken for its neighbour is then seen, and they fall on all parts of a frame."""


@dataclass(frozen=True)
class Speech:
    """Sound by the numbers of its samples: any stretch of hours of it, at once and without memory.

    click_every_s: about so often it clicks, at the times of `clicks`; None: never. voice: spans (from, to) in seconds
    in which somebody speaks; None: all the time, with pauses. noise: peak of what is heard when nobody speaks.
    """

    click_every_s: float | None = 1.0
    voice: Sequence[tuple[float, float]] | None = None
    rate: int = RATE
    noise: float = 0.0
    first_click_s: float = 0.5

    def clicks(self, start_s: float, end_s: float) -> list[float]:
        """The times of all clicks that begin in a stretch."""
        if self.click_every_s is None:
            return []
        around = range(
            max(0, int((start_s - self.first_click_s) / self.click_every_s) - 1),
            int((end_s - self.first_click_s) / self.click_every_s) + 2,
        )
        return [time for number in around if start_s <= (time := self._click(number)) < end_s]

    def samples(self, start: int, count: int) -> NDArray[np.float32]:
        """float32 [count] mono, from sample number `start` on."""
        index = np.arange(start, start + count)
        sound = LOUDNESS * self._voice(index)
        if self.noise:
            sound += self.noise * np.random.default_rng(start).uniform(-1, 1, count)
        for click in self.clicks(start / self.rate - CLICK_S, (start + count) / self.rate):
            at = round(click * self.rate) - start
            sound[max(0, at) : max(0, at + round(CLICK_S * self.rate))] = CLICK
        return sound.astype(np.float32)

    def s16le(self, start: int, count: int) -> bytes:
        return (self.samples(start, count) * 32767).round().astype("<i2").tobytes()

    def _click(self, number: int) -> float:
        assert self.click_every_s is not None
        jitter = JITTER_S[number % len(JITTER_S)] * min(1.0, self.click_every_s)
        return self.first_click_s + number * self.click_every_s + jitter

    def _voice(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        period = round(self.rate / PITCH_HZ)
        syllable, within = np.divmod(index / self.rate, SYLLABLE_S)
        syllable = syllable.astype(np.int64)
        # Any order will do that does not repeat soon.
        vowel = (syllable * syllable * 7 + syllable // 5) % len(VOWELS)
        open_ = np.sin(np.pi * np.minimum(within / (0.8 * SYLLABLE_S), 1.0)) ** 2
        sound = _wavetable(period, self.rate)[vowel, index % period] * open_
        if self.voice is None:
            return sound * (syllable % 13 < 11)
        spoken = np.zeros(len(index), bool)
        for start, end in self.voice:
            spoken |= (index >= round(start * self.rate)) & (index < round(end * self.rate))
        return sound * spoken


@functools.cache
def _wavetable(period: int, rate: int) -> NDArray[np.float64]:
    """One period of each vowel, [len(VOWELS), period], of peak 1."""
    hz = np.arange(1, 33) * (rate / period)
    phase = 2 * np.pi * np.outer(np.arange(1, 33), np.arange(period) / period)
    waves = []
    for formants in VOWELS:
        strength = sum(1 / (1 + ((hz - formant) / 120) ** 2) for formant in formants) / hz**0.5
        wave = (strength[:, None] * np.sin(phase)).sum(0)
        waves.append(wave / np.abs(wave).max())
    return np.stack(waves)


class Speaker:
    """Says a `Speech` into a file descriptor as s16le, from a thread. Closes it at the end, and when stopped.

    speed: seconds of speech in a second, 1.001 for a clock that is a thousandth fast; None: as fast as it is taken.
    said_s: seconds of speech written; late_s: how far the worst chunk was behind its time, because the pipe was full;
    ended: the speech was all written, the reader has gone, or it was stopped.
    """

    def __init__(
        self,
        descriptor: int,
        speech: Speech,
        seconds: float | None = None,
        *,
        speed: float | None = 1.0,
        chunk_s: float = 0.02,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._descriptor, self._speech, self._seconds = descriptor, speech, seconds
        self._speed, self._clock = speed, clock
        self._chunk = max(1, round(chunk_s * speech.rate))
        self._written: deque[tuple[float, float]] = deque(maxlen=20_000)
        self._samples = 0
        self._at_once_until = 0
        self._began = 0.0
        self._stop, self._go, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._go.set()
        self._thread = threading.Thread(target=self._run, name="speaker", daemon=True)
        self.late_s = 0.0
        self.broken = False

    def __enter__(self) -> Speaker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def said_s(self) -> float:
        return self._samples / self._speech.rate

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def start(self) -> Speaker:
        self._began = self._clock()
        self._thread.start()
        return self

    def pause(self) -> None:
        """Say nothing until `resume`; the speech then goes on where it was."""
        self._go.clear()

    def resume(self) -> None:
        self._go.set()

    def burst(self, seconds: float) -> None:
        """Write that much at once, as a fast text-to-speech does; the pause follows of itself."""
        self._at_once_until = self._samples + round(seconds * self._speech.rate)
        self._wake.set()

    def written_at(self, second: float) -> float:
        """When that second of the speech went into the pipe. Raises: LookupError: not yet, or too long ago."""
        for start, at in reversed(self._written):
            if start <= second:
                if second - start > self._chunk / self._speech.rate:
                    break
                return at
        raise LookupError(f"second {second:g} was not written, or long ago")

    def stop(self) -> None:
        self._stop.set()
        self._go.set()
        self._wake.set()
        self._thread.join(5)

    def join(self, limit_s: float = 60.0) -> None:
        """Wait for the end of the speech. Raises: TimeoutError."""
        self._thread.join(limit_s)
        if self._thread.is_alive():
            raise TimeoutError(f"still speaking after {limit_s:g} s, {self.said_s:.1f} s said")

    def _run(self) -> None:
        os.set_blocking(self._descriptor, False)
        try:
            for start, count in self._chunks():
                self._wait(start)
                if self._stop.is_set():
                    break
                now = self._clock()
                self._written.append((start / self._speech.rate, now))
                self._write(self._speech.s16le(start, count))
                self._samples = start + count
        except BrokenPipeError:
            self.broken = True
        finally:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        end = None if self._seconds is None else round(self._seconds * self._speech.rate)
        start = 0
        while end is None or start < end:
            count = self._chunk if end is None else min(self._chunk, end - start)
            yield start, count
            start += count

    def _wait(self, start: int) -> None:
        """Until the chunk is due: as with a microphone, once its last sample has been heard."""
        while not self._stop.is_set():
            if not self._go.is_set():
                paused = self._clock()
                self._go.wait()
                self._began += self._clock() - paused
            if self._speed is None or start < self._at_once_until:
                return
            due = self._began + (start + self._chunk) / (self._speech.rate * self._speed)
            late = self._clock() - due
            if late >= 0:
                self.late_s = max(self.late_s, late)
                return
            self._wake.clear()
            self._wake.wait(-late)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._stop.is_set():
            # A pipe that nobody reads must not keep us from stopping.
            if select.select([], [self._descriptor], [], 0.2)[1]:
                view = view[os.write(self._descriptor, view) :]
