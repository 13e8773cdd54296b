"""What the tests of HTTP serve: the real application over jobs and sessions that do no work.

Keys, inputs, hub and settings are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import ipaddress
import itertools
import time
import wave
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from audio.decode import PcmFormat
from audio.errors import AvatardError
from service.app import App
from service.auth import Keys
from service.commands import Refusal
from service.config import Settings, load_settings
from service.hub import Hub
from service.inputs import Inputs
from service.store import Job

BASE = "http://127.0.0.1:8000"
TOKENS = {name: f"{name}-token-0123456789abcdef" for name in ("read", "jobs", "live", "admin")}


class FakeJobs:
    """Takes jobs, and lets the test decide what becomes of them."""

    def __init__(self, settings: Settings, hub: Hub, inputs: Inputs) -> None:
        self._settings, self._hub, self._inputs = settings, hub, inputs
        self.jobs: dict[str, Job] = {}
        self.commands: dict[str, Any] = {}
        self.paused: str | None = None

    async def submit(self, command, origin=None):
        if self.paused is not None:
            raise Refusal("paused", f"no job is taken: {self.paused}", 30.0)
        if command.name is not None:
            self._inputs.allowed_output(command.name)
            if any(other.name == command.name and id != command.id for id, other in self.commands.items()):
                raise Refusal("conflict", f"name: {command.name}: is the file of another job; choose another one")
        for source, kind in ((command.image, "image"), (command.audio, "audio")):
            if source is not None:
                await self._inputs.fetch(source, kind)
        id = command.id or f"job-{len(self.jobs) + 1}"
        if id in self.jobs:
            if self.commands[id] != command:
                raise Refusal("conflict", f"job {id}: there is another one of this id")
            return self.jobs[id], False
        if (await self.counts())["queued"] >= self._settings.jobs.queue:
            raise Refusal("full", f"{self._settings.jobs.queue} jobs wait, which is the limit", 7.0)
        self.commands[id] = command
        self.jobs[id] = Job(
            id,
            priority=command.priority,
            request=command.model_dump(mode="json"),
            seed=command.seed or 0,
            created_at=1_700_000_000.0 + len(self.jobs),
            origin=origin or {},
        )
        return self.jobs[id], True

    async def get(self, id):
        if id not in self.jobs:
            raise Refusal("not found", f"job {id}: there is none")
        return self.jobs[id]

    async def list(self, *, state=None, limit=100, after=None):
        found = [job for job in reversed(self.jobs.values()) if state in (None, job.state)]
        if after is not None:
            ids = [job.id for job in found]
            found = found[ids.index(after) + 1 :] if after in ids else []
        return found[:limit]

    async def counts(self):
        states = ("queued", "running", "completed", "failed", "cancelled")
        return {state: sum(job.state == state for job in self.jobs.values()) for state in states}

    async def cancel(self, id):
        job = await self.get(id)
        if job.state in ("queued", "running"):
            self.change(id, state="cancelled", finished_at=1_700_000_100.0)
        return self.jobs[id]

    def result_path(self, job):
        return Path(self._settings.daemon.outputs) / job.result["path"]

    def change(self, id: str, what: str | None = None, **fields: Any) -> None:
        """Have something become of a job, and tell it."""
        self.jobs[id] = job = dataclasses.replace(self.jobs[id], **fields)
        self._hub.tell("job", id, what or job.state, frames=job.frames, total_frames=job.total_frames)

    def complete(self, id: str, data: bytes = b"0123456789" * 100, name: str | None = None) -> Path:
        """As when the model has worked."""
        path = Path(self._settings.daemon.outputs) / (name or f"{id}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        made = {"path": name or f"{id}.mp4", "bytes": len(data), "sha256": "0" * 64, "seconds": 1.0, "frames": 25}
        made |= {"width": 64, "height": 64, "fps": 25}
        self.change(id, state="completed", frames=25, total_frames=25, result=made, finished_at=1_700_000_100.0)
        return path


class FakeFeed:
    def __init__(self, session: FakeSession, format: str) -> None:
        self._session = session
        if format != "opus:48000:1":
            PcmFormat.parse(format)

    async def bytes(self, data: bytes) -> None:
        if data == b"not opus":
            raise Refusal("invalid", "this packet is not Opus")
        await self._session.room.wait()
        self._session.heard.append(data)


class FakeSession:
    """Remembers what it was told. `room` cleared: it takes no more sound."""

    view_type = 'video/mp4; codecs="avc1.42c01e, mp4a.40.2"'

    def __init__(self, id: str, hub: Hub, inputs: Inputs, folder: Path) -> None:
        self.id, self._hub, self._inputs = id, hub, inputs
        self.hls_folder: Path | None = folder
        self.heard: list[bytes] = []
        self.said: list[tuple[str, str | None]] = []
        self.ended_utterances = 0
        self.outputs: list[str] = []
        self.room = asyncio.Event()
        self.room.set()
        self.viewers = 0
        self.pieces: list[bytes] | None = None
        self.closed = asyncio.Event()

    def status(self):
        return {"id": self.id, "state": "on air", "frames": 12, "outputs": self.outputs, "viewers": self.viewers}

    def feed(self, format):
        return FakeFeed(self, format)

    async def say(self, text, voice=None):
        await self.room.wait()
        self.said.append((text, voice))

    def utterance_ended(self):
        self.ended_utterances += 1

    def interrupt(self):
        self._hub.tell("session", self.id, "interrupted", played_s=1.5, dropped_s=0.5)
        return {"played_s": 1.5, "dropped_s": 0.5}

    async def set(self, image, prompt):
        if image is not None:
            await self._inputs.fetch(image, "image")

    async def add_output(self, target):
        await self._inputs.check_target(target)
        self.outputs.append(target.rpartition("/")[0] + "/***")
        return self.outputs[-1]

    async def remove_output(self, name):
        if name not in self.outputs:
            raise Refusal("not found", f"output {name}: there is none")
        self.outputs.remove(name)

    async def close(self):
        self.closed.set()
        self._hub.tell("session", self.id, "closed")
        return self.status()

    def view(self):
        if self.viewers >= 2:
            raise Refusal("full", "2 viewers watch, which is the limit")
        return FakeView(self)


class FakeView:
    """A beginning, and fragments; holds a viewer's place until it is closed."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session
        session.viewers += 1
        self._open = True
        self._pieces = self._made()

    async def _made(self) -> AsyncIterator[bytes]:
        yield b"beginning"
        if self._session.pieces is not None:
            for piece in self._session.pieces:
                yield piece
            return
        for number in itertools.count():
            yield b"fragment %d" % number + bytes(50_000)
            await asyncio.sleep(0.001)

    def __aiter__(self) -> FakeView:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        self._session.viewers -= self._open
        self._open = False


