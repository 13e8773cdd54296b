"""`avatard doctor`: each thing that can be wrong with a machine is told in a line, with what to do."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from live import TOY

from service import doctor
from service.config import ConfigError, Settings, load_settings
from service.doctor import Finding, examine, worst

TORCH = {"version": "2.13.0", "cuda": "13.0", "hip": None, "available": True, "devices": [], "threads": 2}
GPU = "NVIDIA H200, 580.1, 143771, 143000\n"
STAGES = {"transformer": 50.0, "decoder": 150.0}


def programs(
    smi: str | Exception | None = None,
    torch: dict | Exception | str = TORCH,
    espeak: bool = True,
    stages: dict | Exception | str = STAGES,
):
    """What the programs that are asked answer. smi: None is a machine without a GPU."""

    def run(command, limit_s):
        assert limit_s > 0
        match command[0]:
            case "nvidia-smi" if smi is None:
                raise FileNotFoundError
            case "nvidia-smi":
                answer = smi
            case "espeak-ng" if not espeak:
                raise FileNotFoundError
            case "espeak-ng":
                answer = "eSpeak NG text-to-speech: 1.51  Data at: /usr/lib/espeak-ng-data"
            case _:
                answer = stages if "avatar.pocket.stages" in command else torch
                answer = json.dumps(answer) if isinstance(answer, dict) else answer
        if isinstance(answer, Exception):
            raise answer
        return 0, answer, ""

    return run


@pytest.fixture
def look(tmp_path) -> Callable[..., dict[str, Finding]]:
    """Examine this machine, with other settings and other programs: findings by their check."""

    def examined(*assignments: str, run=None) -> dict[str, Finding]:
        own = [f"daemon.state={tmp_path}/state", f"daemon.outputs={tmp_path}/out", "jobs.min_free_gb=0", "http.port=0"]
        findings = list(examine(lambda: load_settings(None, [*own, *assignments]), run or programs()))
        names = [finding.check for finding in findings]
        assert len(names) == len(set(names)) or "gpu" in names
        return {finding.check: finding for finding in findings}

    return examined


def test_a_machine_that_can_do_it_all_has_no_problem(look):
    found = look()
    assert worst(found.values()) != "problem", [finding.line for finding in found.values()]
    wanted = {"python", "gpu", "torch", "memory", "settings", "model", "libx264", "voice"}
    assert wanted | {"state folder", "outputs folder"} <= set(found)


def test_looking_leaves_nothing_behind(look, tmp_path):
    look()
    assert list(tmp_path.iterdir()) == []


def test_a_torch_for_cpus_beside_a_gpu_is_a_problem_with_its_mend(look):
    found = look(run=programs(GPU, TORCH | {"version": "2.13.0+cpu", "cuda": None, "available": False}))["torch"]
    assert found.level == "problem"
    assert "beside an NVIDIA GPU" in found.found
    assert "pip install --force-reinstall torch" in found.mend


def test_without_a_gpu_a_torch_for_cpus_is_right(look):
    assert look(run=programs(None, TORCH | {"cuda": None, "available": False}))["torch"].level == "ok"


def test_a_torch_that_does_not_find_the_gpu_is_a_problem_of_the_driver(look):
    found = look(run=programs(GPU, TORCH | {"available": False}))["torch"]
    assert (found.level, "580.1" in found.found, "driver" in found.mend) == ("problem", True, True)


def test_the_memory_of_each_gpu_is_told(look):
    found = look(run=programs(GPU))["gpu"]
    assert found.found == "NVIDIA H200, driver 580.1, 149.9 GB of 150.8 GB free"
    assert look(run=programs("A, 1, 24000, 500\n"))["gpu"].level == "warning"
    assert look(run=programs("Orin, 1, [N/A], [N/A]\n"))["gpu"].level == "ok"


def test_the_rate_of_the_link_to_each_gpu_is_told(look):
    def linked(*rates: float):
        devices = [{"name": "H200", "total": 1.5e11, "link_gb_s": rate} for rate in rates]
        return look(run=programs(GPU, TORCH | {"devices": devices}))["link"]

    assert (linked(55.31).level, linked(55.31).found) == ("ok", "55.3 GB/s to H200")
    assert linked(55.3, 3.2).level == "warning"
    assert "full slot" in linked(3.2).mend


@pytest.mark.parametrize(
    ("stages", "level", "said"),
    [
        ({"transformer": 50.0, "decoder": 160.4}, "ok", "pocket takes 210 ms for a block of 480 ms"),
        ({"decoder": 371.0}, "warning", "371 ms"),
        (subprocess.TimeoutExpired("python", 60), "warning", "not made in 60 s"),
        ("no numbers", "warning", "could not be measured"),
    ],
)
def test_whether_the_embedded_model_is_fast_enough_for_a_broadcast_is_tried(look, stages, level, said):
    found = look(run=programs(stages=stages))["speed"]
    assert found.level == level
    assert said in found.found


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        (subprocess.TimeoutExpired("python", 120), "could not be asked in 120 s"),
        (FileNotFoundError("no python"), "could not be asked"),
        ("not JSON", "could not be asked"),
    ],
)
def test_a_torch_that_cannot_be_asked_is_a_line(look, torch, said):
    found = look(run=programs(torch=torch))["torch"]
    assert found.level == "problem"
    assert said in found.found


def test_a_torch_that_crashes_is_a_line(look):
    def run(command, limit_s):
        return (-11, "", "") if sys.executable in command else programs()(command, limit_s)

    assert look(run=run)["speed"].level == "warning"
    assert look(run=run)["torch"].found == "ends by signal 11"


def test_a_driver_that_hangs_is_a_line(look):
    assert look(run=programs(subprocess.TimeoutExpired("nvidia-smi", 20)))["gpu"].level == "problem"


def test_settings_that_are_wrong_are_told_and_the_machine_is_looked_at_all_the_same():
    def load() -> Settings:
        raise ConfigError("daemon.yaml:3: http.prot: unknown setting; did you mean http.port?")

    found = {finding.check: finding for finding in examine(load, programs())}
    assert found["settings"].level == "problem"
    assert "daemon.yaml:3" in found["settings"].found
    assert {"python", "torch", "memory"} <= set(found)
    assert "model" not in found


def test_a_server_for_everybody_without_a_token_is_a_problem(look):
    found = look("http.host=0.0.0.0")["settings"]
    assert found.level == "problem"
    assert "auth.tokens" in found.found


def test_a_password_that_is_not_there_is_a_problem(look):
    found = look("mqtt.enabled=true", "mqtt.password_env=NOBODY_SET_THIS")["settings"]
    assert (found.level, "NOBODY_SET_THIS" in found.found) == ("problem", True)


def test_a_certificate_that_cannot_be_used_is_a_problem(look, tmp_path):
    cert = tmp_path / "cert.pem"
    found = look(f"http.tls_cert={cert}")["settings"]
    assert (found.level, found.found) == (
        "problem",
        f"http.tls_cert: {cert}: cannot be read (no such file or directory)",
    )
    cert.write_text("no certificate")
    found = look(f"http.tls_cert={cert}")["settings"]
    assert found.level == "problem"
    assert found.found.startswith(f"http.tls_cert: no certificate with its key is in {cert}; both are")


def test_a_folder_that_can_never_be_is_a_problem(look):
    found = look("daemon.state=/dev/null/x")["state folder"]
    assert (found.level, found.found) == ("problem", "/dev/null: is no folder")


def test_options_that_the_model_refuses_are_a_problem(look):
    found = look("model.steps=3", run=doctor.run_program)["speed"]
    assert (found.level, found.found) == (
        "problem",
        "pocket cannot be had so: steps: 3; pocket was trained for 1, 2 or 4",
    )


def test_an_unknown_model_and_one_that_is_not_downloaded_are_problems(look, tmp_path):
    assert "did you mean pocket" in look("model.name=poket")["model"].found
    found = look("model.name=live-avatar-14b", f"paths.models={tmp_path}/models")["model"]
    assert found.level == "problem"
    assert "avatard fetch live-avatar-14b" in found.found


def tensors(file: Path, bytes_: int = 16, cut: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [bytes_], "data_offsets": [0, bytes_]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(bytes_ - cut))


@pytest.fixture
def weights(tmp_path):
    """A folder of downloaded weights, as `avatard fetch` leaves it."""
    folder = tmp_path / "weights"
    (folder / "Live-Avatar").mkdir(parents=True)
    file = folder / "Live-Avatar" / "liveavatar.safetensors"
    tensors(file)
    files = {"liveavatar.safetensors": {"size": file.stat().st_size, "sha256": "", "git": ""}}
    lock = {"repos": {"Quark-Vision/Live-Avatar": {"commit": "1", "revision": "main", "files": files}}}
    (folder / "avatard.lock.json").write_text(json.dumps(lock))
    return folder


def test_weights_that_are_whole_are_right(look, weights):
    assert look(f"model.name={weights}")["model"].level == "ok"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder, file: file.unlink(), "is missing"),
        (lambda folder, file: file.write_bytes(file.read_bytes()[:-3]), "bytes of"),
        (lambda folder, file: (folder / "x.part").touch(), "x.part is half downloaded"),
        (lambda folder, file: (folder / "avatard.lock.json").write_text("{"), "cannot be read"),
        (lambda folder, file: tensors(folder / "more.safetensors", cut=1), "more.safetensors is cut off"),
        (lambda folder, file: (folder / "more.safetensors").write_bytes(b"short"), "more.safetensors is cut off"),
    ],
)
def test_weights_that_are_not_whole_are_a_problem(look, weights, damage, said):
    damage(weights, weights / "Live-Avatar" / "liveavatar.safetensors")
    found = look(f"model.name={weights}")["model"]
    assert found.level == "problem"
    assert said in found.found


def test_without_espeak_texts_cannot_be_spoken_and_that_is_a_warning(look):
    found = look(run=programs(espeak=False))["voice"]
    assert (found.level, "espeak-ng" in found.mend) == ("warning", True)
    shown = look("voice.url=https://user:secret@voice.example/v1/audio/speech", run=programs(espeak=False))["voice"]
    assert shown.level == "ok"
    assert "secret" not in shown.line


def test_a_disk_that_is_nearly_full_is_a_problem(look):
    found = look("jobs.min_free_gb=1000000000")["state folder"]
    assert (found.level, "jobs.min_free_gb" in found.mend) == ("problem", True)


def test_a_slow_disk_is_a_warning(look, monkeypatch):
    monkeypatch.setattr(doctor, "_write_rate", lambda folder: 3.0)
    assert look()["outputs folder"].level == "warning"


def test_a_disk_that_does_not_take_a_byte_is_a_problem(look, monkeypatch):
    def full(folder: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor, "_write_rate", full)
    assert "no space left" in look()["state folder"].found


def test_a_port_that_is_taken_is_a_problem_unless_the_daemon_has_it(look, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert look(f"http.port={port}")["http port"].level == "problem"
        (tmp_path / "state").mkdir()
        with (tmp_path / "state" / "lock").open("w+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write("4711\n")
            lock.flush()
            found = look(f"http.port={port}")
        assert found["http port"].level == "ok"
        assert "4711" in found["daemon"].found
    assert look(f"http.port={port}")["http port"].level == "ok"


def test_a_broker_that_is_not_there_is_a_warning_since_the_daemon_waits_for_it(look):
    with socket.create_server(("127.0.0.1", 0)) as broker:
        port = broker.getsockname()[1]
        assert look("mqtt.enabled=true", f"mqtt.port={port}")["mqtt broker"].level == "ok"
    assert look("mqtt.enabled=true", f"mqtt.port={port}")["mqtt broker"].level == "warning"


def test_an_encoder_that_was_asked_for_and_is_not_here_is_said(look, monkeypatch):
    monkeypatch.setattr(doctor, "_encodes", lambda codec: "" if codec == "libx264" else "no such chip")
    assert look("live.codec=h264_nvenc")["h264_nvenc"].level == "warning"
    assert "h264_nvenc" not in look()
    monkeypatch.setattr(doctor, "_encodes", lambda codec: "gives no packet")
    assert look()["libx264"].level == "problem"


def settings_in(folder: Path) -> list[str]:
    own = [f"daemon.state={folder}/state", f"daemon.outputs={folder}/out", "jobs.min_free_gb=0", "http.port=0"]
    return [f"--set={assignment}" for assignment in own]


def test_the_command_prints_a_line_each_and_loads_no_torch_itself(place):
    done = place.call(place.command("doctor", *settings_in(place.folder)))
    assert done.returncode == 0, done.stdout
    levels = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert set(levels.values()) <= {"ok", "warning"}
    assert levels["torch"] == "ok"
    program = "import sys; from service import doctor; print('torch' in sys.modules)"
    assert place.call([sys.executable, "-c", program]).stdout == "False\n"


def test_the_command_ends_with_1_when_there_is_a_problem(tmp_path, capsys, monkeypatch):
    from service.cli import main

    monkeypatch.setattr(doctor, "ASK_TORCH", "raise SystemExit('no torch')")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json", f"--set=model.name={TOY}", *settings_in(tmp_path)])
    assert ended.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["level"] == "problem"
    (torch,) = (finding for finding in told["findings"] if finding["check"] == "torch")
    assert (torch["level"], torch["found"]) == ("problem", "no torch")
