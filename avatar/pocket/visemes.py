"""From phonemes with times to the movement of a drawn mouth: opening, width, pucker and tongue, 100 times a second.

Each phoneme pulls the mouth towards its own shape, most strongly while it sounds and a little before and after
(dominance functions). Consonants that the lips do not make are weak, so that vowels shine through them. Lips that must
meet (p b m) or touch the teeth (f v) are closed afterwards, at the times at which the sound says so.

The reach of a phoneme is short on purpose: the mouth must be predictable from the sound that lies at most 80 ms ahead.
Source of the idea: Cohen and Massaro, Modeling coarticulation in synthetic visual speech (1993); the numbers are ours.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FRAMES_PER_SECOND = 100


class Phoneme(NamedTuple):
    """A sound as the synthesiser reports it: an IPA name, "" for silence; start and end in seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Viseme:
    """Where a sound pulls the mouth, each about 0..1, and how strongly.

    opening: jaw and lips; width: spread corners; pucker: rounded lips; tongue: its tip in sight behind the teeth.
    weight: dominance over neighbours; 1 for a vowel.
    seal: the lips meet ("lips"), or the lower one meets the teeth ("teeth"); "" for neither.
    held: for a seal, whether the voice sounds during it (b, m, v) or it comes before the sound (p).
    """

    opening: float
    width: float
    pucker: float
    tongue: float
    weight: float
    seal: str = ""
    held: bool = True


REST = Viseme(0.0, 0.12, 0.05, 0.0, 1.5)
"""The mouth in silence: closed, corners at ease."""

_TABLE: dict[str, Viseme] = {
    # open vowels
    "a ä ɶ": Viseme(1.00, 0.35, 0.00, 0.10, 1.0),
    "ɑ": Viseme(0.92, 0.15, 0.15, 0.05, 1.0),
    "ɒ": Viseme(0.80, 0.05, 0.40, 0.00, 1.0),
    "æ": Viseme(0.90, 0.50, 0.00, 0.15, 1.0),
    "ɐ": Viseme(0.78, 0.30, 0.00, 0.10, 1.0),
    "ʌ": Viseme(0.70, 0.25, 0.12, 0.05, 1.0),
    # middle vowels
    "ɛ": Viseme(0.65, 0.60, 0.00, 0.20, 1.0),
    "e": Viseme(0.50, 0.75, 0.00, 0.25, 1.0),
    "ə ɘ ɵ": Viseme(0.42, 0.30, 0.05, 0.15, 0.8),
    "ɜ ɚ ɝ ɞ": Viseme(0.45, 0.20, 0.30, 0.20, 0.9),
    "ɔ": Viseme(0.68, 0.00, 0.60, 0.00, 1.0),
    "o": Viseme(0.50, 0.00, 0.80, 0.00, 1.0),
    "ɤ": Viseme(0.50, 0.35, 0.10, 0.05, 1.0),
    "œ": Viseme(0.55, 0.15, 0.50, 0.15, 1.0),
    "ø": Viseme(0.40, 0.15, 0.65, 0.15, 1.0),
    # close vowels
    "i": Viseme(0.25, 1.00, 0.00, 0.30, 1.0),
    "ɪ": Viseme(0.32, 0.80, 0.00, 0.30, 0.9),
    "ɨ ɿ": Viseme(0.28, 0.65, 0.00, 0.30, 0.9),
    "ɯ": Viseme(0.28, 0.40, 0.25, 0.10, 0.9),
    "y ʏ": Viseme(0.25, 0.20, 0.75, 0.20, 1.0),
    "u": Viseme(0.25, 0.00, 1.00, 0.00, 1.0),
    "ʊ": Viseme(0.32, 0.00, 0.85, 0.00, 0.9),
    "ʉ": Viseme(0.28, 0.15, 0.65, 0.10, 0.9),
    # lips
    "p": Viseme(0.00, 0.20, 0.10, 0.00, 0.5, "lips", held=False),
    "b ɓ ʙ": Viseme(0.00, 0.20, 0.10, 0.00, 0.5, "lips"),
    "m": Viseme(0.00, 0.20, 0.10, 0.00, 0.6, "lips"),
    "f ɸ ɱ": Viseme(0.06, 0.35, 0.00, 0.00, 0.9, "teeth"),
    "v ʋ β": Viseme(0.08, 0.35, 0.00, 0.00, 0.8, "teeth"),
    "w ʍ ɥ ɰ": Viseme(0.20, 0.00, 1.00, 0.00, 1.0),
    # tongue tip
    "θ ð": Viseme(0.22, 0.35, 0.00, 1.00, 0.9),
    "t d ɗ ʈ ɖ": Viseme(0.20, 0.40, 0.05, 0.70, 0.4),
    "n ɳ": Viseme(0.22, 0.40, 0.05, 0.75, 0.5),
    "s z": Viseme(0.12, 0.65, 0.00, 0.45, 0.8),
    "l ɭ ɬ ɮ ɺ": Viseme(0.32, 0.30, 0.10, 0.95, 0.5),
    "ɫ": Viseme(0.32, 0.15, 0.35, 0.80, 0.8),
    "ɾ ɽ": Viseme(0.30, 0.35, 0.05, 0.70, 0.3),
    "r": Viseme(0.28, 0.30, 0.10, 0.70, 0.5),
    "ɹ ɻ": Viseme(0.26, 0.05, 0.50, 0.40, 0.8),
    "ʃ ʒ ʂ ʐ": Viseme(0.18, 0.10, 0.55, 0.40, 1.0),
    "ɕ ʑ": Viseme(0.18, 0.45, 0.25, 0.40, 0.9),
    # back of the tongue and throat: the lips are free
    "ç ʝ": Viseme(0.22, 0.65, 0.00, 0.25, 0.6),
    "j ʎ ɲ": Viseme(0.24, 0.75, 0.00, 0.45, 0.6),
    "c ɟ": Viseme(0.22, 0.55, 0.00, 0.30, 0.4),
    "k g ɡ ɠ": Viseme(0.28, 0.30, 0.05, 0.05, 0.3),
    "ŋ ɴ": Viseme(0.28, 0.30, 0.05, 0.05, 0.4),
    "x ɣ": Viseme(0.35, 0.25, 0.05, 0.05, 0.4),
    "q ɢ χ ʁ ʀ ħ ʕ": Viseme(0.42, 0.20, 0.10, 0.05, 0.4),
    "h ɦ ʔ": Viseme(0.35, 0.30, 0.05, 0.05, 0.15),
}
VISEMES = {symbol: viseme for symbols, viseme in _TABLE.items() for symbol in symbols.split()}

