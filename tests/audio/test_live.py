"""Sound of a live session: nothing of it lost, heard once, at its time; and clocks that are not quite ours."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.live import LEAST_RESERVE_S, LISTENER_RATE, DriftCorrector, Lateness, LiveBlock, LiveCutter, truncated

RATE = 16_000
BLOCK = 7680
AHEAD = 1280
BLOCK_S = BLOCK / RATE
MS = LISTENER_RATE // 1000


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Every sample differs from zero, so that silence put in between can be told from it."""
    values = np.random.default_rng(seed).uniform(0.05, 0.4, samples)
    return (values * np.random.default_rng(seed + 1).choice([-1, 1], samples)).astype(np.float32)


def tone(samples: int, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(samples) / LISTENER_RATE)).astype(np.float32)


def cutter(**how: float) -> LiveCutter:
    return LiveCutter(BLOCK, AHEAD, RATE, **how)


def drained(live: LiveCutter) -> list[LiveBlock]:
    """Blocks until nothing is pending, the last of them silent."""
    live.utterance_ended()
    blocks = []
    while live.pending_s:
        blocks.append(live.cut())
    return [*blocks, live.cut()]


def programme(blocks: Iterable[LiveBlock]) -> np.ndarray:
    return np.concatenate([block.sound for block in blocks])


def heard_by_model(blocks: Iterable[LiveBlock]) -> np.ndarray:
    return np.concatenate([block.audio.samples for block in blocks])


def spoken(blocks: Iterable[LiveBlock]) -> np.ndarray:
    return np.concatenate([block.spoken for block in blocks])


def error_db(samples: np.ndarray, truth: np.ndarray) -> float:
    return 10 * np.log10(np.mean((samples - truth) ** 2) / np.mean(truth**2))


# What comes in comes out


STEPS = st.lists(
    st.one_of(
        st.integers(1, 40).map(lambda n: ("push", n)),
        st.integers(1, 60 * 480).map(lambda n: ("push", n)),
        st.just(("push", 10 * LISTENER_RATE)),
        st.just(("cut", 0)),
        st.just(("cut", 0)),
        st.just(("end", 0)),
    ),
    max_size=40,
)


def played(steps: list[tuple[str, int]], rate: int = RATE) -> tuple[np.ndarray, list[LiveBlock]]:
    """All that was pushed, and all blocks that were cut of it."""
    live = LiveCutter(BLOCK * rate // RATE, AHEAD * rate // RATE, rate)
    pushed, blocks = [np.zeros(0, np.float32)], []
    for number, (step, samples) in enumerate(steps):
        if step == "push":
            pushed.append(noise(samples, number))
            live.push(pushed[-1])
        elif step == "cut":
            blocks.append(live.cut())
        else:
            live.utterance_ended()
        waiting = sum(map(len, pushed)) - sum(block.spoken.sum() for block in blocks)
        assert live.pending_s == waiting / LISTENER_RATE
    return np.concatenate(pushed), blocks + drained(live)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_however_it_comes_the_listener_hears_all_of_it_once_and_in_order(steps):
    pushed, blocks = played(steps)
    sound = programme(blocks)
    np.testing.assert_array_equal(sound[sound != 0], pushed)
    np.testing.assert_array_equal(sound != 0, spoken(blocks))
    for number, block in enumerate(blocks):
        assert (block.audio.start, block.audio.valid) == (number * BLOCK, BLOCK)
        assert block.audio.samples.shape == (BLOCK,)
        assert block.audio.ahead.shape == (AHEAD,)
        assert block.sound.shape == block.spoken.shape == (BLOCK * 3,)
        assert block.sound.dtype == block.audio.samples.dtype == block.audio.ahead.dtype == np.float32
        assert block.speaking == bool(block.sound.any())


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_the_model_hears_what_the_listener_hears_without_seams(steps):
    _, blocks = played(steps)
    truth = soxr.resample(programme(blocks), LISTENER_RATE, RATE)
    if truth.any():
        assert error_db(heard_by_model(blocks), truth) < -85


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 48_000])
def test_models_of_other_rates_hear_it_too(rate):
    steps = [("push", 30_000), ("cut", 0), ("push", 7), ("cut", 0), ("push", 50_000), ("cut", 0)]
    _, blocks = played(steps, rate)
    sound = programme(blocks)
    truth = soxr.resample(sound, LISTENER_RATE, rate) if rate != LISTENER_RATE else sound
    np.testing.assert_allclose(heard_by_model(blocks), truth, atol=1e-5)


