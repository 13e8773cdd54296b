"""Live sessions over HTTP: opened, spoken into, watched and changed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Path, Query, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.types import Receive, Scope, Send

from audio.errors import AvatardError
from audio.source import SourceClosed
from service.app import App
from service.commands import ID, AddOutput, Change, OpenSession, Refusal, Say, complaint
from service.http_answers import LOCATION, file_answer, needs, news_body, problems, refused
from service.http_door import CLIENT_GONE, SUBPROTOCOL
from service.hub import News

if TYPE_CHECKING:
    from service.sessions import Feed, Session

SessionId = Annotated[str, Path(pattern=ID, examples=["reception"])]
OutputName = Annotated[str, Path(min_length=1, max_length=4096, description="as `outputs` lists it")]
HlsFile = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.(m3u8|ts|m4s|mp4)$", examples=["index.m3u8"])
]

REFUSED = problems(400, 404, 408, 409, 413, 422)
"""What a command with a body may be answered."""

HLS_TYPES = {
    "m3u8": "application/vnd.apple.mpegurl",
    "ts": "video/mp2t",
    "m4s": "video/iso.segment",
    "mp4": "video/mp4",
}

FIRST_MESSAGE_S = 10.0
"""Within which a client says in what format its sound is."""
AHEAD_BYTES = 1_000_000
"""Sound read from a client and not yet taken by its session. With more, the socket is not read: its sender waits."""
BAD_MESSAGES = 20
"""After so many messages that mean nothing, a client is sent away."""

GOING_AWAY, POLICY = 1001, 1008
"""Codes with which a WebSocket is closed (RFC 6455)."""


class SessionAnswer(BaseModel):
    """A session as it stands: see docs/http.md for what else is in it."""

    model_config = ConfigDict(extra="allow")

    id: str
    state: str


class SessionList(BaseModel):
    sessions: list[SessionAnswer]


class Interrupted(BaseModel):
    """Seconds: heard since the voice began, and sound that never will be."""

    played_s: float
    dropped_s: float


class Output(BaseModel):
    name: str = Field(description="what the output is called from now on; without secrets")


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SoundFormat(_Message):
    """The first message, where the address has no ?format=."""

    format: str = Field(max_length=64, examples=["s16le:16000:1", "opus:48000:1"])


class SayMessage(Say):
    type: Literal["say"]


class InterruptMessage(_Message):
    type: Literal["interrupt"]


class EndMessage(_Message):
    """What was said so far is whole: nothing need be waited for."""

    type: Literal["end"]


_CONTROL: TypeAdapter[SayMessage | InterruptMessage | EndMessage] = TypeAdapter(
    Annotated[SayMessage | InterruptMessage | EndMessage, Field(discriminator="type")]
)


def add_session_routes(http: FastAPI, app: App) -> None:
    """Everything below /v1/sessions."""
    read, live = needs("read"), needs("live")
    speakers: dict[str, _Speaker] = {}

    @http.post(
        "/v1/sessions",
        tags=["sessions"],
        status_code=201,
        dependencies=[live],
        responses={**REFUSED, 201: {"description": "It is opening", "headers": LOCATION}},
    )
    async def open_session(command: OpenSession, response: Response) -> SessionAnswer:
        """Go on air. It is opening when this answers; `state` and the events say when there is a picture."""
        session = await app.sessions.open(command)
        response.headers["Location"] = f"/v1/sessions/{quote(session.id)}"
        return _answer(session)

    @http.get("/v1/sessions", tags=["sessions"], dependencies=[read], responses=problems())
    async def sessions() -> SessionList:
        """The sessions that are open."""
        return SessionList(sessions=[_answer(session) for session in app.sessions.list()])

    @http.get("/v1/sessions/{id}", tags=["sessions"], dependencies=[read], responses=problems(404, 422))
    async def session(id: SessionId) -> SessionAnswer:
        """How a session stands."""
        return _answer(app.sessions.get(id))

    @http.delete("/v1/sessions/{id}", tags=["sessions"], dependencies=[live], responses=problems(404, 422))
    async def close_session(id: SessionId) -> SessionAnswer:
        """End a session, finish its files, and tell how it stood in the end."""
        found = app.sessions.get(id)
        status = await found.close()
        return SessionAnswer(**{"id": id, "state": "closed", **status})

    @http.post("/v1/sessions/{id}/interrupt", tags=["sessions"], dependencies=[live], responses=problems(404, 409, 422))
    async def interrupt(id: SessionId) -> Interrupted:
        """Fall silent now: drop what is not heard yet."""
        return Interrupted(**app.sessions.get(id).interrupt())

    @http.post(
        "/v1/sessions/{id}/say",
        tags=["sessions"],
        status_code=202,
        dependencies=[live],
        responses=REFUSED,
    )
    async def say(id: SessionId, command: Say) -> SessionAnswer:
        """Speak a text. Answers when all of it has been turned into sound that waits for its turn."""
        session = app.sessions.get(id)
        if command.interrupt:
            session.interrupt()
        await session.say(command.text, command.voice)
        return _answer(session)

    @http.post(
        "/v1/sessions/{id}/set",
        tags=["sessions"],
        dependencies=[live],
        responses=REFUSED,
    )
    async def set_(id: SessionId, command: Change) -> SessionAnswer:
        """Another picture or prompt, from the next block on."""
        session = app.sessions.get(id)
        await session.set(command.image, command.prompt)
        return _answer(session)

    @http.post(
        "/v1/sessions/{id}/outputs",
        tags=["sessions"],
        status_code=201,
        dependencies=[live],
        responses=REFUSED,
    )
    async def add_output(id: SessionId, command: AddOutput) -> Output:
        """Send the session to one more place."""
        return Output(name=await app.sessions.get(id).add_output(command.target))

    @http.delete(
        "/v1/sessions/{id}/outputs/{name:path}",
        tags=["sessions"],
        dependencies=[live],
        responses=problems(404, 409, 422),
    )
    async def remove_output(id: SessionId, name: OutputName) -> SessionAnswer:
        """Send it there no more; what was written there is finished."""
        session = app.sessions.get(id)
        await session.remove_output(name)
        return _answer(session)

    @http.get(
        "/v1/sessions/{id}/view.mp4",
        tags=["sessions"],
        dependencies=[read],
        response_class=StreamingResponse,
        responses={
            **problems(404, 422),
            200: {
                "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
                "description": "Fragmented MP4 from the next keyframe on, without end",
            },
        },
    )
    async def view(id: SessionId) -> Response:
        """Watch. A viewer who is too slow misses pictures and goes on at a keyframe."""
        session = app.sessions.get(id)
        return _Pictures(session.view(), session.view_type, http.state.ending)

    @http.get(
        "/v1/sessions/{id}/hls/{file}",
        tags=["sessions"],
        dependencies=[read],
        response_class=Response,
        responses={
            **problems(404, 422),
            200: {"content": {type_: {} for type_ in HLS_TYPES.values()}, "description": "A playlist or a segment"},
            206: {"content": {type_: {} for type_ in HLS_TYPES.values()}, "description": "A part of a segment"},
            416: {"content": {"text/plain": {}}, "description": "The file has no such range"},
        },
    )
    async def hls(request: Request, id: SessionId, file: HlsFile) -> Response:
        """The files of the session's HLS output."""
        folder = app.sessions.get(id).hls_folder
        if folder is None:
            raise Refusal("not found", f"session {id}: has no HLS output; add hls:NAME as an output")
        return await file_answer(request, folder / file, download=False, media_type=HLS_TYPES[file.rpartition(".")[2]])

    @http.websocket("/v1/sessions/{id}/audio", dependencies=[live])
    async def audio(
        socket: WebSocket, id: SessionId, format: Annotated[str | None, Query(max_length=64)] = None
    ) -> None:
        """Speak: binary messages are sound, texts are control; what happens to the session comes back as JSON."""
        try:
            session = app.sessions.get(id)
            feed = session.feed(format) if format is not None else None
        except AvatardError as error:
            return await socket.send_denial_response(refused(error))
        await socket.accept(_subprotocol(socket))
        speaker = _Speaker(app, session, socket, http.state.ending)
        # A client that comes again after its line was cut finds its old socket still open: the new one counts.
        if (old := speakers.pop(id, None)) is not None:
            old.leave("another client speaks now")
        speakers[id] = speaker
        try:
            await speaker.run(feed)
        finally:
            if speakers.get(id) is speaker:
                del speakers[id]

    @http.websocket("/v1/sessions/{id}/view", dependencies=[read])
    async def watch(socket: WebSocket, id: SessionId) -> None:
        """Watch: first {"type": ...} for MediaSource, then a fragmented MP4: its beginning, then each fragment."""
        try:
            session = app.sessions.get(id)
            pieces = session.view()
        except AvatardError as error:
            return await socket.send_denial_response(refused(error))
        try:
            await socket.accept(_subprotocol(socket))
            await _show(socket, session.view_type, _until(pieces, http.state.ending))
        finally:
            await _leave(pieces)


