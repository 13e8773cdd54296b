"""The MQTT trigger against a real broker: what is answered, what is told, and what survives whom."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from aiomqtt import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from mosquitto import Caller, Mosquitto
from mp4 import clicks_at, read_mp4, write_sound
from procs import LoopWatch
from serve import ROOT, Serve
from waiting import until_async

from service import mqtt_broker, mqtt_messages
from service.commands import OpenSession, Refusal, SubmitJob
from service.config import ConfigError, Settings, load_settings
from service.hub import Hub
from service.mqtt import serve_mqtt
from service.mqtt_broker import Inbox, Login, TooLong
from service.mqtt_ledger import Ledger, LedgerError
from service.mqtt_messages import Submission, Topics, encode, read_asker, read_object, read_submission

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
            frames=0, total_frames=None, seed=command.seed or 0, created_at=time.time(), started_at=None,
            finished_at=None, result=None, error=None, error_type=None, origin=origin,
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


async def settled(folder: Path) -> None:
    """Nobody waits for anything of that daemon any more."""

    def nothing_owed() -> bool:
        with contextlib.closing(sqlite3.connect(folder / "mqtt.sqlite")) as database:
            return not database.execute("SELECT job, topic FROM owed").fetchall()

    # Longer than one answer of the broker that is lost.
    await until_async(nothing_owed, 20, "everybody told")


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path / "broker") as broker:
        yield broker


@pytest.fixture(autouse=True)
def quick_returns(monkeypatch):
    monkeypatch.setattr(mqtt_broker, "RETRY_S", (0.02, 0.1))


# Questions and answers


async def test_a_question_is_answered_and_its_result_told(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "avatar/#", "bot/answers") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers", b"\x00\x01")
        first = await bot.hears_state("bot/answers", "queued")
        assert (first.head["id"], first.correlation, first.retain) == ("one", b"\x00\x01", False)
        assert "fresh_id" not in first.head
        daemon.jobs.becomes("one", "running")
        await bot.hears_state("avatar/jobs/one/state", "running")
        daemon.jobs.becomes("one", "completed", b"film")
        last = await bot.hears_state("bot/answers", "completed")
        assert last.head["result"]["url"] == "https://avatars.example/v1/jobs/one/result"
        assert last.correlation == b"\x00\x01"
        assert (await bot.hears("avatar/jobs/one/result")).head["state"] == "completed"
        await settled(tmp_path / "d")


async def test_without_an_id_each_message_is_a_job_of_its_own_and_is_told_its_name(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/available") as bot:
        await bot.hears("avatar/available")
        for _ in range(2):
            await bot.say("avatar/jobs/submit", {"text": "hello"}, "bot/answers", b"same")
        await until_async(lambda: len(bot.on("bot/answers")) == 2)
        first, second = bot.on("bot/answers")
        assert first.head["id"] != second.head["id"]
        assert first.head["fresh_id"] is second.head["fresh_id"] is True
        assert set(daemon.jobs.jobs) == {first.head["id"], second.head["id"]}


async def test_duplicates_are_one_job_and_everybody_who_asked_is_told(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/available") as bot:
        await bot.hears("avatar/available")
        for reply in ("bot/a", "bot/a", "bot/b"):
            await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, reply)
        await bot.hears_state("bot/b", "queued")
        daemon.jobs.becomes("one", "completed", b"film")
        await bot.hears_state("bot/a", "completed")
        await bot.hears_state("bot/b", "completed")
        # Long after: it is not made again, and told again.
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/late")
        await bot.hears_state("bot/late", "completed")
        assert len(daemon.jobs.jobs) == 1
        assert [heard.head["state"] for heard in bot.on("bot/a")].count("completed") == 1
        await settled(tmp_path / "d")


async def test_the_same_id_for_something_else_is_refused_to_who_asked_alone(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/a")
        await bot.hears_state("bot/a", "queued")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "goodbye"}, "bot/b")
        assert (await bot.hears_state("bot/b", "refused")).head["reason"] == "conflict"
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "goodbye"})
        assert (await bot.hears("avatar/jobs/refused")).head["id"] == "one"
        daemon.jobs.becomes("one", "completed", b"film")
        await bot.hears_state("bot/a", "completed")
        assert {heard.head["state"] for heard in bot.on("avatar/jobs/one/state")} == {"queued", "completed"}


BAD = {
    "not JSON": (b"{", "is not JSON"),
    "empty": (b"", "is not JSON"),
    "no object": (b"[1]", "is not a JSON object"),
    "not UTF-8": (b"\xff\xfe{}", "is not text in UTF-8"),
    "too deep": (b'{"a":' + b"[" * 50_000, "is not JSON"),
    "not a number": (b'{"text":"a","seed":NaN}', "is not JSON"),
    "nothing to say": (b'{"id":"bad"}', "give audio or text"),
    "unknown field": (b'{"id":"bad","text":"a","colour":1}', "colour"),
    "bad id": (b'{"id":"../etc","text":"a"}', "id"),
    "bad result": (b'{"text":"a","result":"carrier pigeon"}', "result"),
    "unhashable result": (b'{"text":"a","result":["url"]}', "result"),
    "half a letter": (b'{"text":"\\ud800"}', "text"),
    "sound elsewhere": (b'{"id":"bad","audio":{"topic":"avatar/jobs/other/audio"}}', "audio.topic"),
    "sound without a name": (b'{"audio":{"topic":"avatar/jobs/x/audio"}}', "id"),
    "bad id for sound": (b'{"id":["x"],"audio":{"topic":"avatar/jobs/x/audio"}}', "audio.topic"),
}


async def test_what_cannot_be_done_is_refused_once_and_for_all(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        for number, (payload, words) in enumerate(BAD.values()):
            await bot.say("avatar/jobs/submit", payload, "bot/answers", b"%d" % number)
            heard = await bot.hears("bot/answers", lambda heard, mark=b"%d" % number: heard.correlation == mark)
            assert (heard.head["state"], heard.head["reason"]) in (("refused", "invalid"), ("refused", "forbidden"))
            assert words in heard.head["error"]
        assert daemon.jobs.jobs == {}
        # Without a topic for the answer: to who waits for that job, or to all.
        await bot.say("avatar/jobs/submit", b'{"id":"bad"}')
        await bot.hears_state("avatar/jobs/bad/state", "refused")
        await bot.say("avatar/jobs/submit", b"{")
        await bot.hears_state("avatar/jobs/refused", "refused")
        await daemon.end()
    # Nothing comes again: all were acknowledged.
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/available") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "good", "text": "hello"}, "bot/answers")
        await bot.hears_state("bot/answers", "queued")
        assert len(bot.on("bot/answers")) == 1


async def test_what_the_jobs_refuse_is_told_with_when_to_come_again(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        daemon.jobs.refuses = Refusal("paused", "the disk is full", 60.0)
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
        heard = await bot.hears_state("bot/answers", "refused")
        assert (heard.head["reason"], heard.head["retry_s"]) == ("paused", 60.0)
        daemon.jobs.refuses = ZeroDivisionError("a bug with a secret in it")
        await bot.say("avatar/jobs/submit", {"id": "two", "text": "hello"}, "bot/two")
        assert "secret" not in (await bot.hears_state("bot/two", "refused")).head["error"]
        daemon.jobs.refuses = None
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/one")
        await bot.hears_state("bot/one", "queued")


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("avatar/jobs/submit", "forbidden"),
        ("avatar/sessions/open", "forbidden"),
        ("avatar/available", "forbidden"),
        ("$SYS/x", "invalid"),
        ("x" * 513, "invalid"),
    ],
)
async def test_answers_go_nowhere_where_they_would_do_harm(tmp_path, broker, topic, reason):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, topic)
        assert (await bot.hears_state("avatar/jobs/one/state", "refused")).head["reason"] == reason
        assert daemon.jobs.jobs == {}


@pytest.mark.parametrize(
    "topic", ["bot/+", "#", "a/#", "", 7, {}, "\ud800", "a\ufdd0b", "a\uffffb", "a\U0010fffe", "a/" * 100 + "b"]
)
def test_a_topic_in_the_message_is_looked_at_like_the_property(topic):
    with pytest.raises(Refusal):
        read_asker(None, {"response_topic": topic}, Topics("avatar"))


@pytest.mark.parametrize("more", [{"text": "hello"}, {"nonsense": 1}], ids=["taken", "refused"])
@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_topic_over_which_the_broker_hangs_up_harms_nobody_else(
    tmp_path, broker, caplog, monkeypatch, version, more
):
    monkeypatch.setattr(mqtt_messages, "TOPIC_LEVELS", 1000)  # as of a broker with fewer levels than are allowed here
    monkeypatch.setattr(mqtt_broker, "ANSWER_S", 1.0)
    deadly = "a/" * 250 + "b"
    for life in ("first", "second"):
        async with Daemon(tmp_path / "d", broker, f'mqtt.version="{version}"') as daemon, Caller(broker, "#") as bot:
            await bot.hears("avatar/available", lambda heard: heard.payload == b"online")
            if life == "first":
                await bot.say("avatar/jobs/submit", {"id": "bad", "response_topic": deadly, **more})
            for number in range(12):
                ask = {"id": f"{life}-{number}", "text": "hello", "response_topic": f"bot/{number}"}
                await bot.say("avatar/jobs/submit", ask)
            for number in range(12):
                await bot.hears_state(f"bot/{number}", "queued", 20)
            if life == "first" and "text" in more:
                daemon.jobs.becomes("bad", "completed", b"film")
                await bot.hears("avatar/jobs/bad/result")
            elif life == "first":
                await bot.hears_state("avatar/jobs/bad/state", "refused")
    with contextlib.closing(sqlite3.connect(tmp_path / "d" / "mqtt.sqlite")) as database:
        assert not database.execute("SELECT n FROM owed WHERE job = 'bad'").fetchall()
    assert "hangs up over the response topic" in caplog.text


async def test_what_is_too_long_is_answered_and_not_kept(tmp_path, broker):
    async with (
        Daemon(tmp_path / "d", broker, "mqtt.max_payload_mb=0.1") as daemon,
        Caller(broker, "bot/#", "avatar/#") as bot,
    ):
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", b" " * 150_000, "bot/answers")
        assert (await bot.hears_state("bot/answers", "refused")).head["reason"] == "too large"
        # So much longer that the broker does not pass it on.
        await bot.say("avatar/jobs/submit", b" " * 400_000, "bot/answers")
        await bot.say("avatar/jobs/submit", {"id": "good", "text": "hello"}, "bot/answers")
        await bot.hears_state("bot/answers", "queued")
        assert list(daemon.jobs.jobs) == ["good"]


async def test_a_command_that_was_lying_there_is_not_carried_out_at_each_return(tmp_path, broker):
    async with Caller(broker) as bot:
        await bot.say("avatar/jobs/submit", {"text": "hello"}, retain=True)
    async with (
        Daemon(tmp_path / "d", broker, "mqtt.group=") as daemon,
        Caller(broker, "bot/#", "avatar/available") as bot,
    ):
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
        await bot.hears_state("bot/answers", "queued")
        assert list(daemon.jobs.jobs) == ["one"]


async def test_a_job_that_is_cancelled_while_it_is_decided_upon_is_cancelled(tmp_path, broker, monkeypatch):
    decide, writing = Ledger.decide, asyncio.Event()

    async def slowly(ledger: Ledger, n: int, answer: Any = None) -> None:
        writing.set()
        await asyncio.sleep(0.3)
        await decide(ledger, n, answer)

    monkeypatch.setattr(Ledger, "decide", slowly)
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/available") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/one")
        await writing.wait()
        await bot.say("avatar/jobs/one/cancel", b"", "bot/cancel")
        await bot.hears_state("bot/cancel", "cancelled")
        await bot.hears_state("bot/one", "cancelled")
        assert daemon.jobs.jobs["one"].state == "cancelled"


async def test_what_was_cancelled_before_it_was_a_job_is_not_made_after_a_kill(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/available") as bot:
        await bot.hears("avatar/available")
        daemon.jobs.slow.clear()
        await bot.say("avatar/jobs/submit", {"id": "slow", "text": "hello"}, "bot/slow")
        await until_async(lambda: daemon.jobs.submissions)
        await bot.say("avatar/jobs/slow/cancel", b"", "bot/cancel")
        await bot.hears_state("bot/cancel", "cancelled")
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#") as bot:
        await bot.hears_state("bot/slow", "cancelled")
        assert daemon.jobs.submissions == 0
        await settled(tmp_path / "d")


async def test_jobs_are_cancelled_wherever_they_are(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "queued", "text": "hello"}, "bot/queued")
        await bot.hears_state("bot/queued", "queued")
        await bot.say("avatar/jobs/queued/cancel", b"", "bot/cancel", b"1")
        assert (await bot.hears_state("bot/cancel", "cancelled")).head["id"] == "queued"
        await bot.hears_state("bot/queued", "cancelled")
        # Its picture is being fetched.
        daemon.jobs.slow.clear()
        await bot.say("avatar/jobs/submit", {"id": "slow", "text": "hello"}, "bot/slow")
        await until_async(lambda: daemon.jobs.submissions == 2)
        await bot.say("avatar/jobs/slow/cancel", b"", "bot/slow/cancel")
        await bot.hears_state("bot/slow/cancel", "cancelled")
        daemon.jobs.slow.set()
        await bot.hears_state("bot/slow", "cancelled")
        await bot.say("avatar/jobs/unknown/cancel", b"", "bot/unknown")
        assert (await bot.hears_state("bot/unknown", "refused")).head["reason"] == "not found"
        await settled(tmp_path / "d")


async def test_a_slow_address_holds_nobody_else_up(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        daemon.jobs.slow.clear()
        # More than the broker's window: each was acknowledged although none has been looked into.
        for number in range(30):
            await bot.say("avatar/jobs/submit", {"id": f"j{number}", "text": "hello"}, "bot/answers")
        await bot.say("avatar/sessions/open", {"id": "live"}, "bot/live")
        await bot.hears_state("bot/live", "open")
        daemon.jobs.slow.set()
        await until_async(lambda: len(daemon.jobs.jobs) == 30)


# What is told


async def test_states_are_kept_by_the_broker_until_a_while_after_the_end(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"})
        await bot.hears_state("avatar/jobs/one/state", "queued")
        async with Caller(broker, "avatar/jobs/one/state") as late:
            heard = await late.hears_state("avatar/jobs/one/state", "queued")
            assert (heard.retain, heard.expires_s) == (True, None)
        daemon.jobs.becomes("one", "failed", error="a bad picture", error_type="PictureError")
        await bot.hears_state("avatar/jobs/one/result", "failed")
        async with Caller(broker, "avatar/jobs/one/state") as late:
            heard = await late.hears_state("avatar/jobs/one/state", "failed")
            assert heard.head["error"] == "a bad picture"
            assert heard.expires_s is not None
            assert 0 < heard.expires_s <= 3600


async def test_progress_is_told_now_and_then(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"})
        await bot.hears_state("avatar/jobs/one/state", "queued")
        for frames in range(1000):
            daemon.hub.tell("job", "one", "progress", frames=frames, total_frames=1000)
            daemon.hub.tell("job", "of somebody else", "progress", frames=frames)
        heard = await bot.hears("avatar/jobs/one/progress")
        assert heard.head["total_frames"] == 1000
        assert len(bot.on("avatar/jobs/one/progress")) < 5
        assert {heard.topic for heard in bot.heard if "progress" in heard.topic} == {"avatar/jobs/one/progress"}


async def test_a_result_comes_in_pieces_that_can_be_put_together(tmp_path, broker):
    film = bytes(range(256)) * 2500
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello", "result": "payload"}, "bot/answers", b"me")
        await bot.hears_state("bot/answers", "queued")
        daemon.jobs.becomes("one", "completed", film)
        told = await bot.hears_state("bot/answers", "completed")
        assert told.head["result"]["chunks"] == 3
        await bot.hears("bot/answers", lambda heard: heard.head.get("index") == 2)
        pieces = [heard for heard in bot.on("bot/answers") if heard.chunk]
        assert [(piece.head["index"], piece.head["total"], piece.head["id"]) for piece in pieces] == [
            (0, 3, "one"),
            (1, 3, "one"),
            (2, 3, "one"),
        ]
        assert {piece.correlation for piece in pieces} == {b"me"}
        assert max(len(piece.chunk) for piece in pieces) == 256 * 1024
        whole = b"".join(piece.chunk for piece in pieces)
        assert hashlib.sha256(whole).hexdigest() == told.head["result"]["sha256"] == pieces[0].head["sha256"]


async def test_a_broker_that_takes_no_such_pieces_is_told_where_the_file_is(tmp_path):
    with Mosquitto(tmp_path / "broker", lines="max_packet_size 100000\n") as broker:
        async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
            await bot.hears("avatar/available")
            await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello", "result": "payload"}, "bot/answers")
            await bot.hears_state("bot/answers", "queued")
            daemon.jobs.becomes("one", "completed", bytes(300_000))
            told = await bot.hears("bot/answers", lambda heard: (heard.head.get("result") or {}).get("kind") == "url")
            assert told.head["state"] == "completed"
            await settled(tmp_path / "d")


async def test_a_result_is_told_as_a_path_where_there_is_no_http_server(tmp_path, broker):
    async with (
        Daemon(tmp_path / "d", broker, "http.enabled=false") as daemon,
        Caller(broker, "bot/#", "avatar/#") as bot,
    ):
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
        await bot.say("avatar/jobs/submit", {"id": "two", "text": "hello", "result": "url"}, "bot/two")
        assert "HTTP" in (await bot.hears_state("bot/two", "refused")).head["error"]
        await bot.hears_state("bot/answers", "queued")
        daemon.jobs.becomes("one", "completed", b"film")
        told = (await bot.hears_state("bot/answers", "completed")).head["result"]
        assert told["path"] == str(tmp_path / "d" / "one.mp4")


async def test_the_daemon_says_that_it_is_there_how_it_is_and_that_it_goes(tmp_path, broker):
    async with Caller(broker, "avatar/#") as bot, Daemon(tmp_path / "d", broker, "mqtt.stats_s=0.05") as daemon:
        assert (await bot.hears("avatar/available")).payload == b"online"
        stats = await bot.hears("avatar/stats")
        assert stats.head["jobs"] == {"queued": 0}
        assert stats.head["engine"] == "ready"
        await until_async(lambda: len(bot.on("avatar/stats")) >= 3)
        await daemon.end()
        await until_async(lambda: bot.on("avatar/available")[-1].payload == b"offline")
        async with Caller(broker, "avatar/available") as late:
            assert (await late.hears("avatar/available")).payload == b"offline"


# Sound in messages of its own


async def test_sound_comes_in_pieces_and_ends_with_an_empty_one(tmp_path, broker):
    sound = bytes(range(256)) * 40
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        question = {"id": "one", "audio": {"topic": "avatar/jobs/one/audio"}}
        await bot.say("avatar/jobs/submit", question, "bot/answers")
        await bot.hears_state("bot/answers", "receiving")
        for start in range(0, len(sound), 1000):
            await bot.say("avatar/jobs/one/audio", sound[start : start + 1000])
        await bot.say("avatar/jobs/one/audio", b"")
        await bot.hears_state("bot/answers", "queued")
        name = daemon.jobs.jobs["one"].request["audio"]["upload"]
        assert (tmp_path / "d" / name).read_bytes() == sound


async def test_sound_that_is_refused_or_cut_off_is_told_and_can_be_sent_again(tmp_path, broker):
    question = {"id": "one", "audio": {"topic": "avatar/jobs/one/audio"}}
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", question, "bot/empty")
        await bot.hears_state("bot/empty", "receiving")
        await bot.say("avatar/jobs/one/audio", b"")
        await bot.hears_state("bot/empty", "refused")
        await bot.say("avatar/jobs/submit", question, "bot/cut")
        await bot.hears_state("bot/cut", "receiving")
        await bot.say("avatar/jobs/submit", question, "bot/twice")
        assert (await bot.hears_state("bot/twice", "refused")).head["reason"] == "conflict"
        for _ in range(5):
            # Between the kill and what was acknowledged before: the broker writes down every second change only.
            await bot.say("avatar/jobs/one/audio", b"abc")
        broker.kill()
        await asyncio.sleep(0.1)
        broker.start()
    async with Caller(broker, "bot/#", "avatar/available") as bot, Daemon(tmp_path / "d", broker) as daemon:
        await bot.hears("avatar/available", lambda heard: not heard.retain)
        await bot.say("avatar/jobs/submit", question, "bot/again")
        await bot.hears_state("bot/again", "receiving")
        await bot.say("avatar/jobs/one/audio", b"abc")
        await daemon.end()
    async with Caller(broker, "bot/#", "avatar/available") as bot, Daemon(tmp_path / "d", broker) as daemon:
        # It was restarted in the middle of it.
        heard = await bot.hears_state("bot/again", "refused")
        assert "send it again" in heard.head["error"]
        await bot.say("avatar/jobs/submit", question, "bot/last")
        await bot.hears_state("bot/last", "receiving")
        await bot.say("avatar/jobs/one/audio", b"abc")
        await bot.say("avatar/jobs/one/audio", b"")
        await bot.hears_state("bot/last", "queued")
        assert list(daemon.jobs.jobs) == ["one"]


# Sessions


async def test_a_session_is_opened_spoken_to_changed_interrupted_and_closed(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/sessions/open", {"id": "live", "audio": "s16le:24000:1"}, "bot/answers", b"q")
        opened = await bot.hears_state("bot/answers", "open")
        assert (opened.head["id"], opened.correlation) == ("live", b"q")
        player = daemon.sessions.get("live")
        await bot.say("avatar/sessions/live/audio", b"\0\1" * 100, qos=0)
        await bot.say("avatar/sessions/live/audio", b"")
        await bot.say("avatar/sessions/live/say", "good morning")
        await bot.say("avatar/sessions/live/set", {"prompt": "she smiles"}, "bot/set")
        await bot.hears_state("bot/set", "done")
        assert player.did == [b"\0\1" * 100, "ended", ("say", "good morning", None), ("set", "she smiles")]
        await bot.say("avatar/sessions/live/interrupt", b"", "bot/interrupt")
        assert (await bot.hears("bot/interrupt")).head["interrupted"] == {"frame": 7}
        state = await bot.hears_state("avatar/sessions/live/state", "idle")
        assert state.head["daemon"] == "daemon"
        await bot.say("avatar/sessions/live/close", b"", "bot/close")
        assert (await bot.hears_state("bot/close", "closed")).head["frames"] == 7
        await bot.hears_state("avatar/sessions/live/state", "closed")


async def test_what_a_session_refuses_is_answered(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        for payload in ({"colour": 1}, {"audio": "mp3"}, {"audio": 7}, b"nonsense"):
            await bot.say("avatar/sessions/open", payload, "bot/open")
        await until_async(lambda: len(bot.on("bot/open")) == 4)
        assert {heard.head["state"] for heard in bot.on("bot/open")} == {"refused"}
        # The one whose sound could not be read is not left open.
        assert daemon.sessions.list() == []
        await bot.say("avatar/sessions/open", {"id": "live"}, "bot/opened")
        await bot.hears_state("bot/opened", "open")
        await bot.say("avatar/sessions/live/say", {"text": "a", "loud": True})
        assert (await bot.hears("avatar/sessions/refused")).head["id"] == "live"
        await bot.say("avatar/sessions/live/set", {}, "bot/set")
        await bot.hears_state("bot/set", "refused")


async def test_a_session_that_does_not_keep_up_holds_nobody_up_and_an_interruption_goes_first(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/sessions/open", {"id": "live"}, "bot/opened")
        await bot.hears_state("bot/opened", "open")
        player = daemon.sessions.get("live")
        player.taking.clear()
        for _ in range(20):
            await bot.say("avatar/sessions/live/audio", bytes(300_000))
        await bot.say("avatar/sessions/live/say", {"text": "never said"}, "bot/say")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
        await bot.hears_state("bot/answers", "queued")
        await bot.say("avatar/sessions/live/say", {"text": "said at once", "interrupt": True})
        await until_async(lambda: "interrupted" in player.did)
        player.taking.set()
        await until_async(lambda: ("say", "said at once", None) in player.did)
        # One piece had been given to the session before; what waited behind it is gone, what did not fit was left out.
        assert player.did == ["interrupted", bytes(300_000), ("say", "said at once", None)]
        state = await bot.hears("avatar/sessions/live/state", lambda heard: heard.head.get("left_out"))
        assert state.head["left_out"] == 6


async def test_sessions_that_others_opened_are_told_and_take_commands_too(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/#") as bot:
        await bot.hears("avatar/available")
        session = await daemon.sessions.open(OpenSession(id="page"))
        await bot.hears_state("avatar/sessions/page/state", "idle")
        await bot.say("avatar/sessions/page/say", "hello")
        await until_async(lambda: session.did == [("say", "hello", None)])
        await session.close()
        await bot.hears_state("avatar/sessions/page/state", "closed")


# Brokers that fail


async def test_jobs_that_end_while_the_broker_is_away_are_told_when_it_is_back(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon:
        async with Caller(broker, "bot/#", "avatar/available") as bot:
            await bot.hears("avatar/available")
            for number in range(3):
                await bot.say(
                    "avatar/jobs/submit", {"id": f"j{number}", "text": "hello"}, "bot/answers", b"c%d" % number
                )
            await until_async(lambda: len(bot.on("bot/answers")) == 3)
            broker.kill()
        daemon.jobs.becomes("j0", "completed", b"film")
        daemon.jobs.becomes("j1", "failed", error="no")
        daemon.jobs.becomes("j2", "running")
        broker.start()
        async with Caller(broker, "bot/#", "avatar/#", identifier="bot") as bot:
            # It subscribed after the daemon may have been back: what was told meanwhile is its own business.
            await bot.hears("avatar/jobs/j2/state")
            daemon.jobs.becomes("j2", "completed", b"film")
            await bot.hears("bot/answers", lambda heard: heard.correlation == b"c2")
        await settled(tmp_path / "d")


async def test_answers_wait_for_a_broker_that_is_not_there_yet(tmp_path):
    broker = Mosquitto(tmp_path / "broker")
    async with Daemon(tmp_path / "d", broker) as daemon:
        await asyncio.sleep(0.3)
        assert not daemon.task.done()
        with broker:
            async with Caller(broker, "avatar/#") as bot:
                await bot.hears("avatar/available")


async def test_a_frozen_broker_is_left_within_seconds_and_found_again(tmp_path, broker, monkeypatch, caplog):
    monkeypatch.setattr(mqtt_broker, "ANSWER_S", 1.0)
    caplog.set_level(logging.INFO)
    async with Daemon(tmp_path / "d", broker, "mqtt.keepalive_s=2") as daemon, LoopWatch() as loop:
        async with Caller(broker, "bot/#", "avatar/available") as bot:
            await bot.hears("avatar/available")
            await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
            await bot.hears_state("bot/answers", "queued")
        broker.freeze()
        frozen = time.monotonic()
        daemon.jobs.becomes("one", "running")
        await until_async(lambda: any("trying again" in text for text in caplog.messages), 4)
        assert time.monotonic() - frozen < 3
        # Nothing piles up: a thousand changes are one thing to tell.
        for _ in range(1000):
            daemon.hub.tell("job", "one", "progress", frames=1)
            daemon.hub.tell("job", "one", "running")
        daemon.jobs.becomes("one", "completed", b"film")
        await asyncio.sleep(0.5)
        broker.thaw()
        async with Caller(broker, "avatar/jobs/one/state") as bot:
            await bot.hears_state("avatar/jobs/one/state", "completed")
    assert loop.worst_s < 0.5


async def test_a_broker_that_says_nothing_costs_no_descriptors(tmp_path, broker, monkeypatch):
    monkeypatch.setattr(mqtt_broker, "ANSWER_S", 0.05)
    connections = 0

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Daemon(tmp_path / "d", broker, f"mqtt.port={port}", "mqtt.keepalive_s=2") as daemon:
        await until_async(lambda: connections >= 3)
        before = psutil.Process().num_fds()
        await until_async(lambda: connections >= 40, 20)
        # Each is let go after a while; both ends of it live in this process.
        assert psutil.Process().num_fds() - before < 2 * 30
        assert not daemon.task.done()
    server.close()


async def test_a_wrong_password_is_told_in_one_line_and_tried_slowly(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    secret = tmp_path / "password"
    secret.write_text("wrong-and-secret")
    secret.chmod(0o600)
    with Mosquitto(tmp_path / "broker", users={"avatar": "right-and-secret"}) as broker:
        login = ["mqtt.user=avatar", f"mqtt.password_file={secret}"]
        async with Daemon(tmp_path / "d", broker, *login) as daemon:
            await until_async(lambda: any("refuses user 'avatar'" in text for text in caplog.messages))
            await asyncio.sleep(0.5)
            assert not daemon.task.done()
        assert broker.log.count("New connection") <= 2
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "mqtt.password_file" in warnings[0].getMessage()
        secret.write_text("right-and-secret")
        async with (
            Daemon(tmp_path / "d", broker, *login),
            Caller(broker, "avatar/#", username="avatar", password="right-and-secret") as bot,
        ):
            await bot.hears("avatar/available")
    assert "and-secret" not in caplog.text


async def test_what_it_may_not_publish_is_told_once(tmp_path, caplog):
    rights = tmp_path / "rights"
    writable = ("jobs/submit", "jobs/+/state", "jobs/+/progress", "available", "stats")
    rights.write_text("topic read avatar/#\n" + "".join(f"topic readwrite avatar/{topic}\n" for topic in writable))
    with Mosquitto(tmp_path / "broker", lines=f"acl_file {rights}\n") as broker:
        async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "avatar/#") as bot:
            await bot.hears("avatar/available")
            for id in ("one", "two"):
                await bot.say("avatar/jobs/submit", {"id": id, "text": "hello"})
                await until_async(lambda id=id: id in daemon.jobs.jobs)
                daemon.jobs.becomes(id, "completed", b"film")
                await bot.hears_state(f"avatar/jobs/{id}/state", "completed")
            await until_async(lambda: broker.log.count("Denied PUBLISH") >= 2)
    told = [text for text in caplog.messages if "the broker does not let" in text]
    assert told == [
        "mqtt: the broker does not let a client without a user publish avatar/jobs/one/result; give it the right to"
    ]


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["mqtt.password_file=/nowhere", "mqtt.user=a"], "/nowhere: cannot be read"),
        (["mqtt.password_env=NOT_THERE", "mqtt.user=a"], "NOT_THERE"),
        (["mqtt.host="], "mqtt.host"),
        (["mqtt.ca_file=/nowhere"], "mqtt.tls"),
        (["mqtt.tls=true", "mqtt.ca_file=/nowhere"], "mqtt.ca_file: /nowhere"),
        (["mqtt.tls=true", "mqtt.cert_file=/nowhere"], "mqtt.cert_file"),
        (["mqtt.tls=true", "mqtt.key_file=/nowhere"], "mqtt.cert_file"),
        (["daemon.state=/nowhere", "mqtt.client_id="], "daemon.state"),
    ],
)
async def test_settings_that_no_broker_could_mend_end_the_trigger_with_one_line(tmp_path, assignments, words):
    daemon = Daemon(tmp_path / "d", Mosquitto(tmp_path / "broker"), *assignments)
    with pytest.raises(ConfigError, match=words) as told:
        await serve_mqtt(daemon.app)
    assert "\n" not in str(told.value)


@pytest.mark.needs("openssl")
async def test_over_tls_both_sides_show_who_they_are(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(mqtt_broker, "ANSWER_S", 2.0)
    with Mosquitto(tmp_path / "broker", tls=True, client_certificates=True) as broker:
        mine = [f"mqtt.cert_file={broker.client_cert}", f"mqtt.key_file={broker.client_key}"]
        trusted = f"mqtt.ca_file={broker.ca}"
        context = ssl.create_default_context(cafile=broker.ca)
        context.load_cert_chain(broker.client_cert, broker.client_key)
        async with (
            Daemon(tmp_path / "d", broker, "mqtt.tls=true", trusted, *mine),
            Caller(broker, "bot/#", "avatar/#", tls_context=context) as bot,
        ):
            await bot.hears("avatar/available")
            await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
            await bot.hears_state("bot/answers", "queued")
        async with Daemon(tmp_path / "d", broker, "mqtt.tls=true", *mine):
            await until_async(lambda: any("not trusted" in text for text in caplog.messages))
        async with Daemon(tmp_path / "d", broker, "mqtt.tls=true", trusted):
            await until_async(lambda: any("want a client certificate" in text for text in caplog.messages))


# Daemons that fail


async def test_what_ended_while_the_daemon_was_away_is_told_by_its_next_life(tmp_path, broker):
    async with Caller(broker, "bot/#", "avatar/#") as bot:
        async with Daemon(tmp_path / "d", broker) as daemon:
            await bot.hears("avatar/available")
            for id in ("done", "lost"):
                await bot.say("avatar/jobs/submit", {"id": id, "text": "hello"}, f"bot/{id}", b"mine")
                await bot.hears_state(f"bot/{id}", "queued")
            jobs = daemon.jobs
        async with Daemon(tmp_path / "d", broker) as daemon:
            daemon.jobs.jobs = {"done": jobs.jobs["done"]}
            daemon.jobs.becomes("done", "completed", b"film")
            told = await bot.hears_state("bot/done", "completed")
            assert told.correlation == b"mine"
            assert (await bot.hears_state("bot/lost", "failed")).head["error_type"] == "lost"
            await settled(tmp_path / "d")


async def test_nothing_is_acknowledged_before_it_is_on_the_disk(tmp_path, broker, monkeypatch):
    """This pins what the trigger uses of aiomqtt's insides: manual_ack_set and ack of paho's client."""
    stuck = asyncio.Event()

    async def take(self: Ledger, submission: Submission) -> int:
        stuck.set()
        await asyncio.sleep(3600)
        raise AssertionError

    async with Caller(broker, "bot/#", "avatar/available") as bot:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "take", take)
            async with Daemon(tmp_path / "d", broker):
                await bot.hears("avatar/available")
                await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
                await asyncio.wait_for(stuck.wait(), 5)
        async with Daemon(tmp_path / "d", broker) as daemon:
            await bot.hears_state("bot/answers", "queued")
            assert list(daemon.jobs.jobs) == ["one"]
        # And it was acknowledged then.
        async with Daemon(tmp_path / "d", broker) as daemon:
            await bot.say("avatar/jobs/submit", {"id": "two", "text": "hello"}, "bot/two")
            await bot.hears_state("bot/two", "queued")
            assert list(daemon.jobs.jobs) == ["two"]


async def test_a_ledger_that_cannot_be_read_is_told_in_one_line(tmp_path, broker):
    daemon = Daemon(tmp_path / "d", broker)
    (tmp_path / "d" / "mqtt.sqlite").write_bytes(b"something else, which is no database" * 100)
    with pytest.raises(LedgerError, match=r"mqtt\.sqlite: cannot be used"):
        await serve_mqtt(daemon.app)
    (tmp_path / "d" / "mqtt.sqlite").unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "d" / "mqtt.sqlite")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match="later version"):
        await serve_mqtt(daemon.app)


async def test_small_messages_do_not_wait_for_larger_ones(tmp_path, broker):
    daemon = Daemon(tmp_path / "d", broker)
    async with mqtt_broker.new_client(Login.read(daemon.settings), "avatar/available") as client:
        connected = client._client.socket()
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_message_that_ends_the_daemon_each_time_is_refused_in_the_end(tmp_path, broker):
    async with Caller(broker, "bot/#", "avatar/available") as bot:
        for life in range(4):
            async with Daemon(tmp_path / "d", broker) as daemon:
                daemon.jobs.slow.clear()
                if life == 0:
                    await bot.hears("avatar/available")
                    await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
                if life < 3:
                    await until_async(lambda daemon=daemon: daemon.jobs.submissions == 1)
                else:
                    await bot.hears_state("bot/answers", "refused")


async def test_a_full_disk_leaves_the_message_with_the_broker(tmp_path, broker, monkeypatch, caplog):
    monkeypatch.setattr(mqtt_broker, "REFUSED_RETRY_S", 0.1)
    async with Caller(broker, "bot/#", "avatar/available") as bot, Daemon(tmp_path / "d", broker) as daemon:
        await bot.hears("avatar/available")
        with monkeypatch.context() as patch:

            async def take(self: Ledger, submission: Submission) -> int:
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(Ledger, "take", take)
            await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, "bot/answers")
            await until_async(lambda: any("disk is full" in text for text in caplog.messages))
        await bot.hears_state("bot/answers", "queued")
        assert list(daemon.jobs.jobs) == ["one"]


async def test_two_daemons_share_the_jobs_and_one_of_them_says_that_somebody_is_there(tmp_path, broker):
    async with Caller(broker, "bot/#", "avatar/available") as bot:
        async with (
            Daemon(tmp_path / "a", broker, "mqtt.client_id=a") as a,
            Daemon(tmp_path / "b", broker, "mqtt.client_id=b") as b,
        ):
            await until_async(lambda: len(bot.on("avatar/available")) >= 2)
            for number in range(20):
                await bot.say("avatar/jobs/submit", {"id": f"j{number}", "text": "hello"}, "bot/answers")
            await until_async(lambda: len(bot.on("bot/answers")) == 20)
            assert len(a.jobs.jobs) + len(b.jobs.jobs) == 20
            assert min(len(a.jobs.jobs), len(b.jobs.jobs)) >= 5
            for heard in bot.on("bot/answers"):
                assert heard.head["id"] in (a if heard.head["daemon"] == "a" else b).jobs.jobs
            await b.end()
            await until_async(lambda: any(heard.payload == b"offline" for heard in bot.on("avatar/available")))
            await until_async(lambda: bot.on("avatar/available")[-1].payload == b"online")
        await until_async(lambda: bot.on("avatar/available")[-1].payload == b"offline")


async def test_two_daemons_of_one_name_are_told_so(tmp_path, broker, caplog):
    async with Daemon(tmp_path / "a", broker), Daemon(tmp_path / "b", broker):
        await until_async(lambda: any("another client may come as daemon" in text for text in caplog.messages))


# MQTT 3.1.1


async def test_who_speaks_3_1_1_asks_and_hears_in_json(tmp_path, broker):
    async with (
        Daemon(tmp_path / "d", broker, "mqtt.version=3.1.1") as daemon,
        Caller(broker, "bot/#", "avatar/#", version=3) as bot,
    ):
        await bot.hears("avatar/available")
        question = {
            "id": "one",
            "text": "hello",
            "response_topic": "bot/answers",
            "correlation": "7",
            "result": "payload",
        }
        await bot.say("avatar/jobs/submit", question)
        assert (await bot.hears_state("bot/answers", "queued")).head["correlation"] == "7"
        daemon.jobs.becomes("one", "completed", bytes(300_000))
        await bot.hears_state("bot/answers", "completed")
        await bot.hears("bot/answers", lambda heard: heard.head.get("index") == 1)
        pieces = [heard for heard in bot.on("bot/answers") if heard.chunk]
        assert b"".join(piece.chunk for piece in pieces) == bytes(300_000)
        assert {piece.head["correlation"] for piece in pieces} == {"7"}
        # Nothing retained is left behind by what has ended.
        await bot.hears("avatar/jobs/one/state", lambda heard: heard.payload == b"")
        async with Caller(broker, "avatar/#", version=3) as late:
            await late.hears("avatar/available")
            assert late.on("avatar/jobs/one/state") == []


async def test_a_session_of_3_1_1_keeps_what_comes_while_the_daemon_is_away(tmp_path, broker):
    async with Caller(broker, "bot/#", "avatar/available") as bot:
        async with Daemon(tmp_path / "d", broker, "mqtt.version=3.1.1"):
            await bot.hears("avatar/available")
        await bot.say("avatar/jobs/submit", {"id": "one", "text": "hello"}, b"bot/answers".decode())
        async with Daemon(tmp_path / "d", broker, "mqtt.version=3.1.1") as daemon:
            await until_async(lambda: list(daemon.jobs.jobs) == ["one"])


async def test_the_bot_of_the_examples_prints_where_its_clip_is(tmp_path, broker):
    async with Daemon(tmp_path / "d", broker) as daemon:
        command = [sys.executable, "-m", "examples.mqtt_bot", "Good morning", "--port", str(broker.port)]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        await until_async(lambda: list(daemon.jobs.jobs), 20)
        (job,) = daemon.jobs.jobs.values()
        assert job.request["text"] == "Good morning"
        daemon.jobs.becomes(job.id, "completed", b"film")
        assert process.stdout is not None
        assert (await process.stdout.read()).decode() == f"https://avatars.example/v1/jobs/{job.id}/result\n"
        assert await process.wait() == 0


# The daemon as it is run


@pytest.mark.needs("mosquitto")
async def test_a_clip_and_a_conversation_with_the_real_daemon(tmp_path, broker):
    sound = write_sound(tmp_path / "speech.wav", clicks_at([0.5], 1.0), 16_000).read_bytes()
    with Serve(tmp_path / "d", "mqtt.enabled=true", f"mqtt.port={broker.port}", "encoder.preset=ultrafast") as serve:
        async with Caller(broker, "bot/#", "avatar/#") as bot:
            await bot.hears("avatar/available", limit_s=30)
            question = {"id": "one", "audio": {"topic": "avatar/jobs/one/audio"}, "result": "payload"}
            await bot.say("avatar/jobs/submit", question, "bot/answers", b"q")
            await bot.hears_state("bot/answers", "receiving")
            for start in range(0, len(sound), 10_000):
                await bot.say("avatar/jobs/one/audio", sound[start : start + 10_000])
            await bot.say("avatar/jobs/one/audio", b"")
            told = await bot.hears_state("bot/answers", "completed", 40)
            result = told.head["result"]
            await bot.hears("bot/answers", lambda heard: heard.head.get("index") == result["chunks"] - 1)
            film = b"".join(heard.chunk for heard in bot.on("bot/answers"))
            assert hashlib.sha256(film).hexdigest() == result["sha256"]
            (tmp_path / "film.mp4").write_bytes(film)
            assert read_mp4(tmp_path / "film.mp4").frames == result["frames"] == 25

            await bot.say("avatar/sessions/open", {"id": "live", "audio": "s16le:16000:1"}, "bot/live")
            await bot.hears_state("bot/live", "open", 20)
            for _ in range(10):
                await bot.say("avatar/sessions/live/audio", bytes(3200), qos=0)
            await bot.hears("avatar/sessions/live/state", lambda heard: heard.head.get("frames", 0) > 0, 20)
            await bot.say("avatar/sessions/live/interrupt", b"", "bot/interrupt")
            await bot.hears("bot/interrupt")
            await bot.say("avatar/sessions/live/close", b"", "bot/close")
            await bot.hears_state("bot/close", "closed", 20)
            # Killed, it says nothing; the broker does.
            await asyncio.to_thread(serve.kill)
            await bot.hears("avatar/available", lambda heard: heard.payload == b"offline", 10)


# Whatever comes

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["id", "image", "audio", "text", "prompt", "seed", "priority", "result", "response_topic", "correlation", "topic"]
)
questions = st.dictionaries(fields | st.text(), json_values, max_size=6)


@settings(max_examples=100, deadline=None)
@given(questions)
def test_any_question_is_read_or_refused(question):
    topics = Topics("avatar")
    with contextlib.suppress(Refusal):
        body = read_object(json.dumps(question).encode())
        asker = read_asker(None, body, topics)
        submission = read_submission(body, asker, topics, "url")
        assert encode(asker.address({"id": submission.id}))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_payload_is_read_or_refused(payload):
    with contextlib.suppress(Refusal):
        assert isinstance(read_object(payload), dict)


async def test_whatever_comes_the_daemon_goes_on(tmp_path, broker):
    """Random messages on every topic it listens to, with random properties; then it still does its work."""
    random = Random(7)
    names = ["jobs/submit", "jobs/x/cancel", "jobs/x/audio", "jobs//cancel", "sessions/open", "available"]
    names += [f"sessions/{id}/{what}" for id in ("live", "x") for what in ("audio", "say", "interrupt", "set", "close")]
    texts = [b"", b"{}", b"null", b"[]", b'"a"', b"{", b"\xff", b'{"id":"live"}', b'{"text":""}', b'{"text":"\\u0000"}']
    async with Daemon(tmp_path / "d", broker) as daemon, Caller(broker, "bot/#", "avatar/available") as bot:
        await bot.hears("avatar/available")
        await bot.say("avatar/sessions/open", {"id": "live"})
        for number in range(400):
            question = {
                random.choice(["id", "text", "audio", "image", "seed", "prompt", "result", "response_topic", "topic"]):
                random.choice([None, 1, -1, 1e400, "", "a", "x" * 5000, [], {}, {"path": "/etc/passwd"}, True])
                for _ in range(random.randrange(5))
            }  # fmt: skip
            payload = random.choice([random.choice(texts), random.randbytes(random.randrange(300)), question])
            reply = random.choice(["", "bot/fuzz", "avatar/jobs/submit", "bot/ü"])
            await bot.say(
                f"avatar/{random.choice(names)}", payload, reply, random.randbytes(number % 20), qos=number % 2
            )
        await bot.say("avatar/jobs/submit", {"id": "good", "text": "hello"}, "bot/answers")
        await bot.hears_state("bot/answers", "queued")
        assert not daemon.task.done()


async def test_a_flood_that_knows_no_acknowledgement_is_bounded(caplog):
    inbox = Inbox(1000)
    for number in range(5000):
        inbox.put_nowait(Message("a", b"x" * 10, 0, False, number, None))
    assert inbox.qsize() == 100 or inbox.qsize() <= 257
    assert inbox.lost == 5000 - inbox.qsize()
    # What is acknowledged is never left out, and what is too long is not kept.
    inbox.put_nowait(Message("a", b"x" * 5000, 1, False, 1, None))
    last = [inbox.get_nowait() for _ in range(inbox.qsize())][-1]
    assert isinstance(last.payload, TooLong)
    assert last.payload.size == 5000
    assert len([record for record in caplog.records if "QoS 0" in record.getMessage()]) < 15