def test_a_click_is_heard_by_both_at_the_same_time_at_the_border_of_blocks_too():
    places = [100, 7679, 7680, 7681, 12_345, 15_358, 15_359, 15_360, 20_001]
    for place in places:
        sound = np.zeros(3 * 23_000, np.float32)
        sound[3 * place] = 1.0
        live = cutter()
        live.push(sound)
        blocks = drained(live)
        at = int(np.argmax(programme(blocks)))
        assert at == 3 * place + 240
        assert int(np.argmax(heard_by_model(blocks))) == at // 3


def test_what_is_ahead_of_a_block_is_the_beginning_of_the_next():
    live = cutter()
    live.push(noise(3 * LISTENER_RATE))
    blocks = [live.cut() for _ in range(5)]
    for block, following in pairwise(blocks):
        assert error_db(block.audio.ahead, following.audio.samples[:AHEAD]) < -90


def test_what_is_not_mono_is_refused():
    with pytest.raises(ValueError, match="mono"):
        cutter().push(np.zeros((10, 2), np.float32))
    with pytest.raises(ValueError, match="11025 Hz"):
        LiveCutter(BLOCK, AHEAD, 11_025)


# When a voice begins


def first_sound(blocks: list[LiveBlock]) -> float:
    """In seconds of the programme."""
    return int(np.argmax(spoken(blocks))) / LISTENER_RATE


def test_with_no_sound_there_is_silence():
    live = cutter()
    for _ in range(3):
        block = live.cut()
        assert not block.sound.any()
        assert not block.audio.samples.any()
        assert not block.speaking
    assert live.pending_s == 0


def test_the_beginning_of_a_voice_is_laid_to_the_end_of_the_block_and_lookahead_and_reserve_are_kept():
    live = cutter(reserve_s=0.04)
    live.push(noise(300 * MS))
    live.cut()
    assert live.pending_s == pytest.approx(0.120 + 0.005)  # 5 ms of what is laid out is cut with the next block
    live.push(noise(480 * MS))
    block = live.cut()
    assert block.spoken.all()
    assert live.pending_s == pytest.approx(0.120 + 0.005)


def test_less_than_lookahead_and_reserve_waits_for_more():
    live = cutter(reserve_s=0.04)
    for _ in range(7):
        live.push(noise(17 * MS))
    assert not live.cut().speaking
    live.push(noise(1 * MS))
    assert not live.cut().speaking
    live.push(noise(10 * MS))
    live.cut()
    live.push(noise(480 * MS))
    assert live.cut().spoken[: 10 * MS].all()


def test_what_waited_a_block_long_without_more_is_heard():
    live = cutter()
    live.push(noise(50 * MS))
    blocks = [live.cut(), live.cut(), live.cut()]
    assert [block.speaking for block in blocks] == [False, True, False]
    assert first_sound(blocks) == pytest.approx(BLOCK_S + 0.005)


def test_an_utterance_that_is_known_to_be_whole_begins_at_once():
    live = cutter()
    live.push(noise(50 * MS))
    live.utterance_ended()
    block = live.cut()
    assert block.spoken.sum() == 50 * MS
    assert first_sound([block]) == pytest.approx(0.005)


def test_an_utterance_after_one_that_ended_begins_like_any_other():
    live = cutter()
    live.push(noise(100 * MS, 1))
    live.utterance_ended()
    live.push(noise(200 * MS, 2))
    first = live.cut()
    live.push(noise(480 * MS, 3))
    blocks = [first, live.cut()]
    marks = spoken(blocks)
    begins = np.flatnonzero(np.diff(marks.astype(int)) == 1)
    assert len(begins) == 2, "the second utterance has a hole"
    assert marks[5 * MS : 105 * MS].all()
    assert marks[-480 * MS :].all()


