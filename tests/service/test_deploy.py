"""What is deployed: the preset, the unit, the image and the servers beside it are read by the programs that will."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import find_program

from service.auth import Keys
from service.config import Settings, load_settings
from service.secrets import read_secret

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def run(*command: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, **more
    )


def program(name: str) -> str:
    path = find_program(name)
    assert path is not None
    return path


def differences(file: Path) -> dict[str, bool]:
    """Of each setting in a file, whether it differs from its default."""
    settings, default = load_settings(file), Settings()
    written = yaml.safe_load(file.read_text())
    return {
        f"{section}.{key}": getattr(getattr(settings, section), key) != getattr(getattr(default, section), key)
        for section, keys in written.items()
        for key in keys
    }


@pytest.mark.parametrize("file", [ROOT / "configs" / "daemon.yaml", DEPLOY / "compose" / "daemon.yaml"])
def test_a_preset_holds_what_differs_and_nothing_else(file):
    assert differences(file)
    assert [name for name, differs in differences(file).items() if not differs] == []


def test_the_preset_needs_no_token_since_it_listens_on_this_machine_alone():
    settings = load_settings(ROOT / "configs" / "daemon.yaml")
    assert not Keys.load(settings).required
    assert settings.mqtt.enabled


def test_what_the_preset_shows_as_a_comment_can_be_taken_out_of_it(tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef-front-desk")
    text = (ROOT / "configs" / "daemon.yaml").read_text()
    text = re.sub(r"^(\s*)# (?=\s*(- \{|\w+:( |$)))", r"\1", text, flags=re.MULTILINE)
    file = tmp_path / "daemon.yaml"
    file.write_text(text)
    settings = load_settings(file)
    assert settings.http.host == "0.0.0.0"
    assert [token.name for token in settings.auth.tokens] == ["front desk", "monitoring"]
    assert settings.mqtt.tls


def test_the_daemon_of_the_compose_file_takes_its_secrets_from_the_environment(monkeypatch):
    for name in COMPOSE["services"]["avatard"]["environment"]:
        monkeypatch.setenv(name, "0123456789abcdef0123456789abcdef")
    settings = load_settings(DEPLOY / "compose" / "daemon.yaml")
    assert Keys.load(settings).required
    assert read_secret("mqtt.password", settings.mqtt.password_file, settings.mqtt.password_env)


def test_no_port_of_the_compose_file_can_be_reached_from_other_machines():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_file_that_the_compose_file_and_the_image_take_is_there():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).is_file(), source
    assert (DEPLOY / COMPOSE["services"]["avatard"]["build"]["context"] / "deploy" / "Dockerfile").is_file()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for words in dockerfile("COPY"):
        for source in words[:-1]:
            if not words[0].startswith("--from"):
                assert (ROOT / source).exists(), source
                assert source.partition("/")[0] in let_in, source


def dockerfile(instruction: str) -> list[list[str]]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith(f"{instruction} ")]


def test_the_image_runs_without_rights_and_ends_by_a_signal():
    (user,) = dockerfile("USER")
    assert int(user[0].partition(":")[0]) > 0
    assert "[tini," in " ".join(dockerfile("ENTRYPOINT")[0])
    assert dockerfile("STOPSIGNAL") == [["SIGTERM"]]


def test_the_image_holds_every_package_of_the_wheel():
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = \[(.*)\]", project, re.MULTILINE)
    assert packages is not None
    copied = {source for words in dockerfile("COPY") for source in words[:-1]}
    assert {name.strip(' "') for name in packages[1].split(",")} <= copied


def test_whoever_may_stop_the_daemon_waits_for_longer_than_it_takes():
    unit = (DEPLOY / "avatard.service").read_text()
    stop = re.search(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)
    grace = COMPOSE["services"]["avatard"]["stop_grace_period"]
    assert stop is not None
    assert min(int(stop[1]), int(grace.removesuffix("s"))) > Settings().daemon.shutdown_s + 2


@pytest.fixture
def unit(tmp_path):
    """The unit, with a program that is here."""
    text = (DEPLOY / "avatard.service").read_text()
    text = text.replace("/opt/avatard/bin/avatard", sys.executable).replace("/bin/kill", program("kill"))
    text = text.replace("User=avatard\nGroup=avatard\n", "User=root\nGroup=root\n")
    file = tmp_path / "avatard.service"
    file.write_text(text)
    return file


@pytest.mark.needs("systemd-analyze")
def test_systemd_understands_every_line_of_the_unit(unit):
    done = run(program("systemd-analyze"), "verify", "--man=no", unit)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "avatard.service" in line]
    assert complaints == []


@pytest.mark.needs("systemd-analyze")
def test_the_unit_gives_the_daemon_few_rights(unit):
    done = run(program("systemd-analyze"), "security", "--offline=true", "--threshold=40", "--no-pager", unit)
    assert done.returncode == 0, done.stdout[-400:] + done.stderr[-400:]


@pytest.mark.needs("nginx")
def test_nginx_accepts_its_configuration(tmp_path):
    text = (DEPLOY / "compose" / "nginx.conf").read_text()
    file = tmp_path / "nginx.conf"
    file.write_text(text.replace("/tmp", str(tmp_path)).replace("listen 1935", "listen 127.0.0.1:1"))
    done = run(program("nginx"), "-t", "-p", tmp_path, "-c", file, "-e", "stderr")
    # Ports are not opened; whether the machine may is not the question.
    assert "syntax is ok" in done.stderr, done.stderr


@pytest.mark.needs("mosquitto", "mosquitto_passwd")
async def test_the_broker_lets_in_who_has_the_password_and_nobody_else(tmp_path):
    import aiomqtt
    from mosquitto import Mosquitto

    (service,) = (text for text in COMPOSE["services"]["mosquitto"]["entrypoint"] if "mosquitto_passwd" in text)
    lines = (DEPLOY / "compose" / "mosquitto.conf").read_text().replace("/mosquitto/data", str(tmp_path))
    # The lines of the entrypoint that make the password's file, as they are but for the folder.
    make = service.replace("$$", "$").replace("/mosquitto/data", str(tmp_path)).partition("chown")[0]
    path = os.pathsep.join([os.environ["PATH"], str(Path(program("mosquitto")).parent)])
    made = run("/bin/sh", "-ec", make, env={"PATH": path, "AVATARD_MQTT_PASSWORD": "a long password"})
    assert made.returncode == 0, made.stderr
    assert "a long password" not in (tmp_path / "passwords").read_text()

    class Deployed(Mosquitto):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            kept = "\n".join(line for line in lines.splitlines() if not line.startswith(("log_dest", "persistence")))
            (folder / "broker.conf").write_text(
                kept.replace("listener 1883", f"listener {self.port} 127.0.0.1")
                + f"\nlog_dest file {folder}/broker.log\nuser root\n"
            )

    with Deployed(tmp_path / "broker") as broker:
        async with aiomqtt.Client("127.0.0.1", broker.port, username="avatard", password="a long password"):
            pass
        for stranger in ({}, {"username": "avatard", "password": "another"}):
            with pytest.raises(aiomqtt.MqttError):
                async with aiomqtt.Client("127.0.0.1", broker.port, **stranger):
                    pass
