"""Makes the speech of the drawn world: espeak-ng reads sentences and pseudo-sentences, visemes.py moves the mouth.

python -m avatar.pocket.speech --out DIR --minutes 115 --seed 0
writes speech_train.npz, speech_test.npz and speech_test.wav.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import multiprocessing
import random
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
from numpy.typing import NDArray

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.pocket.visemes import FRAMES_PER_SECOND, Phoneme, mouth_track

log = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE // FRAMES_PER_SECOND
MEL_STEP = 3
"""Stored mel is rounded to multiples of so many bytes (0.9 dB), finer than its training noise: a quarter smaller."""
RANGES = {"mel": (-5.0, 2.5), "mouth": (0.0, 1.2), "loudness": (0.0, 1.2)}
"""What 0 and 255 stand for in the stored arrays."""


class SpeechError(AvatardError):
    """Speech could not be synthesised: espeak-ng is missing, or does not know the voice."""


# --------------------------------------------------------------------------- espeak-ng


class Utterance(NamedTuple):
    """What to say and how: speed in words per minute, pitch and its range 0..100, level in dB around the usual.

    throat: above 1 a smaller speaker, all of whose sound is higher and faster; pause_s: the silence that follows.
    """

    text: str
    voice: str
    speed: int = 170
    pitch: int = 50
    pitch_range: int = 50
    throat: float = 1.0
    level_db: float = 0.0
    pause_s: float = 0.3


class _EventName(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventName),
    ]


# Names and numbers of espeak-ng/speak_lib.h
_SYNCHRONOUS, _PHONEME_EVENTS, _PHONEME_IPA = 2, 1, 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8 = 1
_LIST_TERMINATED, _PHONEME = 0, 7
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Synthesiser:
    """libespeak-ng in this process. It keeps global state and crashes at times: use one, in a child process."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError as error:
            raise SpeechError("libespeak-ng.so.1 not found; install espeak-ng (apt-get install espeak-ng)") from error
        self.sample_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEME_EVENTS | _PHONEME_IPA)
        self._pieces: list[NDArray[np.int16]] = []
        self._events: list[tuple[float, str]] = []
        self._callback = _Callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for i in range(1 << 20):
            event = events[i]
            if event.type == _LIST_TERMINATED:
                break
            if event.type == _PHONEME:
                name = bytes(event.id.string).split(b"\0")[0].decode("utf-8", "ignore")
                self._events.append((event.audio_position_ms / 1000, name))
        return 0

    def say(self, utterance: Utterance) -> tuple[NDArray[np.float32], list[Phoneme]]:
        """Samples at `sample_rate` and the phonemes with their times.

        Raises: SpeechError: espeak-ng does not know the voice.
        """
        self._pieces.clear()
        self._events.clear()
        if self._library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise SpeechError(f"espeak-ng: no voice '{utterance.voice}'; espeak-ng --voices lists them")
        for parameter, value in ((_RATE, utterance.speed), (_PITCH, utterance.pitch), (_RANGE, utterance.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        text = utterance.text.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._pieces or [np.zeros(0, np.int16)]) * np.float32(1 / 32768)
        # "(en)" and the like tell of a change of language within the text: no sound
        heard = [(start, name) for start, name in self._events if not name.startswith("(")]
        ends = [start for start, _ in heard[1:]] + [len(samples) / self.sample_rate]
        return samples, [Phoneme(name, start, end) for (start, name), end in zip(heard, ends, strict=True)]


# --------------------------------------------------------------------------- one utterance


@dataclass(frozen=True)
class Speech:
    """Speech and its mouth, aligned: frame k is samples [160 k, 160 k + 160).

    samples: float32 [160 T] at 16 kHz; mouth: float32 [T, 4] = opening, width, pucker, tongue; loudness: float32 [T].
    """

    samples: NDArray[np.float32]
    mouth: NDArray[np.float32]
    loudness: NDArray[np.float32]


SPEECH_RMS = 10 ** (-22 / 20)
"""The usual level of speech, -22 dBFS."""
SILENCE_RMS = 10 ** (-54 / 20)


def perform(synthesiser: Synthesiser, utterance: Utterance) -> Speech | None:
    """Say it and move the mouth to it; the pause follows. None when nothing came out."""
    raw, phonemes = synthesiser.say(utterance)
    samples = np.asarray(soxr.resample(raw, synthesiser.sample_rate * utterance.throat, SAMPLE_RATE), np.float32)
    phonemes = [Phoneme(p.name, p.start / utterance.throat, p.end / utterance.throat) for p in phonemes]
    loud = np.abs(samples) > 0.01
    if len(samples) < 0.2 * SAMPLE_RATE or not loud.any():
        return None
    samples *= SPEECH_RMS / np.sqrt(np.square(samples[loud]).mean())
    frames = len(samples) // SAMPLES_PER_FRAME + round(utterance.pause_s * FRAMES_PER_SECOND)
    samples = np.pad(samples, (0, max(0, frames * SAMPLES_PER_FRAME - len(samples))))[: frames * SAMPLES_PER_FRAME]
    rms = np.sqrt(np.square(samples.reshape(frames, -1)).mean(1))
    loudness = _loudness(rms)
    # The mouth follows the effort, not the microphone: the level is changed after it has been measured.
    mouth = mouth_track(phonemes, loudness, rms > SILENCE_RMS)
    return Speech(np.clip(samples * 10 ** (utterance.level_db / 20), -1, 1).astype(np.float32), mouth, loudness)


def _loudness(rms: NDArray[np.float32]) -> NDArray[np.float32]:
    """About 1 at the usual level of speech, 0 in silence, at most 1.2; smoothed over 90 ms."""
    kernel = np.hanning(11)[1:-1]
    smooth = np.convolve(rms, kernel / kernel.sum(), "same")
    return np.clip((smooth / (1.4 * SPEECH_RMS)) ** 0.5, 0, 1.2).astype(np.float32)


# --------------------------------------------------------------------------- many utterances, in child processes

BATCH = 40
BATCH_LIMIT_S = 60.0
_spawn = multiprocessing.get_context("spawn")


def perform_all(utterances: list[Utterance]) -> Iterator[Speech]:
    """Say everything in child processes, in order; what crashes one is tried once more, alone, and then left out.

    Raises: SpeechError: espeak-ng is missing or does not know a voice.
    """
    lost = 0
    for at in range(0, len(utterances), BATCH):
        batch = utterances[at : at + BATCH]
        results = _in_child(batch)
        if results is None:
            singles = [_in_child([utterance]) for utterance in batch]
            lost += sum(single is None for single in singles)
            results = [single[0] for single in singles if single]
        yield from (speech for speech in results if speech)
    if lost:
        log.warning("espeak-ng crashed on %d of %d utterances; they were left out", lost, len(utterances))


def _in_child(batch: list[Utterance]) -> list[Speech | None] | None:
    """None when the child died or hung."""
    here, there = _spawn.Pipe(duplex=False)
    child = _spawn.Process(target=_perform_batch, args=(batch, there), daemon=True)
    child.start()
    there.close()
    try:
        answer = here.recv() if here.poll(BATCH_LIMIT_S) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()
        here.close()
    if isinstance(answer, SpeechError):
        raise answer
    result: list[Speech | None] | None = answer
    return result


def _perform_batch(batch: list[Utterance], answer: Connection) -> None:
    try:
        synthesiser = Synthesiser()
        answer.send([perform(synthesiser, utterance) for utterance in batch])
    except SpeechError as error:
        answer.send(error)


# --------------------------------------------------------------------------- what is said


ENGLISH = ["en-us", "en-us", "en", "en-gb-x-rp", "en-gb-x-gbclan", "en-029"]
# fmt: off
VARIANTS = [
    "", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m8", "+f1", "+f2", "+f3", "+f5", "+steph", "+steph2",
    "+klatt", "+klatt2", "+whisper", "+Alex", "+Alicia", "+Andrea", "+Denis", "+Diogo", "+Gene", "+Hugo",
    "+Jacky", "+Lee", "+Marco", "+Mario", "+Michael", "+Mike", "+adam", "+anika", "+antonio", "+aunty",
    "+belinda", "+benjamin", "+boris", "+caleb", "+david", "+ed", "+edward", "+grandma", "+grandpa", "+john",
    "+marcelo", "+max", "+michel", "+miguel", "+norbert", "+pablo", "+paul", "+pedro", "+quincy", "+rob",
    "+robert", "+sandro", "+shelby", "+travis", "+victor",
]
# fmt: on
"""Of the speaker; few whisper."""
VOICES = {"cmn": "cmn-latn-pinyin"}
"""Where the voice is called otherwise than the language: Mandarin is written in pinyin."""
HELD_OUT_ENGLISH = ["en-gb-scotland", "en-gb-x-gbcwmd", "en-us-nyc"]
HELD_OUT_VARIANTS = ["", "", "+f4", "+m7", "+linda", "+Annie"]


def load_texts() -> dict[str, Any]:
    """What can be said, by espeak-ng's language: "train" and "test" sentences, "syllables" for pseudo-words."""
    texts: dict[str, Any] = json.loads(Path(__file__).with_name("sentences.json").read_text(encoding="utf-8"))
    return texts


def pseudo_sentence(syllables: dict[str, Any], rng: random.Random, between: str = " ") -> str:
    """Three to nine words that mean nothing, out of a language's "onsets", "nuclei" and "codas"."""
    onsets, nuclei, codas = (syllables[part].split() or [""] for part in ("onsets", "nuclei", "codas"))

    def word() -> str:
        count = rng.choice([1, 1, 2, 2, 2, 3, 3])
        closed = [rng.random() < syllables["coda_share"] for _ in range(count)]
        return "".join(rng.choice(onsets) + rng.choice(nuclei) + (rng.choice(codas) if c else "") for c in closed)

    words = [word() for _ in range(rng.randint(3, 9))]
    if len(words) > 5 and rng.random() < 0.5:
        words[rng.randint(1, 3)] += ","
    # NFC: a Korean coda is a letter of its own here and becomes a part of its syllable
    return unicodedata.normalize("NFC", between.join(words)) + rng.choice([".", ".", ".", "!", "?"])


def _manner(text: str, voice: str, rng: random.Random) -> Utterance:
    pause_s = rng.choice([0.15, 0.25, 0.4, 0.6, 1.0, 1.6]) if rng.random() < 0.96 else rng.uniform(3.0, 6.0)
    throat = rng.uniform(0.94, 1.07)
    return Utterance(
        text,
        voice,
        round(rng.uniform(115, 230) / throat),
        rng.randint(15, 85),
        rng.randint(20, 80),
        throat,
        rng.uniform(-6.0, 6.0),
        pause_s,
    )


def train_utterances(seed: int) -> Iterator[Utterance]:
    """Without end: half sentences, half pseudo-sentences; English two fifths of the time; a voice drawn for each."""
    rng = random.Random(seed)
    texts = load_texts()
    others = [language for language in texts["train"] if language != "en"]
    decks: dict[str, list[str]] = {}
    while True:
        language = "en" if rng.random() < 0.4 else rng.choice(others)
        if rng.random() < 0.5:
            text = pseudo_sentence(texts["syllables"][language], rng, "" if language == "ja" else " ")
        else:
            # as from a deck of cards: every sentence once before any comes again
            sentences = texts["train"][language]
            deck = decks.setdefault(language, [])
            deck[:] = deck or rng.sample(sentences, len(sentences))
            text = deck.pop()
        voice = rng.choice(ENGLISH) if language == "en" else VOICES.get(language, language)
        yield _manner(text, voice + (rng.choice(VARIANTS) if rng.random() < 0.6 else ""), rng)


def held_out_utterances(seed: int) -> list[Utterance]:
    """Sentences, voices and languages that training has not heard."""
    rng = random.Random(seed)
    utterances = []
    for language, texts in load_texts()["test"].items():
        for text in texts * 3:
            voice = rng.choice(HELD_OUT_ENGLISH) if language == "en" else language
            utterances.append(_manner(text, voice + rng.choice(HELD_OUT_VARIANTS), rng))
    rng.shuffle(utterances)
    return utterances


# --------------------------------------------------------------------------- the stored sets


def collect(speeches: Iterable[Speech], minutes: float) -> Speech:
    """Speech after speech until there are so many minutes, or no more."""
    parts: list[Speech] = []
    frames = 0
    for speech in speeches:
        parts.append(speech)
        frames += len(speech.mouth)
        if frames >= minutes * 60 * FRAMES_PER_SECOND:
            break
    return Speech(
        np.concatenate([p.samples for p in parts]),
        np.concatenate([p.mouth for p in parts]),
        np.concatenate([p.loudness for p in parts]),
    )


def quantise(values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """Real units to bytes over the range that RANGES gives for the name."""
    low, high = RANGES[name]
    return np.clip((values - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8)


def store(speech: Speech, path: Path) -> None:
    """Write log-mel, mouth and loudness as bytes with their ranges; the file appears whole or not at all."""
    stored: dict[str, Any] = {
        "mel": quantise(long_mel(speech.samples), "mel") // MEL_STEP * MEL_STEP + MEL_STEP // 2 * (MEL_STEP > 1),
        "mouth": quantise(speech.mouth, "mouth"),
        "loudness": quantise(speech.loudness, "loudness"),
    }
    stored |= {f"{name}_range": np.array(RANGES[name], np.float32) for name in RANGES}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **stored)
    part.rename(path)


def long_mel(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-mel of hours of samples, a minute at a time: [N // 160, 80]."""
    # torch is imported here and not above: the child processes, which only speak, then start at once
    from audio.mel import block_mel, init_state, lookahead_samples

    state, minute, ahead = init_state(), 60 * SAMPLE_RATE, lookahead_samples(0)
    padded = np.pad(samples, (0, ahead))
    pieces = []
    for start in range(0, len(samples), minute):
        piece = samples[start : start + minute]
        block = AudioBlock(piece, start, len(piece), padded[start + len(piece) :][:ahead])
        pieces.append(block_mel(block, state, 0, 0).numpy())
    return np.concatenate(pieces)


def build(out: Path, minutes: float, seed: int) -> None:
    """Write both sets into the folder, the training set first."""
    import soundfile

    out.mkdir(parents=True, exist_ok=True)
    # About 5 s each with its pause; whole batches are made, so the generous number costs nothing but a list.
    stream = train_utterances(seed)
    utterances = [next(stream) for _ in range(int(minutes * 60))]
    train = collect(perform_all(utterances), minutes)
    store(train, out / "speech_train.npz")
    log.info("training set: %.1f minutes", len(train.mouth) / 6000)
    test = collect(perform_all(held_out_utterances(seed + 1)), minutes=math.inf)
    store(test, out / "speech_test.npz")
    soundfile.write(out / "speech_test.wav", test.samples, SAMPLE_RATE)
    log.info("test set: %.1f minutes", len(test.mouth) / 6000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--minutes", type=float, default=115.0, help="length of the training set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(args.out, args.minutes, args.seed)


if __name__ == "__main__":
    main()
