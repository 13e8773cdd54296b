"""How a run goes, drawn on a terminal: a bar for a file, one line for a broadcast."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from service.batch import BatchWatcher, Outcome
from service.batch_plan import Item, Step, shown
from service.live import Event, LiveWatcher
from service.run import Watcher

if TYPE_CHECKING:
    from audio.decode import SoundFile
    from streaming.session import Progress as Frames

WINDOW = 12
"""Blocks over which the speed is averaged: about six seconds of video."""


class Bar(Watcher):
    """A progress bar on stderr, for a terminal. Use as a context manager around the run."""

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fps = 25
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            # The last state is replaced by the line that says where the video is.
            transient=True,
        )
        self._task = self._progress.add_task(f"{title}: loading the model", total=None, speed="")
        self._title = title

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def began(self, sound: SoundFile, total_frames: int | None, fps: int) -> None:
        self._fps = fps
        self._progress.update(self._task, description=self._title, total=total_frames)

    def advanced(self, progress: Frames) -> None:
        self._seen.append((self._clock(), progress.frames))
        (since, first), (now, last) = self._seen[0], self._seen[-1]
        rate = (last - first) / (now - since) if now > since else 0.0
        speed = f"{rate:.1f} fps, {rate / self._fps:.2f} x real time" if rate else ""
        self._progress.update(self._task, completed=progress.frames, speed=speed)


class BatchBars(BatchWatcher):
    """Bars for a whole batch and for what is being made, and a line for each failure, on stderr, for a terminal.

    Use as a context manager around the batch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._whole = self._progress.add_task("looking at the sounds", total=None, note="")
        self._slots: dict[int, TaskID] = {}
        self._seen: dict[int, deque[tuple[float, int]]] = {}
        self._failed = 0

    def __enter__(self) -> BatchBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def looked(self, number: int, items: int) -> None:
        self._progress.update(self._whole, completed=number, total=items)

    def planned(self, steps: Sequence[Step]) -> None:
        self._progress.update(self._whole, description="all", completed=0, total=len(steps))

    def began(self, slot: int, item: Item) -> None:
        if slot not in self._slots:
            self._slots[slot] = self._progress.add_task("", total=None, note="")
        self._seen[slot] = deque(maxlen=WINDOW)
        self._progress.reset(self._slots[slot], description=shown(item.name), total=None, note="")

    def advanced(self, slot: int, frames: int, total: int | None) -> None:
        seen = self._seen[slot]
        seen.append((self._clock(), frames))
        (since, first), (now, last) = seen[0], seen[-1]
        note = f"{(last - first) / (now - since):.1f} fps" if now > since else ""
        self._progress.update(self._slots[slot], completed=frames, total=total, note=note)

    def ended(self, slot: int | None, outcome: Outcome) -> None:
        if outcome.state == "failed":
            self._failed += 1
            self._console.print(f"{shown(outcome.item.name)}: {outcome.error}", markup=False, highlight=False)
        self._progress.update(self._whole, advance=1, note=f"{self._failed} failed" if self._failed else "")


class StatusLine(LiveWatcher):
    """The state of a broadcast on stderr, for a terminal. Use as a context manager around it."""

    def __init__(self) -> None:
        self._live = Live(Text("loading the model"), console=Console(stderr=True), transient=True)

    def __enter__(self) -> StatusLine:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def event(self, event: Event) -> None:
        if "outputs" in event:
            self._live.update(Text(status_text(event)))


def status_text(event: Event) -> str:
    """A broadcast's event in words: one line for the whole, one for each output."""
    air = "ON AIR" if event["on_air"] else "warming up"
    seconds = event["frames"] // 25
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    doing = "speaking" if event["speaking"] else "idle"
    halved = "  half rate" if event["half_rate"] else ""
    lines = [
        f"{air} {clock}  {doing}  ahead {event['ahead_s']:.2f} s  load {event['load']:.0%}{halved}  "
        f"skew {1000 * event['skew_s']:.0f} ms  held {event['held']}  engine {event['engine']} "
        f"({event['engine_restarts']} restarts)"
    ]
    for output in event["outputs"]:
        problem = f"  {output['last_error']}" if output["last_error"] and output["state"] != "sending" else ""
        lines.append(
            f"  {output['name']}  {output['state']}  sent {output['sent_s']:.0f} s  behind {output['backlog_s']:.1f} s"
            f"  dropped {output['dropped_frames']}  reconnects {output['reconnects']}{problem}"
        )
    return "\n".join(lines)
