"""The HTTP server: uvicorn inside the daemon's loop, with a bound on what a client can cost by doing nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from audio.errors import AvatardError
from service.app import App

log = logging.getLogger(__name__)

HEAD_BYTES = 32_768
"""Of the request line and all headers."""
HEAD_S = 10.0
"""From a connection, or from the first byte of a later request, to the end of its headers."""
IDLE_S = 15.0
"""Between two requests of one connection."""
STALL_S = 30.0
"""A client that takes nothing of what is sent for so long is gone, or as good as."""
MESSAGE_BYTES = 1_000_000
"""Of one WebSocket message; ten seconds of 48 kHz sound."""
SPARE_CONNECTIONS = 32
"""Beyond the limit, so that a refusal can be told, and whether the daemon lives."""
PROBES = ("/livez", "/readyz", "/metrics")


class HttpError(AvatardError):
    """The server cannot listen."""


async def serve(app: App, http: FastAPI) -> None:
    """Serve until cancelled, then end within `daemon.shutdown_s`: what is asked for is answered, streams are ended.

    Raises: HttpError: the address is taken or not ours, or the certificate cannot be used.
    """
    settings = app.settings.http

    # Taken here, so that a port in use is an error in one line and not the end of the process.
    listener = _listen(settings.host, settings.port)
    try:
        server = _server(app, http)
    except BaseException:
        listener.close()
        raise
    scheme = "https" if settings.tls_cert is not None else "http"
    host, port = listener.getsockname()[:2]
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    serving = asyncio.create_task(server.serve([listener]), name="uvicorn")
    try:
        log.info("listening on %s", url)
        app.hub.tell("daemon", "http", "listening", url=url)
        # Not cancelled with this one: it has requests to answer.
        await asyncio.shield(serving)
    finally:
        http.state.ending.set()
        server.should_exit = True
        # Twice what it gives its clients; what is left then is cut off.
        await asyncio.wait({serving}, timeout=app.settings.daemon.shutdown_s)
        server.abort()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(256)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise HttpError(f"http.host {host}, http.port {port}: cannot listen ({why}); 0 takes a free port") from error
    return listener


def _server(app: App, http: ASGIApp) -> _Server:
    settings = app.settings.http

    def path_of(file: os.PathLike[str] | None) -> str | None:
        return os.path.expanduser(file) if file is not None else None

    config = uvicorn.Config(
        http,
        http=_HttpProtocol,
        ws=_WebSocketProtocol,
        lifespan="off",
        log_config=None,
        # What is worth an operator's line the door logs. uvicorn would write down addresses, what any passer-by sends
        # that is no HTTP, and each client that has to be left at the end.
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=IDLE_S,  # type: ignore[arg-type]
        timeout_graceful_shutdown=max(1, int(app.settings.daemon.shutdown_s / 2)),
        ws_max_size=MESSAGE_BYTES,
        # A client's answer may wait behind minutes of its sound; that it lives, TCP sees (see _watch).
        ws_ping_timeout=None,
        ws_per_message_deflate=False,
        ssl_certfile=path_of(settings.tls_cert),
        ssl_keyfile=path_of(settings.tls_key),
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise HttpError(f"http.tls_cert, http.tls_key: cannot be used ({why})") from error
    server = _Server(config)
    config.loaded_app = _Crowd(config.loaded_app, server, settings.connections)
    return server


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Signals are the daemon's business."""
        yield

    def abort(self) -> None:
        """Cut off whoever is left."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Crowd:
    """ASGI: with more connections than the limit, who comes is refused, but for who asks whether the daemon lives."""

    def __init__(self, inner: ASGIApp, server: uvicorn.Server, limit: int) -> None:
        self._inner, self._server, self._limit = inner, server, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._server.server_state.connections) <= self._limit or scope.get("path") in PROBES:
            return await self._inner(scope, receive, send)
        headers = {"Retry-After": "5", "Connection": "close"}
        detail = f"{self._limit} connections are open, which is the limit; try again later"
        await JSONResponse({"detail": detail}, 503, headers)(scope, receive, send)


def _watch(transport: asyncio.Transport) -> None:
    """Have the kernel end a connection whose other end has vanished without a word."""
    connection = transport.get_extra_info("socket")
    options = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in options.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALL_S * 1000))


class _Stall:
    """Aborts a transport whose other end takes nothing for STALL_S; to be told when writing pauses and resumes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop, self._transport = loop, transport
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self.end()
        self._timer = self._loop.call_later(STALL_S, self._transport.abort)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _HttpProtocol(H11Protocol):
    """A connection that has to say what it wants soon, and to take what it asked for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._stall = _Stall(self.loop, transport)
        self._head_timer: asyncio.TimerHandle | None = None
        _watch(transport)
        limit = self.config.loaded_app._limit
        if len(self.connections) > limit + SPARE_CONNECTIONS:
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # It is closed once all is sent, which a client can keep from happening.
            self._stall.begin()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._stall.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stall.end()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.end()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _WebSocketProtocol(WebSocketsSansIOProtocol):
    """The same for a WebSocket that an HTTP connection has become."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stall = _Stall(self.loop, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stall.end()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.end()
