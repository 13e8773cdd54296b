"""The MQTT trigger against a real broker: what is answered, what is told, and what survives whom."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mosquitto import Caller, Mosquitto

from service import mqtt_broker
from service.commands import OpenSession, Refusal, SubmitJob
from service.config import Settings, load_settings
from service.hub import Hub
from service.mqtt import serve_mqtt

pytestmark = pytest.mark.needs("mosquitto")


@dataclasses.dataclass(frozen=True)
class Job:
    """As in service/store.py."""

    id: str
    state: str
    priority: str
    request: dict[str, Any]
    attempts: int
    frames: int
    total_frames: int | None
    seed: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    result: dict[str, Any] | None
    error: str | None
    error_type: str | None
    origin: dict[str, Any]


class Desk:
    """Jobs without an engine: they stay queued until the test says otherwise."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.jobs: dict[str, Job] = {}
        self.digests: dict[str, str] = {}
        self.paused: str | None = None
        self.refuses: Exception | None = None
        self.slow = asyncio.Event()
        self.slow.set()
        self.submissions = 0

    async def submit(self, command: SubmitJob, origin: dict[str, Any]) -> tuple[Job, bool]:
        self.submissions += 1
        await self.slow.wait()
        if self.refuses is not None:
            raise self.refuses
        assert command.id is not None
        digest = hashlib.sha256(command.model_dump_json().encode()).hexdigest()
        if command.id in self.jobs:
            if self.digests[command.id] != digest:
                raise Refusal("conflict", f"job {command.id}: is there already, and asks for something else")
            return self.jobs[command.id], False
        self.digests[command.id] = digest
        job = Job(
            id=command.id, state="queued", priority=command.priority, request=command.model_dump(), attempts=0,
            frames=0, total_frames=None, seed=command.seed or 0, created_at=time.time(), started_at=None, finished_at=None,
            result=None, error=None, error_type=None, origin=origin,
        )  # fmt: skip
        self.jobs[command.id] = job
        self.hub.tell("job", job.id, "queued")
        return job, True

    def becomes(self, id: str, state: str, content: bytes = b"", **changes: Any) -> None:
        if state == "completed":
            path = self.folder / f"{id}.mp4"
            path.write_bytes(content)
            changes["result"] = {
                "path": path.name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "frames": 12,
            }
        self.jobs[id] = dataclasses.replace(self.jobs[id], state=state, **changes)
        self.hub.tell("job", id, state)

    async def get(self, id: str) -> Job:
        if id not in self.jobs:
            raise Refusal("not found", f"job {id}: there is none")
        return self.jobs[id]

    async def cancel(self, id: str) -> Job:
        await self.get(id)
        self.becomes(id, "cancelled")
        return self.jobs[id]

    async def counts(self) -> dict[str, int]:
        return {"queued": len(self.jobs)}

    def result_path(self, job: Job) -> Path:
        assert job.result is not None
        return self.folder / job.result["path"]


class Keeper:
    """Uploads without a check of what they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def keep(self, stream: AsyncIterator[bytes], kind: str, name: str = "") -> Path:
        data = b"".join([part async for part in stream])
        if not data:
            raise Refusal("invalid", f"{name}: is empty")
        path = self.folder / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        return path


class Stage:
    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.sessions: dict[str, Player] = {}

    async def open(self, command: OpenSession) -> Player:
        if command.id in self.sessions:
            raise Refusal("conflict", f"session {command.id}: is open already")
        session = Player(command.id or "fresh", self)
        self.sessions[session.id] = session
        self.hub.tell("session", session.id, "opening")
        return session

    def get(self, id: str) -> Player:
        if id not in self.sessions:
            raise Refusal("not found", f"session {id}: there is none")
        return self.sessions[id]

    def list(self) -> list[Player]:
        return list(self.sessions.values())


class Player:
    def __init__(self, id: str, stage: Stage) -> None:
        self.id, self.stage = id, stage
        self.did: list[Any] = []
        self.taking = asyncio.Event()
        self.taking.set()

    def status(self) -> dict[str, Any]:
        return {"state": "idle", "said": len(self.did)}

    def feed(self, format: str) -> Any:
        if not format.startswith("s16le:"):
            raise Refusal("invalid", f"{format}: is no format")

        async def take(data: bytes) -> None:
            await self.taking.wait()
            self.did.append(data)

        return SimpleNamespace(bytes=take)

    async def say(self, text: str, voice: str | None = None) -> None:
        await self.taking.wait()
        self.did.append(("say", text, voice))

    def utterance_ended(self) -> None:
        self.did.append("ended")

    def interrupt(self) -> dict[str, Any]:
        self.did.append("interrupted")
        return {"frame": 7}

    async def set(self, image: Any, prompt: str | None) -> None:
        self.did.append(("set", prompt))

    async def close(self) -> dict[str, Any]:
        del self.stage.sessions[self.id]
        self.stage.hub.tell("session", self.id, "closed", frames=7)
        return {"frames": 7}


class Daemon:
    """The trigger with fakes behind it, in this event loop."""

    def __init__(self, folder: Path, broker: Mosquitto, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings_for(folder, broker, *more)
        self.hub = Hub()
        self.jobs = Desk(self.hub, folder)
        self.sessions = Stage(self.hub)
        self.messages: list[tuple[str, str]] = []
        self.app: Any = SimpleNamespace(
            settings=self.settings,
            hub=self.hub,
            jobs=self.jobs,
            sessions=self.sessions,
            inputs=Keeper(folder),
            engine=SimpleNamespace(state="ready"),
            metrics=SimpleNamespace(message=lambda kind, outcome: self.messages.append((kind, outcome))),
        )

    async def __aenter__(self) -> Daemon:
        self.task = asyncio.create_task(serve_mqtt(self.app), name="mqtt")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


def settings_for(folder: Path, broker: Mosquitto, *more: str) -> Settings:
    return load_settings(
        None,
        [
            "mqtt.enabled=true",
            f"mqtt.port={broker.port}",
            "mqtt.client_id=daemon",
            f"daemon.state={folder}",
            f"daemon.outputs={folder}",
            "http.public_url=https://avatars.example",
            *more,
        ],
    )


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path / "broker") as broker:
        yield broker


@pytest.fixture(autouse=True)
def quick_returns(monkeypatch):
    monkeypatch.setattr(mqtt_broker, "RETRY_S", (0.02, 0.1))


async def test_a_question_is_answered_and_its_result_told(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "avatar/#", "bot/answers") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers", b"\x00\x01")
        first = await bot.hears_state("bot/answers", "queued")
        assert (first.head["id"], first.correlation, first.retain) == ("one", b"\x00\x01", False)
        daemon.jobs.becomes("one", "running")
        await bot.hears_state("avatar/jobs/one/state", "running")
        daemon.jobs.becomes("one", "completed", b"film")
        last = await bot.hears_state("bot/answers", "completed")
        assert last.head["result"]["url"] == "https://avatars.example/v1/jobs/one/result"
        assert last.correlation == b"\x00\x01"
        await bot.hears_state("avatar/jobs/one/result", "completed")
    assert owed(tmp_path / "d") == []


def owed(folder: Path) -> list[Any]:
    import sqlite3

    with contextlib.closing(sqlite3.connect(folder / "mqtt.sqlite")) as database:
        return database.execute("SELECT * FROM owed").fetchall()
