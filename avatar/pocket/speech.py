"""Makes the speech of the drawn world: espeak-ng reads sentences and pseudo-sentences, visemes.py moves the mouth.

python -m avatar.pocket.speech --out DIR --minutes 75 --seed 0 writes speech_train.npz, speech_test.npz, speech_test.wav.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
from numpy.typing import NDArray

from audio.errors import AvatardError
from avatar.pocket.visemes import FRAMES_PER_SECOND, Phoneme, mouth_track

log = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE // FRAMES_PER_SECOND
RANGES = {"mel": (-5.0, 2.5), "mouth": (0.0, 1.2), "loudness": (0.0, 1.2)}
"""What 0 and 255 stand for in the stored arrays."""


class SpeechError(AvatardError):
    """Speech could not be synthesised: espeak-ng is missing, or does not know the voice."""


# --------------------------------------------------------------------------- espeak-ng


class Utterance(NamedTuple):
    """What to say and how: speed in words per minute, pitch and its range 0..100, level in dB around the usual."""

    text: str
    voice: str
    speed: int = 170
    pitch: int = 50
    pitch_range: int = 50
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
        samples = np.concatenate(self._pieces or [np.zeros(0, np.int16)]).astype(np.float32) / 32768
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
    samples = np.asarray(soxr.resample(raw, synthesiser.sample_rate, SAMPLE_RATE), np.float32)
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
_synthesiser: Synthesiser | None = None


def _perform_batch(batch: list[Utterance]) -> list[Speech | None]:
    global _synthesiser  # the library is global itself: one for each child process
    if _synthesiser is None:
        os.nice(5)
        _synthesiser = Synthesiser()
    return [perform(_synthesiser, utterance) for utterance in batch]


def perform_all(utterances: list[Utterance]) -> Iterator[Speech]:
    """Say everything in a child process, in order; what crashes it is tried once more, alone, and then left out."""
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
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        return pool.submit(_perform_batch, batch).result(timeout=BATCH_LIMIT_S)
    except (BrokenProcessPool, TimeoutError):
        for child in list((pool._processes or {}).values()):
            child.kill()
        return None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------- what is said


ENGLISH = ["en-us", "en-us", "en", "en-gb-x-rp", "en-gb-x-gbclan", "en-029"]
VARIANTS = ["", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m8", "+f1", "+f2", "+f3", "+f5", "+steph", "+klatt", "+whisper"]
HELD_OUT_ENGLISH = ["en-gb-scotland", "en-gb-x-gbcwmd", "en-us-nyc"]
HELD_OUT_VARIANTS = ["+f4", "+m7", "+Annie", "+linda", "+Andy"]


@dataclass(frozen=True)
class Sounds:
    """The stuff of pseudo-words in a language's own spelling."""

    onsets: str
    nuclei: str
    codas: str
    coda_share: float = 0.4


