"""The measure of the embedded model: it finds what is there, and a model that draws the truth passes it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from torch import Tensor

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from audio.mel import MelState, block_mel, init_state
from avatar.model import FrameBlock, Part, Reference, StreamSpec
from avatar.pocket import evaluate
from avatar.pocket.evaluate import (
    EvaluationError,
    Figure,
    Measured,
    Task,
    best_lag,
    blinks,
    correlation,
    excerpt,
    lag_correlations,
    load_meter,
    load_speech,
    measure,
    mouth_of_frames,
    parse,
    plan_tasks,
    seam_ratio,
    slope,
    student_quantile,
    table,
    with_silence,
)
from avatar.pocket.motion import MotionState, init_motion, next_drive, speech_energy
from avatar.pocket.speech import SAMPLE_RATE, SAMPLES_PER_FRAME, Speech, store
from avatar.pocket.world import Person, as_motion, draw

needs_weights = pytest.mark.skipif(
    not (Path(evaluate.__file__).parent / "weights" / "meter.safetensors").exists(), reason="no weights of the meter"
)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- statistics


def test_correlation_is_that_of_numpy():
    a, b = noise(0, 200), noise(1, 200)
    b = b + 0.7 * a
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.numpy(), b.numpy())[0, 1], abs=1e-6)


def test_correlation_with_what_does_not_vary_is_unknown():
    assert math.isnan(correlation(noise(0, 50), torch.full((50,), 3.0)))


@pytest.mark.parametrize("lag", [-6, -1, 0, 2, 6])
def test_a_late_mouth_has_a_positive_lag(lag: int):
    wanted = noise(2, 300)
    curve = lag_correlations(wanted.roll(lag), wanted)
    assert len(curve) == 13
    assert best_lag(curve) == lag
    assert max(curve) == pytest.approx(1.0)


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.776), (10, 2.228), (22, 2.074), (200, 1.972)])
def test_students_quantile_is_that_of_the_tables(freedom: int, value: float):
    assert student_quantile(freedom) == pytest.approx(value, abs=0.01)


def test_a_slope_is_found_with_its_interval():
    times = torch.arange(1000) / 100
    steep, margin = slope(times, 0.3 * times + 0.5 * noise(3, 1000))
    assert abs(steep - 0.3) < margin
    assert 0 < margin < 0.05


def test_the_interval_of_a_flat_course_holds_zero_19_times_in_20():
    times = torch.arange(250.0)
    misses = 0
    for seed in range(200):
        steep, margin = slope(times, noise(seed, 250))
        misses += abs(steep) > margin
    assert 2 <= misses <= 22


def test_a_slope_passes_over_what_is_unknown():
    times = torch.arange(100.0)
    values = 2 * times
    values[::3] = math.nan
    steep, margin = slope(times, values)
    assert steep == pytest.approx(2)
    assert margin == pytest.approx(0, abs=1e-6)


def test_the_slope_of_too_few_points_is_unknown():
    assert all(math.isnan(v) for v in slope(torch.arange(5.0), torch.arange(5.0)))


def test_even_motion_has_no_seams_and_a_jump_at_the_borders_shows():
    change = torch.ones(120)
    change[0] = math.nan
    assert seam_ratio(change, 12) == pytest.approx(1)
    change[12::12] = 1.8
    assert seam_ratio(change, 12) == pytest.approx(1.8)


def test_a_blink_counts_once():
    lids = torch.tensor([0, 0.25, 0.75, 1, 1, 0.7, 0.35, 0.1, 0, 0, 0.75, 1, 0.35, 0])
    assert blinks(lids) == 2


# --------------------------------------------------------------------------- speech


def made_speech(seconds: float) -> Speech:
    """Half a second of a buzz with the mouth open, half a second of silence, and so on."""
    frames = round(100 * seconds)
    spoken = (np.arange(frames) // 50) % 2 == 0
    t = np.arange(frames * SAMPLES_PER_FRAME) / SAMPLE_RATE
    buzz = 0.2 * np.sign(np.sin(2 * math.pi * 120 * t)) * np.repeat(spoken, SAMPLES_PER_FRAME)
    course = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(frames) / 50)
    mouth = np.zeros((frames, 4), np.float32)
    mouth[:, 0] = course * spoken
    mouth[:, 1] = 0.8 * np.roll(course, 7) * spoken
    mouth[:, 2] = 0.6 * np.roll(course, 19) * spoken
    return Speech(buzz.astype(np.float32), mouth, spoken.astype(np.float32))


def write_speech(folder: Path, seconds: float) -> Path:
    speech = made_speech(seconds)
    store(speech, folder / "made.npz")
    soundfile.write(folder / "made.wav", speech.samples, SAMPLE_RATE)
    return folder / "made.npz"


@pytest.mark.parametrize("suffix", [".npz", ".wav"])
def test_stored_speech_comes_back_with_its_mouth(tmp_path: Path, suffix: str):
    speech = made_speech(2.0)
    back = load_speech(write_speech(tmp_path, 2.0).with_suffix(suffix))
    np.testing.assert_allclose(back.samples, speech.samples, atol=1e-4)
    np.testing.assert_allclose(back.mouth, speech.mouth, atol=0.005)


def test_sound_and_mouth_that_do_not_belong_together_are_one_line(tmp_path: Path):
    path = write_speech(tmp_path, 2.0)
    soundfile.write(tmp_path / "made.wav", np.zeros(5 * SAMPLE_RATE, np.float32), SAMPLE_RATE)
    with pytest.raises(EvaluationError, match=r"made\.npz: 80000 samples at 16000 Hz do not belong to 200 frames"):
        load_speech(path)


def test_missing_speech_is_one_line(tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"needed are NAME\.npz and NAME\.wav") as caught:
        load_speech(tmp_path / "none.npz")
    assert "\n" not in str(caught.value)


def test_an_excerpt_begins_again_after_the_end():
    speech = made_speech(1.0)
    part = excerpt(speech, 80, 40)
    np.testing.assert_array_equal(part.mouth, np.concatenate([speech.mouth[80:], speech.mouth[:20]]))
    assert len(part.samples) == 40 * SAMPLES_PER_FRAME


def test_the_mouth_rests_in_the_silence_that_follows():
    speech = with_silence(made_speech(1.0), 100)
    assert len(speech.samples) == 2 * SAMPLE_RATE
    assert speech.mouth[110:, 0].max() == 0


def test_a_picture_shows_the_mouth_of_the_middle_of_its_own_40_ms():
    mouth = np.arange(8, dtype=np.float32)[:, None].repeat(4, 1)
    assert mouth_of_frames(mouth)[:, 0].tolist() == [1.5, 5.5]


# --------------------------------------------------------------------------- models that draw


@dataclass
class DrawnState:
    motion: MotionState
    mel: MelState = field(default_factory=init_state)
    frame: int = 0


class DrawnModel:
    """Draws the truth, if need be with a delay of the mouth, and shifted to one side in every second block."""

    spec = StreamSpec(256, 256, lookahead_samples=1400)

    def __init__(self, person: Person, mouth: Tensor, late: int = 0, shift: float = 0.0) -> None:
        self.person, self.mouth, self.shift = person, mouth.roll(late, 0), shift

    def parts(self) -> list[Part]:
        return []

    def start(self, reference: Reference) -> DrawnState:
        return DrawnState(init_motion(reference.seed))

    def step(self, state: DrawnState, audio: AudioBlock) -> list[FrameBlock]:
        mel = block_mel(audio, state.mel, 20, 8)[20:68]
        drive = next_drive(state.motion, speech_energy(mel)[None])[0]
        drive[:, 0] += self.shift * (state.frame // 12 % 2)
        span = slice(state.frame, state.frame + 12)
        person = {k: v.expand(12, *v.shape[1:]) for k, v in self.person.items()}
        pictures = draw(person, as_motion(drive, self.mouth[span]))
        block = FrameBlock(evaluate.as_bytes(pictures), audio.samples, state.frame)
        state.frame += 12
        return [block]

    def finish(self, state: DrawnState) -> list[FrameBlock]:
        return []


def task(blocks: int = 6) -> Task:
    return plan_tasks(made_speech(3.0), 1, blocks, 2, 12, seed=4242)[0]


def measured(late: int = 0, shift: float = 0.0, blocks: int = 4) -> Measured:
    t = task(blocks)
    model = DrawnModel(t.person, mouth_of_frames(t.speech.mouth), late, shift)
    return measure(model, load_meter(), t, draw_every=2)


@pytest.fixture(scope="module")
def perfect() -> Measured:
    return measured(blocks=6)


@needs_weights
def test_drawn_frames_equal_the_truth(perfect: Measured):
    known = ~perfect.error[:, 0].isnan()
    assert known.sum() == 48
    assert perfect.error[known].max() == 0
    torch.testing.assert_close(perfect.readings[known], perfect.drawn[known], atol=1e-3, rtol=1e-3)
    assert perfect.drawn_change[known].equal(perfect.change[known])


@needs_weights
def test_a_model_that_draws_the_truth_speaks_in_time(perfect: Measured):
    figures = {figure.name: figure for figure in evaluate.lip_sync([perfect])}
    assert figures["opening, correlation"].value > 0.95
    assert figures["lag of the mouth, frames"].value == 0


@needs_weights
def test_a_late_mouth_is_found_in_the_frames():
    figures = {figure.name: figure for figure in evaluate.lip_sync([measured(late=2)])}
    assert figures["lag of the mouth, frames"].value == 2
    assert figures["lag of the mouth, frames"].met is False


@needs_weights
def test_a_jump_between_blocks_is_found_in_the_frames(perfect: Measured):
    std = load_meter().std
    smooth, jumping = (evaluate.seams([found], std, 12) for found in (perfect, measured(shift=0.02)))
    assert all(figure.value < 1.5 for figure in smooth)
    assert all(figure.value > 2 for figure in jumping if figure.goal)


@needs_weights
def test_the_presenter_is_told_from_255_others(perfect: Measured):
    figures = {figure.name: figure for figure in evaluate.identity([perfect], load_meter().std, 12)}
    assert figures["nearest of 256, % right"].value > 80


@needs_weights
def test_a_session_that_moves_otherwise_is_not_measured():
    t = task(2)

    class Restless(DrawnModel):
        def step(self, state: DrawnState, audio: AudioBlock) -> list[FrameBlock]:
            blocks = super().step(state, audio)
            state.motion = init_motion(99)
            return blocks

    with pytest.raises(AssertionError):
        measure(Restless(t.person, mouth_of_frames(t.speech.mouth)), load_meter(), t, draw_every=2)


@needs_weights
def test_the_command_writes_table_numbers_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    t = plan_tasks(made_speech(3.0), 1, 6, 4, 12, seed=7)[0]
    monkeypatch.setattr(evaluate, "embedded_model", lambda steps: DrawnModel(t.person, mouth_of_frames(t.speech.mouth)))
    monkeypatch.setattr(evaluate, "IDLE_S", 2.0)
    speech = write_speech(tmp_path, 3.0)
    evaluate.main(["--presenters=1", "--seconds=3", "--seed=7", f"--speech={speech}", f"--out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    for group in ("lip sync", "identity", "seams", "speaking", "idle"):
        assert group in printed
    result = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert {figure["group"] for figure in result["figures"]} >= {"lip sync", "seams"}
    assert (tmp_path / "out" / "quality.png").stat().st_size > 10_000


def test_of_many_presenters_the_lowest_and_the_highest_are_shown():
    figures = [Figure("seams", "pose", 1.5, [1.0, math.nan, 2.0, 1.4, 1.6], 1.1, margin=0.25, digits=2)]
    console = Console(width=120, file=io.StringIO())
    console.print(table(figures, "five"))
    rows = console.file.getvalue().splitlines()
    assert [row.split()[-3:] for row in rows if "pose" in row] == [["1.10", "1.00", "2.00"]]
    assert "1.50 ± 0.25" in console.file.getvalue()


# --------------------------------------------------------------------------- the embedded model itself


@needs_weights
@pytest.mark.needs("espeak-ng")
def test_the_embedded_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("avatar.load")
    monkeypatch.setattr(evaluate, "IDLE_S", 2.0)
    evaluate.main(["--presenters=1", "--seconds=3", "--json", f"--out={tmp_path}"])
    result = json.loads(capsys.readouterr().out)
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    assert figures["PSNR of whole picture, dB"] > 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--presenters", "0"], "--presenters 0: must be 1 to 64"),
        (["--seconds", "1"], "--seconds 1: must be 3 to 36000"),
        (["--presentrs", "3"], "unrecognized arguments: --presentrs 3"),
        (["--seconds", "long"], "invalid float value: 'long'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], words: str):
    with pytest.raises(AvatardError, match=words):
        parse(arguments)


def test_a_long_run_takes_ten_minutes_for_each_of_two():
    options = parse(["--long"])
    assert (options.seconds, options.presenters) == (600, 2)
