"""The speech of the drawn world: every phoneme has a mouth, and the mouth fits the sound."""

from __future__ import annotations

import multiprocessing
import random
from itertools import islice
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import pytest

from avatar.pocket.speech import (
    RANGES,
    SAMPLES_PER_FRAME,
    VOICES,
    Speech,
    SpeechError,
    Synthesiser,
    Utterance,
    collect,
    held_out_utterances,
    load_texts,
    perform_all,
    pseudo_sentence,
    quantise,
    store,
    train_utterances,
)
from avatar.pocket.visemes import VISEMES, Phoneme, mouth_track, symbols

OPENING, WIDTH, PUCKER, TONGUE = range(4)


def track(*sounds: tuple[str, float]) -> np.ndarray:
    """The mouth for sounds of so many seconds, with 300 ms of silence on either side."""
    phonemes, clock = [], 0.3
    for name, seconds in sounds:
        phonemes.append(Phoneme(name, clock, clock + seconds))
        clock += seconds
    frames = round(100 * (clock + 0.3))
    sounding = np.zeros(frames, bool)
    sounding[30 : frames - 30] = True
    return mouth_track(phonemes, sounding.astype(np.float32), sounding)


def test_the_mouth_is_closed_before_and_after_speech():
    mouth = track(("a", 0.3))
    assert mouth[30:60, OPENING].max() > 0.8
    assert mouth[: 30 - 6, OPENING].max() < 0.02
    assert mouth[60 + 12 :, OPENING].max() < 0.02


@pytest.mark.parametrize("name", ["b", "m", "bʲ", "mː"])
def test_lips_meet_while_a_voiced_bilabial_sounds(name: str):
    mouth = track(("a", 0.2), (name, 0.06), ("a", 0.2))
    assert (mouth[:, OPENING] < 0.05)[50:56].sum() >= 4
    assert mouth[40, OPENING] > 0.8
    assert mouth[66, OPENING] > 0.8


def test_lips_meet_before_the_burst_of_p():
    mouth = track(("a", 0.2), ("p", 0.04), ("a", 0.2))
    assert (mouth[44:52, OPENING] < 0.05).sum() >= 4
    assert mouth[58, OPENING] > 0.5


def test_the_lower_lip_touches_the_teeth_in_f():
    mouth = track(("a", 0.2), ("f", 0.08), ("a", 0.2))
    assert 0.02 < mouth[53, OPENING] < 0.15


@pytest.mark.parametrize(
    ("name", "channel"), [("u", PUCKER), ("w", PUCKER), ("iː", WIDTH), ("ɑː", OPENING), ("θ", TONGUE)]
)
def test_a_sound_has_its_shape(name: str, channel: int):
    middle = track((name, 0.3))[45]
    assert middle[channel] > 0.75
    assert middle[channel] <= 1.1


def test_round_and_spread_exclude_each_other():
    assert track(("u", 0.3))[45, WIDTH] < 0.1
    assert track(("i", 0.3))[45, PUCKER] < 0.1


def test_a_sound_is_not_seen_more_than_70_ms_before_it_comes():
    same, other = track(("i", 0.3), ("i", 0.3)), track(("i", 0.3), ("u", 0.3))
    np.testing.assert_allclose(same[: 60 - 7], other[: 60 - 7], atol=0.06)


def test_a_mark_of_no_length_is_not_seen():
    np.testing.assert_allclose(track(("a", 0.2), ("", 0.0), ("i", 0.2)), track(("a", 0.2), ("i", 0.2)), atol=1e-3)


def test_no_phonemes_leave_the_mouth_at_rest():
    mouth = mouth_track([], np.zeros(40, np.float32), np.zeros(40, bool))
    assert mouth.shape == (40, 4)
    assert mouth[:, OPENING].max() == 0


@pytest.mark.parametrize(
    ("name", "sounds"),
    [("tʃʰ", ["t", "ʃ"]), ("ç", ["ç"]), ("ɑ̃ː", ["ɑ"]), ("ts.h", ["t", "ʂ", "h"]), ("ʲ", ["j"]), ("", [])],
)
def test_names_fall_into_sounds(name: str, sounds: list[str]):
    assert symbols(name) == sounds


def test_training_and_test_share_no_sentence_and_no_language_but_english():
    texts = load_texts()
    assert set(texts["train"]) & set(texts["test"]) == {"en"}
    assert not set(texts["train"]["en"]) & set(texts["test"]["en"])


def test_training_and_test_share_no_voice():
    train = {utterance.voice for utterance in islice(train_utterances(0), 3000)}
    assert not train & {utterance.voice for utterance in held_out_utterances(0)}


