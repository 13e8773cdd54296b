"""The wheel: everything is in it, and it works where there is no checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_WEIGHT_BYTES = 24_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation: the builder is in the test extra, nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel in it; the packages it needs are those of this one.

    A path named in a .pth file is searched, but its own .pth files are not read, so the editable installation of the
    checkout stays out.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True, timeout=120)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def call(commands: Path, folder: Path, *arguments: str, timeout: int = 60) -> str:
    """What `avatard ARGUMENTS` prints, called outside the checkout."""
    command = [str(commands / "avatard"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, timeout=timeout).stdout


def test_weights_settings_and_examples_are_in_the_wheel(names: dict[str, int]) -> None:
    wanted = {
        *(f"avatar/pocket/weights/{name}.safetensors" for name in ("dit", "vae", "ear", "meter")),
        *(f"configs/{name}.yaml" for name in ("models", "reference")),
        *(
            f"examples/{name}"
            for name in ("presenter.png", "presenter_2.png", "welcome.wav", "story.mp3", "ni_hao.wav")
        ),
        *(f"service/page/{path.name}" for path in (ROOT / "service" / "page").glob("*.*") if path.suffix != ".pyc"),
        "avatar/pocket/sentences.json",
        "avatar/pocket/MODEL_CARD.md",
    }
    assert wanted <= names.keys()


def test_the_licence_is_in_the_wheel(names: dict[str, int]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_nothing_but_the_packages_is_in_the_wheel(names: dict[str, int]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "audio", "avatar", "streaming", "service", "configs", "examples"
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or "checkpoint" in name]


def test_the_weights_stay_under_24_mb(names: dict[str, int]) -> None:
    assert sum(size for name, size in names.items() if name.endswith(".safetensors")) < MAX_WEIGHT_BYTES


def test_the_installed_command_says_its_version(commands: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call(commands, tmp_path, "--version") == f"avatard {version}\n"


def test_the_installed_command_finds_its_settings_and_weights(commands: Path, tmp_path: Path) -> None:
    parts = {part["name"] for part in json.loads(call(commands, tmp_path, "plan", "--json"))["pocket"]["parts"]}
    assert {"dit", "vae", "ear"} <= parts
    assert call(commands, tmp_path, "config", "show").startswith("# Which model speaks")


@pytest.mark.slow
def test_the_installed_command_makes_a_video(commands: Path, tmp_path: Path) -> None:
    examples = next(commands.parent.glob("lib/python*/site-packages/examples"))
    given = ["--image", str(examples / "presenter.png"), "--audio", str(examples / "ni_hao.wav")]
    result = json.loads(call(commands, tmp_path, "run", *given, "--to", "out.mp4", "--json", timeout=300))
    assert result["complete"]
    assert (tmp_path / "out.mp4").stat().st_size > 50_000
