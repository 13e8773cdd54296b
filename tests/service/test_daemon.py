"""The daemon: up in its order, kept up, told again what changed, killed and put away."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import socket
import time

import garbage
import numpy as np
import pytest
from mp4 import clicks_at, read_mp4, write_sound
from prometheus_client.parser import text_string_to_metric_families
from serve import Serve
from virtual_loop import run_virtual
from waiting import until

from audio.errors import AvatardError
from service.config import ConfigError, Settings, load_settings, reloaded
from service.daemon import ServiceManager, _Daemon, _sole_owner


@pytest.fixture
def speech(tmp_path):
    """A file of sound: a click each second, so that its video can be told from another's."""
    return lambda seconds=2.0: write_sound(
        tmp_path / f"speech-{seconds:g}.wav", clicks_at(np.arange(0.5, seconds, 1.0), seconds), 16_000
    )


# The whole of it: one process, from its first line to its last


def test_a_day_of_the_daemon(tmp_path, speech):
    """Not ready, ready, a job from its sound to its file, the engine's death, the end; systemd is told of it all."""
    watched = garbage.watched(tmp_path / "garbage")
    with Serve(tmp_path, notify=True, watchdog_s=1.5, environment=watched) as serve:
        assert serve.call("GET", "/livez").status_code == 200
        # Taken before the model is warm.
        job = serve.submit(speech(), id="early", seed=7)
        assert job["state"] in ("queued", "running")
        serve.ready()
        assert serve.finished("early")["state"] == "completed"
        video = read_mp4(serve.result("early", tmp_path / "early.mp4"))
        assert video.frames == 50
        until(lambda: any("READY=1" in told for told in serve.told), 10, "READY")
        until(lambda: "WATCHDOG=1" in serve.told, 10, "WATCHDOG")

        figures = until(lambda: figures_with(serve, 'avatard_jobs_total{outcome="completed"}'), 10, "a counted job")
        assert figures['avatard_stage_seconds_count{stage="model"}'] >= 5
        assert figures["avatard_job_video_seconds_total"] == 2.0
        assert figures['avatard_http_requests_total{code="201",method="POST",route="/v1/jobs"}'] == 1
        assert figures["avatard_engine_process_resident_memory_bytes"] > 1e6

        serve.kill_engine()
        until(lambda: serve.metrics()["avatard_engine_restarts_total"] == 1, 30, "a new engine")
        serve.ready()
        serve.submit(speech(), id="after", seed=7)
        assert serve.finished("after")["state"] == "completed"
        again = read_mp4(serve.result("after", tmp_path / "after.mp4"))
        np.testing.assert_array_equal(again.brightness, video.brightness)

        before = time.monotonic()
        assert serve.stop() == 0
        assert time.monotonic() - before < 10
        assert garbage.share_walked(tmp_path / "garbage", serve.process.pid) < 0.2
        assert any("STOPPING=1" in told for told in serve.told)
        assert "Traceback" not in serve.text


def figures_with(serve: Serve, name: str) -> dict[str, float] | None:
    figures = serve.metrics()
    return figures if figures.get(name) else None


def test_what_prometheus_reads_of_a_daemon_at_work(tmp_path, speech):
    with Serve(tmp_path) as serve:
        serve.ready()
        session = serve.call("POST", "/v1/sessions", json={"outputs": ["show.mp4"]}).raise_for_status().json()
        on_air = f"/v1/sessions/{session['id']}"
        until(lambda: serve.call("GET", on_air).json()["state"] == "on air", 30, "on air")
        until(lambda: serve.metrics()["avatard_live_frames_total"] > 50, 30, "frames")
        answer = serve.call("GET", "/metrics")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        assert {sample.labels["state"]: sample.value for sample in families["avatard_sessions"].samples}["on air"] == 1
        (ahead,) = families["avatard_live_worst_ahead_seconds"].samples
        assert -1 < ahead.value < 2
        (outputs,) = families["avatard_outputs"].samples
        assert outputs.labels["kind"] == "file"
        assert session["id"] not in answer.text

        # Asked to end, it finishes the file.
        assert serve.stop() == 0
        assert read_mp4(serve.outputs / "show.mp4").frames > 50