class FakeSessions:
    def __init__(self, settings: Settings, hub: Hub, inputs: Inputs) -> None:
        self._settings, self._hub, self._inputs = settings, hub, inputs
        self.sessions: dict[str, FakeSession] = {}

    async def open(self, command):
        if len(self.sessions) >= self._settings.sessions.limit:
            raise Refusal("full", "as many sessions as there may be are on air")
        id = command.id or f"session-{len(self.sessions) + 1}"
        if id in self.sessions:
            raise Refusal("conflict", f"session {id}: there is one")
        if command.image is not None:
            await self._inputs.fetch(command.image, "image")
        for target in command.outputs:
            await self._inputs.check_target(target)
        folder = Path(self._settings.daemon.outputs) / "hls"
        self.sessions[id] = FakeSession(id, self._hub, self._inputs, folder)
        self._hub.tell("session", id, "opening")
        return self.sessions[id]

    def get(self, id):
        if id not in self.sessions:
            raise Refusal("not found", f"session {id}: there is none")
        return self.sessions[id]

    def list(self):
        return list(self.sessions.values())


@dataclass
class FakeEngine:
    state: str = "ready"
    spec: Any = None


@dataclass
class FakeMetrics:
    requests: list[tuple[str, str, int]] = field(default_factory=list)

    def request(self, route, method, status, seconds):
        assert seconds >= 0
        self.requests.append((route, method, status))

    def text(self):
        return b"# HELP avatard_up it is\navatard_up 1\n"


async def no_names(host: str, port: int) -> list[str]:
    """A resolver that knows addresses and no names, and asks nobody."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError as error:
        raise OSError(f"{host}: no such host") from error


def make_app(folder: Path, *assignments: str, tokens: bool = False) -> App:
    """An application whose folders lie below `folder`; with tokens, those of TOKENS are known."""
    for name in ("outputs", "state", "pictures"):
        (folder / name).mkdir(exist_ok=True)
    more = []
    if tokens:
        sections = []
        for name, token in TOKENS.items():
            file = folder / f"{name}.token"
            file.write_text(token)
            file.chmod(0o600)
            sections.append(f"{{name: {name}, scopes: [{name}], file: {file}}}")
        more.append(f"auth.tokens=[{', '.join(sections)}]")
    settings = load_settings(
        None,
        [
            f"daemon.outputs={folder / 'outputs'}",
            f"daemon.state={folder / 'state'}",
            f"inputs.roots=[{folder / 'pictures'}]",
            "auth.requests_per_minute=1000000",
            "auth.failures_per_minute=1000000",
            "http.port=0",
            *more,
            *assignments,
        ],
    )
    hub = Hub()
    inputs = Inputs(settings, resolve=no_names)
    return App(
        settings=settings,
        hub=hub,
        metrics=FakeMetrics(),  # type: ignore[arg-type]
        inputs=inputs,
        engine=FakeEngine(),  # type: ignore[arg-type]
        turns=None,  # type: ignore[arg-type]
        jobs=FakeJobs(settings, hub, inputs),  # type: ignore[arg-type]
        sessions=FakeSessions(settings, hub, inputs),  # type: ignore[arg-type]
        voice=None,
        keys=Keys.load(settings),
    )


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def client_of(http: Any, **options: Any) -> httpx.AsyncClient:
    """Calls an application without a network."""
    transport = httpx.ASGITransport(http, raise_app_exceptions=options.pop("raise_app_exceptions", True))
    return httpx.AsyncClient(transport=transport, base_url=BASE, **options)


@contextlib.asynccontextmanager
async def served(app: App) -> AsyncIterator[str]:
    """The application on a free loopback port; its address, without http://."""
    from service.http import serve_http

    with app.hub.listen() as news:
        serving = asyncio.create_task(serve_http(app))
        first = asyncio.create_task(anext(news))  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(10):
                await asyncio.wait({serving, first}, return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
                listening = await first
            yield str(listening.body["url"]).removeprefix("http://")
        finally:
            first.cancel()
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError, AvatardError):
                await serving


def sound(seconds: float = 0.1) -> bytes:
    """A small WAV."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes((np.sin(np.arange(round(seconds * 16_000)) / 9) * 9000).astype("<i2").tobytes())
    return file.getvalue()


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 140)).save(file, kind)
    return file.getvalue()


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """How long what is inside took, in seconds."""
    took: list[float] = []
    began = time.monotonic()
    yield took
    took.append(time.monotonic() - began)
