"""`avatard run` as a user runs it: a process, its exit status, its one line, and the file it leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mp4 import boxes, read_mp4, write_sound
from PIL import Image

from service import VERSION


def one_line(process: subprocess.CompletedProcess[str]) -> str:
    """What a user error is: exit status 2, one line on stderr, nothing on stdout."""
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("avatard: ")
    return process.stderr.removeprefix("avatard: ").rstrip()


def wait_for_part(place, minimum_bytes: int = 20_000) -> Path:
    """The part of a run under way, once it holds some fragments."""
    part, deadline = place.folder / "out.part.mp4", time.monotonic() + 20
    while not part.exists() or part.stat().st_size < minimum_bytes:
        assert time.monotonic() < deadline, "no part has grown"
        time.sleep(0.02)
    return part


def gone(pid: int) -> bool:
    """Whether a process has ended, within a second or so."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_picture_and_a_sound_become_a_file_that_plays(place):
    process = place.run()
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    file = read_mp4(place.folder / "out.mp4")
    assert file.frames == 75
    assert file.flashes() == pytest.approx(file.clicks(), abs=0.04)
    assert abs(file.duration_s - 3.0) <= 0.04
    assert boxes(place.folder / "out.mp4").index("moov") == 1
    assert place.files() == {"out.mp4"}


def test_the_file_says_what_it_is(place):
    place.run(to="My talk.mp4")
    metadata = read_mp4(place.folder / "My talk.mp4").metadata
    assert metadata["title"] == "My talk"
    assert metadata["encoder"] == f"avatard {VERSION}"
    assert metadata["comment"].startswith("AI-generated: a model (toy_model.py:load)")


def test_a_name_that_is_no_utf_8_is_told_as_far_as_it_can_be(place):
    name = os.fsdecode(b"bad\xff.mp4")
    assert place.run(to=name).returncode == 0
    assert read_mp4(place.folder / name).metadata["title"] == "bad\N{REPLACEMENT CHARACTER}"


