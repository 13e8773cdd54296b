"""The operator's log: short lines for a command; for the daemon lines with their time and session or job, or JSON.

Whatever is logged, by us or by a library, goes through `redact` last: addresses lose their passwords and keys, and a
secret that was read from a file or a variable is blanked wherever it turns up.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from audio.urls import HIDDEN, redacted

if TYPE_CHECKING:
    from service.config import LoggingSection

Event = MutableMapping[str, Any]

ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>]+")
TRAILING = ".,;:)]}"
"""What follows an address in a sentence, and is no part of it."""

NAMED = re.compile(
    r"""(?ix) (?P<name>
      \b (?:[a-z0-9_]*_)? (?:token|password|passwd|secret|api[_-]?key|stream[_-]?key) ["']? \s* [=:] \s*
    | \b authorization ["']? \s* [=:] \s* (?:bearer|basic)? \s* | \b bearer [\s.]+ (?=\S{16}) )
    (?P<value> "[^"]*" | '[^']*' | [^\s,;&}\]]+ )"""
)
"""password=..., "token": "...", Authorization: Bearer ..., in query strings too; bearer.... of a WebSocket."""

SHORTEST_SECRET = 6
"""A shorter one is not looked for: it would blank half of every line."""

QUIET = ("uvicorn.access", "httpx", "httpcore", "multipart", "python_multipart", "websockets", "asyncio", "PIL")
"""Libraries that write a line for each request or less; theirs begin at warnings."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_secrets: set[str] = set()


def set_up(level: int = logging.WARNING) -> None:
    """For a command: log to stderr in the form `avatard: text`, warnings and worse."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("avatard: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def set_up_daemon(settings: LoggingSection) -> None:
    """For the daemon: everything to stderr, as the settings say. May be called again with others."""
    import structlog

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = [structlog.processors.JSONRenderer(ensure_ascii=False)] if settings.format == "json" else [_text]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                redact,
                *last,
            ],
        )
    )
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It has handlers of its own where it was set up by its command.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    # "Uvicorn running on", "Started server process": said by the daemon itself, in one line.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


@contextmanager
def bound(**names: str) -> Iterator[None]:
    """Whatever is logged inside, and in tasks begun inside, says this: `with bound(job=id): ...`."""
    import structlog

    with structlog.contextvars.bound_contextvars(**names):
        yield


def hide(secret: str) -> None:
    """Never write this text, whoever logs it."""
    if len(secret) >= SHORTEST_SECRET:
        _secrets.add(secret)


def redact(_: Any, __: str, event: Event) -> Event:
    """A processor of structlog: every text of an event as it may be shown."""
    for key, value in event.items():
        event[key] = _shown(value)
    return event


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_shown(item) for item in value]
    return value if isinstance(value, int | float | bool | None) else without_secrets(str(value))


def without_secrets(text: str) -> str:
    """A text with its addresses redacted, and what is named a secret or known to be one blanked."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = ADDRESS.sub(_redacted_address, text)
    return NAMED.sub(lambda found: f"{found['name']}{HIDDEN}", text)


def _redacted_address(found: re.Match[str]) -> str:
    address = found[0].rstrip(TRAILING)
    return redacted(address) + found[0][len(address) :]


def _text(_: Any, __: str, event: Event) -> str:
    """2026-11-21T09:48:25Z info service.mqtt job=clip-17: what happened."""
    at = str(event.pop("timestamp", ""))
    level, name = event.pop("level", ""), event.pop("logger", "")
    said = CONTROL.sub("?", str(event.pop("event", "")))
    trace = event.pop("exception", None)
    about = "".join(f" {key}={CONTROL.sub('?', str(value))}" for key, value in sorted(event.items()))
    line = f"{at[:19]}Z {level} {name}{about}: {said}"
    return f"{line}\n{trace}" if trace else line