def test_a_killed_daemon_goes_on_where_it_was_and_the_file_is_the_same(tmp_path, speech):
    slow = ("model.options={step_s: 0.1}", "jobs.segment_s=1")
    sound = speech(5.0)
    with Serve(tmp_path, *slow) as serve:
        serve.submit(sound, id="long", seed=3, name="killed/film")
        for frames in (30, 70):
            until(lambda frames=frames: serve.job("long")["frames"] >= frames, 60, f"{frames} frames")
            serve.kill()
            serve.start()
        # What was accepted is there, and what is asked for again is the same job.
        assert serve.submit(sound, id="long", seed=3, name="killed/film")["id"] == "long"
        serve.submit(sound, id="whole", seed=3, name="whole/film")
        job = serve.finished("long", 90)
        assert (job["state"], job["attempts"]) == ("completed", 3)
        assert serve.finished("whole", 90)["attempts"] == 1
        assert len(serve.call("GET", "/v1/jobs").json()["jobs"]) == 2
        killed, whole = (serve.result(id, tmp_path / f"{id}.mp4") for id in ("long", "whole"))
    assert killed.read_bytes() == whole.read_bytes()
    assert read_mp4(whole).frames == 125


# Starting


def refused(serve: Serve) -> str:
    """What it says when it does not start, after its status was looked at."""
    assert serve.end(60) == 2
    (line,) = [line for line in serve.lines if line.startswith("avatard: ")]
    assert "Traceback" not in serve.text
    return line


def test_a_second_daemon_on_the_same_state_is_refused_in_a_line(tmp_path):
    with Serve(tmp_path) as first:
        first.says("listening on")
        with Serve(tmp_path) as second:
            assert f"another avatard serve works there (process {first.process.pid})" in refused(second)
        assert first.process.poll() is None


def test_a_wrong_setting_is_refused_with_its_line_and_what_was_meant(tmp_path):
    config = tmp_path / "daemon.yaml"
    config.write_text("http:\n  prot: 80\n")
    with Serve(tmp_path, config=config) as serve:
        assert f"{config}:2: http.prot: unknown setting; did you mean http.port?" in refused(serve)
    assert not (tmp_path / "state").exists()


def test_a_port_that_is_taken_and_a_model_that_is_not_there_are_refused_in_a_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Serve(tmp_path / "port", f"http.port={port}") as serve:
            assert f"http.port {port}: cannot listen" in refused(serve)
    with Serve(tmp_path / "model", model="poket") as serve:
        assert "did you mean pocket?" in refused(serve)


def test_a_state_folder_that_cannot_be_made_is_refused_in_a_line(tmp_path):
    (tmp_path / "file").touch()
    settings = load_settings(None, [f"daemon.state={tmp_path}/file/state", f"daemon.outputs={tmp_path}/out"])
    with (
        pytest.raises(ConfigError, match=r"daemon.state: .*: cannot be made \(not a directory\)"),
        _sole_owner(settings),
    ):
        pass


def test_the_lock_of_a_daemon_that_was_killed_is_free(tmp_path):
    settings = load_settings(None, [f"daemon.state={tmp_path}/state", f"daemon.outputs={tmp_path}/out"])
    for _ in range(2):
        with _sole_owner(settings):
            assert (tmp_path / "state" / "lock").read_text() == f"{os.getpid()}\n"
            with pytest.raises(AvatardError, match="another avatard serve works there"), _sole_owner(settings):
                pass
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


# Ending


