"""`avatard serve`, as an operator has it: a command that is started, called over HTTP, told by signals, and killed."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import procs
from waiting import until

ROOT = Path(__file__).parent.parent
TOY = f"{Path(__file__).parent / 'toy_model.py'}:load"
ENGINE = "streaming.engine_child"


class Serve:
    """The daemon on a free port, its state and results below `folder`; start it again for the same state.

    Use as a context manager: whatever is left of it at the end is killed. assignments: as after `--set`.
    notify: whether a socket listens for what it tells systemd. watchdog_s: what systemd asks of it.
    """

    def __init__(
        self,
        folder: Path,
        *assignments: str,
        config: Path | None = None,
        model: str = TOY,
        notify: bool = False,
        watchdog_s: float | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.state, self.outputs = folder, folder / "state", folder / "results"
        own = {
            "model.name": model,
            "daemon.state": self.state,
            "daemon.outputs": self.outputs,
            "http.port": 0,
            "jobs.min_free_gb": 0,
        }
        assignments = (*(f"{key}={value}" for key, value in own.items()), *assignments)
        self._command = [
            *(sys.executable, "-m", "service.cli", "serve"),
            *(("--config", str(config)) if config is not None else ()),
            *(word for assignment in assignments for word in ("--set", assignment)),
        ]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
        self.told: list[str] = []
        """What systemd would have heard, datagram by datagram."""
        self._notified: socket.socket | None = None
        if notify:
            folder.mkdir(parents=True, exist_ok=True)
            # Paths of sockets are short: a name in the abstract space.
            self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._notified.bind(f"\0avatard-test-{os.getpid()}-{id(self)}")
            self._environment["NOTIFY_SOCKET"] = f"@avatard-test-{os.getpid()}-{id(self)}"
            if watchdog_s is not None:
                self._environment["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
            threading.Thread(target=self._hear, name="notify", daemon=True).start()
        self.lines: list[str] = []
        self.process: subprocess.Popen[bytes]
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Serve:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()
        if self._notified is not None:
            self._notified.close()
        if error is not None:
            error.add_note("the daemon said:\n" + "\n".join(self.lines[-60:]))

    # Its life

    def start(self) -> None:
        """Anew, on the state it left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines.clear()
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=self._environment,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, limit_s: float = 30.0) -> int:
        """Wait for its end; its exit status."""
        status = self.process.wait(limit_s)
        if self._reader is not None:
            self._reader.join(5)
        return status

    def stop(self, limit_s: float = 30.0) -> int:
        """SIGTERM, and its exit status."""
        self.send(signal.SIGTERM)
        return self.end(limit_s)

    def kill(self) -> None:
        """kill -9, as a power cut has it; its children, whose input ends, go by themselves or are killed."""
        left = procs.children(self.process.pid, ENGINE)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_engine(self) -> None:
        pid = until(lambda: procs.children(self.process.pid, ENGINE), 30, "the engine")[-1]
        os.kill(pid, signal.SIGKILL)

    # What it says

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def says(self, pattern: str, limit_s: float = 30.0) -> re.Match[str]:
        """The first line of its log that has this. Raises: TimeoutError; EOFError: it ended without it."""

        def found() -> re.Match[str] | None:
            ended = self.process.poll() is not None and self._reader is not None and not self._reader.is_alive()
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            if ended:
                raise EOFError(f"ended with {self.process.returncode} without {pattern!r}:\n{self.text[-3000:]}")
            return None

        match = until(found, limit_s, f"{pattern!r} in the log")
        assert match is not None
        return match

    # HTTP

    @property
    def url(self) -> str:
        return self.says(r"listening on (https?://\S+)")[1]

    def call(self, method: str, path: str, token: str = "", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.request(method, self.url + path, headers=headers, timeout=30, **more)

    def is_ready(self) -> bool:
        return self.call("GET", "/readyz").status_code == 200

    def ready(self, limit_s: float = 60.0) -> Serve:
        until(self.is_ready, limit_s, "ready")
        return self

    def submit(self, audio: Path, **command: Any) -> dict[str, Any]:
        """A job that says what is in a file."""
        data = base64.b64encode(audio.read_bytes()).decode()
        answer = self.call("POST", "/v1/jobs", json={"audio": {"data": data}, **command})
        answer.raise_for_status()
        return dict(answer.json())

    def job(self, id: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/v1/jobs/{id}").raise_for_status().json())

    def finished(self, id: str, limit_s: float = 60.0) -> dict[str, Any]:
        """The job once it has ended, however it did."""

        def ended() -> dict[str, Any] | None:
            job = self.job(id)
            return job if job["state"] in ("completed", "failed", "cancelled") else None

        job = until(ended, limit_s, f"the end of job {id}")
        assert job is not None
        return job

    def result(self, id: str, to: Path) -> Path:
        to.write_bytes(self.call("GET", f"/v1/jobs/{id}/result").raise_for_status().content)
        return to

    def metrics(self) -> dict[str, float]:
        """Samples by their name with labels, as they are written."""
        lines = self.call("GET", "/metrics").raise_for_status().text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                del self.lines[:-5000]

    def _hear(self) -> None:
        assert self._notified is not None
        with contextlib.suppress(OSError):
            while True:
                self.told.append(self._notified.recv(4096).decode())