_LATIN = "p b m f v t d n s z l r k g w h"
SOUNDS = {
    "en": Sounds(
        _LATIN + " p b m sh ch th j y bl pr fl tr st sp sm gr kw br", "a e i o u ee oo ow ay igh oy ar er or aw ea",
        "p b m t d n s l k ng sh th ft mp nd st ve ff", 0.6,
    ),
    "de": Sounds(_LATIN + " sch pf bl br schw st sp tr kn m p b", "a e i o u ä ö ü ei au eu ie ah oh uh", "n t st r l m ch p ft", 0.5),
    "fr": Sounds("p b m f v t d n s z l r ch j gn br pl tr", "a é è i o u ou eu oi on an in au ui", "r l s t m b pe", 0.25),
    "es": Sounds("p b m f t d n s l r rr ch ll ñ g j qu br pl tr", "a e i o u ia ue ie au", "n s r l", 0.3),
    "it": Sounds("p b m f v t d n s z l r c g sc gn gl br pr", "a e i o u ia ie uo ai", "n r l m", 0.2),
    "pt-br": Sounds("p b m f v t d n s z l r ch j lh nh br pr", "a e i o u ão ei ou ai é ó", "s r m", 0.25),
    "nl": Sounds(_LATIN + " sch bl br st sp vr zw", "a e i o u aa ee oo uu ie oe eu ij ui ou", "n t r l m p k cht st", 0.5),
    "pl": Sounds("p b m f w t d n s z l ł r k g sz cz ż ć ś ch prz br", "a e i o u y ą ę ó ia ie", "m n k t sz w ł p", 0.35),
    "ru": Sounds("п б м ф в т д н с з л р к г ш ж ч х бр пл тр", "а е и о у ы я ю ё э ай ой", "м н т к р л п ш в", 0.4),
    "uk": Sounds("п б м ф в т д н с з л р к г ш ж ч х", "а е и о у і я ю є ї ий", "м н т к р л в", 0.35),
    "tr": Sounds("p b m f v t d n s z l r k g ş ç c y h", "a e ı i o ö u ü ay ey", "m n r l k t p ş", 0.45),
    "sv": Sounds("p b m f v t d n s l r k g sj tj bl br st", "a e i o u y å ä ö", "r n t l m s p k", 0.45),
    "cs": Sounds("p b m f v t d n s z l r k h š č ž ř br pr", "a e i o u á é í ů ou", "m n k t l p v", 0.35),
    "fi": Sounds("p m v t n s l r k h j", "a e i o u y ä ö aa ee ii oo uu yy ää ai ei uo yö", "n s t l r", 0.35),
    "da": Sounds("p b m f v t d n s l r k g h br bl st", "a e i o u y å æ ø", "r n t l m s", 0.4),
    "el": Sounds("π μπ μ φ β τ ντ ν σ ζ λ ρ κ γκ θ δ χ", "α ε ι ο ου αι", "ς ν ρ", 0.2),
    "id": Sounds("p b m t d n s l r k g w j c ny ng h", "a e i o u ai au", "n m k t r p ng h", 0.4),
    "vi": Sounds("ph b m v t đ n s x l r kh g ng nh ch tr h", "a ă e ê i o ô ơ u ư á à ả ô ú ì ạ", "n m p t ng nh c", 0.45),
    "ja": Sounds(" か さ た な は ま ら が だ ば ぱ わ", "あ い う え お", "ん", 0.2),
    "hi": Sounds("प ब म फ व त द न स ज ल र क ग श च भ ट", "ा ि ी ु ू े ो ै ौ", "न म र ल त क प", 0.35),
    "ko": Sounds("", "", "", 0.35),
    "cmn": Sounds("b p m f d t n l g k h zh ch sh z c s w y", "", "", 0.0),
}
_KANA = "あいうえお かきくけこ さしすせそ たちつてと なにぬねの はひふへほ まみむめも らりるれろ がぎぐげご だぢづでど ばびぶべぼ ぱぴぷぺぽ わいをえお やいゆえよ".split()
_PINYIN = (
    "ba bo bi bu bai bei bao ban ben bang bing bian biao pa po pi pu pai pei pao pan peng ping ma mo mi mu mai mei mao "
    "man men ming mian fa fo fu fei fan feng da de di du dai dao dou dan dong dui duo ta ti tu tai tou tian ting na ni "
    "nu nü nai nao nan neng la li lu lü lai lei lou liu lan ling ge gu gai gao gou gan gong guo gui ke ku kai kou kan "
    "he hu hai hei hao hou huo hua ji ju jia jie jiu jian jin qi qu qing qian xi xu xia xie xin xiao zhi zhu zhe zhong "
    "chi chu cha chang shi shu she shou shuo ri ru ren zi zu zai zuo ci cong si su san suo wa wo wu wai wei wan wen "
    "wang ya yi yu ye you yao yan yin yong yue yuan"
).split()


def pseudo_sentence(language: str, rng: random.Random) -> str:
    """Three to nine words that mean nothing and sound like the language; "cmn" in pinyin with tones."""
    words = [_pseudo_word(language, rng) for _ in range(rng.randint(3, 9))]
    if len(words) > 5 and rng.random() < 0.5:
        words[rng.randint(1, 3)] += ","
    return ("" if language == "ja" else " ").join(words) + rng.choice([".", ".", ".", "!", "?"])


