"""Live sessions by MQTT: opened, spoken to and told of on topics of their own, for as long as they are on air."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from audio.errors import AvatardError
from service.app import App
from service.commands import Change, OpenSession, Refusal, Say
from service.mqtt_answers import Answers, Due, as_refusal
from service.mqtt_broker import Connection
from service.mqtt_messages import Asker, Body, Topics, encode, read_command, refusal_body

if TYPE_CHECKING:
    from service.hub import News
    from service.sessions import Feed, Session

COMMANDS = ("audio", "say", "interrupt", "set", "close")
"""Topics of a session that are listened to."""
LINE_BYTES, LINE_MESSAGES = 4_000_000, 512
"""Said to one session, and not taken by it yet; more is left out, and counted."""
CHANGE_BYTES = 64_000
"""What a change counts as among them."""
ENDS = 256
"""Sessions that ended and of which that is still to be told; of more it is not told how."""
STATE_KEPT_S = 60
"""For which the broker keeps the state of a session of which it hears nothing."""
STATUS_EVERY_S = 2.0
PCM = "s16le:16000:1"
"""The sound on a session's audio topic, where nobody said otherwise."""


class _Line:
    """What is said to one session, in its order; `feed` takes its sound."""

    def __init__(self, session: Session, feed: Feed) -> None:
        self.session, self.feed = session, feed
        self.task: asyncio.Task[None] | None = None
        self._left_out = 0
        self._error = ""
        self._waiting: deque[tuple[bytes | Say | Change, int, Asker]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    def add(self, said: bytes | Say | Change, size: int, asker: Asker) -> bool:
        """size: about as many bytes. False: there is no room, and it is left out."""
        if self._bytes + size > LINE_BYTES or len(self._waiting) >= LINE_MESSAGES:
            self._left_out += 1
            return False
        self._waiting.append((said, size, asker))
        self._bytes += size
        self._changed.set()
        return True

    def interrupt(self) -> None:
        """What was to be spoken is not."""
        self._waiting = deque(item for item in self._waiting if isinstance(item[0], Change))
        self._bytes = sum(size for _, size, _ in self._waiting)

    def fail(self, error: str) -> None:
        """Its sound could not be taken."""
        self._error = error

    def status(self) -> Body:
        """What its sender cannot know otherwise: messages left out, and what is wrong with its sound."""
        return {"left_out": self._left_out, "audio_error": self._error or None}

    async def next(self) -> tuple[bytes | Say | Change, Asker]:
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        said, size, asker = self._waiting.popleft()
        self._bytes -= size
        return said, asker


class SessionMessages:
    """All sessions of the daemon, whoever opened them. daemon: its name, for who hears of several."""

    def __init__(
        self, app: App, topics: Topics, daemon: str, due: Due, answers: Answers, tasks: asyncio.TaskGroup
    ) -> None:
        self._app, self._topics, self._daemon = app, topics, daemon
        self._due, self._answers, self._tasks = due, answers, tasks
        self._lines: dict[str, _Line] = {}
        self._ends: OrderedDict[str, Body] = OrderedDict()
        self._openers: dict[str, list[tuple[Asker, Body]]] = {}
        self._told: set[str] = set()
        self._followed: set[str] = set()

    # What comes

    async def open(self, body: Body, asker: Asker) -> None:
        """Raises: AvatardError."""
        sound = body.pop("audio", PCM)
        if not isinstance(sound, str):
            raise Refusal("invalid", f"audio: is not the format of the sound to come, such as {PCM}")
        session = await self._app.sessions.open(read_command(OpenSession, body))
        try:
            self._line(session, sound)
        except AvatardError:
            await session.close()
            raise
        # Told when the session's topics are listened to: what is said before that is not heard.
        answer = {"id": session.id, "state": "open", "daemon": self._daemon, "audio": sound}
        self._openers.setdefault(session.id, []).append((asker, answer))
        self._due.add(("session", session.id))

    def take(self, id: str, what: str, body: Body | bytes, asker: Asker) -> None:
        """A message on one of a session's topics; bytes are sound. Raises: Refusal."""
        session = self._app.sessions.get(id)
        line = self._line(session)
        match what, body:
            case "audio", bytes():
                line.add(body, len(body), asker)
            case "say", dict():
                say = read_command(Say, body)
                if say.interrupt:
                    self._interrupt(line)
                if not line.add(say, len(say.text), asker):
                    raise Refusal("full", f"session {id}: too much waits to be said; interrupt it or wait", 1.0)
            case "set", dict():
                if not line.add(read_command(Change, body), CHANGE_BYTES, asker):
                    raise Refusal("full", f"session {id}: too much waits to be done; interrupt it or wait", 1.0)
            case "interrupt", _:
                self._answers.answer(asker, {"id": id, "interrupted": self._interrupt(line)})
            case "close", _:
                self._answers.start(self._close(session, asker), asker, "sessions", id)

    def _line(self, session: Session, sound: str = PCM) -> _Line:
        """Raises: AvatardError: the sound's format."""
        if session.id not in self._lines:
            line = _Line(session, session.feed(sound))
            line.task = self._tasks.create_task(self._speak(line), name=f"mqtt line to {session.id}")
            self._lines[session.id] = line
        return self._lines[session.id]

    def _interrupt(self, line: _Line) -> Body:
        line.interrupt()
        return dict(line.session.interrupt())

    async def _close(self, session: Session, asker: Asker) -> None:
        self._answers.answer(asker, {"id": session.id, "state": "closed"} | await session.close())

    async def _speak(self, line: _Line) -> None:
        """What was said to a session, as fast as the session takes it."""
        session = line.session
        while True:
            said, asker = await line.next()
            try:
                if said == b"":
                    session.utterance_ended()
                elif isinstance(said, bytes):
                    await line.feed.bytes(said)
                elif isinstance(said, Say):
                    await session.say(said.text, said.voice)
                else:
                    await session.set(said.image, said.prompt)
            except Exception as error:
                refusal = as_refusal(error)
                if isinstance(said, bytes):
                    line.fail(str(refusal))
                else:
                    self._answers.reply(asker, "sessions/refused", refusal_body(refusal, session.id))
            else:
                self._answers.answer(asker, {"id": session.id, "state": "done"})

    # What is told

    def connected(self) -> None:
        """To a broker that may know nothing of us."""
        self._followed.clear()

    def on_news(self, item: News) -> None:
        if item.what in ("closed", "failed"):
            self._ends[item.id] = {"state": item.what, **item.body}
            if len(self._ends) > ENDS:
                self._ends.popitem(last=False)
        self._due.add(("session", item.id))

    def all_due(self) -> None:
        for id in self._told | {session.id for session in self._app.sessions.list()}:
            self._due.add(("session", id))

    async def watch(self) -> None:
        """Tell of them now and then, also when nothing happens."""
        while True:
            for session in self._app.sessions.list():
                self._due.add(("session", session.id))
            await asyncio.sleep(STATUS_EVERY_S)

    async def tell(self, connection: Connection, id: str) -> None:
        """How a session stands. Raises: BrokerGone."""
        try:
            session = self._app.sessions.get(id)
        except Refusal:
            await self._tell_end(connection, id)
            return
        if id not in self._followed:
            await connection.subscribe(self._commands(id))
            self._followed.add(id)
        for asker, answer in self._openers.pop(id, ()):
            self._answers.reply(asker, f"sessions/{id}/state", answer)
        body = {"id": id, "daemon": self._daemon, **session.status()}
        if id in self._lines:
            body |= self._lines[id].status()
        self._told.add(id)
        await self._publish(connection, id, body)

    async def _tell_end(self, connection: Connection, id: str) -> None:
        line = self._lines.pop(id, None)
        if line is not None and line.task is not None:
            line.task.cancel()
        body = {"id": id, "state": "closed", "daemon": self._daemon} | self._ends.get(id, {})
        for asker, _ in self._openers.pop(id, ()):
            # It ended before it could be told that it was open.
            self._answers.reply(asker, f"sessions/{id}/state", body)
        if id in self._told:
            await self._publish(connection, id, body)
            self._told.discard(id)
        if id in self._followed:
            await connection.unsubscribe(self._commands(id))
            self._followed.discard(id)
        self._ends.pop(id, None)

    async def _publish(self, connection: Connection, id: str, body: Body) -> None:
        topic = self._topics.own(f"sessions/{id}/state")
        # Only MQTT 5 has an end to what is retained: a daemon that is killed leaves no session on air for ever.
        await connection.publish(topic, encode(body), retain=connection.five, expires_s=STATE_KEPT_S)

    def _commands(self, id: str) -> list[str]:
        return [self._topics.own(f"sessions/{id}/{what}") for what in COMMANDS]
