"""The sound of a live session, cut on the clock: what has arrived by then, and silence where nothing has.

Pure arithmetic. Times are told by the caller, in seconds of any one monotonic clock.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from audio.chunk import AudioBlock

Samples = NDArray[np.float32]

LISTENER_RATE = 48_000
"""Hz, mono: what the listener of a live session hears."""

RESERVE_S = 0.02
"""Sound kept back beside the lookahead, so that chunks of a voice may come that much late; until that was measured."""

PATIENCE_S = 0.04
"""How late a chunk may come at least before its voice counts as ended."""

LEAST_RESERVE_S, MOST_RESERVE_S = 0.005, 0.2
"""Of what is kept back once it was measured."""

BURST_S = 0.15
"""A microphone gives smaller chunks than this; whoever gives more at once has it ready made and is not waited for."""

FADE_S = 0.005
"""From a voice to silence where it is cut off."""

FILTER_REACH = 80
"""How far soxr's filter hears each way, in samples of the lower rate: what it hears beyond is under -90 dB."""


@dataclass(frozen=True)
class LiveBlock:
    """One block of the programme.

    audio: what the model hears of it, at the model's rate; its `valid` is always the whole block.
    sound: float32 [n] at 48 kHz, what the listener hears.
    spoken: bool [n], which of that was pushed; the rest is silence put in between.
    """

    audio: AudioBlock
    sound: Samples
    spoken: NDArray[np.bool_]

    @property
    def speaking(self) -> bool:
        """Whether any of it was pushed."""
        return bool(self.spoken.any())

    def spoken_after(self, samples: int) -> int:
        """How many of the listener's samples were pushed, from that one on."""
        return int(np.count_nonzero(self.spoken[max(samples, 0) :]))


def truncated(block: LiveBlock, samples: int) -> LiveBlock:
    """The block with its voice cut off after so many of the listener's samples: a fade of 5 ms, then silence.

    The model hears the same, and silence ahead. With 0 or less there is no fade either: nothing of it is heard.
    """
    fade = np.arange(len(block.sound), dtype=np.float32) - samples
    gain = np.clip(1 - fade / (FADE_S * LISTENER_RATE), 0, 1) if samples > 0 else np.zeros_like(fade)
    gain = 0.5 - 0.5 * np.cos(np.pi * gain)
    every = len(block.sound) // len(block.audio.samples)
    audio = dataclasses.replace(
        block.audio, samples=block.audio.samples * gain[::every], ahead=np.zeros_like(block.audio.ahead)
    )
    return LiveBlock(audio, block.sound * gain, block.spoken & (fade < 0))


