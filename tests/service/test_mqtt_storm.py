"""A thousand jobs through a broker that is killed, to a daemon that is killed: each is made once, told, and plays."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import json
import socket
import sqlite3
import time
from pathlib import Path
from random import Random
from typing import Any

import aiomqtt
import av
import pytest
from mosquitto import Heard, Mosquitto
from mp4 import clicks_at, write_sound
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from serve import Serve
from waiting import until_async

pytestmark = [pytest.mark.needs("mosquitto"), pytest.mark.slow]

SOUND_S = 0.2
ASK_AGAIN_S = 20.0
"""Silence after which the bot asks again: a broker that is killed forgets what it had not written down yet."""


class Bot:
    """As a bot ought to be: it names its jobs, comes back to its broker, and asks again for what it has not heard."""

    def __init__(self, broker: Mosquitto, sound: bytes, ids: list[str], random: Random) -> None:
        self._broker, self._random = broker, random
        self._sound = base64.b64encode(sound).decode()
        self._unsent = collections.deque(ids)
        self.ids = ids
        self.answers: collections.Counter[str] = collections.Counter()
        self.results: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        self.sent = 0
        self.connections = 0
        self._heard_at = time.monotonic()

    @property
    def missing(self) -> list[str]:
        return [id for id in self.ids if id not in self.results]

    async def run(self) -> None:
        """Until it has heard of all."""
        while self.missing:
            with contextlib.suppress(aiomqtt.MqttError):
                await self._converse()
            await asyncio.sleep(0.2)

    async def _converse(self) -> None:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        client = aiomqtt.Client(
            "127.0.0.1",
            self._broker.port,
            identifier="bot",
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=False,
            properties=properties,
            timeout=5,
            keepalive=5,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        async with client:
            self.connections += 1
            await client.subscribe("bot/answers", 1)
            speaker = asyncio.create_task(self._speak(client))
            try:
                async for message in client.messages:
                    self._hear(Heard(message))
                    if not self.missing:
                        return
            finally:
                speaker.cancel()
                await asyncio.gather(speaker, return_exceptions=True)

    def _hear(self, heard: Heard) -> None:
        self._heard_at = time.monotonic()
        id, state = heard.head["id"], heard.head["state"]
        assert heard.correlation == id.encode()
        self.answers[state] += 1
        if state == "completed":
            self.results[id].append(heard.head["result"])
        elif state in ("failed", "cancelled") or (state, heard.head.get("reason")) == ("refused", "invalid"):
            raise AssertionError(heard)

    async def _speak(self, client: aiomqtt.Client) -> None:
        while True:
            while self._unsent:
                id = self._unsent[0]
                for _ in range(2 if self._random.random() < 0.1 else 1):
                    await self._ask(client, id)
                self._unsent.popleft()
            await asyncio.sleep(1)
            if time.monotonic() - self._heard_at > ASK_AGAIN_S:
                self._heard_at = time.monotonic()
                self._unsent.extend(self.missing[:100])

    async def _ask(self, client: aiomqtt.Client, id: str) -> None:
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = "bot/answers"
        properties.CorrelationData = id.encode()
        question = {"id": id, "audio": {"data": self._sound}, "result": "path"}
        await client.publish("avatar/jobs/submit", json.dumps(question), 1, False, properties)
        self.sent += 1


async def storm(folder: Path, jobs: int, daemon_kills: int, broker_kills: int) -> dict[str, Any]:
    """Every kill at a random number of results heard. Returns: figures of it."""
    random = Random(11)
    sound = write_sound(folder / "speech.wav", clicks_at([], SOUND_S), 16_000).read_bytes()
    killed = ["daemon"] * daemon_kills + ["broker"] * broker_kills
    random.shuffle(killed)
    when = sorted(random.sample(range(1, jobs), len(killed)))
    began = time.monotonic()
    with Mosquitto(folder / "broker", lines="max_inflight_messages 20\n") as broker:
        serve = Serve(
            folder / "daemon",
            "mqtt.enabled=true",
            f"mqtt.port={broker.port}",
            "encoder.preset=ultrafast",
        )
        with serve:
            # Before a daemon was there for the first time, a broker keeps nothing for it.
            await asyncio.to_thread(serve.says, "mqtt: connected", 60)
            bot = Bot(broker, sound, [f"job-{number}" for number in range(jobs)], random)
            asking = asyncio.create_task(bot.run())
            for at, what in zip(when, killed):
                await until_async(lambda at=at: len(bot.results) >= at or asking.done(), 1200, f"{at} results")
                # Anywhere between two results, not only where one was just told.
                await asyncio.sleep(random.random() * 0.5)
                if what == "daemon":
                    await asyncio.to_thread(serve.kill)
                    await asyncio.to_thread(serve.start)
                else:
                    await asyncio.to_thread(broker.kill)
                    await asyncio.sleep(random.random())
                    await asyncio.to_thread(broker.start)
            await asking
            took_s = time.monotonic() - began
            # It may have been started a moment ago, and know nothing of signals yet.
            await asyncio.to_thread(serve.ready)
            assert await asyncio.to_thread(serve.stop) == 0
    with contextlib.closing(sqlite3.connect(serve.state / "jobs.sqlite")) as database:
        rows = dict(database.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        begun = database.execute("SELECT SUM(attempts), MAX(attempts) FROM jobs").fetchone()
    assert rows == {"completed": jobs}
    files = sorted(serve.outputs.rglob("*.mp4"))
    assert {file.stem for file in files} == set(bot.ids)
    assert len(files) == jobs
    for file in files:
        with av.open(str(file)) as video:
            assert sum(1 for _ in video.decode(video=0)) == bot.results[file.stem][0]["frames"] > 0
    for told in bot.results.values():
        # However often it was told, it is the same file.
        assert len({result["sha256"] for result in told}) == 1
    return {
        "jobs": jobs,
        "seconds": round(took_s, 1),
        "asked": bot.sent,
        "results told": sum(map(len, bot.results.values())),
        "told more than once": sum(len(told) > 1 for told in bot.results.values()),
        "answers": dict(bot.answers),
        "times begun": begun[0],
        "most times begun": begun[1],
        "connections of the bot": bot.connections,
    }


async def test_a_thousand_jobs_survive_five_deaths_of_the_daemon_and_three_of_the_broker(tmp_path, capsys):
    """One to three minutes on two cores."""
    async with asyncio.timeout(3600):
        figures = await storm(tmp_path, 1000, daemon_kills=5, broker_kills=3)
    with capsys.disabled():
        print("\n", json.dumps(figures))


async def test_a_small_storm(tmp_path):
    async with asyncio.timeout(240):
        figures = await storm(tmp_path, 30, daemon_kills=2, broker_kills=1)
    assert figures["results told"] >= 30
