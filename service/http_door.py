"""The door of the HTTP server: what is settled before a route sees a request, and told after it.

Who asks, from which page, how much they may send and how slowly. A route's body is read before its dependencies are
asked, so a stranger must be turned away here, before a byte of it is held.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect, WebSocketDisconnected

from service.app import App
from service.commands import Refusal
from service.http_answers import refused

log = logging.getLogger(__name__)

OPEN = ("/", "/livez", "/readyz", "/health", "/openapi.json")
"""What needs no token: whether it lives, what there is to call, and the page, which asks for the token itself."""
OPEN_BELOW = "/page/"

STREAMED = ("/v1/uploads", "/v1/tasks/video/form")
"""Bodies that go to the disk while they arrive; every other one is held in memory, whole."""

HELD_AT_ONCE = 4
"""So many of the largest bodies are held in memory at once; who comes then has to come again."""
SMALL = 65_536
"""A body of so many bytes always finds room: their number is bounded by that of connections."""

BODY_GRACE_S = 30.0
BODY_BYTES_PER_S = 2_000
"""A body may take the grace, and a second for each so many bytes of it that have come."""

SUBPROTOCOL = "avatard"
BEARER_SUBPROTOCOL = "bearer."

CLIENT_GONE = (ClientDisconnect, WebSocketDisconnect, WebSocketDisconnected)
"""What is raised where there is nobody to read from or to send to any more; clients leave when they like."""
CLIENT_LEFT = 499
"""The status, in metrics alone, of what nobody waited for; nginx calls it so."""

NOTHING_RUNS = "default-src 'none'; frame-ancestors 'none'"


class Door:
    """ASGI middleware. `scope["state"]["principal"]` is who asks, wherever a token may be asked for."""

    def __init__(self, inner: ASGIApp, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner, self._app, self._clock = inner, app, clock
        http = app.settings.http
        self._max_streamed = round(http.max_body_mb * 1e6)
        self._max_held = min(self._max_streamed, round(http.max_json_mb * 1e6))
        self._held = 0
        self._own_names = {urlsplit(http.public_url).netloc.lower()} if http.public_url else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._inner(scope, receive, send)
        began = self._clock()
        visit = _Visit(self, scope, receive, send)
        try:
            try:
                self._admit(scope)
                visit.expect()
            except (Refusal, HTTPException) as error:
                await _turned_away(error)(scope, receive, visit.send)
            else:
                await self._inner(scope, visit.receive, visit.send)
        except CLIENT_GONE:
            visit.status = visit.status or CLIENT_LEFT
        except Exception:
            visit.status = visit.status or 500
            log.exception("%s: failed by a bug", _route(scope))
            raise
        finally:
            self._held -= visit.held
            method = scope.get("method", "WEBSOCKET")
            self._app.metrics.request(_route(scope), method, visit.status or CLIENT_LEFT, self._clock() - began)

    def _admit(self, scope: Scope) -> None:
        """Raises: Refusal."""
        if scope["path"] != "/":
            # Clients of LightX2V write a slash at the end, or none.
            scope["path"] = scope["path"].rstrip("/") or "/"
        headers = Headers(scope=scope)
        self._check_names(scope, headers)
        path = scope["path"]
        if path in OPEN or path.startswith(OPEN_BELOW):
            return
        address = scope["client"][0] if scope.get("client") else ""
        principal = self._app.keys.identify(_token(scope, headers), address)
        scope.setdefault("state", {})["principal"] = principal

    def _check_names(self, scope: Scope, headers: Headers) -> None:
        """A page of another site may not speak for whoever looks at it.

        Without tokens being on this machine is all that counts, and a browser that shows a foreign page is on it: its
        page may give its own name the address of this machine, so then the name that was called counts as well.
        """
        host = headers.get("host", "").lower()
        if not self._app.keys.required and host not in self._own_names and not _is_loopback(host):
            raise Refusal("forbidden", "this server has no tokens and answers to localhost only; see http.public_url")
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if origin is not None and changes:
            caller = urlsplit(origin.lower()).netloc if origin != "null" else ""
            if _without_port(caller, origin) not in {_without_port(name, origin) for name in (host, *self._own_names)}:
                raise Refusal("forbidden", "a page of another site may not do this; see http.public_url")


def _route(scope: Scope) -> str:
    """The address as it was described, not as it was called."""
    return str(getattr(scope.get("route"), "path", "other"))


class _Visit:
    """One request: what has come in and gone out of it so far."""

    def __init__(self, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
        self._door, self._scope, self._receive, self._send = door, scope, receive, send
        self._streamed = scope["path"].rstrip("/") in STREAMED
        self._limit = door._max_streamed if self._streamed else door._max_held
        self._received = 0
        self._waited_s = 0.0
        self._body_read = False
        self.held = 0
        """Bytes of the body that count as being held in memory."""
        self.status = 0

    def expect(self) -> None:
        """Raises: HTTPException: what is announced is too much."""
        length = Headers(scope=self._scope).get("content-length")
        if length is not None and length.isdecimal():
            self._take(int(length))

    async def receive(self) -> Message:
        if self._scope["type"] != "http" or self._body_read or self.status:
            return await self._receive()
        began = self._door._clock()
        try:
            async with asyncio.timeout(BODY_GRACE_S + self._received / BODY_BYTES_PER_S - self._waited_s):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body came too slowly", {"Connection": "close"}) from None
        self._waited_s += self._door._clock() - began
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._body_read = not message.get("more_body", False)
            self._take(self._received)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            _protect(MutableHeaders(scope=message))
        elif message["type"] == "websocket.accept":
            self.status = 101
        elif message["type"] == "websocket.close" and not self.status:
            self.status = 403
        await self._send(message)

    def _take(self, size: int) -> None:
        if size > self._limit:
            larger = "" if self._streamed else "; /v1/uploads takes larger pictures and sounds"
            detail = f"the body is larger than {self._limit / 1e6:g} MB{larger}"
            raise HTTPException(413, detail, {"Connection": "close"})
        if self._streamed or size <= self.held:
            return
        more = size - self.held
        if size > SMALL and self._door._held + more > HELD_AT_ONCE * self._door._max_held:
            raise HTTPException(503, "too many large requests at once", {"Connection": "close", "Retry-After": "2"})
        self._door._held += more
        self.held = size


def _turned_away(error: Refusal | HTTPException) -> ASGIApp:
    if isinstance(error, Refusal):
        # What has been announced is not read, so the connection is of no more use.
        response = refused(error)
        response.headers["Connection"] = "close"
        return response
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


def _protect(headers: MutableHeaders) -> None:
    """No page of another site may show or read an answer, and none may be taken for what it is not."""
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
    # Not on a video: the browser's own player obeys it too.
    if headers.get("content-type", "text/").startswith(("text/", "application/json")):
        headers.setdefault("Content-Security-Policy", NOTHING_RUNS)
        headers.setdefault("Cache-Control", "no-store")


def _token(scope: Scope, headers: Headers) -> str | None:
    """From the header; on a WebSocket, where a browser can set none, also from a subprotocol."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    for name in scope.get("subprotocols", ()):
        if name.startswith(BEARER_SUBPROTOCOL):
            text = name.removeprefix(BEARER_SUBPROTOCOL)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
            except (binascii.Error, UnicodeDecodeError):
                return text
    return None


def _is_loopback(host: str) -> bool:
    name = _name(host)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """Of host, host:port or [address]:port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def _without_port(host: str, origin: str) -> str:
    """Without the port that goes without saying for the origin's scheme."""
    return host.removesuffix(":443" if origin.lower().startswith("https:") else ":80")