def _pseudo_word(language: str, rng: random.Random) -> str:
    sounds, syllables = SOUNDS[language], rng.choice([1, 1, 2, 2, 2, 3, 3])
    if language == "cmn":
        return "".join(rng.choice(_PINYIN) + str(rng.randint(1, 4)) for _ in range(syllables))
    if language == "ja":
        return "".join(rng.choice(rng.choice(_KANA)) + rng.choice(["", "", "", "ん", "ー"]) for _ in range(syllables))
    if language == "ko":
        # Hangul syllables are numbered: (onset * 21 + vowel) * 28 + coda; 0 is no coda
        codas = [rng.choice([1, 4, 8, 16, 17, 21]) if rng.random() < sounds.coda_share else 0 for _ in range(syllables)]
        return "".join(chr(0xAC00 + (rng.randrange(19) * 21 + rng.randrange(21)) * 28 + coda) for coda in codas)
    coda = [rng.choice(sounds.codas.split()) if rng.random() < sounds.coda_share else "" for _ in range(syllables)]
    if len(coda) > 1 and language == "en":
        coda[0] = ""
    return "".join(rng.choice(sounds.onsets.split()) + rng.choice(sounds.nuclei.split()) + end for end in coda)


def load_sentences(which: str) -> dict[str, list[str]]:
    """Sentences by espeak-ng language, of "train" or "test"."""
    text = Path(__file__).with_name("sentences.json").read_text(encoding="utf-8")
    sentences: dict[str, list[str]] = json.loads(text)[which]
    return sentences


def _manner(text: str, voice: str, rng: random.Random) -> Utterance:
    pause_s = rng.choice([0.15, 0.25, 0.4, 0.6, 1.0, 1.6]) if rng.random() < 0.96 else rng.uniform(3.0, 6.0)
    return Utterance(
        text, voice, rng.randint(115, 230), rng.randint(15, 85), rng.randint(20, 80), rng.uniform(-6.0, 6.0), pause_s
    )


def train_utterances(seed: int) -> Iterator[Utterance]:
    """Without end: half sentences, half pseudo-sentences; English two fifths of the time; a voice drawn for each."""
    rng = random.Random(seed)
    sentences = load_sentences("train")
    others = [language for language in sorted(SOUNDS) if language != "en"]
    decks: dict[str, list[str]] = {}
    while True:
        language = "en" if rng.random() < 0.4 else rng.choice(others)
        voice = rng.choice(ENGLISH) if language == "en" else language
        if language == "cmn":
            voice = "cmn-latn-pinyin"
        if rng.random() < 0.5 and sentences.get(language):
            if not decks.get(language):
                decks[language] = rng.sample(sentences[language], len(sentences[language]))
            text = decks[language].pop()
        else:
            text = pseudo_sentence(language, rng)
        yield _manner(text, voice + rng.choice(VARIANTS), rng)


def held_out_utterances(seed: int) -> list[Utterance]:
    """Sentences, voices and languages that training has not heard."""
    rng = random.Random(seed)
    utterances = []
    for language, texts in load_sentences("test").items():
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
    arrays = {
        "mel": quantise(long_mel(speech.samples), "mel"),
        "mouth": quantise(speech.mouth, "mouth"),
        "loudness": quantise(speech.loudness, "loudness"),
    }
    ranges = {f"{name}_range": np.array(RANGES[name], np.float32) for name in arrays}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays, **ranges)
    part.rename(path)


def long_mel(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-mel of hours of samples, a minute at a time: [N // 160, 80]."""
    from audio.chunk import AudioBlock
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
    test = collect(perform_all(held_out_utterances(seed + 1)), minutes)
    store(test, out / "speech_test.npz")
    soundfile.write(out / "speech_test.wav", test.samples, SAMPLE_RATE)
    log.info("test set: %.1f minutes", len(test.mouth) / 6000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--minutes", type=float, default=75.0, help="length of the training set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(args.out, args.minutes, args.seed)


if __name__ == "__main__":
    main()
