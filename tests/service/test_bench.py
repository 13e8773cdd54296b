"""The benchmarks, on the toy: that they measure, and what they print. Their figures are no test's business."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import procs
import pytest
from waiting import until

TOY = f"{Path(__file__).parent.parent / 'toy_model.py'}:load"


def test_speed_prints_every_stage_beside_its_limit(place):
    model = place.run_command()[-1].removeprefix("--model=")
    process = place.call(
        place.command(
            "bench", "speed", "--model", model, "--image", place.image, "--audio", place.audio, "--seconds", 4
        )
    )
    assert process.returncode == 0, process.stderr
    assert "64x64, 4 s of video" in process.stdout
    assert "ms of 480 ms" in process.stdout
    assert "x real time" in process.stdout


@pytest.mark.parametrize(
    "words",
    [["speed", "--seconds=nan"], ["speed", "--seconds=-1"], ["memory", "--seconds=inf"], ["memory", "--every=0"]],
)
def test_what_is_no_length_is_one_line(place, words):
    process = place.call(place.command("bench", *words))
    assert process.returncode == 2
    assert process.stderr.startswith(f"avatard: {words[1].replace('=', ' ')}: not a length in seconds")
    assert process.stderr.count("\n") == 1


def test_memory_that_is_interrupted_before_the_first_frame_says_so(place):
    words = ["--model", TOY, "--image", place.image, "--audio", place.audio, "--seconds", 4]
    slow = ["--set", "model.options={fail_at: 0, how: hang}"]
    process = subprocess.Popen(
        place.command("bench", "memory", *words, *slow), stderr=subprocess.PIPE, text=True, env=place.environment()
    )
    engine = until(lambda: procs.children(process.pid, "streaming.engine_child"), 20, "the engine")
    assert engine
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "avatard: stopped before the first frame\n")


def test_the_stages_of_the_embedded_model_are_told_in_their_order():
    from service.bench import stage_lines, stages
    from service.config import load_settings

    found = stages(load_settings(), blocks=3)
    assert list(found) == ["ear and drive", "transformer", "decoder", "to bytes"]
    assert all(ms > 0 for ms in found.values())
    assert "%" in stage_lines(found)[0]
    assert stages(load_settings(assignments=["model.name=live-avatar-14b"])) == {}


def test_memory_prints_a_curve_and_its_growth(place):
    model = place.run_command()[-1].removeprefix("--model=")
    options = ["--image", place.image, "--audio", place.audio, "--seconds", 12, "--every", 3]
    process = place.call(place.command("bench", "memory", "--model", model, *options))
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["3", "6", "9", "12"]
    assert lines[-1].startswith("growth from the first to the last:")


def test_what_the_command_says_is_what_the_benchmark_says(place):
    process = place.call(
        place.command("bench", "speed", "--image", "none.png", "--audio", place.audio, "--model", "nix")
    )
    assert process.returncode == 2
    assert process.stderr.startswith("avatard: model nix: no such model or folder")


@pytest.mark.slow
def test_memory_stays_flat_over_ten_minutes_of_video(place):
    model = place.run_command()[-1].removeprefix("--model=")
    options = ["--image", place.image, "--audio", place.audio, "--seconds", 600, "--every", 60]
    process = place.call(place.command("bench", "memory", "--model", model, *options))
    growth = float(process.stdout.splitlines()[-1].split()[-2])
    assert growth < 2.0, process.stdout
