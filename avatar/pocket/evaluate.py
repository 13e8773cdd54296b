"""How good the embedded model is: `avatard bench quality`.

The model streams, block by block, presenters and speech that training never saw. The drawn world knows what should be
seen: the drive is made again beside the model, from the same motion state and the same sound, and the mouth comes from
the phonemes. A meter reads the generated frames, and for comparison the drawn ones: what it reads off the truth itself
is the best that any model could reach under this instrument.

Nothing but numbers is kept of a frame once it is measured, so memory is flat at any length.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from audio.blocks import BlockCutter
from audio.chunk import AudioBlock, AudioChunk
from audio.errors import AvatardError
from audio.mel import MelState, block_mel
from audio.mel import init_state as init_mel
from avatar.model import AvatarModel, FrameBlock, Reference, State
from avatar.pocket.ear import MEL_PER_FRAME
from avatar.pocket.meter import MOVES, Meter, truth
from avatar.pocket.motion import DRIVE, MotionState, next_drive, speech_energy
from avatar.pocket.network import FRAMES_PER_LATENT
from avatar.pocket.speech import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    Speech,
    collect,
    held_out_utterances,
    perform_all,
    store,
)
from avatar.pocket.visemes import mouth_track
from avatar.pocket.world import (
    HAIR_STYLES,
    SIZE,
    Motion,
    Person,
    as_motion,
    detail_weight,
    draw,
    reference_motion,
    sample_person,
)
from avatar.stateful import clone

FPS = 25
IDLE_S = 10.0
"""Silence that follows the speech of every presenter."""
SETTLE_FRAMES = 12
"""After speech has ended, before the mouth must be closed."""
LONG_S = 600.0
DRIFT_S = 60.0
"""What is shorter says nothing about drift: the pose alone moves the meter's readings as much."""
GALLERY = 256
"""People among whom a presenter must be recognised."""
GALLERY_SEED = 90_210
LAGS = 6
"""Frames by which the mouth may be early or late in the search for its lag."""
CLOSED_LIDS = 0.6
"""How far the lids are closed in a blink."""

OPENING, WIDTH, PUCKER, LIDS = range(4)
POSE = slice(MOVES.index("head_x"), MOVES.index("pitch") + 1)
TRAITS = slice(len(MOVES), -len(HAIR_STYLES))
"""Of the meter's readings; the styles of hair are classes, not measures."""


class EvaluationError(AvatardError):
    """The evaluation cannot be run as asked: an option, a file of speech, a missing program."""


# --------------------------------------------------------------------------- statistics


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two series [T]; nan where one of them does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 1e-12 else math.nan


def lag_correlations(made: Tensor, wanted: Tensor, reach: int = LAGS) -> list[float]:
    """Correlation of made[t + lag] with wanted[t] for lag = -reach..reach; a positive lag is a late mouth."""
    middle = wanted[reach : len(wanted) - reach]
    return [correlation(made[reach + lag : len(made) - reach + lag], middle) for lag in range(-reach, reach + 1)]


def best_lag(correlations: Sequence[float]) -> int:
    """The lag, in frames, of the greatest of what `lag_correlations` gives."""
    return int(np.nanargmax(correlations)) - len(correlations) // 2


def student_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t, good to 0.01 from four degrees of freedom on (Cornish and Fisher's series)."""
    z = 1.959964
    series = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(series))


def slope(times: Tensor, values: Tensor, bins: int = 24) -> tuple[float, float]:
    """Slope of a straight line through values over times [T], and half the width of its 95 % interval.

    Neighbours in time are alike, so that the points are averaged in up to `bins` stretches before the line is fitted;
    the stretches are taken to be independent. (nan, nan) where there are fewer than 6 points.
    """
    found = ~values.isnan()
    times, values = times[found].double(), values[found].double()
    if len(values) < 6:
        return math.nan, math.nan
    bins = min(bins, len(values))
    times = torch.stack([part.mean() for part in times.tensor_split(bins)])
    values = torch.stack([part.mean() for part in values.tensor_split(bins)])
    centred = times - times.mean()
    spread = float(centred.square().sum())
    steep = float(centred @ values) / spread
    rest = values - values.mean() - steep * centred
    error = math.sqrt(float(rest.square().sum()) / (bins - 2) / spread)
    return steep, student_quantile(bins - 2) * error


def seam_ratio(changes: Tensor, frames_per_block: int) -> float:
    """Mean change across block borders over the mean change inside; changes[t] is from frame t - 1 to t, nan: unknown.

    changes: [T], or [T, n] of n quantities in like units.
    """
    border = torch.arange(len(changes)) % frames_per_block == 0
    return float(changes[border].nanmean() / changes[~border].nanmean())


def blinks(lids: Tensor) -> int:
    """How often the lids [T] close."""
    closed = lids > CLOSED_LIDS
    return int((closed[1:] & ~closed[:-1]).sum())


