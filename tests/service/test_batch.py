"""`avatard batch` as it runs: on the toy, its results, its report, its exit status, and every way it can end."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from mp4 import clicks_at, read_mp4, write_sound
from PIL import Image
from waiting import until

import service.batch
from service.batch import BatchResult, BatchWatcher, Outcome, batch, table
from service.batch_plan import BatchRequest, Item
from service.config import Settings, load_settings

TOY = str(Path(__file__).parent.parent / "toy_model.py") + ":load"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sounds that can be spoken, one that cannot, and a face."""
    sounds = tmp_path / "in"
    (sounds / "deep").mkdir(parents=True)
    Image.new("RGB", (300, 400), (90, 120, 140)).save(tmp_path / "face.png")
    write_sound(sounds / "a.wav", clicks_at([0.5], 1.0), 16_000)
    write_sound(sounds / "deep" / "b.flac", clicks_at([1.0], 1.5), 16_000)
    write_sound(sounds / "deep" / "c.wav", clicks_at([0.5], 1.0), 16_000)
    (sounds / "bad.mp3").write_text("I am no sound")
    return tmp_path


def toy(**options: Any) -> Settings:
    assignments = [f"model.options.{name}={value}" for name, value in options.items()]
    return load_settings(None, ["encoder.preset=ultrafast", *assignments], model__name=TOY)


def asked(folder: Path, **options: Any) -> BatchRequest:
    return BatchRequest((folder / "in",), (folder / "face.png",), folder / "out", **options)


def states(result: BatchResult) -> dict[str, str]:
    return {outcome.item.name: outcome.how or outcome.state for outcome in result.outcomes}