# espeak-ng writes some sounds in its own way: a dot for a curled tongue, Greek letters, a mark alone. Its Japanese u
# sounds, and so looks, half rounded, and its syllabic l is dark.
_SPELLINGS = (("ɯᵝ", "ʉ"), ("əl", "ɫ"), ("s.", "ʂ"), ("z.", "ʐ"), ("r.", "ɽ"), ("ε", "ɛ"), ("ᵻ", "ɪ"))
_ALONE = {"ʲ": "j"}


def symbols(name: str) -> list[str]:
    """The sounds in an IPA name, without marks of length, stress, tone, breath and the like: "tʃʰ" is t, ʃ."""
    for theirs, ours in _SPELLINGS:
        name = name.replace(theirs, ours)
    composed = unicodedata.normalize("NFC", _ALONE.get(name, name))
    # "ç" is a sound of its own and keeps its cedilla; any other mark over or under a letter goes
    letters = (c if c == "ç" else unicodedata.normalize("NFD", c)[0] for c in composed)
    return [c for c in letters if unicodedata.category(c) in ("Ll", "Lo")]


class _Pull(NamedTuple):
    """One shape of a phoneme (a diphthong has two) and when it holds, in seconds."""

    viseme: Viseme
    start: float
    end: float


def _pulls(phonemes: list[Phoneme]) -> list[_Pull]:
    pulls = []
    for phoneme in phonemes:
        shapes = [VISEMES[s] for s in symbols(phoneme.name) if s in VISEMES] if phoneme.name else [REST]
        step = (phoneme.end - phoneme.start) / max(1, len(shapes))
        pulls += [_Pull(v, phoneme.start + i * step, phoneme.start + (i + 1) * step) for i, v in enumerate(shapes)]
    return pulls