def _answer(session: Session) -> SessionAnswer:
    return SessionAnswer(**session.status())


def _subprotocol(socket: WebSocket) -> str | None:
    return SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None


# Watching


class _Pictures(StreamingResponse):
    """A session's pictures as one file without end. Whatever happens, the viewer's place is free again at once."""

    def __init__(self, pieces: AsyncIterator[bytes], view_type: str, ending: asyncio.Event) -> None:
        super().__init__(_until(pieces, ending), media_type=view_type, headers={"Cache-Control": "no-store"})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _leave(self._pieces)


async def _leave(pieces: AsyncIterator[bytes]) -> None:
    if (close := getattr(pieces, "aclose", None)) is not None:
        await close()


async def _until(pieces: AsyncIterator[bytes], ending: asyncio.Event) -> AsyncIterator[bytes]:
    """The same, until the server ends."""
    stopped: asyncio.Future[Any] = asyncio.ensure_future(ending.wait())
    coming: asyncio.Future[Any] | None = None
    try:
        while not ending.is_set():
            coming = asyncio.ensure_future(anext(pieces, b""))  # type: ignore[arg-type]
            await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done() or not (piece := coming.result()):
                return
            yield piece
    finally:
        stopped.cancel()
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})


async def _show(socket: WebSocket, view_type: str, pieces: AsyncIterator[bytes]) -> None:
    """Send until one side has had enough. What a viewer sends means nothing, and is read so that its end is seen."""

    async def send() -> None:
        await socket.send_text(json.dumps({"type": view_type}))
        async for piece in pieces:
            await socket.send_bytes(piece)
        await socket.close(1000, "the session is over")

    async def read() -> None:
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass

    await _first_of(send(), read())