class Seen(BatchWatcher):
    """What is told of a batch, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.frames: list[tuple[int, int | None]] = []

    def began(self, slot: int, item: Item) -> None:
        self.told.append(f"{item.name} began")

    def advanced(self, slot: int, frames: int, total: int | None) -> None:
        self.frames.append((frames, total))

    def ended(self, slot: int | None, outcome: Outcome) -> None:
        self.told.append(f"{outcome.item.name} {outcome.how or outcome.state}")


# What it makes.


def test_all_is_made_but_what_cannot_be(folder):
    seen = Seen()
    result = batch(asked(folder), toy(), seen)
    assert states(result) == {"a.mp4": "made", "bad.mp4": "failed", "deep/b.mp4": "made", "deep/c.mp4": "copied"}
    assert seen.told == [
        *("a.mp4 began", "a.mp4 made", "deep/c.mp4 copied"),
        *("bad.mp4 began", "bad.mp4 failed", "deep/b.mp4 began", "deep/b.mp4 made"),
    ]
    assert seen.frames[:3] == [(12, 25), (24, 25), (25, 25)]
    file = read_mp4(folder / "out" / "deep" / "b.mp4")
    assert file.frames == 38
    assert file.flashes() == pytest.approx(file.clicks(), abs=0.04)
    assert file.metadata["title"] == "b"
    assert (folder / "out" / "a.mp4").read_bytes() == (folder / "out" / "deep" / "c.mp4").read_bytes()


def test_the_second_time_nothing_is_made(folder):
    batch(asked(folder), toy(), BatchWatcher())
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.mp4")}
    seen = Seen()
    result = batch(asked(folder), toy(fail_at=0), seen)
    del seen.told[:]
    result = batch(asked(folder), toy(), seen)
    assert not [line for line in seen.told if line.endswith("began")]
    assert states(result) == {"a.mp4": "kept", "bad.mp4": "failed", "deep/b.mp4": "kept", "deep/c.mp4": "kept"}
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.mp4")}


def test_what_failed_is_tried_again_when_asked(folder):
    batch(asked(folder), toy(), BatchWatcher())
    shutil.copy(folder / "in" / "a.wav", folder / "in" / "bad.mp3")
    seen = Seen()
    batch(asked(folder, retry_failed=True), toy(), seen)
    assert "bad.mp4 copied" in seen.told
    (folder / "in" / "worse.wav").write_text("nothing")
    batch(asked(folder), toy(), BatchWatcher())
    for retry_failed, tried in ((False, False), (True, True)):
        seen = Seen()
        batch(asked(folder, retry_failed=retry_failed), toy(), seen)
        assert ("worse.mp4 began" in seen.told) == tried


def test_overwrite_makes_all_anew(folder):
    batch(asked(folder), toy(), BatchWatcher())
    (folder / "out" / "a.mp4").write_bytes(b"")
    seen = Seen()
    batch(asked(folder, overwrite=True), toy(), seen)
    assert {"a.mp4 made", "deep/b.mp4 made", "deep/c.mp4 copied"} <= set(seen.told)
    assert read_mp4(folder / "out" / "a.mp4").frames == 25


def test_the_report_is_complete_and_says_what_went_wrong(folder):
    result = batch(asked(folder), toy(), BatchWatcher())
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["counts"] == {"made": 2, "failed": 1, "copied": 1}
    assert [item["state"] for item in report["items"]] == ["done", "failed", "done", "done"]
    made = report["items"][0]
    assert (made["frames"], made["seconds"], made["width"], made["fps"], made["seed"]) == (25, 1.0, 64, 25, 0)
    assert made["bytes"] == (folder / "out" / "a.mp4").stat().st_size
    assert "bad.mp3: " in report["items"][1]["error"]
    lines = (folder / "out" / "report.txt").read_text().splitlines()
    assert lines == table(result.outcomes)
    assert len(lines) == 5
    assert lines[2].startswith("failed")
    assert lines[2].endswith(report["items"][1]["error"])


def test_nothing_but_results_and_what_tells_of_them_is_left(folder):
    batch(asked(folder), toy(), BatchWatcher())
    left = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file()}
    assert left == {"a.mp4", "deep/b.mp4", "deep/c.mp4", "manifest.jsonl", "report.json", "report.txt", ".avatard/lock"}
    assert os.listdir(folder / "out" / ".avatard") == ["lock"]


def test_a_bug_of_the_model_at_one_file_does_not_stop_the_rest(folder):
    result = batch(asked(folder), toy(fail_at=2, how="bug"), BatchWatcher())
    assert states(result) == {"a.mp4": "failed", "bad.mp4": "failed", "deep/b.mp4": "failed", "deep/c.mp4": "failed"}
    first, _, _, copy = result.outcomes
    assert first.error == "ModelFailure: RuntimeError: the toy broke"
    assert "toy_model.py" in first.trace
    assert copy.error == f"is the same as a.mp4, which failed: {first.error}"


@pytest.mark.slow
def test_a_model_that_ends_for_good_halts_the_batch(folder, tmp_path):
    """Four seconds: a process that does not load is waited for longer each time."""
    settings = toy(deaths="[1, load, load, load]", diary=tmp_path / "lives")
    result = batch(asked(folder), settings, BatchWatcher())
    assert "starting it again failed 3 times in a row" in result.halted
    assert states(result)["a.mp4"] == "waiting"
    assert states(batch(asked(folder), toy(), BatchWatcher()))["a.mp4"] == "made"


def rename(sounds: Path, **names: str) -> None:
    """All at once: each of these sounds gets the name beside it."""
    for name in names:
        os.rename(sounds / f"{name}.wav", sounds / f"{name}.aside")
    for name, new in names.items():
        os.rename(sounds / f"{name}.aside", sounds / f"{new}.wav")


@pytest.fixture
def numbered(folder: Path) -> Path:
    """Three sounds: a.wav of one second, b.wav of two, c.wav of three; all of them made."""
    shutil.rmtree(folder / "in")
    (folder / "in").mkdir()
    for seconds, name in enumerate("abc", 1):
        write_sound(folder / "in" / f"{name}.wav", clicks_at([0.5], float(seconds)), 16_000)
    batch(asked(folder), toy(), BatchWatcher())
    return folder


def seconds_of(out: Path) -> dict[str, int]:
    return {path.stem: read_mp4(path).frames // 25 for path in out.glob("*.mp4")}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"b": "c", "a": "b"}, {"a": 1, "b": 1, "c": 2}),
        ({"a": "b", "b": "a"}, {"a": 2, "b": 1, "c": 3}),
        ({"a": "b", "b": "c", "c": "a"}, {"a": 3, "b": 1, "c": 2}),
        ({"a": "b", "b": "c", "c": "d"}, {"a": 1, "b": 1, "c": 2, "d": 3}),
    ],
    ids=["forward", "swapped", "around", "one more"],
)
def test_sounds_that_get_names_of_others_are_copied_from_their_own_videos(numbered, names, expected):
    rename(numbered / "in", **names)
    seen = Seen()
    result = batch(asked(numbered), toy(), seen)
    assert not result.count("failed")
    assert not [line for line in seen.told if line.endswith("began")]
    assert seconds_of(numbered / "out") == expected
    assert set(states(batch(asked(numbered), toy(), BatchWatcher())).values()) == {"kept"}


def test_a_sound_that_is_put_in_front_does_not_take_the_video_that_is_copied(numbered):
    rename(numbered / "in", a="b", b="c", c="d")
    write_sound(numbered / "in" / "a.wav", clicks_at([0.5], 4.0), 16_000)
    shutil.copy(numbered / "in" / "a.wav", numbered / "in" / "e.wav")
    result = batch(asked(numbered), toy(), BatchWatcher())
    assert list(states(result).values()) == ["made", "copied", "copied", "copied", "copied"]
    assert seconds_of(numbered / "out") == {"a": 4, "b": 1, "c": 2, "d": 3, "e": 4}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["before the name", "after the name"])
def test_copies_that_a_kill_cuts_short_are_gone_on_with(numbered, monkeypatch, links, before):
    rename(numbered / "in", a="b", b="c", c="a")

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    copy_file = service.batch._copy_file

    def killed(source: Path, target: Path) -> None:
        is_second = target.name == "b.mp4"
        if not (is_second and before):
            copy_file(source, target)
        if is_second:
            raise RuntimeError("the end of this process")

    with monkeypatch.context() as patch:
        patch.setattr(service.batch, "_copy_file", killed)
        if not links:
            patch.setattr(os, "link", no_links)
        with pytest.raises(RuntimeError):
            batch(asked(numbered), toy(), BatchWatcher())
    seen = Seen()
    batch(asked(numbered), toy(), seen)
    assert not [line for line in seen.told if line.endswith("began")]
    assert seconds_of(numbered / "out") == {"a": 3, "b": 1, "c": 2}
    assert os.listdir(numbered / "out" / ".avatard") == ["lock"]


# The command.


def command(folder: Path, *extra: object, model: str = TOY) -> list[str]:
    options = [folder / "in", f"--image={folder / 'face.png'}", f"--out={folder / 'out'}", f"--model={model}"]
    return [sys.executable, "-m", "service.cli", "batch", *map(str, options), "--set=encoder.preset=ultrafast", *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def call(folder: Path, *extra: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *extra, **options), capture_output=True, text=True, env=environment(), timeout=120
    )


def spawn(folder: Path, *extra: object, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(folder, *extra, **options), text=True, env=environment(), **pipes)


def test_the_exit_status_tells(folder):
    process = call(folder)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(f"avatard: bad.mp4: {folder}/in/bad.mp3: ")
    assert process.stderr.count("\n") == 1
    os.remove(folder / "in" / "bad.mp3")
    process = call(folder)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--out=face.png"], "--out face.png: cannot be a folder of results (not a directory); name another"),
        (
            ["--out=face.png", "--dry-run"],
            "--out face.png: cannot be a folder of results (not a directory); name another",
        ),
        (["--out=loop", "--dry-run"], "--out loop: cannot be a folder of results (too many levels of symbolic links)"),
        (["--out=loop"], "--out loop: cannot be a folder of results ("),
        (["--model=pockte"], "model pockte: no such model or folder; did you mean pocket?"),
        (["--image=nobody.png"], "--image nobody.png: no such file"),
        (["--pattern=*.ogg"], "there is no sound file that matches *.ogg in it"),
        (["--actors=2"], "--actors 2: is for a Ray cluster; add --ray ADDRESS or --ray local"),
        (["--set=model.options.delai=1"], "model.options.delai: unknown setting of the toy"),
    ],
)
def test_misuse_is_one_line(folder, extra, message):
    os.symlink("loop", folder / "loop")
    process = subprocess.run(
        command(folder, *extra), capture_output=True, text=True, env=environment(), cwd=folder, timeout=60
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1, process.stderr
    assert message in process.stderr


def test_json_is_a_line_for_each_result_and_one_for_all(folder):
    process = call(folder, "--json")
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.stderr == ""
    assert {(line["name"], line["state"]) for line in lines[:-1]} == {
        *(("a.mp4", "done"), ("deep/b.mp4", "done"), ("deep/c.mp4", "done"), ("bad.mp4", "failed"))
    }
    assert lines[-1]["counts"] == {"made": 2, "failed": 1, "copied": 1}


def test_a_dry_run_tells_and_leaves_nothing(folder):
    process = call(folder, "--dry-run")
    assert [line.split()[:2] for line in process.stdout.splitlines()] == [
        ["make", "a.mp4"],
        ["make", "bad.mp4"],
        ["make", "deep/b.mp4"],
        ["copy", "deep/c.mp4"],
    ]
    assert not (folder / "out").exists()
    (line, *_) = call(folder, "--dry-run", "--json").stdout.splitlines()
    assert json.loads(line)["do"] == "make"


def test_a_terminal_gets_bars_and_a_last_line(folder):
    main, side = pty.openpty()
    process = subprocess.Popen(command(folder, "--set=model.options.step_s=0.1"), stderr=side, env=environment())
    os.close(side)
    shown = b""
    while True:
        try:
            shown += os.read(main, 65_536)
        except OSError:  # the other side has closed
            break
    os.close(main)
    assert process.wait() == 1
    for text in (b"deep/b.mp4", b"/38", b"fps", b"1 failed", b"2 made, 1 failed, 1 copied, in "):
        assert text in shown, text


# Ended on the way.


@pytest.fixture
def long(folder: Path) -> Path:
    """One sound of half a minute and one short one, and a model that takes its time."""
    shutil.rmtree(folder / "in")
    (folder / "in").mkdir()
    write_sound(folder / "in" / "a.wav", clicks_at([1.0, 23.0], 30.0), 16_000)
    write_sound(folder / "in" / "b.wav", clicks_at([0.5], 1.0), 16_000)
    return folder


SLOW = ("--set=model.options.step_s=0.02", "--set=jobs.segment_s=2")


def whole(folder: Path) -> dict[str, bytes]:
    """The results of a batch that nothing happens to."""
    request = replace(asked(folder), out=folder / "whole")
    batch(
        request, load_settings(None, ["encoder.preset=ultrafast", "jobs.segment_s=2"], model__name=TOY), BatchWatcher()
    )
    return results(folder / "whole")


def results(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.mp4")}


def checkpoints(folder: Path) -> list[Path]:
    return list((folder / "out" / ".avatard" / "work").glob("*/checkpoint.json"))


def test_killed_again_and_again_it_ends_with_the_same_files(long):
    for _ in range(2):
        before = [path.read_text() for path in checkpoints(long)]
        process = spawn(long, *SLOW)
        until(lambda before=before: [path.read_text() for path in checkpoints(long)] not in ([], before), 30)
        process.kill()
        process.communicate()
        assert not (long / "out" / "a.mp4").exists()
    process = call(long, *SLOW, "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[0])["resumed_from"] >= 2 * 48
    assert results(long / "out") == whole(long)


def test_ctrl_c_ends_it_so_that_it_can_be_gone_on_with(long):
    process = spawn(long, *SLOW)
    until(lambda: checkpoints(long), 30)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (130, "")
    assert errors == "avatard: stopped; 2 of 2 wait, the same command goes on\n"
    assert json.loads((long / "out" / "report.json").read_text())["counts"] == {"waiting": 2}
    assert call(long, *SLOW).returncode == 0
    assert results(long / "out") == whole(long)


def test_two_runs_over_one_folder_do_each_other_no_harm(long):
    first = spawn(long, *SLOW)
    until(lambda: checkpoints(long), 30)
    second = call(long, *SLOW)
    assert second.returncode == 2
    assert second.stderr == (
        f"avatard: --out {long}/out: another avatard batch is at work there; let it end, or name another folder\n"
    )
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert results(long / "out") == whole(long)


def test_a_full_disk_halts_it_and_loses_nothing(long):
    limited = ["sh", "-c", 'ulimit -f 1600; exec "$@"', "sh", *command(long, *SLOW, "--set=encoder.crf=0")]
    process = subprocess.run(limited, capture_output=True, text=True, env=environment(), timeout=60)
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1, process.stderr
    assert "file too large; make room and start it again: it goes on from what was saved; 2 of 2 wait" in process.stderr
    assert checkpoints(long)
    process = call(long, *SLOW, "--set=encoder.crf=0", "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[0])["resumed_from"] > 0


# On a cluster.


@pytest.mark.slow
def test_a_cluster_gives_the_same_results_and_errors(folder):
    """About 15 s, most of which is Ray itself."""
    local = batch(asked(folder), toy(), BatchWatcher())
    there = results(folder / "out")
    shutil.rmtree(folder / "out")
    process = call(folder, "--ray=local", "--actors=2", "--json")
    assert process.returncode == 1, process.stderr
    assert results(folder / "out") == there
    report = json.loads((folder / "out" / "report.json").read_text())
    told = [(item["name"], item["state"], item.get("error"), item.get("sha256")) for item in report["items"]]
    expected = [outcome.told() for outcome in local.outcomes]
    assert told == [(item["name"], item["state"], item.get("error"), item.get("sha256")) for item in expected]


@pytest.mark.slow
def test_a_cluster_goes_on_after_ctrl_c(long):
    """About 30 s."""
    process = spawn(long, *SLOW, "--ray=local")
    until(lambda: checkpoints(long), 60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors == "avatard: stopped; 2 of 2 wait, the same command goes on\n"
    assert call(long, *SLOW, "--ray=local").returncode == 0
    assert results(long / "out") == whole(long)


@pytest.mark.slow
def test_a_cluster_goes_on_when_an_actor_is_lost(long):
    """About 20 s."""
    process = spawn(long, *SLOW, "--ray=local", "--json")
    until(lambda: checkpoints(long), 60)
    (actor,) = [child for child in psutil.Process(process.pid).children(recursive=True) if "Actor" in child.name()]
    actor.kill()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[0])["resumed_from"] > 0
    assert results(long / "out") == whole(long)


@pytest.mark.slow
def test_a_cluster_that_is_not_there_and_a_model_that_cannot_be_loaded_are_one_line(folder):
    """About 15 s."""
    for extra, message in (
        (["--ray=127.0.0.1:1"], "--ray 127.0.0.1:1: no cluster answers there"),
        (["--ray=local", "--set=model.options.delai=1"], "model.options.delai: unknown setting of the toy"),
    ):
        process = call(folder, *extra)
        assert process.returncode == 2, process.stderr
        assert message in process.stderr
        assert process.stderr.count("\n") == 1, process.stderr


def test_without_ray_it_is_one_line(folder, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')")
    process = subprocess.run(
        command(folder, "--ray=local"),
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (
        2,
        "avatard: --ray: Ray is not installed; pip install 'avatard[ray]'\n",
    )
    assert not (folder / "out").exists()


# The embedded model, for as long as it takes.

MINUTES = float(os.environ.get("AVATARD_KILL_MINUTES", "2"))


@pytest.mark.slow
def test_a_long_file_of_the_embedded_model_killed_three_times_is_the_same(tmp_path):
    """Two minutes of sound take about five on one core; AVATARD_KILL_MINUTES=60 makes it an hour of sound."""
    import soundfile

    speech, rate = soundfile.read(ROOT / "examples" / "welcome.wav")
    (tmp_path / "in").mkdir()
    sound = np.resize(speech, round(MINUTES * 60 * rate))
    soundfile.write(tmp_path / "in" / "long.wav", sound, rate)
    shutil.copy(ROOT / "examples" / "presenter.png", tmp_path / "face.png")
    times = random.Random(0)

    def frames() -> int:
        return max((json.loads(path.read_text())["frames"] for path in checkpoints(tmp_path)), default=0)

    total = round(MINUTES * 60 * 25)
    for kill_at in sorted(times.randrange(0, total - 600) for _ in range(3)):
        process = spawn(tmp_path, model="pocket")
        until(lambda kill_at=kill_at: frames() > kill_at, 3600 * max(1, MINUTES / 10))
        time.sleep(times.uniform(0, 3))
        process.kill()
        process.communicate()
        assert not (tmp_path / "out" / "long.mp4").exists()
    process = subprocess.run(
        command(tmp_path, "--json", model="pocket"), capture_output=True, text=True, env=environment()
    )
    assert process.returncode == 0, process.stderr
    resumed = json.loads(process.stdout.splitlines()[0])
    assert resumed["resumed_from"] > 0
    made = (tmp_path / "out" / "long.mp4").read_bytes()
    shutil.rmtree(tmp_path / "out")
    process = subprocess.run(command(tmp_path, model="pocket"), capture_output=True, text=True, env=environment())
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "long.mp4").read_bytes() == made
    assert read_mp4(tmp_path / "out" / "long.mp4").frames == total
