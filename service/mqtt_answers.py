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
        """At once, as `reply`. Raises: BrokerGone."""
        await connection.publish(
            asker.topic or self._topics.own(otherwise),
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
