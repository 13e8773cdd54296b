"""The command line: commands that need no model answer without loading what they do not need."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service import VERSION, cli

HEAVY = ("torch", "av", "numpy", "soxr", "PIL", "transformers", "diffusers", "librosa", "asyncio")


def avatard(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command, in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["plan"],
        ["plan", "live-avatar-14b", "--json"],
        ["config", "show"],
        ["config", "check", "reference.yaml"],
        ["fetch", "--help"],
        ["bench", "--help"],
        ["run", "--imge", "x"],
        ["plan", "no-such-model"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_none_of_the_heavy_packages(arguments):
    code = f"""
import sys
from service import cli
try:
    cli.main({arguments!r})
except SystemExit:
    pass
heavy = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit("imports " + ", ".join(heavy) if heavy else 0)
"""
    folder = Path(__file__).parent.parent.parent / "configs"
    process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(("imported", "status"), [("typer", -signal.SIGINT), ("service.config", 130)])
def test_ctrl_c_while_it_imports_is_no_traceback(imported, status):
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from service import cli
cli.main(["config", "show"])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (status, "", "")


def test_the_version_is_printed(capsys):
    assert avatard(capsys, "--version") == (0, f"avatard {VERSION}\n", "")


def test_plan_lists_parts_and_their_sum(capsys):
    status, out, _ = avatard(capsys, "plan", "live-avatar-14b")
    assert status == 0
    assert "umT5-xxl" in out
    _, out, _ = avatard(capsys, "plan", "live-avatar-14b", "--json")
    parts = json.loads(out)["live-avatar-14b"]["parts"]
    assert 45e9 < sum(part["weight_bytes"] for part in parts) < 50e9


def test_plan_knows_the_files_of_the_embedded_model():
    from service.models import known_models

    folder = Path(cli.__file__).parent.parent / "avatar" / "pocket"
    parts = known_models()["pocket"]["parts"]
    assert sum(part["weight_bytes"] for part in parts) == sum(
        path.stat().st_size for path in folder.rglob("*.safetensors")
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plan", "poket"], "model poket: unknown; did you mean pocket?"),
        (["fetch", "pocket"], "model pocket: comes with the package; there is nothing to download"),
        (["config", "check", "/nowhere.yaml"], "/nowhere.yaml: cannot be read (no such file or directory)"),
        (["config", "show", "--set", "a=1"], "--set a=1: unknown setting; avatard config show lists all"),
        (["rnu"], "No such command 'rnu'. Did you mean 'run'? See avatard --help."),
        (["run"], "Missing option '--image' / '-i'. See avatard --help."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_can_mend_is_one_line_and_exit_status_2(capsys, arguments, line):
    assert avatard(capsys, *arguments) == (2, "", f"avatard: {line}\n")


def test_a_checked_file_is_said_to_be_right(capsys, tmp_path):
    (tmp_path / "own.yaml").write_text("encoder:\n  crf: 20\n")
    status, out, _ = avatard(capsys, "config", "check", str(tmp_path / "own.yaml"))
    assert (status, out) == (0, f"{tmp_path}/own.yaml: all settings are known and valid\n")


@pytest.mark.parametrize("text", ["704x384", "704*384", "704X384", " 704 x 384 ", "704×384"])
def test_a_size_is_read_as_people_write_it(text):
    assert cli.parse_size(text) == (704, 384)


def test_fetch_brings_a_model_to_where_run_looks_for_it(capsys, tmp_path, monkeypatch):
    from avatar.live_avatar import fetch
    from service.config import load_settings
    from service.models import resolve_model

    calls = []

    def brought(folder, **options):
        folder.mkdir()
        calls.append(options)

    monkeypatch.setattr(fetch, "fetch", brought)
    place = f"paths.models={tmp_path}"
    status, out, _ = avatard(capsys, "fetch", "live-avatar-14b", "--revision", "v1", "--verify", "--set", place)
    assert (status, out) == (0, f"live-avatar-14b is in {tmp_path}/live-avatar-14b\n")
    assert calls == [{"revision": "v1", "progress": False, "verify": True}]
    assert resolve_model("live-avatar-14b", load_settings(None, [place])) == f"{tmp_path}/live-avatar-14b"


def test_a_fetch_that_is_stopped_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    from avatar.live_avatar import fetch

    def stopped(folder, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "fetch", stopped)
    status, _, err = avatard(capsys, "fetch", "live-avatar-14b", "--to", str(tmp_path))
    assert (status, err) == (130, "avatard: stopped; the same command goes on from here\n")