@pytest.mark.needs("ffprobe")
def test_another_program_reads_the_file_and_its_statement(place):
    place.run()
    probe = subprocess.run(
        ["ffprobe", "-v", "error", "-of", "json", "-show_format", "-show_streams", place.folder / "out.mp4"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(probe.stdout)
    assert "AI-generated" in found["format"]["tags"]["comment"]
    video, audio = found["streams"]
    assert (video["codec_name"], video["pix_fmt"], video["color_space"]) == ("h264", "yuv420p", "bt709")
    assert (video["nb_frames"], video["r_frame_rate"], video["start_time"]) == ("75", "25/1", "0.000000")
    assert (audio["codec_name"], audio["sample_rate"]) == ("aac", "48000")


def test_json_is_one_line_of_results(place):
    process = place.run("--json", seed=7, size="128*64")
    result = json.loads(process.stdout)
    assert process.stdout.count("\n") == 1
    assert (result["frames"], result["seconds"], result["seed"]) == (75, 3.0, 7)
    assert (result["width"], result["height"]) == (128, 64)
    assert result["complete"]
    assert [Path(path).name for path in result["outputs"]] == ["out.mp4"]
    assert 0 < result["first_frame_s"] < result["wall_s"]
    assert result["times_real_time"] == pytest.approx(3.0 / result["wall_s"], rel=0.01)


@pytest.mark.parametrize("live", [False, True], ids=["file", "live"])
@pytest.mark.parametrize("end", ["reader gone", "disk full"])
def test_results_that_nobody_can_have_stop_nothing(place, live, end):
    (place.folder / "speech.raw").write_bytes(bytes(32_000))
    voice = ["--audio", place.folder / "speech.raw", "--format", "s16le:16000:1"] if live else []
    reader, writer = os.pipe() if end == "reader gone" else (None, os.open("/dev/full", os.O_WRONLY))
    if reader is not None:
        os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        process = subprocess.run(
            place.run_command("--json", *voice),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=place.folder,
            env=place.environment(),
            timeout=60,
        )
    why = "broken pipe" if end == "reader gone" else "no space left on device"
    said = f"avatard: warning: stdout: results cannot be printed any more ({why}); the work goes on\n"
    assert (process.returncode, process.stderr) == (0, said)
    assert read_mp4(place.folder / "out.mp4").frames >= 25


def test_the_same_seed_gives_the_same_file_and_another_does_not(place):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert place.run(to=f"{name}.mp4", seed=seed).returncode == 0
    a, b, c = (read_mp4(place.folder / f"{name}.mp4").brightness for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_silence_speaks_with_a_warning(place):
    write_sound(place.audio, np.zeros(16_000), 16_000)
    process = place.run()
    assert process.returncode == 0
    assert process.stderr == f"avatard: warning: {place.audio}: all silence\n"
    assert place.run("--quiet", "--overwrite").stderr == ""


def test_every_target_gets_the_video(place):
    process = place.run("--json", "--to", place.folder / "second.mov", "--to", "null://")
    assert [Path(path).name for path in json.loads(process.stdout)["outputs"]] == ["out.mp4", "second.mov"]
    assert read_mp4(place.folder / "second.mov").frames == read_mp4(place.folder / "out.mp4").frames == 75


def test_of_targets_one_of_which_cannot_be_written_none_is_begun(place):
    process = place.run("--to", place.folder / "nowhere" / "second.mp4")
    assert process.returncode == 2
    assert "there is no folder" in process.stderr
    assert place.files() == set()


def test_null_measures_and_writes_nothing(place):
    process = place.run("--json", to="null://")
    assert json.loads(process.stdout)["outputs"] == []
    assert place.files() == set()


def test_a_terminal_gets_a_bar_and_a_last_line(place):
    main, side = pty.openpty()
    process = subprocess.Popen(place.run_command(), stderr=side, cwd=place.folder, env=place.environment())
    os.close(side)
    shown = b""
    while True:
        try:
            data = os.read(main, 65_536)
        except OSError:  # the other side has closed
            break
        shown += data
    os.close(main)
    assert process.wait() == 0
    assert b"loading the model" in shown
    assert b"/75" in shown
    assert b"x real time" in shown
    assert b"out.mp4: 3.00 s of video in" in shown


BAD_SOUNDS = {
    "missing": (None, "no such file"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"I am not a sound.\n" * 100, "is not a sound"),
    "no-samples": (b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\0\0\0\0", "empty"),
}


@pytest.mark.parametrize("kind", BAD_SOUNDS)
def test_a_sound_that_cannot_be_used_is_one_line(place, kind):
    content, message = BAD_SOUNDS[kind]
    place.audio.unlink()
    if content is not None:
        place.audio.write_bytes(content)
    line = one_line(place.run())
    assert "speech.wav" in line
    assert re.search(message, line), line
    assert place.files() == set()


def test_a_sound_over_the_limit_is_one_line(place):
    line = one_line(place.run("--set", "limits.audio_hours=0.0005"))
    assert "the limit is 1.8 s" in line
    assert place.files() == set()


def test_a_sound_cut_off_in_the_middle_is_used_with_a_warning(place):
    data = place.audio.read_bytes()
    place.audio.write_bytes(data[: len(data) // 2])
    process = place.run()
    assert process.returncode == 0
    assert "cut off" in process.stderr
    assert 35 <= read_mp4(place.folder / "out.mp4").frames <= 39


def picture_of(kind: str, path: Path) -> None:
    match kind:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"not a picture\n" * 50)
        case "1x1":
            Image.new("RGB", (1, 1)).save(path)
        case "bomb":
            Image.new("1", (12_000, 12_000)).save(path)
        case "cut-off":
            Image.effect_noise((500, 500), 50).save(path)
            path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "1x1", "bomb", "cut-off"])
def test_a_picture_that_cannot_be_used_is_one_line(place, kind):
    picture_of(kind, place.image)
    line = one_line(place.run())
    assert "presenter.png" in line
    assert place.files() == set()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("folder", "is a folder"),
        ("nowhere/out.mp4", "there is no folder nowhere"),
        ("out.xyz", "file type '.xyz' is not one we write"),
        ("rtsp://server/live/secret", "rtsp://: no such output"),
    ],
)
def test_a_target_that_cannot_be_written_is_one_line(place, target, message):
    (place.folder / "folder").mkdir()
    line = one_line(place.run(to=target))
    assert message in line
    assert "secret" not in line
    assert place.files() == {"folder"}


def test_a_file_that_exists_is_left_alone(place):
    (place.folder / "out.mp4").write_bytes(b"mine")
    assert "exists already" in one_line(place.run())
    assert (place.folder / "out.mp4").read_bytes() == b"mine"
    assert place.run("--overwrite").returncode == 0
    assert read_mp4(place.folder / "out.mp4").frames == 75


@pytest.mark.parametrize("kind", ["sound", "picture", "link", "live", "stdin", "hls"])
def test_what_a_video_is_made_from_is_never_replaced_by_it(place, kind):
    own = place.folder / ("mine-7.m4s" if kind == "hls" else "mine.mp4")
    own.write_bytes((place.image if kind == "picture" else place.audio).read_bytes())
    (place.folder / "link.mp4").symlink_to(own)
    before = own.read_bytes()
    live = ["--format", "s16le:16000:1"] if kind in ("live", "stdin") else []
    options = {"image": own} if kind == "picture" else {"audio": "-" if kind == "stdin" else own}
    target = {"link": "link.mp4", "hls": "mine.m3u8"}.get(kind, "mine.mp4")
    with own.open("rb") as stdin:
        command = place.run_command("--overwrite", *live, to=target, **options)
        line = one_line(place.call(command, stdin=stdin))
    what = "picture itself" if kind == "picture" else "sound itself"
    assert line.startswith(f"{target}: would replace the {what} (--")
    assert own.read_bytes() == before
    assert place.files() == {own.name, "link.mp4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "encoder.cfr=3"], "--set encoder.cfr=3: unknown setting; did you mean encoder.crf?"),
        (["--set", "encoder.crf=99"], "--set encoder.crf=99: encoder.crf: input should be less than or equal to 51"),
        (["--set", "model.options.delai=1"], "model.options.delai: unknown setting of the toy"),
        (["--size", "big"], "--size big: not width x height in pixels, such as 704x384"),
        (["--seed", "x"], "Invalid value for '--seed'"),
        (["--imge", "x"], "No such option: --imge"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--model", "pockte"], "model pockte: no such model or folder; did you mean pocket?"),
        (["--model", "live-avatar-14b", "--set", "paths.models=/nowhere"], "avatard fetch live-avatar-14b"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(place, arguments, message):
    assert message in one_line(place.call([*place.run_command(), *arguments]))
    assert place.files() == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(size, steps, options): ...", "there is no function load in own.py"),
        ("def load(size, steps, options)\n", "SyntaxError: expected ':' (own.py, line 1)"),
        (
            "import numpy\nimport nowhere_to_be_found",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found' (line 2",
        ),
        ("def load(size): ...", "TypeError: load() got an unexpected keyword argument 'steps'"),
        ("def load(size, steps, options):\n    return options['x']", "KeyError: 'x' (line 2 of own.py)"),
        ("def load(size, steps, options): ...", "load gave a NoneType, which is no model: no spec in it"),
    ],
)
def test_a_model_of_ones_own_with_a_mistake_is_one_line(place, text, message):
    (place.folder / "own.py").write_text(text)
    line = one_line(place.run(model="own.py:load"))
    assert line.startswith(f"model own.py:load: {message}")


def test_a_size_that_cannot_be_encoded_is_one_line(place):
    assert "65x65 cannot be encoded: sides must be even, such as 66x66" in one_line(place.run(size="65x65"))


def test_a_model_that_gives_up_in_the_middle_is_one_line_and_names_the_part(place):
    line = one_line(place.run("--set", "model.options={fail_at: 3, how: user}"))
    said = "toy: this block is not to my taste; give me another"
    assert line == f"{said}; the video up to there is in {place.folder}/out.part.mp4"
    assert place.files() == {"out.part.mp4"}
    assert read_mp4(place.folder / "out.part.mp4").frames == 36


def test_a_model_process_that_is_killed_is_one_line_and_names_the_part(place):
    line = one_line(place.run("--set", "model.options={fail_at: 2, how: kill}"))
    assert "its process was killed" in line
    assert "the video up to there is in" in line
    assert read_mp4(place.folder / "out.part.mp4").frames == 24


def test_a_bug_in_a_model_keeps_its_traceback_and_the_part(place):
    process = place.run("--set", "model.options={fail_at: 2, how: bug}")
    assert process.returncode == 1
    assert "RuntimeError: the toy broke" in process.stderr
    assert "toy_model.py" in process.stderr
    assert "the video up to there is in" in process.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_a_playable_file_and_says_so(place, long_speech, number):
    long_speech(120)
    process = place.spawn("--set", "model.options.step_s=0.05")
    wait_for_part(place)
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert output == ""
    assert errors.count("\n") == 1
    file = read_mp4(place.folder / "out.part.mp4")
    assert f"stopped after {file.frames / 25:.2f} s of video" in errors
    assert f"{place.folder}/out.part.mp4 plays up to there" in errors
    assert abs(file.sound_s - file.frames / 25) < 0.04
    assert place.files() == {"out.part.mp4"}


def test_ctrl_c_reaches_the_terminals_whole_group_and_the_model_is_let_end_its_part(place, long_speech):
    long_speech(120)
    process = subprocess.Popen(
        place.run_command("--set", "model.options.step_s=0.05"),
        stderr=subprocess.PIPE,
        text=True,
        cwd=place.folder,
        env=place.environment(),
        start_new_session=True,
    )
    wait_for_part(place)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert read_mp4(place.folder / "out.part.mp4").frames > 0


def test_ctrl_c_before_the_first_frame_leaves_nothing(place):
    process = place.spawn("--set", "model.options={fail_at: 0, how: hang}")
    deadline = time.monotonic() + 20
    while not (place.folder / "out.part.mp4").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors == "avatard: stopped before the first frame; nothing was written\n"
    assert place.files() == set()


def test_a_second_ctrl_c_ends_at_once_with_the_part_playable(place, long_speech):
    long_speech(120)
    process = place.spawn("--set", "model.options.step_s=0.02")
    part = wait_for_part(place, 60_000)
    (engine,) = children(process.pid)
    os.kill(engine, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode in (130, 143)
    assert read_mp4(part, cut_off=True).frames > 25
    assert gone(engine)


def test_kill_9_leaves_a_playable_part_and_no_process(place, long_speech):
    long_speech(120)
    process = place.spawn("--set", "model.options.step_s=0.02")
    part = wait_for_part(place, 60_000)
    (engine,) = children(process.pid)
    process.kill()
    process.communicate(timeout=10)
    file = read_mp4(part, cut_off=True)
    assert file.frames > 25
    assert file.times == pytest.approx([i / 25 for i in range(file.frames)])
    assert place.files() == {"out.part.mp4"}
    assert gone(engine)


def test_a_disk_full_half_way_is_one_line_and_names_the_part(place, long_speech):
    long_speech(60)
    command = ["sh", "-c", 'ulimit -f 1600; exec "$@"', "sh", *place.run_command("--set=encoder.crf=0")]
    line = one_line(place.call(command))
    assert line.startswith(f"{place.folder}/out.mp4: file too large; the video up to there is in ")
    assert place.files() == {"out.part.mp4"}
    assert read_mp4(place.folder / "out.part.mp4", cut_off=True).frames > 25


@pytest.mark.parametrize("live", [False, True], ids=["file", "live"])
def test_an_output_that_is_lost_while_another_goes_on_is_told_by_the_status(place, live):
    (place.folder / "speech.raw").write_bytes(bytes(64_000))
    voice = ["--audio", place.folder / "speech.raw", "--format", "s16le:16000:1"] if live else []
    words = ["--set=model.options.step_s=0.1", "--to", place.folder / "second.mp4"]
    process = place.spawn("--json", *words, *voice)
    wait_for_part(place, 0)
    (place.folder / "out.mp4").write_bytes(b"somebody else's")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    result = json.loads(out.splitlines()[-1])
    assert (result["lost"], result["complete"]) == ([str(place.folder / "out.mp4")], False)
    assert [Path(path).name for path in result["outputs"]] == ["out.part.mp4", "second.mp4"]
    assert errors.startswith(f"avatard: {place.folder}/out.mp4: exists already; ")
    assert errors.count("\n") == 1


def test_a_part_of_a_killed_run_is_not_overwritten_by_the_next(place):
    (place.folder / "out.part.mp4").write_bytes(b"what the last run left")
    assert place.run().returncode == 0
    assert (place.folder / "out.part.mp4").read_bytes() == b"what the last run left"
    assert place.files() == {"out.mp4", "out.part.mp4"}


def test_a_folder_called_audio_where_the_user_stands_does_no_harm(place):
    (place.folder / "audio").mkdir()
    (place.folder / "audio" / "__init__.py").write_text("raise SystemExit('the wrong audio')")
    process = subprocess.run(
        [Path(sys.executable).parent / "avatard", *place.run_command()[3:]],
        capture_output=True,
        text=True,
        cwd=place.folder,
    )
    assert (process.returncode, process.stderr) == (0, "")
