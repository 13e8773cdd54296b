"""What the tests of the command line share: the command itself, a picture, a sound, and the toy model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mp4 import clicks_at, write_sound
from PIL import Image

TOY = str(Path(__file__).parent.parent / "toy_model.py") + ":load"
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Workplace:
    """A folder with a picture and a sound, in which the command runs as a user would run it."""

    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "presenter.png"

    @property
    def audio(self) -> Path:
        return self.folder / "speech.wav"

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "service.cli", *map(str, arguments)]

    def run_command(self, *extra: object, **replaced: object) -> list[str]:
        """`avatard run` on the toy, with these options instead of the usual ones."""
        options = {"image": self.image, "audio": self.audio, "to": self.folder / "out.mp4", "model": TOY} | replaced
        return self.command("run", *(f"--{name}={value}" for name, value in options.items()), *extra)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}

    def call(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=self.environment(), timeout=60, **options
        )

    def run(self, *extra: object, **replaced: object) -> subprocess.CompletedProcess[str]:
        return self.call(self.run_command(*extra, **replaced))

    def spawn(self, *extra: object, **replaced: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.run_command(*extra, **replaced),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment(),
        )

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"presenter.png", "speech.wav"}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    folder = tmp_path / "place"
    folder.mkdir()
    workplace = Workplace(folder)
    Image.new("RGB", (300, 400), (90, 120, 140)).save(workplace.image)
    write_sound(workplace.audio, clicks_at([1.0], 3.0), 16_000)
    return workplace


@pytest.fixture
def long_speech(place: Workplace) -> Callable[[float], Path]:
    """A longer sound, so that a run can be met in its middle."""
    return lambda seconds: write_sound(place.folder / "speech.wav", clicks_at([], seconds), 16_000)
