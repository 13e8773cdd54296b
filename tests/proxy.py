"""A line with faults: TCP connections passed on to a server, late, slowly, in part, or not at all.

It runs in a thread with an event loop of its own, so tests with and without asyncio use it alike, and every fault can
be switched while connections are open. With a certificate it is also where TLS ends: a server of RTMP behind it is
one of RTMPS.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Flag
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")

BUFFER_BYTES = 32 * 1024
"""What a direction holds of a connection that stands still; the kernel is given as much on the client's side."""

SEGMENT_BYTES = 1400

PIECES_PER_S = 20
"""Into how many pieces a second of a capped line is cut."""


class Way(Flag):
    """A direction: UP from client to server."""

    UP = 1
    DOWN = 2
    BOTH = 3


@dataclass
class Connection:
    """One connection as the line saw it; times are monotonic seconds.

    ended: "closed" by either end, "reset" by a fault or by the server, "refused" by the server behind; None: open.
    """

    number: int
    opened_s: float
    first_byte_s: float | None = None
    last_byte_s: float | None = None
    closed_s: float | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    ended: str | None = None


@dataclass
class _Fault:
    """What is wrong with one direction."""

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    moving: asyncio.Event = field(default_factory=asyncio.Event)

    def mend(self) -> None:
        self.delay_s, self.bytes_per_s = 0.0, None
        self.moving.set()


