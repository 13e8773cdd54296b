"""`avatard run`, live, as a user has it: a command with a voice on its input and events on its output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import procs
from PIL import Image
from speech import Speaker, Speech
from waiting import until

ROOT = Path(__file__).parent.parent
TOY = f"{Path(__file__).parent / 'toy_model.py'}:load"
FLASHING = f"{Path(__file__).parent / 'toy_model.py'}:load_flashing"

ENGINE = "streaming.engine_child"
PUBLISHER = "streaming.publish"


@dataclass(frozen=True)
class Event:
    """One line of `--json`. at_s: when it was read, in monotonic seconds."""

    at_s: float
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.fields.get("event", ""))

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]


class Live:
    """The command at work. Use as a context manager: whatever is left of it at the end is killed.

    Args:
        folder: where it runs and where a picture is made for it.
        to: its targets. audio: what `--audio` says; "-" is a pipe that `speak` writes into. format: of that pipe.
        model: FILE.py:FUNCTION or a name. more: further words of the command line.
    """

    def __init__(
        self,
        folder: Path,
        to: Sequence[str | Path],
        *more: str,
        audio: str = "-",
        format: str | None = "s16le:16000:1",
        model: str = TOY,
        image: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._command = [
            *(sys.executable, "-m", "service.cli", "run", "--json"),
            *("--image", str(image or _picture(folder))),
            *("--audio", audio, "--model", model),
            *(["--format", format] if format else []),
            *(word for target in to for word in ("--to", str(target))),
            *more,
        ]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
        self._piped = audio == "-"
        self._events: list[Event] = []
        self._errors: list[str] = []
        self._readers: list[threading.Thread] = []
        self._speaker: Speaker | None = None
        self._input: int | None = None
        self.began_s = 0.0

    def __enter__(self) -> Live:
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE if self._piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=self._environment,
        )
        if self.process.stdin is not None:
            # Whoever writes owns it: two owners of one descriptor would close somebody else's in the end.
            self._input = os.dup(self.process.stdin.fileno())
            self.process.stdin.close()
            self.process.stdin = None
        for take, stream in ((self._take_event, self.process.stdout), (self._take_error, self.process.stderr)):
            reader = threading.Thread(target=_each_line, args=(stream, take), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.poll() is None:
            left = [pid for name in (ENGINE, PUBLISHER) for pid in procs.children(self.process.pid, name)]
            self.process.kill()
            self.process.wait(10)
            for pid in left:
                _kill(pid)
        self._say_no_more()
        for reader in self._readers:
            reader.join(5)
        if error is not None:
            error.add_note(f"the command said:\n{self.errors[-4000:]}\nits last events:\n{self._events[-5:]}")

    # The voice.

    def speak(self, speech: Speech | None = None, seconds: float | None = None, **how: Any) -> Speaker:
        """Begin to speak into its input; at the end, or when stopped, the input is closed. `how`: see `Speaker`."""
        assert self._input is not None, "its input is not a pipe, or somebody speaks already"
        self._speaker = Speaker(self._input, speech or Speech(), seconds, **how)
        self._input = None
        return self._speaker.start()

    # What it says.

    @property
    def events(self) -> list[Event]:
        """All events so far."""
        return list(self._events)

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return "".join(self._errors)

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    def wait_for(
        self,
        name: str,
        limit_s: float = 30.0,
        *,
        where: Callable[[Event], bool] = lambda event: True,
        since: Event | None = None,
    ) -> Event:
        """The first event of this name that satisfies `where`, after another one if given.

        Raises: TimeoutError: there was none in that time; EOFError: the command ended without it.
        """
        after = -1 if since is None else self.events.index(since)

        def find() -> Event | None:
            # Asked before looking: what it said last is still found.
            ended = self.process.poll() is not None and not self._readers[0].is_alive()
            for event in self.events[after + 1 :]:
                if event.name == name and where(event):
                    return event
            if ended:
                raise EOFError(f"ended with {self.process.returncode} without {name!r}:\n{self.errors[-2000:]}")
            return None

        found = until(find, limit_s, f"event {name!r}")
        assert found is not None
        return found

    # What is done to it.

    @property
    def pid(self) -> int:
        return self.process.pid

    def engine(self, limit_s: float = 30.0) -> int:
        """The pid of the model's process; waits until there is one."""
        return until(lambda: procs.children(self.pid, ENGINE), limit_s, "the engine")[-1]

    def publishers(self) -> list[int]:
        """The pids of the processes that own connections to servers."""
        return procs.children(self.pid, PUBLISHER)

    def kill_engine(self) -> float:
        """kill -9 of the model's process; when (monotonic seconds)."""
        _kill(self.engine())
        return time.monotonic()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, limit_s: float = 30.0) -> int:
        """Wait for its end; its exit status. Raises: TimeoutError."""
        try:
            status = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"avatard did not end in {limit_s:g} s") from None
        for reader in self._readers:
            reader.join(5)
        return status

    def stop(self, limit_s: float = 30.0) -> int:
        """SIGTERM, and its exit status."""
        self.send(signal.SIGTERM)
        return self.end(limit_s)

    def _say_no_more(self) -> None:
        if self._speaker is not None:
            self._speaker.stop()
        if self._input is not None:
            os.close(self._input)
            self._input = None

    def _take_event(self, line: str) -> None:
        self._events.append(Event(time.monotonic(), json.loads(line)))

    def _take_error(self, line: str) -> None:
        self._errors.append(line)
        del self._errors[:-2000]


def _each_line(stream: Any, take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line.decode(errors="replace"))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _picture(folder: Path) -> Path:
    path = folder / "presenter.png"
    if not path.exists():
        Image.new("RGB", (300, 400), (90, 120, 140)).save(path)
    return path
