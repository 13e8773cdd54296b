"""What a process and its children take of the machine over hours: memory, threads, descriptors, processes, CPU.

python tests/procs.py PID [SECONDS]      watches, then prints what it saw as JSON
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import psutil

MOST_SAMPLES = 4000
"""Beyond them every second one is forgotten: hours are watched as evenly as minutes, in the same memory."""

MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """A process tree at one moment (monotonic seconds). Sums over its processes; cpu_s counts those that ended, too.

    rss counts what processes share once for each; uss is what would be free again if they ended.
    """

    at_s: float
    rss: int
    uss: int
    threads: int
    descriptors: int
    processes: int
    zombies: int
    cpu_s: float


class ProcessWatch:
    """Samples a process tree from a thread, until it has ended or the watch is over. Use as a context manager.

    every_s: between samples; uss costs the kernel a walk over all pages, so do not ask many times a second.
    """

    def __init__(self, pid: int, every_s: float = 1.0) -> None:
        self._root = psutil.Process(pid)
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process watch", daemon=True)
        self._samples: list[Sample] = []
        self._cpu_s: dict[tuple[int, float], float] = {}
        self.peak_rss: dict[str, int] = {}
        """Bytes, by what `role` says of a process."""

    def __enter__(self) -> ProcessWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    @property
    def samples(self) -> list[Sample]:
        return list(self._samples)

    def sample(self) -> Sample | None:
        """One more, now; None: the process is gone."""
        found = self._look()
        if found is not None:
            self._samples.append(found)
            if len(self._samples) > MOST_SAMPLES:
                del self._samples[1::2]
                self._every_s *= 2
        return found

    def slope(self, name: str, skip_s: float = 0.0) -> float:
        """How a figure grows, per hour: the median of the slopes between its halves, deaf to single peaks.

        skip_s: leave out the beginning, in which things are loaded.
        """
        samples = self._after(skip_s)
        if len(samples) < 4:
            raise ValueError(f"{len(samples)} samples are too few for a slope")
        at = np.array([sample.at_s for sample in samples])
        values = np.array([getattr(sample, name) for sample in samples], np.float64)
        half = len(samples) // 2
        # Each sample of the first half with its counterpart in the second: all pairs are equally far apart.
        slopes = (values[-half:] - values[:half]) / (at[-half:] - at[:half])
        return float(np.median(slopes) * 3600)

    def most(self, name: str, skip_s: float = 0.0) -> float:
        return float(max(getattr(sample, name) for sample in self._after(skip_s)))

    def summary(self, skip_s: float = 0.0) -> dict[str, Any]:
        """For a report: of each figure the first, the last, the most and the slope per hour; bytes in MiB."""
        samples = self._after(skip_s)
        told: dict[str, Any] = {"seconds": round(samples[-1].at_s - samples[0].at_s, 1), "samples": len(samples)}
        for name in (field.name for field in fields(Sample) if field.name not in ("at_s", "cpu_s")):
            unit = MIB if name in ("rss", "uss") else 1
            first, last = (getattr(sample, name) / unit for sample in (samples[0], samples[-1]))
            figures = {"first": first, "last": last, "most": self.most(name, skip_s) / unit}
            if len(samples) >= 4:
                figures["per_hour"] = self.slope(name, skip_s) / unit
            told[name] = {key: round(value, 2) for key, value in figures.items()}
        wall = samples[-1].at_s - samples[0].at_s
        told["cores"] = round((samples[-1].cpu_s - samples[0].cpu_s) / wall, 3) if wall else 0.0
        told["peak_rss_mib"] = {name: round(size / MIB, 1) for name, size in self.peak_rss.items()}
        return told

    def _after(self, skip_s: float) -> list[Sample]:
        samples = self.samples
        return [sample for sample in samples if sample.at_s - samples[0].at_s >= skip_s]

    def _run(self) -> None:
        while not self._over.is_set():
            if self.sample() is None:
                break
            self._over.wait(self._every_s)

    def _look(self) -> Sample | None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
            if self._root.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        rss = uss = threads = descriptors = zombies = alive = 0
        for process in processes:
            try:
                with process.oneshot():
                    if process.status() == psutil.STATUS_ZOMBIE:
                        zombies += 1
                        continue
                    memory = process.memory_full_info()
                    times = process.cpu_times()
                    threads += process.num_threads()
                    descriptors += process.num_fds()
                    name = role(process)
                    identity = (process.pid, process.create_time())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            alive += 1
            rss, uss = rss + memory.rss, uss + memory.uss
            self.peak_rss[name] = max(self.peak_rss.get(name, 0), memory.rss)
            self._cpu_s[identity] = times.user + times.system
        return Sample(time.monotonic(), rss, uss, threads, descriptors, alive, zombies, sum(self._cpu_s.values()))


def role(process: psutil.Process) -> str:
    """What a process is: the module it was started with (`python -m MODULE`), else the program's name."""
    command = process.cmdline()
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    return process.name()


def children(pid: int, of_role: str) -> list[int]:
    """The pids of a process's descendants with this role, oldest first."""
    found: list[tuple[float, int]] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE and role(process) == of_role:
                    found.append((process.create_time(), process.pid))
    return [pid for _, pid in sorted(found)]


def command_lines(pid: int) -> list[str]:
    """The command lines and environments of a process tree, as every process of the same user can read them."""
    seen = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            seen.append(" ".join([*process.cmdline(), *(f"{k}={v}" for k, v in process.environ().items())]))
    return seen


class LoopWatch:
    """How long the running event loop was not free: a heartbeat in it, whose worst delay is kept.

    worst_s: of all; beats: how many there were. A busy machine delays a thread by itself: measure that too.
    """

    EVERY_S = 0.005

    def __init__(self) -> None:
        self.worst_s = 0.0
        self.beats = 0

    async def __aenter__(self) -> LoopWatch:
        self._task = asyncio.create_task(self._beat(), name="heartbeat")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _beat(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(self.EVERY_S)
            now = time.monotonic()
            self.worst_s = max(self.worst_s, now - last - self.EVERY_S)
            self.beats += 1
            last = now


def main() -> None:
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    with ProcessWatch(int(sys.argv[1])) as watch:
        time.sleep(seconds)
    print(json.dumps(watch.summary() | {"last": asdict(watch.samples[-1])}, indent=2))


if __name__ == "__main__":
    main()