async def _first_of(*work: Coroutine[Any, Any, None]) -> None:
    """Run all until one of them ends, and end the others. Raises: what that one raised, but not that the peer left."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            with contextlib.suppress(*CLIENT_GONE):
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Speaking


class _Speaker:
    """One client's socket: what it sends goes to the session in its order, an interruption before all of it.

    Three tasks: one reads, and never waits for the session but when much has come that it has not taken; one carries
    out what was read; one tells the client what happens.
    """

    def __init__(self, app: App, session: Session, socket: WebSocket, ending: asyncio.Event) -> None:
        self._app, self._session, self._socket, self._ending = app, session, socket, ending
        self._waiting: deque[bytes | SayMessage | EndMessage] = deque()
        self._waiting_bytes = 0
        self._changed = asyncio.Event()
        """Something came into the queue, or went out of it."""
        self._at_work: asyncio.Future[None] | None = None
        self._own_interruptions = 0
        self._bad = 0
        self._left = asyncio.Event()
        self._why: tuple[int, str] = (1000, "the session is over")

    def leave(self, why: str, code: int = POLICY) -> None:
        """End the socket. The first reason counts."""
        if not self._left.is_set():
            self._why = code, why
            self._left.set()

    async def run(self, feed: Feed | None) -> None:
        """Until one side has had enough."""
        with self._app.hub.listen() as news, contextlib.suppress(*CLIENT_GONE):
            feed = feed or await self._first_message()
            if feed is not None:
                await self._tell("ready", **self._session.status())
                await _first_of(self._read(), self._carry_out(feed), self._report(news), self._wait_to_leave())
            await self._socket.close(*self._why)

    async def _first_message(self) -> Feed | None:
        try:
            async with asyncio.timeout(FIRST_MESSAGE_S):
                message = await self._socket.receive()
        except TimeoutError:
            self.leave(f"no format in {FIRST_MESSAGE_S:g} s")
            return None
        if message["type"] == "websocket.disconnect":
            return None
        try:
            wanted = SoundFormat.model_validate_json(message.get("text") or "")
            return self._session.feed(wanted.format)
        except ValidationError:
            await self._tell("error", detail='first say how the sound comes: {"format": "s16le:16000:1"}')
        except AvatardError as error:
            await self._tell("error", detail=str(error))
        self.leave("no format")
        return None

    async def _wait_to_leave(self) -> None:
        stopped = asyncio.ensure_future(self._ending.wait())
        left = asyncio.ensure_future(self._left.wait())
        try:
            await asyncio.wait({stopped, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            left.cancel()
        if self._ending.is_set():
            self.leave("the server ends", GOING_AWAY)

    # What comes

    async def _read(self) -> None:
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            if (sound := message.get("bytes")) is not None:
                await self._queue(sound)
            else:
                await self._control(message.get("text") or "")
            while self._waiting_bytes > AHEAD_BYTES:
                self._changed.clear()
                await self._changed.wait()

    async def _control(self, text: str) -> None:
        try:
            message = _CONTROL.validate_json(text)
        except ValidationError as error:
            return await self._refuse(_control_complaint(error))
        if isinstance(message, InterruptMessage) or (isinstance(message, SayMessage) and message.interrupt):
            self._forget()
            self._own_interruptions += 1
            told = self._session.interrupt()
            await self._tell("interrupted", **told)
        if not isinstance(message, InterruptMessage):
            await self._queue(message)

    async def _queue(self, item: bytes | SayMessage | EndMessage) -> None:
        self._waiting.append(item)
        self._waiting_bytes += _weight(item)
        self._changed.set()

    def _forget(self) -> None:
        """What has come and not been taken, including what is being taken, will not be heard."""
        self._waiting.clear()
        self._waiting_bytes = 0
        self._changed.set()
        if self._at_work is not None:
            self._at_work.cancel()

    # What is done with it

    async def _carry_out(self, feed: Feed) -> None:
        try:
            while True:
                while not self._waiting:
                    self._changed.clear()
                    await self._changed.wait()
                item = self._waiting.popleft()
                self._waiting_bytes -= _weight(item)
                self._changed.set()
                self._at_work = asyncio.ensure_future(self._take(item, feed))
                await asyncio.wait({self._at_work})
                if self._at_work.cancelled() or (error := self._at_work.exception()) is None:
                    continue
                if isinstance(error, SourceClosed):
                    return
                if not isinstance(error, AvatardError):
                    raise error
                await self._refuse(str(error))
        finally:
            if self._at_work is not None:
                self._at_work.cancel()

    async def _take(self, item: bytes | SayMessage | EndMessage, feed: Feed) -> None:
        if isinstance(item, bytes):
            await feed.bytes(item)
        elif isinstance(item, SayMessage):
            await self._session.say(item.text, item.voice)
        else:
            self._session.utterance_ended()

    # What is told

    async def _report(self, news: AsyncIterator[News]) -> None:
        async for item in news:
            if item.missed:
                self._own_interruptions = 0
            if item.kind != "session" or item.id != self._session.id:
                continue
            if item.what == "interrupted":
                if self._own_interruptions:
                    # Told already, with what came before it dropped; what came since is to be heard.
                    self._own_interruptions -= 1
                    continue
                self._forget()
            await self._tell(item.what, **news_body(item))
            if item.what in ("closed", "failed"):
                return

    async def _refuse(self, detail: str) -> None:
        self._bad += 1
        await self._tell("error", detail=detail)
        if self._bad >= BAD_MESSAGES:
            self.leave("too many messages that mean nothing")

    async def _tell(self, event: str, **body: Any) -> None:
        await self._socket.send_text(json.dumps({"event": event, **body}, ensure_ascii=False, default=str))


def _weight(item: bytes | SayMessage | EndMessage) -> int:
    """Bytes that a message counts for; a thousand small ones are no less work."""
    return 1000 + (len(item) if isinstance(item, bytes) else 0)


def _control_complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return 'not understood; send {"type": "say", "text": ...}, {"type": "interrupt"} or {"type": "end"}'
    return complaint(error)
