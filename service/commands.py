"""What anybody may tell the daemon, whichever way it comes: checked here once, and nowhere else."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from audio.errors import AvatardError

Reason = Literal[
    "invalid",
    "forbidden",
    "not found",
    "conflict",
    "too large",
    "busy",
    "full",
    "paused",
    "unavailable",
    "unauthorised",
]
"""busy: this caller asks too often; full: whoever asks, there is no room."""

ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""Of a job or a session: it becomes part of topics, addresses and names of files."""

Identity = Annotated[str, Field(pattern=ID)]
Text = Annotated[str, Field(max_length=20_000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class Refusal(AvatardError):
    """A command that is not carried out, in one line for whoever sent it.

    reason: what kind of no it is; each trigger has its own code for it. retry_s: after which it may be a yes.
    """

    def __init__(self, reason: Reason, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.retry_s = retry_s


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _source_schema(schema: dict[str, Any]) -> None:
    """What the validators of Source say, for who reads the schema: a text, or an object with one of its fields."""
    properties = schema.pop("properties")
    each = [{"required": [name], "properties": {name: {"type": "string"}}} for name in properties]
    whole = {"type": "object", "properties": properties, "additionalProperties": False, "oneOf": each}
    schema.clear()
    schema |= {"title": "Source", "anyOf": [{"type": "string", "minLength": 1}, whole]}


def _job_schema(schema: dict[str, Any]) -> None:
    """Audio or text, one of them; and what such a command looks like."""
    none, text = {"type": "null"}, {"type": "string", "pattern": r"\S"}
    schema["oneOf"] = [
        {"required": ["audio"], "properties": {"audio": {"not": none}, "text": none}},
        {"required": ["text"], "properties": {"text": text, "audio": none}},
    ]
    spoken = {"audio": "https://example.org/greeting.wav", "image": {"path": "presenters/anna.jpg"}}
    schema["examples"] = [{"id": "greeting-1", "text": "Good morning."}, spoken]


def _change_schema(schema: dict[str, Any]) -> None:
    """Image, prompt or both."""
    given = {"not": {"type": "null"}}
    schema["anyOf"] = [{"required": [name], "properties": {name: given}} for name in ("image", "prompt")]


class Source(_Command):
    """Where a picture or a sound is: exactly one of a file on the daemon's machine, an address, base64, or an upload.

    A plain text is taken as an address when it begins like one, and as a path when it does not.
    """

    model_config = ConfigDict(json_schema_extra=_source_schema)

    path: str | None = Field(None, min_length=1, max_length=4096)
    url: str | None = Field(None, min_length=1, max_length=8192)
    data: str | None = Field(None, min_length=1, description="base64, with or without data:TYPE;base64, before it")
    upload: str | None = Field(None, pattern=ID, description="what an upload answered")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("data:"):
            return {"data": value}
        return {"url": value} if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", value) else {"path": value}

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        if sum(value is not None for value in (self.path, self.url, self.data, self.upload)) != 1:
            raise ValueError("give one of path, url, data, upload")
        return self


class SubmitJob(_Command):
    """Make one video file.

    id: names the job, and is its idempotency key: the same command with the same id is the same job. audio or text:
    what is said. name: of the result, below the folder of results.
    """

    model_config = ConfigDict(json_schema_extra=_job_schema)

    id: Identity | None = None
    image: Source | None = Field(None, description="who speaks; without one: the daemon's own presenter")
    audio: Source | None = None
    text: Text | None = None
    voice: str | None = Field(None, max_length=128, description="who reads the text")
    prompt: Text | None = None
    seed: Seed | None = None
    name: str | None = Field(None, min_length=1, max_length=512)
    priority: Literal["interactive", "batch"] = "interactive"

    @model_validator(mode="after")
    def _something_to_say(self) -> SubmitJob:
        if (self.audio is None) == (self.text is None):
            raise ValueError("give audio or text, one of them")
        if self.text is not None and not self.text.strip():
            raise ValueError("text: is empty")
        return self


class OpenSession(_Command):
    """Go on air. outputs: as after `--to`; the session can be watched without any."""

    id: Identity | None = None
    image: Source | None = None
    prompt: Text | None = None
    seed: Seed | None = None
    outputs: tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...] = Field(
        (), max_length=16, examples=[["hls:main"], ["rtmp://example.org/live/KEY", "show.mp4"]]
    )


class Say(_Command):
    """Speak a text after what is being said; interrupt: in place of it."""

    text: Text = Field(..., min_length=1, examples=["Good morning."])
    voice: str | None = Field(None, max_length=128)
    interrupt: bool = Field(False, strict=True)


class Change(_Command):
    """Another picture or another prompt, from the next block on."""

    model_config = ConfigDict(json_schema_extra=_change_schema)

    image: Source | None = None
    prompt: Text | None = None

    @model_validator(mode="after")
    def _something(self) -> Change:
        if self.image is None and self.prompt is None:
            raise ValueError("give image, prompt or both")
        return self


class AddOutput(_Command):
    """One more place to send a session to."""

    target: str = Field(..., min_length=1, max_length=4096, examples=["rtmp://example.org/live/KEY", "hls:main"])


def complaint(error: ValidationError) -> str:
    """What is wrong with a command, in one line; without the value, which may be long or a secret."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{where}: {message}" if where else message
