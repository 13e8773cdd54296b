"""What is to be told over MQTT, and to whom: as soon as there is a broker, each thing once, and never without bound."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Literal

from audio.errors import AvatardError
from service.commands import Refusal
from service.mqtt_broker import Connection
from service.mqtt_messages import Asker, Body, Topics, encode, refusal_body

COMMANDS = 32
"""Commands other than jobs under way at once."""
REPLIES = 256
"""Answers to them that wait for the broker; the oldest are forgotten first."""

BREAKS = 4
"""Connections in a row that end over one thing that is told; then it is told otherwise."""
BROKEN = 1000
"""Response topics over which a connection has ended, of which is known; the oldest are forgotten first."""

log = logging.getLogger(__name__)

Key = tuple[Literal["job", "progress", "upload", "session", "reply"], str]


class Due:
    """What is to be told: each thing once, however often it changes meanwhile, and by one teller at a time."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Key, None] = OrderedDict()
        self._busy: set[Key] = set()
        self._changed = asyncio.Event()

    def add(self, key: Key) -> None:
        self._waiting[key] = None
        self._changed.set()

    @contextlib.asynccontextmanager
    async def next(self) -> AsyncIterator[Key]:
        """The oldest that nobody is telling. When telling it fails, it is due again."""
        while (key := next((key for key in self._waiting if key not in self._busy), None)) is None:
            self._changed.clear()
            await self._changed.wait()
        del self._waiting[key]
        self._busy.add(key)
        try:
            yield key
        except BaseException:
            self._waiting[key] = None
            raise
        finally:
            self._busy.discard(key)
            self._changed.set()


class Answers:
    """Commands that take their time, and answers that are worth waiting for a broker but not the disk."""

    def __init__(self, topics: Topics, due: Due, tasks: asyncio.TaskGroup) -> None:
        self._topics, self._due, self._tasks = topics, due, tasks
        self._commands = 0
        self._waiting: OrderedDict[str, tuple[Asker, str, Body]] = OrderedDict()
        self._names = itertools.count()
        self._broken: OrderedDict[str, tuple[Connection, int]] = OrderedDict()
        """Response topics under way: the last connection, and how many in a row ended before anything got there."""
        self._one_at_a_time = asyncio.Lock()

    def start(self, work: Coroutine[Any, Any, None], asker: Asker, kind: str, id: str = "") -> None:
        """Carry out a command beside what the broker sends next; what it raises is the asker's answer.

        kind: jobs or sessions. Raises: Refusal: there are too many.
        """
        if self._commands >= COMMANDS:
            work.close()
            raise Refusal("full", f"{COMMANDS} commands are under way, which is the limit; send it again later", 1.0)
        self._commands += 1

        async def carry_out() -> None:
            try:
                await work
            except Exception as error:
                self.reply(asker, f"{kind}/refused", refusal_body(as_refusal(error), id))
            finally:
                self._commands -= 1

        self._tasks.create_task(carry_out(), name=f"mqtt command for {kind}")

    def answer(self, asker: Asker, body: Body) -> None:
        """To an asker who said where to."""
        if asker.topic:
            self.reply(asker, "", body)

    def reply(self, asker: Asker, otherwise: str, body: Body) -> None:
        """To whoever asked; on a topic of our own where nobody said where to."""
        name = str(next(self._names))
        self._waiting[name] = asker, otherwise, body
        if len(self._waiting) > REPLIES:
            self._waiting.popitem(last=False)
        self._due.add(("reply", name))

    def all_due(self) -> None:
        for name in self._waiting:
            self._due.add(("reply", name))

    async def tell(self, connection: Connection, name: str) -> None:
        """One that is due. Raises: BrokerGone."""
        if name in self._waiting:
            asker, otherwise, body = self._waiting[name]
            await self.publish(connection, asker, otherwise, body)
            self._waiting.pop(name, None)

    async def publish(
        self, connection: Connection, asker: Asker, otherwise: str, body: Body, chunk: bytes = b""
    ) -> None:
        """At once, as `reply`. Raises: BrokerGone.

        There are topics on which brokers hang up, and no list of them. One over which BREAKS connections ended is not
        used again, or nobody would be told anything any more; one that is suspected is tried alone.
        """
        topic, own = asker.topic, self._topics.own(otherwise) if otherwise else ""
        broken = 0 if chunk else self._broken.get(topic, (connection, 0))[1]
        if not topic or broken >= BREAKS:
            if own:
                await self._send(connection, own, asker, body, chunk)
        elif chunk:
            await self._send(connection, topic, asker, body, chunk)
        elif broken and self._broken[topic][0] is not connection:
            async with self._one_at_a_time:
                await self._try(connection, topic, asker, body)
        else:
            await self._try(connection, topic, asker, body)

    async def _try(self, connection: Connection, topic: str, asker: Asker, body: Body) -> None:
        last, broken = self._broken.get(topic, (None, 0))
        if last is not connection:
            broken += 1
            self._broken[topic] = connection, broken
            if broken == BREAKS:
                log.warning("mqtt: the broker hangs up over the response topic %.80r; it is tried a last time", topic)
            if len(self._broken) > BROKEN:
                self._broken.popitem(last=False)
        await self._send(connection, topic, asker, body)
        self._broken.pop(topic, None)

    async def _send(self, connection: Connection, topic: str, asker: Asker, body: Body, chunk: bytes = b"") -> None:
        await connection.publish(
            topic,
            encode(asker.address(body), chunk),
            correlation=asker.correlation,
            content_type="application/octet-stream" if chunk else "application/json",
        )


def as_refusal(error: Exception) -> Refusal:
    """Any error as whoever sent the command may see it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, AvatardError):
        return Refusal("unavailable", str(error))
    log.error("mqtt: a command ended in a bug", exc_info=error)
    return Refusal("unavailable", "a bug in the daemon; its log says more")