def test_a_second_signal_ends_it_at_once(tmp_path):
    # A model that takes its time is put away in the time it takes to end a process.
    with Serve(tmp_path, "model.options={step_s: 60}", "live.step_timeout_s=600") as serve:
        serve.ready()
        serve.call("POST", "/v1/sessions", json={}).raise_for_status()
        serve.says("ready")
        serve.send(signal.SIGTERM)
        serve.says("asked to end by SIGTERM")
        before = time.monotonic()
        serve.send(signal.SIGINT)
        assert serve.end() == 128 + signal.SIGINT
        assert time.monotonic() - before < 2


# Settings, again


def test_settings_are_read_again_at_a_hangup_and_kept_when_they_are_wrong(tmp_path):
    config, token = tmp_path / "daemon.yaml", tmp_path / "token"
    token.write_text("first-token-0123456789")
    token.chmod(0o600)
    written = f"auth:\n  tokens:\n    - {{name: bot, scopes: [admin], file: {token}}}\n"
    config.write_text(written)
    with Serve(tmp_path, config=config, notify=True) as serve:
        until(lambda: serve.call("GET", "/v1/status", "first-token-0123456789").status_code == 200, 10, "an answer")

        token.write_text("second-token-0123456789")
        config.write_text(f"{written}logging: {{level: debug}}\nhttp: {{page: false}}\n")
        serve.send(signal.SIGHUP)
        serve.says("settings are read again; after the next start: http.page")
        assert serve.call("GET", "/v1/status", "second-token-0123456789").status_code == 200
        assert serve.call("GET", "/v1/status", "first-token-0123456789").status_code == 401
        assert any("RELOADING=1" in told for told in serve.told)

        config.write_text(f"{written}jobs:\n  keep_dais: 3\n")
        serve.send(signal.SIGHUP)
        line = serve.says("nothing is changed: .*").string
        assert f"{config}:5: jobs.keep_dais: unknown setting; did you mean jobs.keep_days?" in line
        assert serve.call("GET", "/v1/status", "second-token-0123456789").status_code == 200

        token.write_text("short")
        config.write_text(written)
        serve.send(signal.SIGHUP)
        serve.says("nothing is changed: auth.tokens: bot: has 5 characters")
        assert serve.call("GET", "/v1/status", "second-token-0123456789").status_code == 200
        assert "second-token-0123456789" not in serve.text


def test_what_a_hangup_takes_and_what_waits():
    now = Settings()
    wanted = load_settings(None, ["limits.audio_hours=1", "http.port=9", "auth.requests_per_minute=5", "model.seed=4"])
    taken, waiting = reloaded(now, wanted)
    assert taken.limits == wanted.limits
    assert taken.auth == wanted.auth
    assert taken.http == now.http
    assert sorted(waiting) == ["http.port", "model.seed"]


# systemd


