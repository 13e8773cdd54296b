"""What all routes share: who may come in, and how errors, files and events are answered."""

from __future__ import annotations

import asyncio
import difflib
import json
import re
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import Depends, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.requests import HTTPConnection

from audio.errors import AvatardError
from service.auth import Principal, Scope
from service.commands import Reason, Refusal
from service.hub import News
from service.store import StoreError
from streaming.engine import EngineError

STATUS: Mapping[Reason, int] = {
    "invalid": 422,
    "unauthorised": 401,
    "forbidden": 403,
    "not found": 404,
    "conflict": 409,
    "too large": 413,
    "busy": 429,
    "full": 503,
    "paused": 503,
    "unavailable": 503,
}
RETRY_S: Mapping[Reason, float] = {"full": 5.0, "paused": 60.0, "unavailable": 5.0, "busy": 5.0}
"""After which to try again, where nobody knows better."""

KEEP_ALIVE_S = 15.0
"""Between two signs of life on a stream of events; proxies give up after 30 to 60."""


Responses = dict[int | str, dict[str, Any]]
"""What a route may answer, as FastAPI is told."""

LOCATION = {"Location": {"description": "where it is from now on", "schema": {"type": "string"}}}


PROBLEM = {
    "title": "Problem",
    "description": "Any answer that is not the one that was asked for.",
    "type": "object",
    "properties": {"detail": {"type": "string", "description": "what is wrong, in one line"}},
    "required": ["detail"],
}
"""The schema of every error. Some three hundred answers refer to it; with a model for each of them the application
takes four times as long to make."""


MEANING = {
    400: "The body cannot be read",
    401: "A token is needed, or this one is not known",
    403: "The token may not do this, or the file may not be read or written",
    404: "There is none",
    408: "The body came too slowly",
    409: "There is another one of that name",
    413: "Too large",
    416: "The file has no such range",
    422: "Something in the request cannot be carried out",
    429: "Too many requests; Retry-After says when to come back",
    503: "Not now; Retry-After says when to come back",
}


def problems(*codes: int) -> Responses:
    """For a route's `responses`: what everybody may be answered, and these."""
    answers: Responses = {code: problem(MEANING[code]) for code in sorted({401, 403, 429, 503, *codes})}
    for code in (429, 503):
        answers[code]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return answers


def problem(description: str) -> dict[str, Any]:
    """One error, for a route's `responses`."""
    reference = {"$ref": "#/components/schemas/Problem"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def needs(scope: Scope) -> params.Depends:
    """For a route's `dependencies`: whoever calls it must have this scope. Who that is, the door has found out."""

    async def check(connection: HTTPConnection) -> None:
        principal: Principal = connection.state.principal
        principal.require(scope)

    return Depends(check)


# Errors


def refused(error: AvatardError) -> Response:
    """One line, the status that says what kind of no it is, and when to come back."""
    reason: Reason = "unavailable" if isinstance(error, EngineError | StoreError) else "invalid"
    if isinstance(error, Refusal):
        reason = error.reason
    headers = {}
    if (retry_s := getattr(error, "retry_s", None) or RETRY_S.get(reason)) is not None:
        headers["Retry-After"] = str(max(1, round(retry_s)))
    if reason == "unauthorised":
        headers["WWW-Authenticate"] = 'Bearer realm="avatard"'
    return JSONResponse({"detail": str(error)}, STATUS[reason], headers)


def unacceptable(error: RequestValidationError, known: Callable[[], set[str]]) -> Response:
    """What the schema refuses, in one line, without the value: it may be long, or a secret."""
    first = error.errors()[0]
    part, *names = [str(name) for name in first["loc"]]
    where = ".".join(names)
    if first["type"] == "json_invalid":
        return JSONResponse({"detail": f"the body is not JSON: {first['ctx']['error'].lower()}"}, 422)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(names[-1], known(), 1, 0.6)
        hint = f"did you mean {close[0]}?" if close else "/openapi.json lists what there is"
        message = f"unknown; {hint}"
    elif first["type"] == "missing" and not where:
        where, message = part, "there is none"
    else:
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
    return JSONResponse({"detail": f"{where}: {message}" if where else message}, 422)


# Files

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?|bytes=-\d{1,18}")


def _is_range(value: str) -> bool:
    """Whether it is one range of bytes. Several at once, which nobody needs of a video, count as none."""
    found = _RANGE.fullmatch(value.replace(" ", ""))
    return found is not None and (found[2] is None or int(found[1]) <= int(found[2]))


async def file_answer(
    request: Request,
    path: Path,
    *,
    missing: str = "the file is not there, or no more",
    download: bool = True,
    media_type: str | None = None,
) -> Response:
    """A file or the range of it that is asked for; If-Range is honoured.

    A Range that is none, or that comes with another method than GET, counts as none (RFC 9110, 14.2).
    Raises: Refusal: there is no such file; said in the words of `missing`.
    """
    try:
        found = await asyncio.to_thread(path.stat)
    except OSError as error:
        raise Refusal("not found", missing) from error
    if not stat.S_ISREG(found.st_mode):
        raise Refusal("not found", missing)
    given = request.headers.get("range")
    if given is not None and (request.method != "GET" or not _is_range(given)):
        headers = [header for header in request.scope["headers"] if header[0] != b"range"]
        request.scope["headers"] = headers
    return FileResponse(
        path,
        media_type=media_type,
        filename=path.name,
        stat_result=found,
        content_disposition_type="attachment" if download else "inline",
        headers={"Cache-Control": "private, no-cache"},
    )


# Events


class Events(StreamingResponse):
    """Server-sent events, until `events` ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def event(what: str, body: Mapping[str, Any]) -> str:
    """One event as it goes over the wire."""
    return f"event: {what}\ndata: {json.dumps(body, ensure_ascii=False, default=str)}\n\n"


def news_body(news: News) -> dict[str, Any]:
    """News as JSON; `missed` only where some was."""
    missed = {"missed": news.missed} if news.missed else {}
    return {"kind": news.kind, "id": news.id, "what": news.what, "at": news.at, **news.body, **missed}


async def with_signs_of_life(
    news: AsyncIterator[News], ending: asyncio.Event, every_s: float = KEEP_ALIVE_S
) -> AsyncIterator[News | None]:
    """What a listener hears, and None whenever there was nothing for so long, until the server ends."""
    stopped: asyncio.Future[Any] = asyncio.ensure_future(ending.wait())
    heard: asyncio.Future[Any] = asyncio.ensure_future(anext(news))  # type: ignore[arg-type]
    try:
        while not ending.is_set():
            await asyncio.wait({heard, stopped}, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
            if heard.done():
                yield heard.result()
                heard = asyncio.ensure_future(anext(news))  # type: ignore[arg-type]
            elif not stopped.done():
                yield None
    finally:
        heard.cancel()
        stopped.cancel()