def test_the_same_seed_plans_the_same_speech():
    first, again, other = (list(islice(train_utterances(seed), 20)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_every_training_language_has_pseudo_words():
    texts = load_texts()
    rng = random.Random(0)
    assert set(texts["syllables"]) == set(texts["train"])
    assert all(len(pseudo_sentence(syllables, rng)) > 5 for syllables in texts["syllables"].values())


def test_korean_pseudo_words_are_whole_syllables():
    sentence = pseudo_sentence(load_texts()["syllables"]["ko"], random.Random(2))
    assert all("가" <= letter <= "힣" for letter in sentence if letter.isalpha())


def test_bytes_stand_for_the_stated_range():
    low, high = RANGES["mel"]
    np.testing.assert_array_equal(
        quantise(np.array([low - 1, low, high, high + 9], np.float32), "mel"), [0, 0, 255, 255]
    )


# --------------------------------------------------------------------------- with espeak-ng


@pytest.fixture(scope="module")
def spoken() -> list[Speech]:
    texts = ["Papa made popcorn.", "Bob, my map!", "Five foxes found it."]
    return list(perform_all([Utterance(text, "en-us", pause_s=0.5) for text in texts]))


@pytest.mark.needs("espeak-ng")
def test_sound_and_mouth_are_of_one_length(spoken: list[Speech]):
    assert len(spoken) == 3
    for speech in spoken:
        assert len(speech.samples) == SAMPLES_PER_FRAME * len(speech.mouth) == SAMPLES_PER_FRAME * len(speech.loudness)


@pytest.mark.needs("espeak-ng")
def test_the_mouth_is_closed_in_the_pause_and_moves_in_speech(spoken: list[Speech]):
    for speech in spoken:
        assert speech.mouth[-35:, OPENING].max() < 0.02
        assert speech.mouth[:, OPENING].max() > 0.5
        assert speech.mouth.min() >= 0
        assert speech.mouth.max() <= 1.1
        assert speech.loudness.max() <= 1.2


@pytest.mark.needs("espeak-ng")
def test_lips_meet_once_for_each_bilabial(spoken: list[Speech]):
    for speech, bilabials in zip(spoken[:2], (5, 4), strict=True):
        closed = speech.mouth[:, OPENING] < 0.05
        times = np.count_nonzero(np.diff(closed.astype(int)) == 1)
        assert times in (bilabials, bilabials + 1)  # and once at the end


@pytest.mark.needs("espeak-ng")
def test_the_mouth_keeps_time_with_the_sound(spoken: list[Speech]):
    for speech in spoken:
        opening, loudness = speech.mouth[:, OPENING], speech.loudness
        agreement = [np.corrcoef(np.roll(opening, lag), loudness)[0, 1] for lag in range(-8, 9)]
        assert abs(int(np.argmax(agreement)) - 8) <= 4


@pytest.mark.needs("espeak-ng")
def test_saying_it_again_gives_the_same(spoken: list[Speech]):
    again = next(perform_all([Utterance("Papa made popcorn.", "en-us", pause_s=0.5)]))
    np.testing.assert_array_equal(again.mouth, spoken[0].mouth)
    np.testing.assert_array_equal(again.samples, spoken[0].samples)


@pytest.mark.needs("espeak-ng")
def test_an_unknown_voice_is_named():
    with pytest.raises(SpeechError, match="no voice 'klingon-x'"):
        list(perform_all([Utterance("Hello.", "klingon-x")]))


@pytest.mark.needs("espeak-ng")
def test_the_stored_set_is_quantised_and_aligned(spoken: list[Speech], tmp_path):
    whole = collect(spoken, minutes=1)
    store(whole, tmp_path / "speech.npz")
    stored = np.load(tmp_path / "speech.npz")
    assert stored["mel"].shape == (len(whole.mouth), 80)
    assert stored["mel"].dtype == np.uint8
    low, high = stored["mouth_range"]
    np.testing.assert_allclose(stored["mouth"] / 255 * (high - low) + low, whole.mouth, atol=0.003)
    assert [path.name for path in tmp_path.iterdir()] == ["speech.npz"]


def phoneme_names(texts: dict[str, Any], names: Queue[set[str]]) -> None:
    """Run in a child process: the names of all phonemes that espeak-ng speaks in all sentences."""
    synthesiser = Synthesiser()
    found: set[str] = set()
    for part in ("train", "test"):
        for language, sentences in texts[part].items():
            for sentence in sentences:
                found |= {p.name for p in synthesiser.say(Utterance(sentence, VOICES.get(language, language)))[1]}
    names.put(found)


@pytest.mark.needs("espeak-ng")
def test_every_phoneme_of_every_sentence_is_in_the_table():
    names: Queue[set[str]] = multiprocessing.get_context("spawn").Queue()
    child = multiprocessing.get_context("spawn").Process(target=phoneme_names, args=(load_texts(), names), daemon=True)
    child.start()
    found = names.get(timeout=60)
    child.join()
    assert not {name for name in found if name and not set(symbols(name)) <= set(VISEMES)}
    assert not {name for name in found if name and not symbols(name)}
    assert len(found) > 150
