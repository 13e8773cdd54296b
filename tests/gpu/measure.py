"""All that is said of the full-size model on a GPU, measured again: docs/performance.md, docs/placement.md.

    python tests/gpu/measure.py FOLDER [--only same,budgets] [--minutes 15]

Each task runs in a process of its own, one at a time on every GPU that is there, each with its share of the cores. What
it says lies in FOLDER/TASK.log at once; when it has ended, its result lines are printed. Nothing is begun that is known
to last longer than what is left of the time; what still runs when that is over is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = shlex.quote(sys.executable)
BENCH = f"{PYTHON} -m avatar.gpu_bench"
RUN = f"{PYTHON} -m service.cli run --json --overwrite --image examples/presenter.png"


@dataclass(frozen=True)
class Task:
    """A shell command, run in the checkout with $OUT for its files, and about how many seconds it takes on an H200."""

    command: str
    seconds: int


TASKS = {
    # The longest first, so that several GPUs end at about the same time.
    "ten-minutes": Task(f"{BENCH} plans --cases all8-merged-640 --seconds 600", 590),
    "broadcast": Task(
        f"{PYTHON} tests/gpu/measure.py --speak 340 | {RUN} --model live-avatar-14b --random-weights"
        " --audio - --format s16le:16000:1 --to $OUT/live.mp4",
        390,
    ),
    "budgets": Task(f"{BENCH} plans --cases all8-24GiB,all8-12GiB,bf16-48GiB --seconds 12", 190),
    "resident": Task(f"{BENCH} plans --cases all8-wavefront,all8,bf16,all8-merged,all8-24GiB-sequential", 250),
    "cold": Task(
        f"rm -rf $OUT/model; {PYTHON} tests/published.py $OUT/model && for i in 1 2; do date +%s.%N;"
        f" {RUN} --model $OUT/model"
        " --audio examples/welcome.wav --prompt 'A person speaks.' --set model.options.schedule=sequential"
        " --to $OUT/cold$i.mp4; date +%s.%N; done; rm -r $OUT/model",
        280,
    ),
    "same": Task(f"{BENCH} same --modes bf16+fused,float8+attention8+fused", 100),
    "tests": Task(f"{PYTHON} -m pytest -q -m gpu -p no:cacheprovider tests/gpu", 80),
}


def speak(seconds: float) -> None:
    """A tone that swells, 16 bits at 16 kHz, on stdout at the pace of a voice."""
    began, rate, piece = time.monotonic(), 16_000, 320
    for n in range(round(seconds * rate / piece)):
        at = (np.arange(piece) + n * piece) / rate
        tone = 6000 * (1 + np.sin(8 * np.pi * at)) * np.sin(300 * np.pi * at)
        sys.stdout.buffer.write(tone.astype("<i2").tobytes())
        sys.stdout.buffer.flush()
        time.sleep(max(0.0, began + (n + 1) * piece / rate - time.monotonic()))


class Lanes:
    """One for each GPU; each takes the next task that there is still time for."""

    def __init__(self, folder: Path, names: list[str], seconds: float) -> None:
        self._folder, self._waiting = folder, deque(names)
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def end(self, *_: object) -> None:
        """Nothing goes on without us: it would be measured beside what is measured next."""
        for process in list(self._running):
            os.killpg(process.pid, signal.SIGKILL)
        os._exit(1)

    def run(self) -> None:
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.splitlines()
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // len(gpus)
        lanes = [
            threading.Thread(target=self._lane, args=(gpu, cores[gpu * share : (gpu + 1) * share]))
            for gpu in range(len(gpus))
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()

    def _lane(self, gpu: int, cores: list[int]) -> None:
        while (name := self._next()) is not None:
            log, files = self._folder / f"{name}.log", self._folder / name
            files.mkdir(exist_ok=True)
            environment = {"CUDA_VISIBLE_DEVICES": str(gpu), "OUT": str(files), "PYTHONPATH": self._path()}
            began = time.monotonic()
            with log.open("w") as out:
                process = subprocess.Popen(
                    ["taskset", "-c", ",".join(map(str, cores)), "bash", "-c", TASKS[name].command],
                    env={**os.environ, **environment},
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
                self._running.add(process)
                try:
                    status = process.wait(max(0.0, self._end - began))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    status = process.wait()
                self._running.discard(process)
            self._say(name, f"status {status} after {time.monotonic() - began:.0f} s on GPU {gpu}", log)

    def _next(self) -> str | None:
        with self._lock:
            left = self._end - time.monotonic()
            name = next((name for name in self._waiting if TASKS[name].seconds <= left), None)
            if name is not None:
                self._waiting.remove(name)
            return name

    @staticmethod
    def _path() -> str:
        return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    def _say(self, name: str, what: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()
        results = [line for line in lines if line.startswith("{")][-8:] or lines[-5:]
        with self._lock:
            print(f"== {name}: {what}", *map(_short, results), sep="\n", flush=True)


def _short(line: str) -> str:
    """A line of results without what is long."""
    try:
        found = json.loads(line)
    except ValueError:
        return line
    long = {name for name, value in found.items() if isinstance(value, list | dict) and len(str(value)) > 300}
    return json.dumps({name: value for name, value in found.items() if name not in long})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-figures"))
    parser.add_argument("--speak", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--only", default=",".join(TASKS), help="of: " + ", ".join(TASKS))
    parser.add_argument("--minutes", type=float, default=40.0)
    chosen = parser.parse_args()
    if chosen.speak is not None:
        return speak(chosen.speak)
    names = [name for name in TASKS if name in chosen.only.split(",")]
    chosen.folder.mkdir(parents=True, exist_ok=True)
    lanes = Lanes(chosen.folder.resolve(), names, 60 * chosen.minutes)
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ending, lanes.end)
    return lanes.run()


if __name__ == "__main__":
    main()