def test_more_than_a_block_begins_at_once():
    live = cutter()
    live.push(noise(700 * MS))
    assert first_sound([live.cut()]) == pytest.approx(0.005)


def test_a_gap_of_the_source_is_silence_and_then_it_begins_anew():
    live = cutter(reserve_s=0.04)
    live.push(noise(900 * MS))
    live.cut()
    gap = live.cut()
    assert gap.spoken.sum() == 425 * MS
    assert gap.spoken[: 425 * MS].all()
    live.push(noise(200 * MS))
    onset = live.cut()
    assert np.flatnonzero(onset.spoken)[0] == (480 - 80 + 5) * MS


def test_missing_says_what_the_next_block_needs():
    live = cutter(reserve_s=0.04)
    assert live.missing_s == pytest.approx(0.6)
    live.push(noise(500 * MS))
    assert live.missing_s == pytest.approx(0.1)
    live.push(noise(500 * MS))
    assert live.missing_s == 0


def test_dropping_forgets_all_that_is_in_no_block():
    live = cutter()
    live.push(noise(1000 * MS))
    block = live.cut()
    assert live.drop() == 1000 * MS - block.spoken.sum()
    assert live.pending_s == 0
    silent = live.cut()
    assert not silent.sound.any()
    assert not silent.audio.samples.any()
    assert silent.audio.start == BLOCK


@settings(max_examples=40, deadline=None)
@given(
    phase=st.floats(0, 0.48),
    chunk_ms=st.sampled_from([5, 20, 23, 60, 90, 100, 128, 149]),
    jitters=st.lists(st.floats(0, 0.03), min_size=1, max_size=50),
    timed=st.booleans(),
)
def test_a_voice_in_real_time_has_no_hole(phase, chunk_ms, jitters, timed):
    """Chunks come when they are complete, and up to 30 ms later."""
    live = cutter()
    chunk_s = chunk_ms / 1000
    arrivals = [phase + (i + 1) * chunk_s + jitters[i % len(jitters)] for i in range(round(6 / chunk_s))]
    sound = noise(chunk_ms * MS)
    arrivals = list(np.maximum.accumulate(arrivals))
    blocks, came = [], 0
    for number in range(1, 12):
        now = number * BLOCK_S
        while came < len(arrivals) and arrivals[came] <= now:
            live.push(sound, arrivals[came] if timed else None)
            came += 1
        blocks.append(live.cut(now if timed else None))
    marks = spoken(blocks)
    begin = int(np.argmax(marks))
    assert marks[begin:].all(), "a hole in the voice"
    delay_s = begin / LISTENER_RATE + BLOCK_S - arrivals[0]
    assert delay_s <= BLOCK_S + max(0.12, chunk_s + 0.04) + 0.01 + max(jitters)


