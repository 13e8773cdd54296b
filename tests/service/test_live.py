"""`avatard run`, live, as a command: voices into it, outputs out of it, and every way in which it can be ended.

The slow ones, with faults of the other side and figures, are in test_live_faults.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import garbage
import numpy as np
import procs
import psutil
import pytest
import skew
from live import ENGINE, PUBLISHER, Live
from mp4 import Mp4, read_mp4
from proxy import Proxy, free_port
from rtmp import RtmpServer
from speech import Speaker, Speech
from waiting import until

END_S = 10.0
"""An end that was asked for takes no longer, whatever the state."""

QUICK = "--set=encoder.preset=ultrafast"


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[RtmpServer]:
    with RtmpServer(tmp_path / "server") as server:
        yield server


def whole(path: Path, cut_off: bool = False) -> Mp4:
    """The file read back: every frame is there, at its time, with its sound."""
    file = read_mp4(path, cut_off)
    assert np.abs(np.array(file.times) - np.arange(file.frames) / 25).max() < 0.002, "a gap in the picture"
    assert file.brightness.min() > 20, "a black picture"
    if not cut_off:
        assert file.sound_s == pytest.approx(file.frames / 25, abs=0.05)
    return file


def family(live: Live) -> list[psutil.Process]:
    """The command and all that it has started, to be asked later whether they are gone."""
    root = psutil.Process(live.pid)
    return [root, *root.children(recursive=True)]


def gone(processes: list[psutil.Process], limit_s: float = 5.0) -> None:
    """Raises: TimeoutError: one of them lives on."""

    def alive() -> list[psutil.Process]:
        found = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    until(lambda: not alive(), limit_s, f"the end of all of {processes}")


# On air


@pytest.mark.needs("nginx")
def test_a_voice_is_seen_and_heard_at_one_moment_in_a_file_and_on_a_server(tmp_path, nginx):
    with Live(tmp_path / "live", ["show.mp4", nginx.url()], QUICK) as live:
        live.wait_for("on air")
        until(lambda: nginx.recordings(), 10, "the stream")
        live.speak(Speech(first_click_s=0.3, click_every_s=0.6), 3.0).join()
        assert live.end() == 0
        ended = live.of("ended")[-1]
    file = whole(tmp_path / "live" / "show.mp4")
    assert ended["frames"] == file.frames
    assert ended["outputs"] == ["show.mp4"]
    (recording,) = nginx.recordings()
    for path in (tmp_path / "live" / "show.mp4", recording):
        reading = skew.read(path)
        assert reading.skew.pairs >= 3
        assert reading.skew.max <= 80
        assert reading.black == reading.broken == 0
    changes = [event.name for event in live.events if event.name in ("on air", "speaking", "idle")]
    assert changes[:2] == ["on air", "speaking"]
    assert not live.errors


def test_without_a_voice_it_is_idle_and_never_black(tmp_path):
    with Live(tmp_path, ["show.mp4"], QUICK, environment=garbage.watched(tmp_path / "garbage")) as live:
        live.wait_for("on air")
        time.sleep(2)
        assert live.stop() == 0
    assert garbage.share_walked(tmp_path / "garbage", live.pid) < 0.2, "a collection may hold up the loop"
    file = whole(tmp_path / "show.mp4")
    assert file.frames >= 40
    assert np.abs(file.sound).max() < 1e-3
    assert not live.of("speaking")


def test_an_interruption_by_signal_is_told_and_silences_at_once(tmp_path):
    with Live(tmp_path, ["show.mp4"], QUICK) as live:
        live.wait_for("on air")
        with_all = live.speak(Speech(click_every_s=None, voice=[(0, 4)]), 4.0, speed=None)
        with_all.join()
        began = live.wait_for("speaking")
        time.sleep(1.2)
        live.send(signal.SIGUSR1)
        told = live.wait_for("interrupted")
        assert live.end() == 0
    file = whole(tmp_path / "show.mp4")
    heard = np.flatnonzero(np.abs(file.sound).max(1) > 0.02) / 48_000
    assert told["played_s"] == pytest.approx(told.at_s - began.at_s, abs=0.5)
    assert told["played_s"] + told["dropped_s"] == pytest.approx(4.0, abs=0.05)
    assert heard[-1] - heard[0] <= told["played_s"] + 0.1


def test_hls_parts_a_file_and_a_measure_at_once_all_have_all_of_it(tmp_path):
    (tmp_path / "hls").mkdir()
    targets = ["show.mp4", "event:hls/all.m3u8", "hls/last.m3u8", "segment:2:part.mp4", "null://"]
    with Live(tmp_path, targets, QUICK) as live:
        live.wait_for("on air")
        live.speak(Speech(), 3.0).join()
        assert live.end() == 0
    frames = live.of("ended")[-1]["frames"]
    assert whole(tmp_path / "show.mp4").frames == frames
    parts = sorted(tmp_path.glob("part-*.mp4"))
    assert len(parts) >= 2
    assert sum(read_mp4(part).frames for part in parts) == frames
    for playlist in ("all.m3u8", "last.m3u8"):
        reading = skew.read(tmp_path / "hls" / playlist)
        assert reading.frames == frames
        assert reading.skew.max <= 80


def test_writers_of_a_fifo_come_and_go(tmp_path):
    fifo = tmp_path / "voice"
    os.mkfifo(fifo)
    with Live(tmp_path, ["show.mp4"], QUICK, "--stay", audio=str(fifo)) as live:
        live.wait_for("on air")
        idle = None
        for _ in range(2):
            with Speaker(os.open(fifo, os.O_WRONLY), Speech(first_click_s=0.2, click_every_s=5), 0.8) as speaker:
                speaking = live.wait_for("speaking", since=idle)
                speaker.join()
            idle = live.wait_for("idle", since=speaking)
        assert live.stop() == 0
    file = whole(tmp_path / "show.mp4")
    assert len(file.clicks()) == len(file.flashes()) == 2


@pytest.mark.needs("nginx", "ffmpeg")
def test_a_voice_from_an_address_may_die_and_come_back(tmp_path, nginx):
    """The voice is itself a stream, as of an encoder in a studio; the server that has it is killed meanwhile."""

    def studio() -> subprocess.Popen[bytes]:
        sound = ["-re", "-f", "lavfi", "-i", "sine=300:r=48000", "-c:a", "aac"]
        # Its server waits for a picture before it passes anything on.
        picture = ["-re", "-f", "lavfi", "-i", "color=gray:s=64x64:r=10", "-c:v", "libx264", "-g", "5"]
        words = ["ffmpeg", "-loglevel", "error", *sound[:5], *picture[:5], *sound[5:], *picture[5:]]
        process = subprocess.Popen([*words, "-f", "flv", nginx.url("voice")], stdin=subprocess.DEVNULL)
        until(lambda: "voice" in nginx.stat(), 10, "the studio")
        return process

    voice = studio()
    try:
        with Live(tmp_path / "live", ["show.mp4"], QUICK, audio=nginx.url("voice"), format=None) as live:
            live.wait_for("on air")
            speaking = live.wait_for("speaking")
            nginx.kill()
            voice.wait(10)
            idle = live.wait_for("idle", since=speaking)
            nginx.start()
            voice = studio()
            live.wait_for("speaking", since=idle)
            assert live.stop() == 0
        whole(tmp_path / "live" / "show.mp4")
        assert "voice" not in live.errors
    finally:
        voice.kill()
        voice.wait()


# Refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"format": "s16le:fast:1"}, "PCM format 's16le:fast:1': not encoding:rate:channels"),
        ({"format": "s17le:16000:1"}, "s17le"),
        ({"to": "ftp://host/key"}, "ftp://: no such output"),
        ({"to": "show.avi"}, "show.avi: file type '.avi' is not one we write"),
        ({"audio": "gopher://host/voice"}, "gopher://"),
        ({"audio": "."}, ".: is a folder"),
        ({"audio": "fd:9"}, "fd:9: is not an open file descriptor"),
        ({"audio": "/proc/self/mem"}, "/proc/self/mem: cannot be read (input/output error)"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(tmp_path, words, told):
    to = [words.pop("to", "show.mp4")]
    with Live(tmp_path, to, **words) as live:
        assert live.end(20) == 2
    assert told in live.errors
    assert live.errors.count("\n") == 1
    assert not list(tmp_path.glob("*.mp4"))


def test_a_voice_that_ends_without_a_sound_is_one_line_and_status_2(tmp_path):
    with Live(tmp_path, ["show.mp4"]) as live:
        live.speak(Speech(), 0.0).join()
        assert live.end(20) == 2
    assert live.errors.startswith("avatard: -: ended without any sound")
    assert live.errors.count("\n") == 1


@pytest.mark.parametrize("format", [["--format=s16le:16000:1"], []], ids=["bare", "FFmpeg"])
@pytest.mark.parametrize(
    ("given", "audio", "told"),
    [
        ("<&-", "-", "-: is closed"),
        ("3<.", "fd:3", "fd:3: cannot be read (is a directory)"),
        ("</dev/null", "-", "-: "),
    ],
)
def test_a_descriptor_that_brings_no_sound_is_one_line_and_status_2(place, given, audio, told, format):
    command = ["sh", "-c", f'exec "$@" {given}', "sh", *place.run_command(*format, audio=audio)]
    process = place.call(command)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"avatard: {told}")
    assert process.stderr.count("\n") == 1
    assert not place.files()


# Ends


def ended_well(live: Live, signal_s: float) -> None:
    """It has ended with status 0, soon, and said as its last word what there is."""
    assert time.monotonic() - signal_s < END_S
    assert live.events[-1].name == "ended"
    assert "Traceback" not in live.errors


def test_ended_while_the_model_loads_or_warms_up_it_leaves_nothing(tmp_path):
    (tmp_path / "slow.py").write_text("import time\n\ndef load(size, steps, options):\n    time.sleep(600)\n")
    slow_to_load = Live(tmp_path, ["show.mp4"], model=f"{tmp_path / 'slow.py'}:load")
    slow_to_step = Live(tmp_path, ["show.mp4"], "--set=model.options={step_s: 4}")
    with slow_to_load as loading, slow_to_step as warming:
        loading.engine()
        warming.wait_for("engine", where=lambda event: event["state"] == "ready")
        time.sleep(0.5)
        for live in (loading, warming):
            everyone = family(live)
            began = time.monotonic()
            assert live.stop(END_S) == 0
            ended_well(live, began)
            assert live.events[-1]["frames"] == 0
            assert live.events[-1]["outputs"] == []
            gone(everyone)
    assert not list(tmp_path.glob("*.mp4"))


def test_ended_before_its_server_is_there_it_keeps_the_file(tmp_path):
    with Proxy(free_port()) as line:
        line.tarpit()
        absent, silent = f"rtmp://127.0.0.1:{free_port()}/live/key", f"rtmp://127.0.0.1:{line.port}/live/key"
        with Live(tmp_path, ["show.mp4", absent, silent], QUICK) as live:
            live.wait_for("on air")
            time.sleep(1)
            everyone = family(live)
            began = time.monotonic()
            assert live.stop(END_S) == 0
            ended_well(live, began)
            gone(everyone)
    assert whole(tmp_path / "show.mp4").frames == live.of("ended")[-1]["frames"]


def test_ended_while_it_tries_a_silent_server_for_the_first_time_it_goes_at_once(tmp_path):
    with Proxy(free_port()) as line:
        line.tarpit()
        with Live(tmp_path, ["show.mp4", f"rtmp://127.0.0.1:{line.port}/live/key"], QUICK) as live:
            until(lambda: line.tarpitted, 10, "the first try")
            everyone = family(live)
            began = time.monotonic()
            assert live.stop(END_S) == 0
            ended_well(live, began)
            gone(everyone)


@pytest.mark.needs("nginx")
@pytest.mark.parametrize("fault", ["none", "killed", "frozen"])
def test_ended_on_air_it_finishes_its_file_whatever_has_happened_to_its_server(tmp_path, nginx, fault):
    with Live(tmp_path / "live", ["show.mp4", nginx.url()], QUICK) as live:
        live.wait_for("on air")
        until(lambda: nginx.recordings(), 10, "the stream")
        live.speak(Speech())
        live.wait_for("speaking")
        time.sleep(1.0)
        if fault == "killed":
            nginx.kill()
            time.sleep(0.3)
        elif fault == "frozen":
            nginx.freeze()
        everyone = family(live)
        began = time.monotonic()
        assert live.stop(END_S) == 0
        ended_well(live, began)
        gone(everyone)
    assert whole(tmp_path / "live" / "show.mp4").frames == live.of("ended")[-1]["frames"]


def test_ended_while_the_engine_is_started_again_it_finishes_its_file(tmp_path):
    options = {"deaths": [8] + ["load"] * 50, "diary": str(tmp_path / "diary")}
    with Live(tmp_path, ["show.mp4"], QUICK, f"--set=model.options={json.dumps(options)}") as live:
        live.wait_for("engine", where=lambda event: event["state"] == "restarting")
        time.sleep(1.0)
        everyone = family(live)
        began = time.monotonic()
        assert live.stop(END_S) == 0
        ended_well(live, began)
        gone(everyone)
    file = whole(tmp_path / "show.mp4")
    assert file.frames == live.of("ended")[-1]["frames"]
    assert live.of("ended")[-1]["held"] > 0


def test_ended_while_it_ends_by_itself_it_is_as_if_nobody_had_asked(tmp_path):
    with Live(tmp_path, ["show.mp4"], QUICK) as live:
        live.wait_for("on air")
        live.speak(Speech(), 1.0, speed=None)
        live.wait_for("engine", where=lambda event: event["state"] == "ended")
        assert live.stop(END_S) == 0
        assert live.of("ended")
    whole(tmp_path / "show.mp4")


@pytest.mark.needs("nginx")
def test_asked_twice_it_goes_at_once_and_its_part_plays(tmp_path, nginx):
    with Live(tmp_path / "live", ["show.mp4", nginx.url()], QUICK) as live:
        live.wait_for("on air")
        until(lambda: nginx.recordings(), 10, "the stream")
        time.sleep(2.5)
        everyone = family(live)
        live.send(signal.SIGINT)
        live.send(signal.SIGTERM)
        began = time.monotonic()
        assert live.end(5) in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        assert time.monotonic() - began < 2
        gone(everyone)
    assert whole(tmp_path / "live" / "show.part.mp4", cut_off=True).frames > 25


@pytest.mark.needs("nginx")
def test_killed_it_leaves_no_process_and_its_files_play(tmp_path, nginx):
    (tmp_path / "live").mkdir()
    targets = ["show.mp4", "segment:1:part.mp4", "list.m3u8", nginx.url()]
    with Live(tmp_path / "live", targets, QUICK) as live:
        live.wait_for("on air")
        until(lambda: nginx.recordings(), 10, "the stream")
        live.speak(Speech())
        time.sleep(3)
        everyone = family(live)
        assert {procs.role(process) for process in everyone} >= {ENGINE, PUBLISHER}
        os.kill(live.pid, signal.SIGKILL)
        assert live.end() == -signal.SIGKILL
        gone(everyone)
    assert whole(tmp_path / "live" / "show.part.mp4", cut_off=True).frames > 50
    from_the_first = {"live_start_index": "0"}
    assert skew.read(tmp_path / "live" / "list.m3u8", seconds=1.5, options=from_the_first).frames > 30
    assert len(list((tmp_path / "live").glob("part-*.mp4"))) >= 2


# Secrets


@pytest.mark.needs("nginx")
def test_the_stream_key_is_nowhere_to_be_read(tmp_path, nginx):
    key = "s3cr3t-of-the-stream"
    nginx.accept = lambda name: len(nginx.publishings(key, accepted=False)) > 0
    with Live(tmp_path / "live", ["show.mp4", nginx.url(key)], QUICK) as live:
        live.wait_for("on air")
        until(lambda: nginx.recordings(key), 20, "the stream, once refused")
        # Its own words are what its caller wrote; what it starts must not repeat them.
        seen = [
            line for pid in procs.children(live.pid, ENGINE) + live.publishers() for line in procs.command_lines(pid)
        ]
        assert len(seen) >= 2
        nginx.kill()
        live.wait_for("status", where=lambda event: event["outputs"][1]["reconnects"] == 0)
        assert live.stop() == 0
    told = json.dumps([event.fields for event in live.events]) + live.errors + "".join(seen)
    assert key not in told
    assert "rtmp://127.0.0.1" in live.errors
    assert key not in json.dumps(read_mp4(tmp_path / "live" / "show.mp4").metadata)