class LiveCutter:
    """Sound as it comes, to blocks when their time has come.

    Args:
        samples_per_block, lookahead_samples, sample_rate: the model's; 48 kHz is a multiple of its rate.
        reserve_s: how late chunks of a voice may come, until a second of it was measured.

    How a block is filled:
        - A voice that is going on continues, and silence follows it where it has a gap.
        - A voice that begins is laid to the end of the block, with the lookahead and the reserve kept for the next: one
          that comes in real time then goes on without a hole. What comes later than the reserve costs the model some of
          its lookahead, and the listener nothing before that is used up.
        - A voice that comes in large pieces begins one block after its first came, which is as early as a steady pace
          allows; at once when there are two blocks of it.
        - What is known to be all of an utterance begins at once. So does what seems to be, since no more came in time.

    The listener hears exactly the samples pushed, unless their drift is corrected, and zeros where silence is put in.
    What is laid out runs 5 ms ahead of what is cut, since the model's resampler has to hear that far.
    """

    def __init__(
        self, samples_per_block: int, lookahead_samples: int, sample_rate: int, reserve_s: float = RESERVE_S
    ) -> None:
        if samples_per_block < 1 or lookahead_samples < 0 or LISTENER_RATE % sample_rate:
            raise ValueError(f"blocks of {samples_per_block} + {lookahead_samples} samples at {sample_rate} Hz")
        ratio = LISTENER_RATE // sample_rate
        self._ratio, self._sample_rate = ratio, sample_rate
        self._samples_per_block, self._lookahead_samples = samples_per_block, lookahead_samples
        # From here on everything is in samples of the listener.
        self._block = samples_per_block * ratio
        self._lookahead = lookahead_samples * ratio
        self._lateness = Lateness(reserve_s)
        self._margin = FILTER_REACH * ratio if ratio > 1 else 0
        self._drift = DriftCorrector()
        self._keep_back(reserve_s)
        self._start = 0
        self._laid, self._laid_spoken = _silence(2 * self._margin)
        """The last `margin` samples that were cut, and as many that will be."""
        self._forget()

    def _keep_back(self, reserve_s: float) -> None:
        self._reserve = round(reserve_s * LISTENER_RATE)
        self._patience = round(max(reserve_s, PATIENCE_S) * LISTENER_RATE)
        self._kept = self._lookahead + self._reserve
        self._drift.target_s = -reserve_s / 2

    def _forget(self) -> None:
        self._pending: list[Samples] = []
        self._pending_samples = 0
        self._whole = 0
        """How much of what is pending belongs to utterances that are known to have ended."""
        self._going_on = False
        """A voice filled the latest block to its end and has not ended there."""
        self._fresh = False
        self._began_s: float | None = None
        self._largest = 0

    @property
    def pending_s(self) -> float:
        """Sound pushed and in no block yet, in seconds."""
        laid = int(np.count_nonzero(self._laid_spoken[self._margin :]))
        return (self._pending_samples + self._drift.held + laid) / LISTENER_RATE

    @property
    def missing_s(self) -> float:
        """How much more sound the next block needs to be full of it, its lookahead and the reserve included."""
        return max(0, self._block + self._kept - self._pending_samples) / LISTENER_RATE

    @property
    def drift(self) -> float:
        """How much faster than ours the source's clock runs, 0.001 for 0.1 %; 0 while it is not known."""
        return self._drift.drift

    def push(self, samples: Samples, arrived_s: float | None = None) -> None:
        """Take in sound, float32 [n] mono at 48 kHz (copied), any n.

        arrived_s: when it came; then a source whose clock drifts is corrected, and a voice begins at a better time.
        """
        if samples.ndim != 1:
            raise ValueError(f"mono samples [n], not {list(samples.shape)}")
        if not samples.size:
            return
        if self._pending_samples == self._whole:
            self._began_s, self._largest = arrived_s, 0
            if not self._going_on:
                self._lateness.pause()
                self._keep_back(self._lateness.usual_s)
        self._largest = max(self._largest, samples.size)
        self._fresh = True
        if arrived_s is None:
            self._add(self._drift.flush())
            self._add(np.array(samples, np.float32))
        else:
            if not self._in_bursts:
                self._lateness.push(samples.size, arrived_s)
            self._add(self._drift.push(np.array(samples, np.float32), arrived_s))

    def source_waits(self) -> None:
        """More is ready at the source than it may push: what comes next comes at our pace, not at its own."""
        self._drift.forget_pace()

    def utterance_ended(self) -> None:
        """What was pushed is whole: none of it need wait for more."""
        self._add(self._drift.flush())
        self._whole = self._pending_samples

    def drop(self) -> int:
        """Forget all that is in no block, as when the listener interrupts; the next block begins in silence.

        Gives how many samples that were.
        """
        dropped = round(self.pending_s * LISTENER_RATE)
        self._drift.flush()
        self._laid, self._laid_spoken = _silence(2 * self._margin)
        self._forget()
        return dropped

    def cut(self, now_s: float | None = None) -> LiveBlock:
        """The next block, whatever there is; now_s: on the clock of `push`."""
        if self._seems_whole(now_s) or self._breaks_off():
            self._add(self._drift.flush())
            self._whole = self._pending_samples
        pending = np.concatenate([np.zeros(0, np.float32), *self._pending])
        head = min(self._block, self._certain)
        tail = min(self._block - head, self._beginning(pending.size - head, now_s))
        laid, spoken = _silence(self._block)
        laid[:head], spoken[:head] = pending[:head], True
        laid[self._block - tail :], spoken[self._block - tail :] = pending[head : head + tail], True
        rest = pending[head + tail :].copy()  # a view would keep the whole of a long push alive
        went_on = self._going_on
        self._going_on = tail > 0 or (head == self._block and self._whole != head)
        self._whole = max(0, self._whole - head)
        self._pending, self._pending_samples = [rest], rest.size
        self._fresh = False
        if went_on and self._going_on:
            self._drift.level((rest.size - self._kept) / LISTENER_RATE)
        return self._emit(laid, spoken, self._next(rest))

    @property
    def _certain(self) -> int:
        """How much of what is pending follows at once on what is laid out."""
        return self._whole or (self._pending_samples if self._going_on else 0)

    def _breaks_off(self) -> bool:
        """Whether a voice that goes on has a gap in this block."""
        return self._going_on and not self._whole and self._pending_samples < self._block

    def _seems_whole(self, now_s: float | None) -> bool:
        """Whether a voice that began has come to its end, though nobody said so."""
        if self._going_on or self._pending_samples == self._whole:
            return False
        since = self._since_beginning(now_s)
        if since is None:
            return not self._fresh
        came = self._pending_samples - self._whole + self._drift.held
        return came + (self._patience // 2 if self._in_bursts else self._patience + self._largest) < since

    def _beginning(self, samples: int, now_s: float | None) -> int:
        """How much of a voice that begins, of which so many samples are there, can be heard before the block's end."""
        since = self._since_beginning(now_s)
        if since is not None and self._in_bursts and samples < 2 * self._block:
            return min(samples, since)
        # The next chunk comes no sooner than this one took to be spoken.
        chunk = 0 if self._in_bursts else self._largest
        # What should be there by now and is not yet has perhaps come to its end, and is laid no later for it.
        due = samples if since is None or self._in_bursts else max(samples, since - self._reserve)
        return min(samples, max(0, due - max(self._kept, chunk + self._patience)))

    @property
    def _in_bursts(self) -> bool:
        return self._largest >= BURST_S * LISTENER_RATE

    def _since_beginning(self, now_s: float | None) -> int | None:
        """How long ago the first of a voice came that was not heard yet, in samples; None where no times are told."""
        if now_s is None or self._began_s is None:
            return None
        return max(0, round((now_s - self._began_s) * LISTENER_RATE))

    def _next(self, rest: Samples) -> Samples:
        """What the model is told to come after what is laid out: float32 [lookahead].

        A voice that waits to begin is expected to go on in real time, which places it in the next block.
        """
        ahead = np.zeros(self._lookahead, np.float32)
        gap = 0 if self._whole or self._going_on else max(0, self._kept - rest.size)
        known = (rest[: self._whole] if self._whole else rest)[: max(0, self._lookahead - gap)]
        ahead[gap : gap + known.size] = known
        return ahead

    def _emit(self, laid: Samples, spoken: NDArray[np.bool_], ahead: Samples) -> LiveBlock:
        timeline, spoken = np.concatenate([self._laid, laid]), np.concatenate([self._laid_spoken, spoken])
        self._laid, self._laid_spoken = timeline[self._block :].copy(), spoken[self._block :].copy()
        cut = slice(self._margin, self._margin + self._block)
        heard = np.concatenate([timeline, ahead])
        if self._ratio > 1:
            # With the margins on both sides this is what resampling the whole programme at once would give.
            heard = np.clip(soxr.resample(heard, LISTENER_RATE, self._sample_rate), -1.0, 1.0)
        begin = self._margin // self._ratio
        end = begin + self._samples_per_block
        audio = AudioBlock(
            heard[begin:end].copy(),
            self._start,
            self._samples_per_block,
            heard[end : end + self._lookahead_samples].copy(),
        )
        self._start += self._samples_per_block
        return LiveBlock(audio, timeline[cut].copy(), spoken[cut].copy())

    def _add(self, samples: Samples) -> None:
        if samples.size:
            self._pending.append(samples)
            self._pending_samples += samples.size


def _silence(samples: int) -> tuple[Samples, NDArray[np.bool_]]:
    return np.zeros(samples, np.float32), np.zeros(samples, np.bool_)


class Lateness:
    """How late the chunks of a voice usually come, to the one of the last seconds that came soonest.

    Args:
        expected_s: taken for it until a second was measured.
    """

    EVERY_S = 0.01  # of sound, between two readings: a source may give one sample at a time
    WINDOW_S = 3.0  # no clock is so far off that it drifts by more than a few milliseconds in that time
    READINGS, ENOUGH = 500, 50
    USUAL = 0.98
    PAUSE_S = 0.25  # later than this it did not come late: nothing was said

    def __init__(self, expected_s: float) -> None:
        self._expected_s = expected_s
        self._readings: deque[float] = deque(maxlen=self.READINGS)
        self.pause()

    def pause(self) -> None:
        """What comes next is not measured against what came before."""
        self._delivered_s = self._read_s = 0.0
        self._offsets: deque[tuple[float, float]] = deque()
        self._unsure_s: float | None = None

    def push(self, samples: int, arrived_s: float) -> None:
        """Note that so many more samples at 48 kHz have come."""
        self._delivered_s += samples / LISTENER_RATE
        if self._offsets and self._delivered_s - self._read_s < self.EVERY_S:
            return
        self._read_s = self._delivered_s
        offset = arrived_s - self._delivered_s
        while self._offsets and self._offsets[0][0] < arrived_s - self.WINDOW_S:
            self._offsets.popleft()
        if self._unsure_s is not None:
            self._readings.append(self._unsure_s)
        late_s = max(0.0, offset - min((past for _, past in self._offsets), default=offset))
        if late_s > self.PAUSE_S:
            self._offsets.clear()
        # The end of a voice may lie with its source until that knows it to be the end: nothing waits for it.
        self._unsure_s = None if late_s > self.PAUSE_S else late_s
        self._offsets.append((arrived_s, offset))

    @property
    def usual_s(self) -> float:
        """What 98 of 100 of the last chunks kept to, within what may be kept back."""
        if len(self._readings) < self.ENOUGH:
            return self._expected_s
        return float(np.clip(np.quantile(self._readings, self.USUAL), LEAST_RESERVE_S, MOST_RESERVE_S))


class DriftCorrector:
    """A source whose clock runs a little fast or slow, to ours, by resampling it by so little.

    A source is taken for a clock when for 15 s and more it has delivered within 0.5 % of its rate, never more than
    250 ms from an even pace. From then on its drift is taken out, and `level` is led to `target_s` gently: a second
    that a network kept back is made good in five minutes. What comes in bursts or with gaps, or has to wait until it
    is taken, is no clock, and passes at its own speed.

    Args:
        target_s: where the lowest of the recent levels shall be.
    """

    MOST = 0.005  # of drift, and of correction: a twelfth of a semitone
    STEADY_S = 0.25
    PROOF_S, MEMORY_S = 15.0, 30.0
    GAP_S = 1.0  # nothing for longer: what came before says nothing about what comes
    EVERY_S = 0.5  # between two looks at the clock
    SETTLE_S = 30.0
    HASTE = 0.003  # of the correction, what may serve to settle the level
    LEVELS = 12  # blocks: the lowest of these counts, since that is the one that may become a hole
    HELD = 240  # samples that soxr's resampler keeps until it has heard what follows

    def __init__(self, target_s: float = 0.0) -> None:
        self.drift = 0.0
        self.target_s = target_s
        self._speed = 0.0
        self._delivered_s = 0.0
        self._latest_s = -np.inf
        self._arrivals: deque[tuple[float, float]] = deque()
        self._levels: deque[float] = deque(maxlen=self.LEVELS)
        self._stream: soxr.ResampleStream | None = None
        self._taken = 0

    @property
    def held(self) -> int:
        """How many samples were taken in and not given yet."""
        return min(self._taken, self.HELD)

    def push(self, samples: Samples, arrived_s: float) -> Samples:
        """Samples float32 [n] at 48 kHz in, about as many out, a few milliseconds later."""
        self._observe(len(samples), arrived_s)
        if self._stream is None:
            # The highest ratio ever asked for must be told, and be over 1: at 1.0 itself soxr (1.1.0) changes from one
            # set of filters to another, and clicks each time that border is crossed.
            self._stream = soxr.ResampleStream(LISTENER_RATE * (1 + self.MOST), LISTENER_RATE, 1, "float32", vr=True)
            self._stream.set_io_ratio(1 + self._speed, 1.0)
        self._taken += len(samples)
        return np.clip(self._stream.resample_chunk(samples), -1.0, 1.0)

    def forget_pace(self) -> None:
        """What came before says nothing about the clock by which the next comes."""
        self._arrivals.clear()
        self._correct(0.0)

    def level(self, level_s: float) -> None:
        """How much more sound than wanted was there after a block was cut."""
        self._levels.append(level_s)

    def flush(self) -> Samples:
        """What is held: the voice pauses here."""
        stream, self._stream, self._taken = self._stream, None, 0
        self._levels.clear()
        nothing = np.zeros(0, np.float32)
        return nothing if stream is None else np.clip(stream.resample_chunk(nothing, last=True), -1.0, 1.0)

    def _observe(self, samples: int, arrived_s: float) -> None:
        if arrived_s - self._latest_s > self.GAP_S:
            self._levels.clear()
            self.forget_pace()
        self._latest_s = arrived_s
        self._delivered_s += samples / LISTENER_RATE
        if self._arrivals and arrived_s - self._arrivals[-1][0] < self.EVERY_S:
            return
        self._arrivals.append((arrived_s, self._delivered_s))
        while arrived_s - self._arrivals[0][0] > self.MEMORY_S:
            self._arrivals.popleft()
        self._judge()

    def _judge(self) -> None:
        times, delivered = np.array(self._arrivals).T
        times, delivered = times - times[0], delivered - delivered[0]
        speed = self.drift = 0.0
        if times[-1] >= self.PROOF_S:
            drift, offset = np.polyfit(times, delivered - times, 1)
            uneven = np.abs(delivered - times - drift * times - offset).max()
            if abs(drift) <= self.MOST and uneven <= self.STEADY_S:
                self.drift = float(drift)
                off = min(self._levels) - self.target_s if self._levels else 0.0
                speed = drift + np.clip(off / self.SETTLE_S, -self.HASTE, self.HASTE)
        self._correct(float(np.clip(speed, -self.MOST, self.MOST)))

    def _correct(self, speed: float) -> None:
        if speed != self._speed and self._stream is not None:
            self._stream.set_io_ratio(1 + speed, 1.0, round(self.EVERY_S * LISTENER_RATE / 2))
        self._speed = speed