def said_again(late_s: float, chunk_ms: int = 20) -> list[tuple[float, float]]:
    """Three times 1.5 s of a voice whose every tenth chunk is that late.

    Gives of each how long after its first chunk it was heard, and the length of its holes, in seconds.
    """
    live, number, utterances = cutter(reserve_s=0.04), 0, []
    for begins in (0.1, 3.21, 6.37):
        arrivals = [begins + i * chunk_ms / 1000 + (late_s if i % 10 == 9 else 0) for i in range(1500 // chunk_ms)]
        arrivals, came, blocks = list(np.maximum.accumulate(arrivals)), 0, []
        while (now := number * BLOCK_S) < begins + 3.1:
            while came < len(arrivals) and arrivals[came] <= now:
                live.push(noise(chunk_ms * MS), arrivals[came])
                came += 1
            blocks.append((now, live.cut(now)))
            number += 1
        marks = spoken([block for _, block in blocks])
        begin, end = np.flatnonzero(marks)[[0, -1]]
        holes = (end + 1 - begin - int(marks.sum())) / LISTENER_RATE
        utterances.append((blocks[0][0] + begin / LISTENER_RATE - arrivals[0], holes))
    return utterances


def test_a_voice_that_comes_evenly_is_kept_back_less_when_that_was_measured():
    (first_s, first_hole_s), *later = said_again(0.0)
    assert first_hole_s == 0
    for delay_s, hole_s in later:
        assert hole_s == 0
        assert -1e-6 <= delay_s - (BLOCK_S + 0.08 + LEAST_RESERVE_S) <= 0.02 + 1e-6  # up to a chunk later
        assert first_s - delay_s >= 0.02


def test_a_voice_that_comes_unevenly_is_kept_back_more_when_that_was_measured():
    (_, first_hole_s), *later = said_again(0.18)
    assert first_hole_s > 0
    for delay_s, hole_s in later:
        assert hole_s == 0
        assert delay_s >= BLOCK_S + 0.08 + 0.1


@pytest.mark.parametrize("late_s", [0.0, 0.02, 0.04])
@pytest.mark.parametrize("chunk_ms", [10, 20, 32])
def test_what_comes_late_costs_lookahead_before_it_makes_a_hole(late_s, chunk_ms):
    assert all(hole_s == 0 for _, hole_s in said_again(late_s, chunk_ms))


def test_a_pause_is_not_taken_for_lateness():
    lateness = Lateness(0.04)
    for word in range(20):
        for piece in range(10):
            lateness.push(960, word * 0.6 + piece * 0.02)
    assert lateness.usual_s == LEAST_RESERVE_S


def test_the_end_of_a_voice_may_come_late():
    """A resampler holds the last of it until nothing more seems to come."""
    lateness = Lateness(0.04)
    for word in range(20):
        for piece in range(10):
            lateness.push(960, word * 2.0 + piece * 0.02)
        lateness.push(720, word * 2.0 + 0.4)
        lateness.pause()
    assert lateness.usual_s == LEAST_RESERVE_S


def test_single_samples_are_measured_as_well_as_chunks():
    lateness = Lateness(0.04)
    for at in range(LISTENER_RATE):
        lateness.push(1, at / LISTENER_RATE + 0.03 * (at // 4800 % 2))
    assert lateness.usual_s == pytest.approx(0.03, abs=0.001)


@pytest.mark.parametrize("chunk_ms", [160, 200, 333, 480])
@pytest.mark.parametrize("phase", np.arange(0, 0.48, 0.03).round(3))
def test_a_voice_that_comes_ready_made_begins_within_one_block_and_has_no_hole(chunk_ms, phase):
    live = cutter()
    arrivals = [phase + i * chunk_ms / 1000 for i in range(2000 // chunk_ms)]
    blocks, came = [], 0
    for number in range(1, 6):
        now = number * BLOCK_S
        while came < len(arrivals) and arrivals[came] <= now:
            live.push(noise(chunk_ms * MS, came), arrivals[came])
            came += 1
        blocks.append(live.cut(now))
    marks = spoken(blocks)
    begin = int(np.argmax(marks))
    voice = marks[begin : begin + len(arrivals) * chunk_ms * MS]
    assert voice.all(), "a hole in the voice"
    assert begin / LISTENER_RATE + BLOCK_S - phase <= BLOCK_S + 0.031


@pytest.mark.parametrize("phase", np.arange(0, 0.48, 0.03).round(3))
def test_a_short_word_that_comes_at_once_begins_within_one_block(phase):
    live = cutter()
    live.push(noise(300 * MS), phase)
    blocks = [live.cut((number + 1) * BLOCK_S) for number in range(4)]
    assert first_sound(blocks) + BLOCK_S - phase <= BLOCK_S + 0.031
    assert spoken(blocks).sum() == 300 * MS


@pytest.mark.parametrize("length_ms", [300, 500, 900])
def test_an_utterance_that_ended_just_before_a_cut_is_heard_no_later_than_others(length_ms):
    """In 20 ms at the pace of a voice, begun every 10 ms of a block; nobody says that it has ended."""
    delays = []
    for phase in np.arange(0.0, BLOCK_S, 0.01):
        live, blocks, came = cutter(), [], 0
        for number in range(1, 7):
            while came < length_ms // 20 and phase + (came + 1) * 0.02 <= number * BLOCK_S:
                live.push(noise(20 * MS), phase + (came + 1) * 0.02)
                came += 1
            blocks.append(live.cut(number * BLOCK_S))
        assert spoken(blocks).sum() == length_ms * MS
        delays.append(first_sound(blocks) + BLOCK_S - phase)
    assert max(delays) <= np.median(delays) + 0.045
    assert max(delays) <= BLOCK_S + 0.15


# Cutting a voice off


@pytest.mark.parametrize("samples", [1, 5000, BLOCK * 3 - 100, BLOCK * 3])
def test_a_block_cut_off_is_silent_after_a_short_fade(samples):
    live = cutter()
    live.push(noise(2 * LISTENER_RATE))
    live.cut()
    block = live.cut()
    cut = truncated(block, samples)
    np.testing.assert_array_equal(cut.sound[:samples], block.sound[:samples])
    assert not cut.sound[samples + 5 * MS :].any()
    assert (np.abs(cut.sound) <= np.abs(block.sound)).all()
    same = -(-samples // 3)
    np.testing.assert_array_equal(cut.audio.samples[:same], block.audio.samples[:same])
    assert not cut.audio.samples[same + 5 * 16 :].any()
    assert not cut.audio.ahead.any()
    assert (cut.audio.start, cut.audio.valid) == (block.audio.start, block.audio.valid)
    assert cut.spoken_after(samples) == 0
    assert cut.spoken_after(0) == cut.spoken.sum() == samples
    assert cut.sound.dtype == cut.audio.samples.dtype == np.float32


def test_a_block_cut_off_at_its_beginning_is_silent():
    live = cutter()
    live.push(noise(LISTENER_RATE))
    cut = truncated(live.cut(), 0)
    assert not cut.sound.any()
    assert not cut.audio.samples.any()
    assert not cut.speaking


# Clocks that are not quite ours


def broadcast(
    seconds: float, speed: float, chunk_s: float = 0.02, jitter_s: float = 0.01, period: int = 48
) -> tuple[list[LiveBlock], np.ndarray, LiveCutter]:
    """A source whose clock runs that much fast says a tone of so many samples a period, for so long.

    Gives the last blocks, after each block the sound that was pending beyond lookahead and reserve, in seconds, and the
    cutter. There must be no hole.
    """
    live = LiveCutter(BLOCK * 3, AHEAD * 3, LISTENER_RATE)  # a model that needs no resampling
    rng = np.random.default_rng(7)
    chunk = round(chunk_s * LISTENER_RATE)
    sound = np.tile(tone(period, LISTENER_RATE / period), chunk // period + 2)
    blocks, levels, sent, arrives = [], [], 0, 0.3 + chunk_s
    for number in range(1, int(seconds / BLOCK_S)):
        now = number * BLOCK_S
        while arrives <= now:
            begin = sent * chunk % period
            live.push(sound[begin : begin + chunk], arrives)
            sent += 1
            arrives = max(arrives, 0.3 + (sent + 1) * chunk_s / (1 + speed) + rng.uniform(0, jitter_s))
        block = live.cut(now)
        if number > 3:
            assert block.spoken.all(), f"a hole at {now:.0f} s"
            levels.append(live.pending_s - 0.120)
            blocks = [*blocks[-39:], block]
    return blocks, np.array(levels), live


@pytest.mark.parametrize("speed", [0.001, -0.001])
@pytest.mark.parametrize("minutes", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_a_clock_that_is_off_neither_starves_nor_piles_up(minutes, speed):
    _, levels, live = broadcast(60 * minutes, speed)
    assert np.abs(levels).max() <= 0.04
    assert live.drift == pytest.approx(speed, rel=0.15)
    assert levels[200:500].mean() == pytest.approx(levels[-300:].mean(), abs=0.003)


@pytest.mark.parametrize("chunk_s", [0.01, 0.05, 0.09])
def test_chunks_of_other_sizes_leave_no_hole_either(chunk_s):
    for speed in (0.003, -0.003):
        _, levels, _ = broadcast(120, speed, chunk_s)
        assert np.abs(levels).max() <= 0.06 + chunk_s


@pytest.mark.parametrize("speed", [0.001, -0.001, 0.0])
def test_the_pitch_is_that_of_the_sources_own_clock(speed):
    """What its clock calls 1 kHz has to be heard as 1001 Hz where that clock is 0.1 % fast."""
    blocks, _, _ = broadcast(120, speed)
    heard = programme(blocks)
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard)), 2**22))
    assert np.argmax(spectrum) * LISTENER_RATE / 2**22 == pytest.approx(1000 * (1 + speed), abs=0.4)


def test_the_correction_makes_no_clicks():
    blocks, _, live = broadcast(30, 0.003, period=240)
    bend = np.abs(np.diff(programme(blocks), 2)).max()
    assert live.drift == pytest.approx(0.003, rel=0.1)
    assert bend < 1.05 * 0.4 * (2 * np.pi / 240) ** 2


def test_a_store_of_sound_is_not_hurried_through():
    """A pipe that is always full gives sound as fast as it is taken, which is no clock."""
    corrector = DriftCorrector()
    ratios = []
    for number in range(400):
        corrector.level(0.4)
        corrector.forget_pace()
        ratios.append(len(corrector.push(noise(480 * MS), number * BLOCK_S)) / (480 * MS))
    assert min(ratios[1:]) > 1 - 1e-4
    assert max(ratios[1:]) < 1 + 1e-4


def test_what_a_network_kept_back_is_made_good():
    """A second in one piece, and then a voice in real time again: the second is not late for ever."""
    live = LiveCutter(BLOCK * 3, AHEAD * 3, LISTENER_RATE)
    arrives, levels = [1.5] * 50 + [1.5 + 0.02 * number for number in range(1, 30_000)], []
    for number in range(1, int(600 / BLOCK_S)):
        while arrives and arrives[0] <= number * BLOCK_S:
            live.push(tone(960), arrives.pop(0))
        live.cut(number * BLOCK_S)
        levels.append(live.pending_s)
    assert max(levels[:20]) > 0.9
    assert np.abs(np.array(levels[-100:]) - 0.12).max() <= 0.04


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.floats(0.2, 12.0), st.floats(0.3, 15.0)), min_size=5, max_size=15))
def test_bursts_are_never_stretched(bursts):
    """(seconds of sound, seconds until the next): as speech comes from a synthesizer."""
    corrector, now, pushed, got = DriftCorrector(), 0.0, 0, 0
    for sound_s, pause_s in bursts:
        for _ in range(int(sound_s / 0.1)):
            got += len(corrector.push(np.zeros(100 * MS, np.float32), now))
            corrector.level(0.1)
            pushed += 100 * MS
            now += 0.001
        now += pause_s
    got += len(corrector.flush())
    assert abs(got - pushed) <= 1


def test_what_the_corrector_holds_is_given_at_the_end():
    corrector = DriftCorrector()
    sound = tone(LISTENER_RATE)
    got = [corrector.push(sound[i : i + 960], i / LISTENER_RATE) for i in range(0, len(sound), 960)]
    assert corrector.held == len(sound) - sum(map(len, got)) == 240
    got.append(corrector.flush())
    assert corrector.held == 0
    whole = np.concatenate(got)
    assert len(whole) == pytest.approx(len(sound), abs=1)


def test_of_a_corrected_voice_nothing_is_left_at_its_end():
    live = cutter()
    for number in range(40):
        live.push(tone(960), number * 0.02)
    live.utterance_ended()
    blocks = [live.cut(0.8 + number * BLOCK_S) for number in range(3)]
    assert live.pending_s == 0
    assert spoken(blocks).sum() == pytest.approx(40 * 960, abs=2)