@pytest.fixture
def notified(tmp_path):
    """A socket like systemd's, and what came."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.setblocking(False)

        def told() -> list[str]:
            found = []
            while True:
                try:
                    found.append(listener.recv(4096).decode())
                except BlockingIOError:
                    return found

        yield path, told


def test_systemd_is_told_in_its_own_words(notified):
    path, told = notified
    systemd = ServiceManager({"NOTIFY_SOCKET": path})
    systemd.ready("ready")
    systemd.reloading()
    systemd.watchdog()
    systemd.stopping()
    ready, reloading, watchdog, stopping = told()
    assert ready == "READY=1\nSTATUS=ready"
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
    assert watchdog == "WATCHDOG=1"
    assert stopping.startswith("STOPPING=1\n")


def test_what_the_daemon_starts_cannot_speak_to_systemd_for_it(notified):
    environment = {"NOTIFY_SOCKET": notified[0], "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "A": "b"}
    assert ServiceManager(environment).watchdog_s == 3.0
    assert environment == {"A": "b"}


@pytest.mark.parametrize("asked", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}])
def test_a_watchdog_that_is_not_ours_is_not_fed(notified, asked):
    assert ServiceManager({"NOTIFY_SOCKET": notified[0], **asked}).watchdog_s is None


def test_without_systemd_nobody_is_told_and_one_that_is_gone_does_no_harm(tmp_path):
    ServiceManager({}).ready("ready")
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("ready")


def test_the_watchdog_is_fed_while_the_model_answers_or_may_still_be_loading(notified):
    path, told = notified

    async def main() -> list[int]:
        clock = asyncio.get_running_loop().time
        systemd = ServiceManager({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"})
        one = _Daemon(Settings, load_settings(None, ["model.load_timeout_s=20"]), systemd, clock)
        watching = asyncio.create_task(one._watch_loop())
        counts = []
        for state, seconds in (("ready", 30), ("restarting", 15), ("restarting", 30), ("ready", 30)):
            one._on_engine(state, "")
            fed = 0
            for _ in range(seconds // 5):  # the kernel keeps about ten for a reader
                await asyncio.sleep(5)
                fed += len(told())
            counts.append(fed)
        watching.cancel()
        return counts

    fed, loading, hopeless, again = run_virtual(main())
    assert 28 <= fed <= 31
    assert 13 <= loading <= 16
    assert 4 <= hopeless <= 6
    assert 28 <= again <= 31


# A trigger that fails


def daemon_on(clock) -> _Daemon:
    return _Daemon(Settings, Settings(), ServiceManager({}), clock)


def test_a_trigger_that_fails_by_a_bug_is_started_again_ever_later_and_its_traceback_logged(caplog):
    async def main() -> tuple[list[float], list[str]]:
        clock = asyncio.get_running_loop().time
        one, starts = daemon_on(clock), []

        async def trigger() -> None:
            starts.append(clock())
            if len(starts) == 5:
                await asyncio.sleep(3600)
            raise ZeroDivisionError

        with one._hub.listen() as news:
            keeping = asyncio.create_task(one._keep_up("mqtt", trigger))
            await asyncio.sleep(4000)
            keeping.cancel()
            told = [(await anext(news)).what for _ in range(5)]
        return [round(b - a, 1) for a, b in itertools.pairwise(starts)], told

    waits, told = run_virtual(main())
    assert waits[:5] == [1.0, 2.0, 4.0, 8.0, 3601.0]
    assert told == ["started again"] * 5
    assert "ZeroDivisionError" in caplog.text


def test_a_trigger_that_cannot_work_with_these_settings_ends_the_start_but_never_a_daemon_at_work():
    async def main() -> int:
        clock = asyncio.get_running_loop().time
        one, starts = daemon_on(clock), []

        async def trigger() -> None:
            starts.append(clock())
            if len(starts) == 1:
                await asyncio.sleep(60)
            raise AvatardError("the certificate is gone")

        async def wrong() -> None:
            raise ConfigError("mqtt.password_file: cannot be read")

        with pytest.raises(ConfigError, match="cannot be read"):
            await one._keep_up("mqtt", wrong)
        keeping = asyncio.create_task(one._keep_up("http", trigger))
        await asyncio.sleep(100)
        assert not keeping.done()
        keeping.cancel()
        return len(starts)

    assert run_virtual(main()) > 2


def test_a_loop_that_stands_still_is_measured_and_said_once_a_minute(caplog):
    async def main() -> float:
        loop = asyncio.get_running_loop()
        one = daemon_on(loop.time)
        watching = asyncio.create_task(one._watch_loop())
        await asyncio.sleep(3)
        for _ in range(3):
            loop.now += 2.0  # as a blocking call has it
            await asyncio.sleep(1)
        watching.cancel()
        lines = one._metrics.text().decode().splitlines()
        return float(next(line for line in lines if line.startswith("avatard_event_loop_lag_seconds_sum")).split()[1])

    assert 5.5 < run_virtual(main()) < 6.5
    assert caplog.text.count("the event loop stood still") == 1
