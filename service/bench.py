"""How fast a run is, stage by stage, and how its memory stays: measured on real runs of `avatard run`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from audio.errors import AvatardError
from service.config import Settings, reference_yaml
from service.run import RunRequest, RunResult, Watcher, run
from streaming.engine_process import child_environment

if TYPE_CHECKING:
    from streaming.session import Progress

RATE = 16_000


def example(name: str) -> Path:
    """A picture or sound that comes with the package."""
    return Path(str(resources.files("examples").joinpath(name)))


def speed(settings: Settings, image: Path, audio: Path, seconds: float) -> RunResult:
    """One run over that many seconds of sound (repeated or cut), as a command of its own, from a cold start.

    The times are seen from outside: with the start of Python, and the first frame a little too late rather than early.
    Raises: AvatardError: what the command said.
    """
    _check("--seconds", seconds)
    with tempfile.TemporaryDirectory(prefix="avatard-bench-") as scratch:
        folder = Path(scratch)
        sound = _repeated(audio, folder / "sound.wav", seconds)
        (folder / "settings.yaml").write_text(reference_yaml(settings, comments=False), encoding="utf-8")
        options = {"image": image, "audio": sound, "to": folder / "out.mp4", "config": folder / "settings.yaml"}
        command = [
            sys.executable,
            "-P",
            "-m",
            "service.cli",
            "run",
            "--json",
            *(f"--{k}={v}" for k, v in options.items()),
        ]
        began = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        wall_s = time.monotonic() - began
    if process.returncode:
        raise AvatardError(process.stderr.strip().removeprefix("avatard: "))
    result = RunResult(**json.loads(process.stdout))
    outside_s = wall_s - result.wall_s
    return replace(
        result,
        wall_s=round(wall_s, 3),
        first_frame_s=round((result.first_frame_s or 0.0) + outside_s, 3),
        times_real_time=round(result.seconds / wall_s, 3),
    )


def stages(settings: Settings, blocks: int = 30) -> dict[str, float]:
    """Median milliseconds a block spends in each stage of the embedded model, alone in a process; {} for others."""
    if settings.model.name != "pocket":
        return {}
    steps = [] if settings.model.steps is None else [f"--steps={settings.model.steps}"]
    command = [sys.executable, "-P", "-m", "avatar.pocket.stages", f"--blocks={blocks}", *steps]
    process = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=True)
    found: dict[str, float] = json.loads(process.stdout)
    return found


def stage_lines(stages: Mapping[str, float]) -> list[str]:
    """The stages of a block, each with its share."""
    whole = sum(stages.values())
    return [f"    {stage:<28}  {ms:8.1f} ms, {ms / whole:.0%}" for stage, ms in stages.items()]


def speed_lines(result: RunResult, stages: Mapping[str, float], frames_per_block: int = 12, fps: int = 25) -> list[str]:
    """The result of `speed` for people, with each figure beside its limit."""
    blocks = max(1, -(-result.frames // frames_per_block))
    block_ms = 1000 * frames_per_block / fps
    return [
        f"model {result.model}, {result.width}x{result.height}, {result.seconds:g} s of video, {os.cpu_count()} cores",
        f"  command to first encoded block  {result.first_frame_s or 0:8.2f} s",
        f"  of that, loading the model      {result.load_s:8.2f} s",
        f"  model, each block               {1000 * result.model_s / blocks:8.1f} ms of {block_ms:.0f} ms",
        *stage_lines(stages),
        f"  sound and encoder, each block   {1000 * result.encode_s / blocks:8.1f} ms (beside the model)",
        f"  frames after the first block    {result.fps:8.1f} fps, {result.fps / fps:.2f} x real time",
        f"  command to finished file        {result.wall_s:8.2f} s, {result.times_real_time:.2f} x real time",
    ]


@dataclass(frozen=True)
class MemorySample:
    """Resident memory after so many seconds of video, in MB: of the command and of the model's process."""

    seconds: float
    command_mb: float
    model_mb: float


@dataclass
class MemoryCurve(Watcher):
    """Samples the memory of a run every `every_s` seconds of video."""

    every_s: float
    fps: int = 25
    samples: list[MemorySample] = field(default_factory=list)

    def advanced(self, progress: Progress) -> None:
        seconds = progress.frames / self.fps
        if seconds >= self.every_s * (len(self.samples) + 1):
            self.samples.append(MemorySample(seconds, _resident_mb(os.getpid()), sum(map(_resident_mb, _children()))))

    def growth(self) -> float:
        """How much more both hold at the last sample than at the first, as a share of the first."""
        first, last = self.samples[0], self.samples[-1]
        return (last.command_mb + last.model_mb) / (first.command_mb + first.model_mb) - 1


def memory(settings: Settings, image: Path, audio: Path, seconds: float, every_s: float) -> MemoryCurve:
    """The memory of one run over that many seconds of sound. Raises: AvatardError: not measurable here."""
    if not Path("/proc/self/statm").exists():
        raise AvatardError("bench memory: reads /proc, which only Linux has")
    _check("--seconds", seconds)
    _check("--every", every_s)
    curve = MemoryCurve(every_s)
    with tempfile.TemporaryDirectory(prefix="avatard-bench-") as folder:
        sound = _repeated(audio, Path(folder) / "sound.wav", seconds)
        run(RunRequest(image, sound, (str(Path(folder) / "out.mp4"),)), settings, curve, time.monotonic())
    if not curve.samples:
        raise AvatardError(f"bench memory: --every {every_s:g}: longer than the video of {seconds:g} s")
    return curve


def memory_lines(curve: MemoryCurve) -> list[str]:
    """The curve for people: a line for each sample, and the growth."""
    lines = ["  video s   command MB   model MB   together MB"]
    for sample in curve.samples:
        together = sample.command_mb + sample.model_mb
        lines.append(f"{sample.seconds:9.0f} {sample.command_mb:12.1f} {sample.model_mb:10.1f} {together:13.1f}")
    return [*lines, f"growth from the first to the last: {100 * curve.growth():+.2f} %"]


def _check(option: str, seconds: float) -> None:
    """Raises: AvatardError: not a length of time."""
    if not 0 < seconds < math.inf:
        raise AvatardError(f"{option} {seconds:g}: not a length in seconds; give a number above 0, such as 30")


def _repeated(audio: Path, target: Path, seconds: float) -> Path:
    """A mono file of that length: the sound over and over, without holding it in memory."""
    import soundfile

    from audio.decode import open_sound

    left = round(seconds * RATE)
    with soundfile.SoundFile(target, "w", RATE, 1) as file:
        while left > 0:
            for chunk in open_sound(audio).chunks(RATE):
                file.write(chunk.samples[:left])
                left -= len(chunk.samples[:left])
                if not left:
                    break
    return target


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _children() -> list[int]:
    """The processes that this one started: the model's."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