def decibels(squared_error: Tensor) -> Tensor:
    """PSNR of mean squared errors of pictures in 0..1."""
    return -10 * torch.log10(squared_error.clamp_min(1e-10))


# --------------------------------------------------------------------------- what is shown and said


def load_speech(path: Path) -> Speech:
    """Speech with its mouth from NAME.npz and NAME.wav, as `python -m avatar.pocket.speech` writes them.

    Raises: EvaluationError: one of the two is missing or is something else, or they do not belong together.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(path.with_suffix(".wav"), dtype="float32")
        stored = np.load(path.with_suffix(".npz"))
        unpacked = {name: _unpack(stored, name) for name in ("mouth", "loudness")}
    except (OSError, KeyError, ValueError, soundfile.LibsndfileError) as error:
        raise EvaluationError(
            f"--speech {path}: {error}; needed are NAME.npz and NAME.wav from python -m avatar.pocket.speech"
        ) from error
    frames = len(unpacked["mouth"])
    if rate != SAMPLE_RATE or samples.ndim != 1 or not 0 <= len(samples) - frames * SAMPLES_PER_FRAME < SAMPLE_RATE:
        raise EvaluationError(
            f"--speech {path}: {len(samples)} samples at {rate} Hz do not belong to {frames} frames of mouth "
            "at 100 Hz; make both anew with python -m avatar.pocket.speech"
        )
    return Speech(samples[: frames * SAMPLES_PER_FRAME], unpacked["mouth"], unpacked["loudness"])


def _unpack(stored: Any, name: str) -> NDArray[np.float32]:
    low, high = (float(v) for v in stored[f"{name}_range"])
    unpacked: NDArray[np.float32] = stored[name].astype(np.float32) / 255 * (high - low) + low
    return unpacked


def synthesise_speech(seconds: float, seed: int) -> Speech:
    """At least so much held-out speech, made by espeak-ng; made once, then taken from a temporary folder.

    Raises: SpeechError: espeak-ng is missing.
    """
    import soundfile

    folder = Path(tempfile.gettempdir()) / f"avatard-quality-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / f"speech_{seed}_{math.ceil(seconds)}.npz"
    if not (kept.exists() and kept.with_suffix(".wav").exists()):
        # the same sentences come again in other voices when one round is not enough
        utterances = chain.from_iterable(perform_all(held_out_utterances(seed + 1000 * turn)) for turn in count())
        speech = collect(utterances, seconds / 60)
        soundfile.write(kept.with_suffix(".wav"), speech.samples, SAMPLE_RATE)
        store(speech, kept)
    return load_speech(kept)


def excerpt(speech: Speech, start: int, frames: int) -> Speech:
    """Frames (of 10 ms) from `start` on; after the end it begins again."""
    index = (start + np.arange(frames)) % len(speech.mouth)
    samples = speech.samples.reshape(-1, SAMPLES_PER_FRAME)[index].reshape(-1)
    return Speech(samples, speech.mouth[index], speech.loudness[index])


def with_silence(speech: Speech, frames: int) -> Speech:
    """The same, and after it so many frames (of 10 ms) of silence with the mouth at rest."""
    quiet = np.zeros(frames, np.float32)
    rest = mouth_track([], quiet, quiet > 0)
    return Speech(
        np.concatenate([speech.samples, np.zeros(frames * SAMPLES_PER_FRAME, np.float32)]),
        np.concatenate([speech.mouth, rest]).astype(np.float32),
        np.concatenate([speech.loudness, quiet]),
    )


def mouth_of_frames(mouth: NDArray[np.float32]) -> Tensor:
    """The mouth [T, 4] at 100 Hz in the middle of each picture's own 40 ms: [T / 4, 4]."""
    four = torch.from_numpy(mouth[: len(mouth) // MEL_PER_FRAME * MEL_PER_FRAME]).unflatten(0, (-1, MEL_PER_FRAME))
    return (four[:, 1] + four[:, 2]) / 2


def one_of(people: Person, index: int) -> Person:
    """One of several people, as a batch of one."""
    return {name: trait[index : index + 1] for name, trait in people.items()}


@dataclass(frozen=True)
class Task:
    """One presenter's session: who, the picture that is given to the model, what is said, and the session's seed."""

    person: Person
    picture: NDArray[np.uint8]
    speech: Speech
    speech_frames: int
    """Video frames before the silence."""
    seed: int

    @property
    def frames(self) -> int:
        return len(self.speech.mouth) // MEL_PER_FRAME


def plan_tasks(
    speech: Speech, presenters: int, blocks: int, idle_blocks: int, frames_per_block: int, seed: int
) -> list[Task]:
    """Draw the presenters and deal out the speech, each a part of its own where there is enough of it."""
    generator = torch.Generator().manual_seed(seed)
    people = sample_person(presenters, generator)
    pictures = as_bytes(draw(people, {k: v[:, 0] for k, v in reference_motion(presenters, generator).items()}))
    ticks = frames_per_block * MEL_PER_FRAME
    tasks = []
    for i in range(presenters):
        part = excerpt(speech, i * len(speech.mouth) // presenters, blocks * ticks)
        heard = with_silence(part, idle_blocks * ticks)
        tasks.append(Task(one_of(people, i), pictures[i], heard, blocks * frames_per_block, seed + i))
    return tasks


def as_bytes(pictures: Tensor) -> NDArray[np.uint8]:
    """[N, 3, H, W] in 0..1 to uint8 [N, H, W, 3]."""
    made: NDArray[np.uint8] = (pictures * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return made


def as_pictures(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] to [N, 3, H, W] in 0..1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def audio_blocks(samples: NDArray[np.float32], model: AvatarModel) -> Iterator[AudioBlock]:
    """The blocks as a session would cut them."""
    cutter = BlockCutter(model.spec.samples_per_block, model.spec.lookahead_samples)
    yield from cutter.push(AudioChunk(samples, model.spec.sample_rate))
    yield from cutter.flush()


class Shadow:
    """The drive that a session uses, made again beside it: same motion state, same sound."""

    def __init__(self, state: State) -> None:
        self.motion = clone(motion_of(state))
        self.mel: MelState = init_mel()

    def drive(self, audio: AudioBlock) -> Tensor:
        """The drive [F, 11] of the block that the session makes next."""
        energy = speech_energy(block_mel(audio, self.mel, 0, 0))
        return next_drive(self.motion, energy[None])[0]

    def check(self, state: State) -> None:
        """Call after the session's step. Raises: AssertionError: the session moved otherwise."""
        other = motion_of(state)
        assert self.motion.frame == other.frame
        assert torch.equal(self.motion.noise, other.noise)
        torch.testing.assert_close(self.motion.energy, other.energy, atol=1e-5, rtol=0)


def motion_of(state: State) -> MotionState:
    """The motion in a session's state."""
    found = [value for value in vars(state).values() if isinstance(value, MotionState)]
    if len(found) != 1:
        raise TypeError(f"{type(state).__name__}: holds {len(found)} MotionState, not one; it cannot be measured")
    return found[0]


# --------------------------------------------------------------------------- measuring one presenter


@dataclass
class Shot:
    """A frame kept for the picture: uint8 [H, W, 3], drawn and generated; close: around the mouth."""

    frame: int
    close: bool
    drawn: NDArray[np.uint8]
    made: NDArray[np.uint8]


@dataclass
class Measured:
    """One presenter's session in numbers; V frames, K readings in the order of the meter.

    readings, truth: [V, K] read off the generated frames, and what the world says.
    drawn: [V, K] read off the drawn frames; nan where none was drawn.
    change, drawn_change: [V] mean absolute difference from the frame before, in grey levels of 255; nan where unknown.
    error: [V, 3] mean squared error of the whole picture, the face, the mouth and eyes; nan where none was drawn.
    reference, picture: [K] what the meter reads off the reference, and the reference itself.
    """

    readings: Tensor
    truth: Tensor
    drawn: Tensor
    change: Tensor
    drawn_change: Tensor
    error: Tensor
    reference: Tensor
    picture: NDArray[np.uint8]
    speech_frames: int
    shots: list[Shot] = field(default_factory=list)


@torch.no_grad()
def measure(model: AvatarModel, meter: Meter, task: Task, draw_every: int, on_block: Any = None) -> Measured:
    """Stream one presenter's session and measure it as it comes.

    Args:
        draw_every: the truth is painted for one block in so many; numbers are compared for all.
        on_block: called without arguments after every block.
    """
    kinds, frames = len(meter.mean), task.frames
    state = model.start(Reference(task.picture, seed=task.seed))
    shadow = Shadow(state)
    mouth = mouth_of_frames(task.speech.mouth)
    drive = torch.full((frames, len(DRIVE)), math.nan)
    found = Measured(
        readings=torch.full((frames, kinds), math.nan),
        truth=torch.full((frames, kinds), math.nan),
        drawn=torch.full((frames, kinds), math.nan),
        change=torch.full((frames,), math.nan),
        drawn_change=torch.full((frames,), math.nan),
        error=torch.full((frames, 3), math.nan),
        reference=meter.measure(as_pictures(task.picture[None]))[0],
        picture=task.picture,
        speech_frames=task.speech_frames,
    )
    wanted = choose_shots(mouth, task.speech_frames)
    last: Tensor | None = None

    def motion(span: slice) -> tuple[Person, Motion]:
        moved = as_motion(drive[span], mouth[span])
        return {k: v.expand(len(drive[span]), *v.shape[1:]) for k, v in task.person.items()}, moved

    def take(block: FrameBlock) -> None:
        nonlocal last
        span = slice(block.start, block.start + len(block.frames))
        pictures = as_pictures(block.frames)
        found.readings[span] = meter.measure(pictures)
        found.truth[span] = truth(*motion(span))
        found.change[span] = changes(pictures, last)
        last = pictures[-1:]
        shots = [(at, close) for at, close in wanted if span.start <= at < span.stop]
        number = span.start // model.spec.frames_per_block
        if span.start and number % draw_every == draw_every // 2:
            # one frame more, before the block, to see what a border looks like in the truth
            person, moves = motion(slice(span.start - 1, span.stop))
            painted = as_pictures(as_bytes(draw(person, moves)))
            found.drawn_change[span] = changes(painted[1:], painted[:1])
            found.drawn[span.start - 1 : span.stop] = meter.measure(painted)
            found.error[span] = squared_errors(pictures, painted[1:], *motion(span))
        for at, close in shots:
            person, moves = motion(slice(at, at + 1))
            made = block.frames[at - span.start]
            box = mouth_box(person, moves) if close else (0, 0, SIZE, SIZE)
            found.shots.append(Shot(at, close, crop(as_bytes(draw(person, moves))[0], box), crop(made, box)))

    for audio in audio_blocks(task.speech.samples, model):
        first = audio.start // model.spec.samples_per_frame
        own = shadow.drive(audio)
        drive[first : first + len(own)] = own
        for block in model.step(state, audio):
            take(block)
        shadow.check(state)
        if on_block is not None:
            on_block()
    for block in model.finish(state):
        take(block)
    return found


def changes(pictures: Tensor, before: Tensor | None) -> Tensor:
    """Mean absolute difference of each picture from the one before it, in grey levels; nan where there is none."""
    if before is None:
        before = torch.full_like(pictures[:1], math.nan)
    return (pictures - torch.cat([before, pictures[:-1]])).abs().mean((1, 2, 3)) * 255


def squared_errors(made: Tensor, painted: Tensor, person: Person, motion: Motion) -> Tensor:
    """[N, 3]: mean squared error of the whole picture, of the face, and of mouth and eyes."""
    error = (made - painted).square()
    regions = [
        torch.ones_like(error[:, :1]),
        face_mask(person, motion),
        (detail_weight(person, motion, SIZE) > 3).float(),
    ]
    return torch.stack([(error * r).sum((1, 2, 3)) / (3 * r.sum((1, 2, 3))) for r in regions], 1)


def face_mask(person: Person, motion: Motion) -> Tensor:
    """[N, 1, SIZE, SIZE]: 1 within the head's outline."""
    grid = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    scale = (person["head_scale"] * (1 + motion["zoom"]))[:, None, None]
    x = (grid[None, None, :] - (person["head_x"] + motion["tx"])[:, None, None]) / scale
    y = (grid[None, :, None] - (person["head_y"] + motion["ty"])[:, None, None]) / scale
    inside = (x / person["face_w"][:, None, None]) ** 2 + (y / person["face_h"][:, None, None]) ** 2 < 1
    return inside.float()[:, None]


def mouth_box(person: Person, motion: Motion) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a square of 80 pixels around the mouth of one picture."""
    scale = float(person["head_scale"] * (1 + motion["zoom"]))
    x = float(person["head_x"] + motion["tx"]) + scale * 0.085 * float(motion["yaw"])
    y = float(person["head_y"] + motion["ty"]) + scale * (float(person["mouth_y"]) + 0.07 * float(motion["pitch"]))
    left, top = (round(min(max((c + 1) / 2 * SIZE - 40, 0), SIZE - 80)) for c in (x, y))
    return left, top, left + 80, top + 80


def crop(picture: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    left, top, right, bottom = box
    return picture[top:bottom, left:right].copy()


def choose_shots(mouth: Tensor, speech_frames: int) -> list[tuple[int, bool]]:
    """Which frames to show, and whether close: whole ones spread evenly, close ones where the mouth is most itself."""
    idle = speech_frames + (len(mouth) - speech_frames) // 2
    spread = [round(speech_frames * share) for share in (0.02, 0.35, 0.7, 0.97)]
    fifth = max(1, speech_frames // 5)

    def most(score: Tensor, part: int) -> int:
        return part * fifth + int(score[part * fifth : (part + 1) * fifth].argmax())

    opening, width, pucker = mouth[:, 0], mouth[:, 1], mouth[:, 2]
    close = [most(opening, 0), most(pucker, 1), most(width * (opening > 0.15), 2), most(-opening, 3), most(opening, 4)]
    shots = [(at, False) for at in [*spread, idle]] + [(at, True) for at in close]
    return [(min(at, len(mouth) - 1), near) for at, near in shots]


# --------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    value: mean over presenters; each: one by one; drawn: the same measured on the drawn truth; margin: half of the 95 %
    interval; goal, met: what is asked for, and whether it is reached (None: nothing is asked for).
    """

    group: str
    name: str
    value: float
    each: list[float]
    drawn: float | None = None
    goal: str = ""
    met: bool | None = None
    margin: float | None = None
    digits: int = 3


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def lip_sync(all_found: Sequence[Measured]) -> list[Figure]:
    """Correlations over the speech, the lag of the mouth, and the mouth in silence."""
    figures = []
    for column, name, least in ((OPENING, "opening", 0.93), (WIDTH, "width", 0.85), (PUCKER, "pucker", 0.85)):
        each, drawn = [], []
        for found in all_found:
            spoken = slice(0, found.speech_frames)
            each.append(correlation(found.readings[spoken, column], found.truth[spoken, column]))
            drawn.append(correlation(*_known(found.drawn[spoken, column], found.truth[spoken, column])))
        value = mean(each)
        figures.append(
            Figure("lip sync", f"{name}, correlation", value, each, mean(drawn), f">= {least}", value >= least)
        )
    curves = [lag_curve(found) for found in all_found]
    lag = best_lag([mean(c) for c in zip(*curves, strict=True)])
    figures.append(
        Figure("lip sync", "lag of the mouth, frames", lag, [best_lag(c) for c in curves], 0, "0", lag == 0, digits=0)
    )
    error, drawn_error = [], []
    for found in all_found:
        wrong = (found.readings - found.truth)[: found.speech_frames, OPENING].abs()
        error.append(float(wrong.mean()))
        drawn_error.append(float((found.drawn - found.truth)[: found.speech_frames, OPENING].abs().nanmean()))
    figures.append(Figure("lip sync", "opening, mean error, px", mean(error), error, mean(drawn_error), digits=2))
    each, drawn = [], []
    for found in all_found:
        silent = found.readings[found.speech_frames + SETTLE_FRAMES :, OPENING]
        each.append(float(silent.quantile(0.95)))
        painted = found.drawn[found.speech_frames + SETTLE_FRAMES :, OPENING]
        painted = painted[~painted.isnan()]
        drawn.append(float(painted.quantile(0.95)) if len(painted) else math.nan)
    value = mean(each)
    figures.append(
        Figure("lip sync", "opening in silence, p95, px", value, each, mean(drawn), "< 1", max(each) < 1, digits=2)
    )
    return figures


def lag_curve(found: Measured) -> list[float]:
    spoken = slice(0, found.speech_frames)
    return lag_correlations(found.readings[spoken, OPENING], found.truth[spoken, OPENING])


def identity(all_found: Sequence[Measured], std: Tensor, frames_per_block: int) -> list[Figure]:
    """Is it the same person, as exactly as the meter can tell, and still so at the end?"""
    group = "identity"
    deviation = std[TRAITS]
    own = torch.stack([found.truth[0, TRAITS] for found in all_found]) / deviation
    crowd = gallery_traits(GALLERY - len(all_found)) / deviation
    people = torch.cat([own, crowd])
    right, right_drawn, wrong, wrong_drawn, on_picture = [], [], [], [], []
    distances, per_slope = [], []
    minutes = torch.arange(all_found[0].speech_frames // frames_per_block) * frames_per_block / FPS / 60
    for i, found in enumerate(all_found):
        read, drawn = found.readings[:, TRAITS] / deviation, found.drawn[:, TRAITS] / deviation
        by_block = read.unflatten(0, (-1, frames_per_block)).mean(1)
        right.append(100 * float((torch.cdist(by_block, people).argmin(1) == i).float().mean()))
        drawn_blocks = drawn.unflatten(0, (-1, frames_per_block)).nanmean(1)
        drawn_blocks = drawn_blocks[~drawn_blocks.isnan().any(1)]
        right_drawn.append(100 * float((torch.cdist(drawn_blocks, people).argmin(1) == i).float().mean()))
        wrong.append(float((read - own[i]).abs().mean()))
        wrong_drawn.append(float((drawn - own[i]).abs().nanmean()))
        reference = found.reference[TRAITS] / deviation
        on_picture.append(float((reference - own[i]).abs().mean()))
        distances.append((by_block[: len(minutes)] - reference).abs().mean(1))
        per_slope.append(slope(minutes, distances[-1])[0])
    steep, margin = slope(minutes, torch.stack(distances).mean(0))
    too_short = all_found[0].speech_frames < (DRIFT_S - 1) * FPS
    figures = [
        Figure(group, f"nearest of {GALLERY}, % right", mean(right), right, mean(right_drawn), digits=1),
        Figure(group, "error of traits, sd", mean(wrong), wrong, mean(wrong_drawn)),
        Figure(group, "  on the reference picture", mean(on_picture), on_picture),
        Figure(
            group,
            "distance, slope a minute",
            steep,
            per_slope,
            goal="0 in interval",
            met=None if too_short else steep - margin <= 1e-6,
            margin=margin,
            digits=4,
        ),
    ]
    for column, name in enumerate(("whole picture", "face", "mouth and eyes")):
        each = [float(decibels(found.error[:, column].nanmean())) for found in all_found]
        figures.append(Figure(group, f"PSNR of {name}, dB", mean(each), each, digits=1))
    times = torch.arange(all_found[0].speech_frames) / FPS / 60
    fades = [slope(times, decibels(found.error[: len(times), 1])) for found in all_found]
    series = torch.stack([decibels(found.error[: len(times), 1]) for found in all_found]).mean(0)
    steep, margin = slope(times, series)
    goal_met = None if too_short or math.isnan(steep) else steep + margin >= -1e-6
    figures.append(
        Figure(
            group,
            "PSNR of face, slope in dB a minute",
            steep,
            [s for s, _ in fades],
            goal="0 in interval",
            met=goal_met,
            margin=margin,
            digits=2,
        )
    )
    return figures


def gallery_traits(people: int) -> Tensor:
    """Traits [people, n] of strangers."""
    strangers = sample_person(people, torch.Generator().manual_seed(GALLERY_SEED))
    still = as_motion(torch.zeros(people, len(DRIVE)), torch.zeros(people, 4))
    return truth(strangers, still)[:, TRAITS]


def seams(all_found: Sequence[Measured], std: Tensor, frames_per_block: int) -> list[Figure]:
    """Does it jump where one block ends and the next begins?"""
    group = "seams"
    figures = []

    def steps(readings: Tensor) -> Tensor:
        pose = readings[:, POSE] / std[POSE]
        return torch.cat([torch.full_like(pose[:1], math.nan), pose.diff(dim=0).abs()])

    for name, made, drawn in (
        (
            "frames, border / inside",
            [found.change for found in all_found],
            [found.drawn_change for found in all_found],
        ),
        (
            "pose, border / inside",
            [steps(found.readings) for found in all_found],
            [steps(found.drawn) for found in all_found],
        ),
    ):
        each = [seam_ratio(change, frames_per_block) for change in made]
        pooled = seam_ratio(torch.cat(made), frames_per_block)
        truth_ratio = seam_ratio(torch.cat(drawn), frames_per_block)
        margin = 1.96 * float(np.std(each, ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else None
        met = pooled <= 1.2
        figures.append(Figure(group, name, pooled, each, truth_ratio, "<= 1.2", met, margin, digits=2))
    # what the autoencoder adds: a latent is four frames, and three of them are a block
    each, pooled, truth_ratio = (
        [_latent_seams(found.change, frames_per_block) for found in all_found],
        _latent_seams(torch.cat([found.change for found in all_found]), frames_per_block),
        _latent_seams(torch.cat([found.drawn_change for found in all_found]), frames_per_block),
    )
    figures.append(Figure(group, "frames, latents inside blocks", pooled, each, truth_ratio, digits=2))
    return figures


def _latent_seams(change: Tensor, frames_per_block: int) -> float:
    """`seam_ratio` of the borders of latents that are not borders of blocks."""
    change = change.clone()
    change[::frames_per_block] = math.nan
    return seam_ratio(change, FRAMES_PER_LATENT)


def liveliness(all_found: Sequence[Measured]) -> list[Figure]:
    """Blinks and head motion, while speaking and while idle."""
    figures = []
    for group, part in (("speaking", slice(0, None)), ("idle", slice(1, None))):
        spans = [
            slice(0, found.speech_frames) if part.start == 0 else slice(found.speech_frames, None)
            for found in all_found
        ]
        pairs = [(found.readings[span], found.truth[span]) for found, span in zip(all_found, spans, strict=True)]
        minutes = [len(made) / FPS / 60 for made, _ in pairs]
        rate = [blinks(made[:, LIDS]) / m for (made, _), m in zip(pairs, minutes, strict=True)]
        true_rate = [blinks(wanted[:, LIDS]) / m for (_, wanted), m in zip(pairs, minutes, strict=True)]
        idle = group == "idle"
        figures.append(
            Figure(
                group,
                "blinks a minute",
                mean(rate),
                rate,
                mean(true_rate),
                "> 0" if idle else "",
                mean(rate) > 0 if idle else None,
                digits=1,
            )
        )
        lids = [correlation(made[:, LIDS], wanted[:, LIDS]) for made, wanted in pairs]
        lids_known = [r for r in lids if not math.isnan(r)]
        figures.append(Figure(group, "lids, correlation", mean(lids_known), lids))
        ratio, alike = [], []
        for made, wanted in pairs:
            ratio.append(float((made[:, POSE].std(0) / wanted[:, POSE].std(0)).mean()))
            columns = range(POSE.start, POSE.stop)
            alike.append(mean([correlation(made[:, c], wanted[:, c]) for c in columns]))
        figures.append(
            Figure(
                group,
                "head motion, sd over drawn sd",
                mean(ratio),
                ratio,
                1.0,
                "> 0.5" if idle else "",
                mean(ratio) > 0.5 if idle else None,
                digits=2,
            )
        )
        figures.append(Figure(group, "head motion, correlation", mean(alike), alike))
    return figures


def _known(drawn: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Both, where a drawn frame was measured."""
    found = ~drawn.isnan()
    return drawn[found], wanted[found]


def details(all_found: Sequence[Measured], std: Tensor, frames_per_block: int) -> dict[str, Any]:
    """What the table has no room for: lags, the course over time, each move, change by place in the block."""
    sixths: list[list[float]] = []
    moves: dict[str, dict[str, float]] = {}
    for found in all_found:
        parts = [
            (a[:, OPENING], b[:, OPENING])
            for a, b in zip(
                found.readings[: found.speech_frames].tensor_split(6),
                found.truth[: found.speech_frames].tensor_split(6),
                strict=True,
            )
        ]
        sixths.append([correlation(a, b) for a, b in parts])
    for column, name in enumerate(MOVES):
        pairs = [(f.readings[:, column], f.truth[:, column]) for f in all_found]
        moves[name] = {
            "correlation": mean([correlation(a, b) for a, b in pairs]),
            "correlation_drawn": mean(
                [correlation(*_known(f.drawn[:, column], b)) for f, (_, b) in zip(all_found, pairs)]
            ),
            "sd_generated": mean([float(a.std()) for a, _ in pairs]),
            "sd_drawn": mean([float(b.std()) for _, b in pairs]),
        }

    def by_place(series: list[Tensor]) -> list[float]:
        return [float(v) for v in torch.cat(series).unflatten(0, (-1, frames_per_block)).nanmean(0)]

    return {
        "opening_by_lag": {
            str(lag): mean([lag_curve(f)[lag + LAGS] for f in all_found]) for lag in range(-LAGS, LAGS + 1)
        },
        "opening_by_sixth": [mean(part) for part in zip(*sixths, strict=True)],
        "moves": moves,
        "change_by_place_in_block": by_place([f.change for f in all_found]),
        "drawn_change_by_place_in_block": by_place([f.drawn_change for f in all_found]),
    }


# --------------------------------------------------------------------------- showing


SHOWN = 4
"""Presenters that have a column and a row in the plate; of more, the table shows the lowest and the highest."""


def table(figures: Sequence[Figure], title: str) -> Table:
    shown = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    presenters = len(figures[0].each)
    alone = [str(i + 1) for i in range(presenters)] if presenters <= SHOWN else ["lowest", "highest"]
    shown.add_column("", no_wrap=True)
    for name in ("goal", "met", "mean", "drawn", *alone):
        shown.add_column(name, justify="right", no_wrap=True)
    group = ""
    for figure in figures:
        if figure.group != group:
            group = figure.group
            shown.add_section()
            shown.add_row(f"[bold]{group}[/bold]")
        value = _number(figure.value, figure.digits)
        if figure.margin is not None:
            value += f" ± {_number(figure.margin, figure.digits)}"
        shown.add_row(
            f"  {figure.name}",
            figure.goal,
            {None: "", True: "yes", False: "[bold red]no[/bold red]"}[figure.met],
            value,
            "" if figure.drawn is None else _number(figure.drawn, figure.digits),
            *(_number(v, figure.digits) for v in _alone(figure.each)),
        )
    return shown


def _alone(each: Sequence[float]) -> Sequence[float]:
    """Each presenter's, or the lowest and the highest of many."""
    known = [value for value in each if not math.isnan(value)] or [math.nan]
    return each if len(each) <= SHOWN else (min(known), max(known))


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _plain(tree: Any) -> Any:
    """The same without nan, which JSON does not know."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


TABLE_WIDTH = 140
"""In characters: rows stay whole, whatever a terminal or a pipe says of itself."""
CELL = 132
"""Side of one little picture in the plate, pixels."""


def plate(all_found: Sequence[Measured]) -> Image.Image:
    """Rows: the first presenters, truth above generated. Columns: the reference, whole frames, mouths close up."""
    all_found = all_found[:SHOWN]
    gap, head = 4, 18
    columns = 1 + max(len(found.shots) for found in all_found)
    tall = 2 * CELL + head + 3 * gap
    sheet = Image.new("RGB", (columns * (CELL + gap) + gap, len(all_found) * tall), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def put(picture: NDArray[np.uint8], column: int, y: int) -> None:
        little = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(little, (gap + column * (CELL + gap), y))

    for row, found in enumerate(all_found):
        top = row * tall
        put(found.picture, 0, top + head)
        pen.text((gap, top + 2), "reference", "black", font)
        pen.text((gap, top + head + CELL + 2 * gap), "right: above drawn,\nbelow generated", "black", font)
        shots = sorted(found.shots, key=lambda shot: (shot.close, shot.frame))
        for column, shot in enumerate(shots, 1):
            idle = " idle" if shot.frame >= found.speech_frames else ""
            pen.text((gap + column * (CELL + gap), top + 2), f"{shot.frame / FPS:.2f} s{idle}", "black", font)
            put(shot.drawn, column, top + head)
            put(shot.made, column, top + head + CELL + gap)
    return sheet


# --------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Options:
    """As given on the command line."""

    presenters: int
    seconds: float
    steps: int | None
    seed: int
    speech: Path | None
    out: Path | None
    as_json: bool
    long: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EvaluationError(f"bench quality: {message}")


def parse(arguments: Sequence[str]) -> Options:
    """Raises: EvaluationError: an option is unknown, or a value out of range."""
    parser = _Parser(prog="avatard bench quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--presenters", type=int, help="unseen presenters; default 12, with --long 2")
    parser.add_argument("--seconds", type=float, help="of speech for each; default 60")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--seed", type=int, default=4242, help="of presenters, speech and motion; default 4242")
    parser.add_argument("--speech", type=Path, metavar="NAME.npz", help="held-out speech made before, with NAME.wav")
    parser.add_argument("--out", type=Path, help="folder for quality.png and quality.json; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--long", action="store_true", help="ten minutes for each presenter: does it drift?")
    given = parser.parse_args(list(arguments))
    seconds = given.seconds if given.seconds is not None else LONG_S if given.long else 60.0
    presenters = given.presenters if given.presenters is not None else 2 if given.long else 12
    if not 1 <= presenters <= 64:
        raise EvaluationError(f"--presenters {presenters}: must be 1 to 64")
    if not 3 <= seconds <= 36_000:
        raise EvaluationError(f"--seconds {seconds:g}: must be 3 to 36000")
    return Options(presenters, seconds, given.steps, given.seed, given.speech, given.out, given.json, given.long)


def embedded_model(steps: int | None) -> AvatarModel:
    """The model that is shipped, ready to stream."""
    from avatar.load import load_model  # here, since loading knows all families and this is one of them

    model: AvatarModel = load_model("pocket", size=None, steps=steps, options={})
    return model


def load_meter() -> Meter:
    """The instrument, as it is shipped."""
    weights = load_file(Path(__file__).parent / "weights" / "meter.safetensors")
    meter = Meter(len(weights["mean"]))
    meter.load_state_dict({name: value.float() for name, value in weights.items()})
    return meter.eval()


def evaluate(model: AvatarModel, meter: Meter, options: Options) -> tuple[list[Figure], dict[str, Any], Image.Image]:
    """Run it all: figures, what the table has no room for, and the picture."""
    spec = model.spec
    blocks = max(1, round(options.seconds / spec.block_seconds))
    idle_blocks = round(IDLE_S / spec.block_seconds)
    seconds = blocks * spec.block_seconds
    if options.speech is not None:
        speech = load_speech(options.speech)
    else:
        speech = synthesise_speech(options.presenters * seconds, options.seed)
    tasks = plan_tasks(speech, options.presenters, blocks, idle_blocks, spec.frames_per_block, options.seed)
    # painting costs as much as generating: enough of it for the figures, about 25 blocks a presenter
    draw_every = max(2, (blocks + idle_blocks) // 32)
    with _progress((blocks + idle_blocks) * len(tasks)) as advance:
        found = [measure(model, meter, task, draw_every, advance) for task in tasks]
    size = spec.frames_per_block
    figures = [
        *lip_sync(found),
        *identity(found, meter.std, size),
        *seams(found, meter.std, size),
        *liveliness(found),
    ]
    return figures, details(found, meter.std, size), plate(found)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("measuring"), BarColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def main(arguments: list[str]) -> None:
    """Measure the embedded model and print a table; with --json, a JSON object in one line.

    Raises: AvatardError: an option, the speech, or the folder is not as it must be.
    """
    options = parse(arguments)
    try:
        out = Path(tempfile.mkdtemp(prefix="avatard-quality-")) if options.out is None else options.out
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"--out {options.out}: {error.strerror}; choose a folder that can be written") from error
    model = embedded_model(options.steps)
    figures, more, picture = evaluate(model, load_meter(), options)
    picture.save(out / "quality.png", optimize=True)
    result = {
        "presenters": options.presenters,
        "seconds": options.seconds,
        "steps": options.steps,
        "seed": options.seed,
        "figures": [asdict(figure) for figure in figures],
        **more,
    }
    result = _plain(result)
    (out / "quality.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if options.as_json:
        print(json.dumps(result))
        return
    steps = "" if options.steps is None else f", {options.steps} steps"
    title = f"{options.presenters} unseen presenters, {options.seconds:g} s of unseen speech each{steps}"
    console = Console(width=TABLE_WIDTH)
    console.print(table(figures, title))
    console.print(f"{out / 'quality.png'}  {out / 'quality.json'}", soft_wrap=True)