ANTICIPATION_S = 0.030
"""How long before a sound its shape has e-fold begun to show; small, since it is heard only as it comes."""
CARRY_OVER_S = 0.040
"""How long after a sound its shape lingers, e-fold."""
BRIEF_S = 0.040
"""Shorter sounds pull less; espeak-ng reports marks of no length, which must not be seen at all."""
SMOOTHING_FRAMES = 7
SEAL_S = 0.055
"""Lips that meet stay closed at least as long: more than one picture at 25 frames a second."""
SEAL_EDGE_S = 0.040
"""The time from open to closed lips and back."""


def mouth_track(
    phonemes: list[Phoneme], loudness: NDArray[np.float32], sounding: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """The mouth in each 10 ms: [T, 4] = opening, width, pucker, tongue, each about 0..1.1.

    Args:
        phonemes: in order of time.
        loudness: [T], 1 for a loud vowel; louder speech opens a little wider.
        sounding: [T], whether there is any sound; the mouth rests where there is none for long.
    """
    count = len(loudness)
    clock = (np.arange(count) + 0.5) / FRAMES_PER_SECOND
    pulls = _pulls(phonemes)
    shape = np.tile(_shape_of(REST), (count, 1))
    if pulls:
        targets = np.stack([_shape_of(p.viseme) for p in pulls])
        brief = np.minimum(np.array([p.end - p.start for p in pulls]) / BRIEF_S, 1.0)
        weights = brief * np.array([p.viseme.weight for p in pulls])
        early = np.maximum(np.array([p.start for p in pulls]) - clock[:, None], 0.0) / ANTICIPATION_S
        late = np.maximum(clock[:, None] - np.array([p.end for p in pulls]), 0.0) / CARRY_OVER_S
        dominance = weights * np.exp(-((early + late) ** 1.3)) + 1e-9
        shape = (dominance @ targets) / dominance.sum(1, keepdims=True)
    shape[:, 0] *= np.clip(0.8 + 0.25 * loudness, 0.0, 1.05)
    shape = _smooth(shape, SMOOTHING_FRAMES)
    for pull in pulls:
        if pull.viseme.seal:
            _close(shape, clock, pull)
    awake = _awake(sounding)[:, None]
    return (_shape_of(REST) + awake * (shape - _shape_of(REST))).astype(np.float32)


def _shape_of(viseme: Viseme) -> NDArray[np.float64]:
    return np.array([viseme.opening, viseme.width, viseme.pucker, viseme.tongue])


def _smooth(track: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    """A Hann-weighted mean over an odd number of frames; the ends are held."""
    kernel = np.hanning(frames + 2)[1:-1]
    kernel /= kernel.sum()
    padded = np.pad(track, [(frames // 2, frames // 2)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return sum(k * padded[i : i + len(track)] for i, k in enumerate(kernel))


def _close(shape: NDArray[np.float64], clock: NDArray[np.float64], pull: _Pull) -> None:
    """Bring the opening down to the seal's own, in place, while the lips must touch."""
    if pull.viseme.held:
        start, end = pull.start - 0.010, max(pull.end - 0.012, pull.start - 0.010 + SEAL_S)
    else:
        # espeak-ng reports a voiceless stop at its burst, after the silence in which the lips were closed
        start, end = pull.start - SEAL_S + 0.005, pull.start + 0.005
    away = np.maximum(np.maximum(start - clock, clock - end), 0.0) / SEAL_EDGE_S
    hold = np.where(away < 1.0, 0.5 + 0.5 * np.cos(np.pi * np.minimum(away, 1.0)), 0.0)
    shape[:, 0] = np.minimum(shape[:, 0], shape[:, 0] * (1.0 - hold) + pull.viseme.opening * hold)


def _awake(sounding: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 while speaking, 0 in silence: it rises within 60 ms before a sound and falls within 110 ms after the last."""
    count = len(sounding)
    padded = np.pad(sounding, (12, 12))
    # gaps of a stop's closure are bridged: heard within the last 60 ms, or to be heard within the next 30 ms
    wide = np.any([padded[12 - lag : 12 - lag + count] for lag in range(-3, 7)], axis=0)
    return _smooth(wide.astype(np.float64), 7)
