"""What stands in MQTT messages: topics, commands and answers, between bytes and words. No connection, no clock."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from service.commands import ID, Refusal, SubmitJob, complaint

if TYPE_CHECKING:
    from service.store import Job

ResultKind = Literal["path", "url", "payload"]
Body = dict[str, Any]
C = TypeVar("C", bound=BaseModel)

CHUNK_BYTES = 256 * 1024
"""Of a result in one message."""
TOPIC_BYTES = 512
TOPIC_LEVELS = 100
"""Of an asker's topic; over 200 mosquitto hangs up on whoever publishes to it."""
NO_TOPIC = re.compile(
    r"^\$|[+#\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
"""What nobody can publish to: wildcards, names of the broker's own, and what is not a character, by Unicode's word."""
CORRELATION_BYTES = 1024

FINISHED = ("completed", "failed", "cancelled")
"""States that a job does not leave."""


@dataclass(frozen=True)
class Topics:
    """Every topic there is, below a prefix. A group of daemons shares what is not for one of them by name."""

    prefix: str
    group: str = ""

    def own(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def shared(self, name: str) -> str:
        return f"$share/{self.group}/{self.own(name)}" if self.group else self.own(name)

    def parts(self, topic: str) -> list[str]:
        """What stands behind the prefix, level by level; nothing when the topic is not below it."""
        return topic[len(self.prefix) + 1 :].split("/") if topic.startswith(f"{self.prefix}/") else []

    def check_reply(self, topic: str) -> str:
        """A topic on which somebody wants answers.

        Raises: Refusal: nobody can publish to it, it is too long, or it is one of the daemon's own, where an answer
        would be taken for a command or for news of somebody else's job.
        """
        size = len(topic.encode(errors="replace"))
        if not 1 <= size <= TOPIC_BYTES:
            raise Refusal("invalid", f"response topic: has {size} bytes; 1 to {TOPIC_BYTES} are allowed")
        if NO_TOPIC.search(topic):
            raise Refusal("invalid", "response topic: begins with $, or holds +, # or what is no character to print")
        if topic.count("/") >= TOPIC_LEVELS:
            raise Refusal("invalid", f"response topic: has over {TOPIC_LEVELS} levels")
        if self.parts(topic)[:1] in (["jobs"], ["sessions"], ["available"], ["stats"]):
            raise Refusal("forbidden", "response topic: is one of the daemon's own; use one outside of its prefix")
        return topic


@dataclass(frozen=True)
class Asker:
    """Where answers go, and what the asker calls the question.

    topic: "" where only the job's or the session's own topics tell. in_body: the question's name came in the JSON, as
    MQTT 3.1.1 has no other place, and goes back there.
    """

    topic: str = ""
    correlation: bytes = b""
    in_body: bool = False

    def address(self, body: Body) -> Body:
        """An answer as this asker gets it."""
        return body | {"correlation": self.correlation.decode()} if self.in_body else body


NOBODY = Asker()


@dataclass(frozen=True)
class Submission:
    """A job that is asked for. given: its id is the asker's own; upload: its sound comes in messages of its own."""

    command: SubmitJob
    given: bool
    upload: bool
    result: ResultKind
    asker: Asker

    @property
    def id(self) -> str:
        assert self.command.id is not None
        return self.command.id


def read_object(payload: bytes) -> Body:
    """The JSON object in a payload. Raises: Refusal."""
    try:
        body = json.loads(payload.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Refusal("invalid", "message: is not text in UTF-8; send a JSON object") from None
    except (ValueError, RecursionError):
        raise Refusal("invalid", "message: is not JSON") from None
    if not isinstance(body, dict):
        raise Refusal("invalid", "message: is not a JSON object")
    return body


def _no_constant(name: str) -> float:
    # json writes what it reads, and no other reader of JSON knows these.
    raise ValueError(name)


def read_asker(properties: Any, body: Body, topics: Topics) -> Asker:
    """Who asks: by the properties of MQTT 5, or by response_topic and correlation, which leave `body`.

    Raises: Refusal.
    """
    topic = body.pop("response_topic", None)
    correlation = body.pop("correlation", None)
    in_body = correlation is not None
    if in_body and not isinstance(correlation, str):
        raise Refusal("invalid", "correlation: is not text")
    named = getattr(properties, "ResponseTopic", None) or topic
    if named is not None and not isinstance(named, str):
        raise Refusal("invalid", "response_topic: is not text")
    try:
        data = correlation.encode() if in_body else getattr(properties, "CorrelationData", b"")
    except UnicodeEncodeError:
        raise Refusal("invalid", "correlation: is not text that can be sent") from None
    if len(data) > CORRELATION_BYTES:
        raise Refusal("invalid", f"correlation: {len(data)} bytes; at most {CORRELATION_BYTES} are kept")
    return Asker(topics.check_reply(named) if named is not None else "", data, in_body)


def read_submission(body: Body, asker: Asker, topics: Topics, default: ResultKind) -> Submission:
    """A job as asked for. `body` is changed. Without an id it gets a fresh one. Raises: Refusal."""
    kind = body.pop("result", None) or default
    if kind not in get_args(ResultKind):
        raise Refusal("invalid", f"result: is not one of {', '.join(get_args(ResultKind))}")
    given = body.get("id") is not None
    if not given:
        body["id"] = fresh_id()
    sound = body.get("audio")
    upload = isinstance(sound, dict) and "topic" in sound
    if upload:
        assert isinstance(sound, dict)
        expected = topics.own(f"jobs/{body['id']}/audio")
        if not given:
            raise Refusal("invalid", "id: is needed where the sound comes on a topic; it is part of the topic")
        if sound != {"topic": expected}:
            raise Refusal("invalid", "audio.topic: has to be PREFIX/jobs/ID/audio with this job's id, and stand alone")
        # Stands for the sound until it is there: what is wrong with the rest is told before it is sent.
        body["audio"] = {"upload": "0"}
    return Submission(read_command(SubmitJob, body), given, upload, kind, asker)


def read_command(kind: type[C], body: Body) -> C:
    """Raises: Refusal."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise Refusal("invalid", complaint(error)) from None


def is_id(text: str) -> bool:
    return re.fullmatch(ID, text) is not None


def fresh_id() -> str:
    return secrets.token_hex(12)


def refusal_body(refusal: Refusal, id: str = "") -> Body:
    body: Body = {"id": id} if id else {}
    body |= {"state": "refused", "reason": refusal.reason, "error": str(refusal)}
    return body | {"retry_s": refusal.retry_s} if refusal.retry_s is not None else body


def job_body(job: Job, daemon: str) -> Body:
    """A job's state for whoever watches it, without its result."""
    return {
        "id": job.id,
        "state": job.state,
        "priority": job.priority,
        "attempts": job.attempts,
        "frames": job.frames,
        "total_frames": job.total_frames,
        "seed": job.seed,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "error": job.error,
        "error_type": job.error_type,
        "daemon": daemon,
    }


def encode(body: Body, chunk: bytes = b"") -> bytes:
    """One line of JSON, and behind its end the bytes it is about, where there are any."""
    head = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return head + b"\n" + chunk if chunk else head


def chunk_count(size: int) -> int:
    """In how many messages a file of so many bytes is told."""
    return max(1, -(-size // CHUNK_BYTES))


def read_chunk(path: Path, index: int) -> bytes:
    """One of the pieces in which a file is told. Blocks. Raises: OSError."""
    with path.open("rb") as file:
        file.seek(index * CHUNK_BYTES)
        return file.read(CHUNK_BYTES)
