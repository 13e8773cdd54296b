"""The MQTT trigger: jobs and sessions by messages. docs/mqtt.md describes them.

What a broker delivers is acknowledged when it is on the disk (mqtt_ledger.py) or has been answered, never before; what
an asker is to be told is read from the ledger and the store when there is a broker to tell it to. So nothing is lost
with a connection, and nothing piles up in memory while there is none (mqtt_broker.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

from audio.errors import AvatardError
from service.app import App
from service.commands import Refusal, Source
from service.mqtt_answers import BREAKS, Answers, Due, as_refusal
from service.mqtt_broker import BrokerGone, CannotServe, Connection, Login, TooLong, stay_connected
from service.mqtt_ledger import Debt, Ledger
from service.mqtt_messages import (
    FINISHED,
    NOBODY,
    Asker,
    Body,
    Submission,
    Topics,
    chunk_count,
    encode,
    is_id,
    job_body,
    read_asker,
    read_chunk,
    read_object,
    read_submission,
    refusal_body,
)
from service.mqtt_sessions import SessionMessages

if TYPE_CHECKING:
    import aiomqtt

    from service.hub import News
    from service.store import Job

DECIDERS = 8
"""Jobs whose picture and sound are fetched at once."""
UNDECIDED = 1000
"""Jobs that may wait for that; more are refused."""
ATTEMPTS = 3
"""Times a message is looked into that ends the daemon each time."""
UPLOADS = 8
"""Sounds that come in messages of their own at once."""
UPLOAD_PARTS = 64
"""Messages of one that wait for the disk, and the most seconds they do."""
UPLOAD_WAIT_S = 5.0
TELLERS = 8
"""States and results on their way at once: each waits for the broker to have it."""
KEPT_S = 3600
"""For which the broker keeps the state of what has ended."""
PROGRESS_EVERY_S = 0.5
LARGE_BYTES = 64_000
"""A message from which on it is read in a thread."""
DISK_RETRY_S = 10.0
"""Until what the store or the ledger could not do is tried again."""

R = TypeVar("R")

log = logging.getLogger(__name__)


async def serve_mqtt(app: App) -> None:
    """Take jobs and commands from the broker in the settings, and tell it what becomes of them, until cancelled.

    Whatever a broker does is no error. Raises: ConfigError: a password or a certificate cannot be used; LedgerError.
    """
    login = await asyncio.to_thread(Login.read, app.settings)
    ledger = await Ledger.open(app.settings.daemon.state)
    try:
        await _Mqtt(app, login, ledger).run()
    finally:
        await ledger.close()


class _Upload:
    """A sound on its way in messages. `n`: of its row in the ledger."""

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.n = 0
        self.parts: asyncio.Queue[bytes | Refusal] = asyncio.Queue(UPLOAD_PARTS)
        """b"" is its end."""

    def break_off(self, why: Refusal) -> None:
        while not self.parts.empty():
            self.parts.get_nowait()
        self.parts.put_nowait(why)

    async def stream(self) -> AsyncIterator[bytes]:
        while part := await self.parts.get():
            if isinstance(part, Refusal):
                raise part
            yield part


class _Mqtt:
    """The trigger while the daemon lives, over one connection after the other."""

    def __init__(self, app: App, login: Login, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._ledger, self._clock = app, ledger, clock
        self._login, self._daemon = login, login.client_id
        mqtt = app.settings.mqtt
        self._topics = Topics(mqtt.prefix, mqtt.group)
        self._most_bytes = round(mqtt.max_payload_mb * 1e6)
        self._result = "path" if mqtt.result == "url" and not self._has_address else mqtt.result
        self._began = clock()
        self._due = Due()
        self._tasks = asyncio.TaskGroup()
        self._answers = Answers(self._topics, self._due, self._tasks)
        self._sessions = SessionMessages(app, self._topics, self._daemon, self._due, self._answers, self._tasks)
        # An id for each job in the ledger, so that news of other jobs cost nothing.
        self._owed: set[str] = set()
        self._undecided: asyncio.Queue[int] = asyncio.Queue()
        self._deciding: dict[int, str] = {}
        self._withdrawn: set[str] = set()
        self._uploads: dict[str, _Upload] = {}
        self._progress: dict[str, tuple[float, Body]] = {}
        self._refusals: dict[int, Refusal] = {}
        self._breaks: dict[int, int] = {}

    @property
    def _has_address(self) -> bool:
        """Whether the address of a result could be told, and followed."""
        http = self._app.settings.http
        return http.enabled and bool(http.public_url or http.port)

    async def run(self) -> None:
        # Listened to before the ledger is read: what happens from here on is not missed.
        with self._app.hub.listen(1024) as news:
            for n, id in await self._ledger.undecided():
                self._decide_soon(id, n)
            self._owed = set(await self._ledger.jobs())
            if self._owed:
                log.info("mqtt: %d jobs from before are still to be told about", len(self._owed))
            async with self._tasks:
                self._tasks.create_task(self._listen(news), name="mqtt news")
                for _ in range(DECIDERS):
                    self._tasks.create_task(self._decide_one_after_the_other(), name="mqtt intake")
                await stay_connected(self._login, self._topics.own("available"), self._serve, self._clock)

    # News of the daemon become due

    async def _listen(self, news: AsyncIterator[News]) -> None:
        async for item in news:
            if item.missed:
                self._everything_is_due()
            if item.kind == "session":
                self._sessions.on_news(item)
            elif item.kind == "job" and item.id in self._owed:
                if item.what == "progress":
                    self._on_progress(item)
                else:
                    self._due.add(("job", item.id))

    def _on_progress(self, item: News) -> None:
        last, _ = self._progress.get(item.id, (-PROGRESS_EVERY_S, {}))
        if self._clock() - last >= PROGRESS_EVERY_S:
            self._progress[item.id] = self._clock(), {"id": item.id, **item.body}
            self._due.add(("progress", item.id))

    def _everything_is_due(self) -> None:
        for id in sorted(self._owed):
            self._due.add(("job", id))
        self._sessions.all_due()
        self._answers.all_due()

    # One connection

    async def _serve(self, connection: Connection) -> None:
        """Until the broker is gone. Raises: BrokerGone."""
        self._sessions.connected()
        available = self._topics.own("available")
        shared = [self._topics.shared(name) for name in ("jobs/submit", "sessions/open")]
        await connection.subscribe([*shared, self._topics.own("jobs/+/cancel"), available])
        self._everything_is_due()
        await connection.publish(available, b"online", retain=True, content_type="text/plain")
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(TELLERS):
                    tasks.create_task(self._tell_one_after_the_other(connection), name="mqtt teller")
                tasks.create_task(self._tell_stats(connection), name="mqtt stats")
                tasks.create_task(self._sessions.watch(), name="mqtt sessions")
                await self._receive(connection)
        finally:
            for upload in list(self._uploads.values()):
                # Its next messages may be lost, and nobody could tell.
                upload.break_off(
                    Refusal("unavailable", "the connection to the broker was lost while its sound came; send it again")
                )

    async def _receive(self, connection: Connection) -> None:
        async for message in connection.messages():
            kind, outcome = "other", "ignored"
            # With it set, this was lying there before anybody asked: a command would be carried out at each return.
            if not message.retain:
                try:
                    kind, outcome = await self._take(connection, message)
                except BrokerGone:
                    raise
                except Exception:
                    # A bug. The message must not come again, and the daemon has other things to do.
                    log.exception("mqtt: a message on %s could not even be refused", message.topic)
            connection.acknowledge(message)
            self._app.metrics.message(kind, outcome)

    async def _take(self, connection: Connection, message: aiomqtt.Message) -> tuple[str, str]:
        """Bring a message to where it is safe, or answer it. Returns: what it was, and what became of it."""
        parts = self._topics.parts(message.topic.value)
        body: Body = {}
        asker = NOBODY
        try:
            payload = self._payload_of(message)
            match parts:
                case ["available"]:
                    # Another daemon has gone, or our own last connection has. But we are here.
                    if payload == b"offline":
                        await connection.publish(message.topic.value, b"online", retain=True, content_type="text/plain")
                    return "available", "taken"
                case ["jobs", id, "audio"]:
                    await self._take_part(id, payload)
                    return "audio", "taken"
                case ["sessions", id, "audio"]:
                    self._sessions.take(id, "audio", payload, NOBODY)
                    return "audio", "taken"
                case ["sessions", _, "say"] if not payload.lstrip().startswith(b"{"):
                    body = {"text": payload.decode(errors="replace")}
                case ["jobs", "submit"] | ["sessions", "open"] | ["sessions", _, "say" | "set"]:
                    body = await _in_thread_if_large(payload, lambda: read_object(payload))
                case ["jobs", _, "cancel"] | ["sessions", _, "interrupt" | "close"]:
                    body = read_object(payload) if payload.strip() else {}
                case _:
                    return "other", "ignored"
            asker = read_asker(message.properties, body, self._topics)
            match parts:
                case ["jobs", "submit"]:
                    await self._submit(connection, body, asker)
                case ["jobs", id, "cancel"]:
                    self._answers.start(self._cancel(id, asker), asker, "jobs", id)
                case ["sessions", "open"]:
                    self._answers.start(self._sessions.open(body, asker), asker, "sessions")
                case ["sessions", id, what]:
                    self._sessions.take(id, what, body, asker)
            return parts[-1], "taken"
        except BrokerGone:
            raise
        except sqlite3.Error as error:
            # Not acknowledged, so that the broker keeps it.
            raise CannotServe(f"nothing can be taken: {error}; is the disk of daemon.state full?") from error
        except Exception as error:
            refusal = as_refusal(error)
        if asker is NOBODY:
            # What is not JSON may well say where the answer goes.
            with contextlib.suppress(Refusal):
                asker = read_asker(message.properties, {}, self._topics)
        await self._refuse(connection, parts, body, asker, refusal)
        return parts[-1], "refused"

    def _payload_of(self, message: aiomqtt.Message) -> bytes:
        if isinstance(message.payload, TooLong):
            size = message.payload.size / 1e6
            raise Refusal("too large", f"message: {size:.1f} MB; mqtt.max_payload_mb allows {self._most_bytes / 1e6:g}")
        return bytes(message.payload)

    async def _refuse(
        self, connection: Connection, parts: list[str], body: Body, asker: Asker, refusal: Refusal
    ) -> None:
        """Answer at once, so that the message can be acknowledged."""
        named = parts[1] if len(parts) == 3 else body.get("id")
        id = named if isinstance(named, str) and is_id(named) else ""
        match parts:
            case ["jobs", _, "audio"] if id in self._uploads:
                self._uploads[id].break_off(refusal)
                return
            case ["sessions", _, "audio"]:
                # As often as there is sound.
                return
            case ["jobs" | "sessions", *_]:
                known = parts[0] == "jobs" and id in self._owed
                answer = refusal_body(refusal, id)
                await self._answers.publish(connection, asker, _refused_topic(parts[0], answer, known), answer)

    # Jobs: in

    async def _submit(self, connection: Connection, body: Body, asker: Asker) -> None:
        """Returns when the ledger has it. Raises: Refusal, sqlite3.Error, BrokerGone."""
        submission = await _in_thread_if_large(body, lambda: read_submission(body, asker, self._topics, self._result))
        if submission.result == "url" and not self._has_address:
            raise Refusal("invalid", "result: this daemon has no address for HTTP; ask for path or payload")
        if len(self._deciding) >= UNDECIDED:
            raise Refusal("full", f"{UNDECIDED} jobs wait for their picture and sound; send it again later", 5.0)
        id = submission.id
        if not submission.upload:
            n = await self._ledger.take(submission)
            self._owed.add(id)
            self._decide_soon(id, n)
            return
        if id in self._uploads:
            raise Refusal("conflict", f"job {id}: its sound is on the way already")
        if len(self._uploads) >= UPLOADS:
            raise Refusal("full", f"{UPLOADS} sounds are on the way, which is the limit; send it again later", 5.0)
        upload = self._uploads[id] = _Upload(submission)
        try:
            await connection.subscribe([self._topics.own(f"jobs/{id}/audio")])
            upload.n = await self._ledger.take(submission)
        except BaseException:
            del self._uploads[id]
            raise
        self._owed.add(id)
        self._tasks.create_task(self._receive_sound(upload), name=f"mqtt sound of {id}")
        self._due.add(("job", id))

    async def _take_part(self, id: str, payload: bytes) -> None:
        """A piece of a job's sound; one that nobody waits for any more is left out."""
        upload = self._uploads.get(id)
        if upload is None:
            self._due.add(("upload", id))
            return
        try:
            async with asyncio.timeout(UPLOAD_WAIT_S):
                await upload.parts.put(payload)
        except TimeoutError:
            upload.break_off(
                Refusal("unavailable", "the disk is too slow for its sound; send the job again later", 60.0)
            )

    async def _receive_sound(self, upload: _Upload) -> None:
        id = upload.submission.id
        try:
            path = await self._app.inputs.keep(upload.stream(), "audio", f"the sound of job {id}")
            command = upload.submission.command.model_copy(
                update={"audio": Source.model_validate({"upload": path.name})}
            )
            await self._ledger.received(upload.n, command)
        except Exception as error:
            self._refusals[upload.n] = as_refusal(error)
        finally:
            del self._uploads[id]
            self._due.add(("upload", id))
        self._decide_soon(id, upload.n)

    def _decide_soon(self, id: str, n: int) -> None:
        self._deciding[n] = id
        self._undecided.put_nowait(n)

    async def _decide_one_after_the_other(self) -> None:
        while True:
            n = await self._undecided.get()
            try:
                await self._decide(n, self._deciding[n])
            except sqlite3.Error as error:
                log.error("mqtt: a message cannot be settled: %s; is the disk of daemon.state full?", error)
                await asyncio.sleep(DISK_RETRY_S)
                self._undecided.put_nowait(n)

    async def _decide(self, n: int, id: str) -> None:
        """Make a job of a message, or say why not. It may take as long as its picture and sound are fetched."""
        answer: Body | None = None
        try:
            asked = await self._ledger.begin(n)
            if n in self._refusals:
                raise self._refusals.pop(n)
            if asked.incomplete:
                self._due.add(("upload", id))
                raise Refusal("unavailable", "the daemon ended while its sound came; send it again")
            if asked.attempts >= ATTEMPTS:
                raise Refusal("invalid", f"the daemon ended {asked.attempts} times while it looked into it")
            if asked.withdrawn:
                self._withdrawn.add(id)
            if id in self._withdrawn:
                answer = self._cancelled(id)
            else:
                await self._app.jobs.submit(asked.command, {"trigger": "mqtt"})
        except sqlite3.Error:
            raise
        except Exception as error:
            answer = refusal_body(as_refusal(error), id)
        await self._ledger.decide(n, answer)
        while id in self._withdrawn:
            # It may be a job all the same: since this was begun, or since a daemon that was killed had begun it.
            self._withdrawn.discard(id)
            with contextlib.suppress(AvatardError):
                await self._app.jobs.cancel(id)
        del self._deciding[n]
        # Again: while this row was written, another one of the same job may have been the last to be settled.
        self._owed.add(id)
        self._due.add(("job", id))

    async def _cancel(self, id: str, asker: Asker) -> None:
        if id in self._uploads:
            self._uploads[id].break_off(Refusal("conflict", "was cancelled before all its sound came"))
            self._answers.answer(asker, self._cancelled(id))
        elif id in self._deciding.values():
            self._withdrawn.add(id)
            await self._ledger.withdraw(id)
            self._answers.answer(asker, self._cancelled(id))
        else:
            self._answers.answer(asker, job_body(await self._app.jobs.cancel(id), self._daemon))

    def _cancelled(self, id: str) -> Body:
        return {"id": id, "state": "cancelled", "daemon": self._daemon}

    # Jobs: out

    async def _tell_job(self, connection: Connection, id: str) -> None:
        debts = await self._ledger.debts(id)
        taken = [debt for debt in debts if debt.decided and debt.answer is None]
        for debt in debts:
            if debt.answer is not None:
                await self._tell_refused(connection, debt, debt.answer, bool(taken))
            elif debt.upload and id in self._uploads and not debt.told:
                waiting = {"id": id, "state": "receiving", "daemon": self._daemon}
                await self._answers.publish(connection, debt.asker, f"jobs/{id}/state", waiting)
                await self._ledger.tell(debt.n)
        if taken:
            await self._tell_state(connection, id, taken)
        if not await self._ledger.debts(id):
            self._owed.discard(id)
            self._progress.pop(id, None)

    async def _tell_refused(self, connection: Connection, debt: Debt, answer: Body, known: bool) -> None:
        await self._answers.publish(connection, debt.asker, _refused_topic("jobs", answer, known), answer)
        await self._ledger.settle(debt.n)

    async def _tell_state(self, connection: Connection, id: str, debts: list[Debt]) -> None:
        """What has become of a job that is in the store: to all, and to those who asked for it."""
        try:
            job = await self._app.jobs.get(id)
        except Refusal:
            lost = {"id": id, "state": "failed", "error": "was deleted before this could be told", "error_type": "lost"}
            for debt in debts:
                await self._answers.publish(connection, debt.asker, f"jobs/{id}/result", lost)
                await self._ledger.settle(debt.n)
            return
        body = job_body(job, self._daemon)
        finished = job.state in FINISHED
        if finished:
            body["result"] = self._result_of(job, self._result)
        topic = self._topics.own(f"jobs/{id}/state")
        if connection.five:
            expires_s = KEPT_S if finished else None
            await connection.publish(topic, encode(body), retain=True, expires_s=expires_s)
        else:
            await connection.publish(topic, encode(body), retain=not finished)
            if finished:
                # Nothing retained ends by itself in MQTT 3.1.1.
                await connection.publish(topic, b"", retain=True)
        if finished:
            await connection.publish(self._topics.own(f"jobs/{id}/result"), encode(body))
        for debt in debts:
            # To be told apart from an id that was asked for.
            mine = body if debt.given else body | {"fresh_id": True}
            if finished:
                await self._tell_result(connection, debt, job, mine)
                await self._ledger.settle(debt.n)
            elif not debt.told:
                if debt.asker.topic:
                    await self._answers.publish(connection, debt.asker, "", mine)
                await self._ledger.tell(debt.n)

    async def _tell_result(self, connection: Connection, debt: Debt, job: Job, body: Body) -> None:
        kind, breaks = debt.result, self._breaks.get(debt.n, 0)
        if kind == "payload" and breaks >= BREAKS:
            # Or it would end every connection from now on, and nobody would be told anything.
            kind = "url" if self._has_address else "path"
            log.warning("mqtt: job %s: the broker does not take its file in pieces; it is told as %s", job.id, kind)
        body = body | {"result": self._result_of(job, kind)}
        if debt.asker.topic:
            await self._answers.publish(connection, debt.asker, "", body)
        if kind == "payload" and job.result is not None:
            self._breaks[debt.n] = breaks + 1
            await self._tell_pieces(connection, debt, job, job.result)
        self._breaks.pop(debt.n, None)

    async def _tell_pieces(self, connection: Connection, debt: Debt, job: Job, result: Body) -> None:
        topic, total = f"jobs/{job.id}/result", chunk_count(result["bytes"])
        try:
            path = self._app.jobs.result_path(job)
            for index in range(total):
                piece = await asyncio.to_thread(read_chunk, path, index)
                head = {"id": job.id, "index": index, "total": total, "sha256": result["sha256"]}
                await self._answers.publish(connection, debt.asker, topic, head, piece)
        except (OSError, Refusal) as error:
            log.warning("mqtt: job %s: its file cannot be read: %s", job.id, error)
            gone = {"id": job.id, "state": "failed", "error": "its file was deleted or cannot be read"}
            await self._answers.publish(connection, debt.asker, topic, gone)

    def _result_of(self, job: Job, kind: str) -> Body | None:
        """A finished job's file, and where it is to be had."""
        if job.result is None:
            return None
        told = {name: value for name, value in job.result.items() if name != "path"} | {"kind": kind}
        if kind == "path":
            with contextlib.suppress(Refusal):
                told["path"] = str(self._app.jobs.result_path(job))
            return told
        if kind == "payload":
            return told | {"chunks": chunk_count(job.result["bytes"])}
        return told | {"url": f"{_http_address(self._app)}/v1/jobs/{job.id}/result"}

    # Telling, and the daemon itself

    async def _tell_one_after_the_other(self, connection: Connection) -> None:
        while True:
            async with self._due.next() as (kind, id):
                try:
                    await self._tell(connection, kind, id)
                except BrokerGone:
                    raise
                except sqlite3.Error as error:
                    raise CannotServe(f"nothing can be told: {error}; is the disk of daemon.state full?") from error
                except AvatardError as error:
                    log.warning("mqtt: %s %s cannot be told now: %s", kind, id, error)
                    await asyncio.sleep(DISK_RETRY_S)
                    self._due.add((kind, id))
                except Exception:
                    # A bug: it must not keep the others from being told.
                    log.exception("mqtt: %s %s cannot be told", kind, id)

    async def _tell(self, connection: Connection, kind: str, id: str) -> None:
        match kind:
            case "job":
                await self._tell_job(connection, id)
            case "progress" if id in self._progress:
                _, body = self._progress[id]
                await connection.publish(self._topics.own(f"jobs/{id}/progress"), encode(body), qos=0)
            case "upload" if id not in self._uploads:
                await connection.unsubscribe([self._topics.own(f"jobs/{id}/audio")])
            case "session":
                await self._sessions.tell(connection, id)
            case "reply":
                await self._answers.tell(connection, id)

    async def _tell_stats(self, connection: Connection) -> None:
        while True:
            with contextlib.suppress(AvatardError):
                # What is wrong with the store is told by who works on it.
                await connection.publish(self._topics.own("stats"), encode(await self._stats()), qos=0)
            await asyncio.sleep(self._app.settings.mqtt.stats_s)

    async def _stats(self) -> Body:
        return {
            "daemon": self._daemon,
            "name": self._app.settings.daemon.metadata_name,
            "version": version("avatard"),
            "uptime_s": round(self._clock() - self._began, 1),
            "engine": self._app.engine.state,
            "jobs": await self._app.jobs.counts(),
            "sessions": len(self._app.sessions.list()),
            "intake": self._app.jobs.paused or "open",
        }


async def _in_thread_if_large(what: bytes | Body, work: Callable[[], R]) -> R:
    """Beside the event loop where it would stand still for a while: a picture in base64, read letter by letter."""
    if isinstance(what, bytes):
        large = len(what) > LARGE_BYTES
    else:
        sources = [
            part.get("data") if isinstance(part, dict) else part for part in (what.get("image"), what.get("audio"))
        ]
        large = any(isinstance(source, str) and len(source) > LARGE_BYTES for source in sources)
    return await asyncio.to_thread(work) if large else work()


def _refused_topic(kind: str, answer: Body, known: bool) -> str:
    """Where a refusal goes that nobody gave a topic for: to who waits for that job, and not for another of its name."""
    id = answer.get("id")
    if kind == "jobs" and id and not known and answer.get("reason") != "conflict":
        return f"jobs/{id}/state"
    return f"{kind}/refused"


def _http_address(app: App) -> str:
    """How others reach the HTTP server."""
    http = app.settings.http
    scheme = "https" if http.tls_cert is not None else "http"
    return http.public_url.rstrip("/") or f"{scheme}://{http.host}:{http.port}"