@dataclass
class _Flapping:
    """How many connections are still to be reset, each after how many bytes from its client."""

    left: int = 0
    after_bytes: int = 0


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes connections on to a port there. Use as a context manager.

    port: where it listens; connections: all there ever were, in order; tarpitted: those accepted and not served.
    """

    def __init__(self, target_port: int, *, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.target_port, self.port = target_port, port
        self.connections: list[Connection] = []
        self.tarpitted = 0
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._faults = {Way.UP: _Fault(), Way.DOWN: _Fault()}
        self._mend()
        self._lines: dict[int, _Line] = {}
        self._flapping = _Flapping()
        self._tarpit = False
        self._held: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._do(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def url(self, url: str) -> str:
        """The same URL by way of this line; rtmp:// becomes rtmps:// where TLS ends here."""
        parts = urlsplit(url)
        scheme = "rtmps" if self._tls and parts.scheme == "rtmp" else parts.scheme
        return urlunsplit(parts._replace(scheme=scheme, netloc=f"127.0.0.1:{self.port}"))

    @property
    def open(self) -> list[Connection]:
        """Connections that have not ended."""
        return [connection for connection in self.connections if connection.ended is None]

    # What is wrong with the line, from now on until `mend`.

    def mend(self) -> None:
        """No fault any more: what stood still goes on, and new connections are taken. Those in the tarpit are reset."""

        async def do() -> None:
            self._flapping.left = 0
            self._tarpit = False
            self._mend()
            await self._listen()

        self._do(do)

    def delay(self, seconds: float, way: Way = Way.BOTH) -> None:
        """All that comes now arrives so much later, in order and at full rate (up to what a direction holds)."""
        self._each(way, lambda fault: setattr(fault, "delay_s", seconds))

    def cap(self, bytes_per_s: float | None, way: Way = Way.UP) -> None:
        """Each connection gets no more than that through; None: no limit."""
        self._each(way, lambda fault: setattr(fault, "bytes_per_s", bytes_per_s))

    def stall(self, way: Way = Way.BOTH) -> None:
        """Nothing is read or written any more, and nobody is told. Also a close waits until the line moves again."""
        self._each(way, lambda fault: fault.moving.clear())

    def resume(self, way: Way = Way.BOTH) -> None:
        self._each(way, lambda fault: fault.moving.set())

    def reset(self) -> int:
        """Tear down every open connection with a RST to both ends; how many there were."""

        async def do() -> int:
            lines = list(self._lines.values())
            for line in lines:
                line.reset()
            return len(lines)

        return self._do(do)

    def reset_each(self, times: int, after_bytes: int) -> None:
        """The next so many connections are each reset once the client has sent that many bytes: flapping.

        One that ends by itself before that is not counted.
        """

        async def do() -> None:
            self._flapping = _Flapping(times, after_bytes)

        self._do(do)

    @property
    def resets_left(self) -> int:
        return self._flapping.left

    def refuse(self) -> None:
        """New connections are refused, as by a host where nothing listens; open ones go on."""
        self._do(self._stop_listening)

    def tarpit(self) -> None:
        """New connections are accepted and get no answer, and nothing that they send is read; open ones go on."""

        async def do() -> None:
            self._tarpit = True
            await self._listen()

        self._do(do)

    def deaf(self) -> None:
        """New connections get no answer to their SYN, as from a host behind a firewall; open ones go on."""

        async def do() -> None:
            await self._stop_listening()
            self._listener = _listener(self.port, backlog=0)
            # Linux drops the SYN of a connection that finds the queue of those not accepted full.
            for _ in range(2):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", self.port))
                self._held.append(filler)

        self._do(do)

    def _each(self, way: Way, change: Callable[[_Fault], None]) -> None:
        async def do() -> None:
            for direction, fault in self._faults.items():
                if direction in way:
                    change(fault)

        self._do(do)

    def _do(self, work: Callable[[], Any]) -> Any:
        """Run a coroutine in the line's thread, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    def _mend(self) -> None:
        for fault in self._faults.values():
            fault.mend()

    async def _listen(self) -> None:
        await self._stop_listening()
        self._listener = _listener(self.port, backlog=128)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listener), name="accept")

    async def _stop_listening(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for held in self._held:
            _close_with_reset(held)
        self._held.clear()

    async def _accept(self, listener: socket.socket) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                if self._tarpit:
                    self.tarpitted += 1
                    self._held.append(client)
                else:
                    tasks.create_task(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        connection = Connection(len(self.connections), time.monotonic())
        self.connections.append(connection)
        line = _Line(connection, self._faults, self._flapping if self._flapping.left else _Flapping())
        try:
            await self._loop.create_connection(lambda: line.server, "127.0.0.1", self.target_port)
        except OSError:
            connection.closed_s, connection.ended = time.monotonic(), "refused"
            _close_with_reset(client)
            return
        try:
            await self._loop.connect_accepted_socket(lambda: line.client, client, ssl=self._tls)
        except (OSError, ssl.SSLError):
            line.end("closed")
            return
        self._lines[connection.number] = line
        line.on_end = lambda: self._lines.pop(connection.number, None)
        line.run()

    async def _close(self) -> None:
        await self._stop_listening()
        for line in list(self._lines.values()):
            line.reset()
        # Once round the loop, so that transports that were aborted close their sockets.
        await asyncio.sleep(0)


class _Line:
    """One connection: two ends, and two directions between them."""

    def __init__(self, connection: Connection, faults: dict[Way, _Fault], flapping: _Flapping) -> None:
        self.connection, self._flapping = connection, flapping
        self.client = _End(self, Way.UP, faults[Way.UP])
        self.server = _End(self, Way.DOWN, faults[Way.DOWN])
        self.on_end: Callable[[], object] = lambda: None
        self._tasks: list[asyncio.Task[None]] = []

    def run(self) -> None:
        for source, sink in itertools.permutations([self.client, self.server]):
            self._tasks.append(asyncio.create_task(source.pump(sink), name=f"pump {source.way}"))

    def count(self, way: Way, size: int) -> bool:
        """So many bytes went through; False: and those were the last."""
        seen = self.connection
        seen.last_byte_s = time.monotonic()
        seen.first_byte_s = seen.first_byte_s or seen.last_byte_s
        if way is Way.UP:
            seen.up_bytes += size
        else:
            seen.down_bytes += size
        if not self._flapping.left or seen.up_bytes < self._flapping.after_bytes:
            return True
        self._flapping.left -= 1
        return False

    def allowed(self, way: Way, size: int) -> int:
        """How many of these bytes still go through before the reset that is due."""
        if way is Way.UP and self._flapping.left:
            return max(0, min(size, self._flapping.after_bytes - self.connection.up_bytes))
        return size

    def reset(self) -> None:
        for end in (self.client, self.server):
            end.reset()
        self.end("reset")

    def end(self, how: str) -> None:
        if self.connection.ended is None:
            self.connection.ended, self.connection.closed_s = how, time.monotonic()
            self.on_end()
        for end in (self.client, self.server):
            if end.transport is not None:
                end.transport.close()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


class _End(asyncio.Protocol):
    """One end of a line, and the bytes that came from it and are under way to the other."""

    def __init__(self, line: _Line, way: Way, fault: _Fault) -> None:
        self.line, self.way, self.fault = line, way, fault
        self.transport: asyncio.Transport | None = None
        self.queue: deque[tuple[float, bytes]] = deque()
        self.queued = 0
        self.finished: str | None = None
        self.news = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        self.queue.append((time.monotonic() + self.fault.delay_s, data))
        self.queued += len(data)
        self._read_or_not()
        self.news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.finished = self.finished or ("closed" if error is None else "reset")
        self.writable.set()
        self.news.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    async def pump(self, sink: _End) -> None:
        """Pass on what comes from here, as the fault lets it."""
        while self.queue or self.finished is None:
            if not self.queue:
                self.news.clear()
                await self.news.wait()
                continue
            due, data = self.queue[0]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not await self._write(sink, data):
                return
            self.queue.popleft()
            self.queued -= len(data)
            self._read_or_not()
        await self.fault.moving.wait()
        if self.finished == "reset":
            self.line.reset()
        else:
            self.line.end("closed")

    async def _write(self, sink: _End, data: bytes) -> bool:
        """Write to the other end as fast as allowed; False: that was the end of the connection."""
        at = 0
        while at < len(data):
            await self.fault.moving.wait()
            rate = self.fault.bytes_per_s
            size = len(data) - at if rate is None else min(len(data) - at, max(1, int(rate / PIECES_PER_S)))
            size = self.line.allowed(self.way, size)
            assert sink.transport is not None
            if not sink.transport.is_closing():
                sink.transport.write(data[at : at + size])
            if not self.line.count(self.way, size):
                self.line.reset()
                return False
            await sink.writable.wait()
            if rate is not None:
                await asyncio.sleep(size / rate)
            at += size
        return True

    def _read_or_not(self) -> None:
        """Hold no more than a buffer, or what is under way on a long line."""
        if self.transport is None or self.transport.is_closing():
            return
        # A delayed line is long: what is on it is limited by time, not by us, up to what a fast one carries.
        full = self.queued >= (BUFFER_BYTES if not self.fault.delay_s else 64 * BUFFER_BYTES)
        with contextlib.suppress(RuntimeError):
            (self.transport.pause_reading if full else self.transport.resume_reading)()

    def reset(self) -> None:
        if self.transport is None:
            return
        # abort() drops what was not sent; without lingering the kernel then says RST instead of FIN.
        with contextlib.suppress(OSError, AttributeError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()


NO_LINGER = struct.pack("ii", 1, 0)


def _close_with_reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    connection.close()


def _listener(port: int, backlog: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Given a size, the kernel does not enlarge it: otherwise it takes in megabytes for a client of a line that stalls.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    # Segments as on any line: those of loopback are larger than that buffer, and who sends them is stopped for seconds.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    listener.bind(("127.0.0.1", port))
    listener.listen(backlog)
    listener.setblocking(False)
    return listener


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens, and which the kernel gives to nobody who leaves the choice to it.

    One of those that it does give could be another's before ours is bound: tests run side by side.
    """
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = range(10_000, 65_536)
    for port in random.SystemRandom().sample([port for port in ports if not first <= port <= last] or ports, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("of a hundred ports all were taken")


def certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 and localhost, made now: one PEM file with its key (needs openssl).

    The file also is what a client has to trust (SSL_CERT_FILE).
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, cert, both = folder / "key.pem", folder / "cert.pem", folder / "both.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    return both


def tls_server(pem: Path) -> ssl.SSLContext:
    """What a `Proxy` needs to speak TLS with a certificate of `certificate`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context
