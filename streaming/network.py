"""Outputs at the other end of a network: RTMP, RTMPS and SRT, each connection in a process that can be killed.

The packets are muxed here, and `streaming.publish` passes the bytes on. Deadlines are asyncio's, and an output is
judged by how far its bytes have come: the buffers of two kernels hide a dead server for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import json
import logging
import os
import socket
import ssl
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import SplitResult, urlsplit

import av
from av.packet import Packet
from av.stream import Stream

from audio.urls import blanked, redacted
from streaming.engine_process import import_path
from streaming.muxer import FLV, MPEGTS, ByteBuffer, Muxer, length_s
from streaming.sink import SinkError, TargetAbsent, TargetRefused, reason

logger = logging.getLogger(__name__)

LookUp = Callable[[str, int], Awaitable[Sequence[str]]]
"""A host and a port to the addresses that may be called, the best first. Raises: OSError: no such host; SinkError."""

CONTAINERS = {"rtmp": ("flv", FLV), "rtmps": ("flv", FLV), "srt": ("mpegts", MPEGTS)}

PORTS = {"rtmp": 1935, "rtmps": 443}

HANDSHAKE = 1536
"""Bytes of an RTMP handshake's first answer, after its version."""

CA_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")
"""Where systems keep the certificates that they trust, beside where Python's OpenSSL was told to look."""


STALL_SLICES = 4

WINDOW_SHARE = 0.2
"""By how much of what is acknowledged a window shrinks at least when nobody reads. On Linux it is 0.35 or more; below
200 kbit/s, where small packets are packed together, less: there a frozen server is found out only when it is full."""

WINDOW_NOISE = 3000
"""Bytes that a window goes up and down by itself; it is rounded by as much."""

LATE_S = 0.5
"""How late a report may be for the time since the last one to count in full."""

LAST_BREATH_S = 0.5


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds.

    spawn_s: for the process to begin; open_s: for the server to take the connection, its handshake and the stream;
    stall_s: for progress; close_s: for a goodbye. window_s: how much of the stream may be on its way to the wire.
    """

    spawn_s: float = 20.0
    open_s: float = 5.0
    stall_s: float = 4.0
    close_s: float = 2.0
    window_s: float = 0.5


class NetworkSink:
    """One connection to a server: rtmp://, rtmps:// (certificates are verified) or srt://.

    look_up: who decides which address a name stands for; the connection is then made to that very address, whatever
    the name means a moment later. rtmps:// is called by its name all the same: whoever cannot show its certificate gets
    nothing. None: any address that the system knows.
    Raises: SinkError: a URL that names no server.
    """

    live: ClassVar[bool] = True
    output: Path | None = None

    def __init__(self, url: str, limits: Limits | None = None, look_up: LookUp | None = None) -> None:
        self.name = redacted(url)
        self._url, self._limits, self._look_up = url, limits or Limits(), look_up
        self._judged: str | None = None
        self._scheme, self._host, self._port = _address(url)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._state = "new"
        self._error: SinkError | None = None
        self._gone = False
        self._muxer: Muxer | None = None
        self._bytes = ByteBuffer()
        self._flow = Flow(self._limits.stall_s)

    @property
    def pending_s(self) -> float:
        return self._flow.pending_s

    @property
    def failed(self) -> bool:
        return self._error is not None

    async def open(self) -> None:
        if self._scheme == "srt":
            _check_protocol(self._scheme)
            if self._look_up is not None:
                self._judged = await self._first_address(self._look_up)
            return
        self._judged = await probe(
            self.name, self._host, self._port, self._limits.open_s, self._scheme == "rtmps", self._look_up
        )

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        container, options = CONTAINERS[self._scheme]
        self._muxer = Muxer(self._bytes, streams, metadata, container, options)
        try:
            async with asyncio.timeout(self._limits.spawn_s):
                await self._spawn()
                await self._until(lambda: self._state != "new")
        except TimeoutError:
            raise SinkError(
                f"{self.name}: the publishing process did not begin in {self._limits.spawn_s:g} s"
            ) from None
        url, options = self._url, self._options()
        if self._look_up is not None and self._scheme != "rtmps":
            assert self._judged is not None, "start() before open()"
            url, named = _pinned(self._url, self._judged, self._port)
            options |= named
        request = {
            "url": url,
            "options": options,
            "open_s": 2 * self._limits.open_s,
            "close_s": 2 * self._limits.close_s,
        }
        self._send(json.dumps(request).encode() + b"\n")
        try:
            async with asyncio.timeout(self._limits.open_s):
                await self._until(lambda: self._state == "connected")
        except TimeoutError:
            raise TargetAbsent(
                f"{self.name}: the server did not take the stream in {self._limits.open_s:g} s"
            ) from None

    async def write(self, packets: Sequence[Packet]) -> None:
        assert self._muxer is not None, "write() before start()"
        for packet in packets:
            await self._until(lambda: self._flow.pending_s < self._limits.window_s)
            self._muxer.mux([packet])
            part = self._bytes.take()
            self._send(part)
            self._flow.wrote(len(part), length_s([packet]))

    async def close(self, complete: bool) -> None:
        if self._state == "closed":
            return
        say_goodbye = self._state == "connected" and self._error is None
        self._state = "closed"
        if self._muxer is not None:
            # In any case, since an open container is in a circle of references that holds a megabyte.
            self._muxer.close()
        if self._process is None:
            return
        try:
            if say_goodbye:
                self._send(self._bytes.take())
                assert self._process.stdin is not None
                self._process.stdin.close()
                async with asyncio.timeout(self._limits.close_s):
                    await self._process.wait()
        except TimeoutError:
            logger.debug("%s: no goodbye in %g s", self.name, self._limits.close_s)
        finally:
            await self._end()

    async def _first_address(self, look_up: LookUp) -> str:
        try:
            async with asyncio.timeout(self._limits.open_s):
                return (await look_up(self._host, self._port))[0]
        except TimeoutError:
            raise TargetAbsent(f"{self.name}: the server was not found ({self._limits.open_s:g} s)") from None
        except OSError as error:
            raise TargetAbsent(f"{self.name}: no such host ({error.strerror})") from error

    def _options(self) -> dict[str, str]:
        options = {"flush_packets": "1"}
        if self._scheme == "rtmp":
            options["tcp_nodelay"] = "1"
        if self._scheme == "rtmps":
            options["tls_verify"] = "1"
            if ca_file := _ca_file():
                options["ca_file"] = ca_file
        return options

    async def _spawn(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "streaming.publish"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # A traceback could quote the URL.
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": import_path()},
            # Ctrl-C is for us: the connection ends with a goodbye.
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read(), name=f"reports of {self.name}")

    def _send(self, part: bytes) -> None:
        # No drain: the window bounds what can be under way, and the reader learns first when the process dies.
        assert self._process is not None
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(part)

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that a report brings. Raises: SinkError: the connection failed before or meanwhile."""
        while self._error is None and not reached():
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            while self._error is None:
                # A process that was stopped, or has no time, reports nothing.
                async with asyncio.timeout(self._limits.stall_s if self._state == "connected" else None):
                    line = await self._process.stdout.readline()
                if not line:
                    self._gone = True
                    status = await self._process.wait()
                    self._fail(SinkError(f"{self.name}: the publishing process ended with status {status}"))
                    return
                self._take(json.loads(line))
        except TimeoutError:
            self._fail(SinkError(f"{self.name}: the publishing process said nothing for {self._limits.stall_s:g} s"))
        finally:
            # Whatever it was: somebody may be waiting for news.
            self._fail(SinkError(f"{self.name}: the publishing process is not listened to any more"))

    def _take(self, report: dict[str, Any]) -> None:
        event = report.pop("event")
        if event == "progress":
            self._flow.report(**report)
            if self._flow.stalled and self._state == "connected":
                self._fail(SinkError(f"{self.name}: the server has taken nothing for {self._limits.stall_s:g} s"))
        elif event == "failed":
            self._gone = True
            self._fail(self._cause(**report))
        elif self._state != "closed":
            self._state = event
        self._news.set()

    def _fail(self, error: SinkError) -> None:
        if self._error is None:
            self._error = error
        self._news.set()

    def _cause(self, kind: str, why: str, log: Sequence[str], trace: str) -> SinkError:
        """What the process's last report means. FFmpeg says most of it in its log only."""
        said = blanked("; ".join(log), self._url)
        if trace:
            logger.error("%s: a bug ended the publishing process\n%s", self.name, blanked(trace, self._url))
            return SinkError(f"{self.name}: the publishing process failed ({kind})")
        if self._state == "connected":
            return SinkError(f"{self.name}: connection lost ({blanked(why, self._url)})")
        if kind == "ConnectionRefusedError":
            return TargetAbsent(f"{self.name}: connection refused; is the server running?")
        if "ertificate" in said:
            return TargetRefused(f"{self.name}: its certificate cannot be trusted; SSL_CERT_FILE names those that can")
        if (at := said.find("Server error: ")) >= 0:
            answer = said[at:].removeprefix("Server error: ").partition(";")[0]
            return TargetRefused(f"{self.name}: the server refuses the stream: {answer}")
        return TargetRefused(
            f"{self.name}: the server ended the connection without a word; are application and stream key right?"
        )

    async def _end(self) -> None:
        """No process and no task is left behind."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            # One that has reported its failure is about to end, and asyncio is confused by a kill at that moment.
            async with asyncio.timeout(LAST_BREATH_S if self._gone else 0):
                await self._process.wait()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        if self._process.stdin is not None:
            self._process.stdin.close()


@dataclass(frozen=True)
class _Mark:
    """How far a connection was: when, bytes that the other end had acknowledged, its window, and if all was sent."""

    at_s: float
    acked: int
    window: int | None
    idle: bool


class Flow:
    """How far a stream of bytes has come on its way to the other end, by what the process that sends it reports.

    pending_s: seconds of the stream that were written and have not left this machine; what is on the wire does not
    count, so a long way is not taken for a narrow one. stalled: for `stall_s` the other end has read nothing.

    A kernel goes on acknowledging what its own process does not read, until its buffers are full: for a minute at the
    rate of an idle face. But its window shrinks meanwhile, and who reads opens it again. So the last seconds are looked
    at in slices, and in each the window must have shrunk along with what was acknowledged, or nothing moved at all.
    """

    def __init__(self, stall_s: float) -> None:
        self._slice_s = stall_s / STALL_SLICES
        self._written = 0
        self._written_s = self._left_s = 0.0
        self._pending: deque[tuple[int, float]] = deque()
        self._reported_at: float | None = None
        self._marks: deque[_Mark] = deque()
        self.stalled = False

    @property
    def pending_s(self) -> float:
        return self._written_s - self._left_s

    def wrote(self, size: int, seconds: float) -> None:
        """So many bytes more were written, with which so many seconds of the stream are complete."""
        self._written += size
        self._written_s += seconds
        self._pending.append((self._written, self._written_s))

    def report(
        self, at_s: float, taken: int, acked: int | None = None, unsent: int = 0, window: int | None = None
    ) -> None:
        """How far it is at a time of the reporter's clock: bytes taken from us; and of the socket, where the system
        says so, bytes that the other end has acknowledged, bytes not sent yet, and bytes that it would still take.
        """
        left = taken - unsent
        while self._pending and self._pending[0][0] <= left:
            self._left_s = self._pending.popleft()[1]
        # Not more at once than a report may be late: after the machine has slept nobody is to blame.
        passed_s = 0.0 if self._reported_at is None else min(at_s - self._reported_at, LATE_S)
        self._reported_at = at_s
        now_s = self._marks[-1].at_s + passed_s if self._marks else 0.0
        self._marks.append(_Mark(now_s, left if acked is None else acked, window, left >= self._written))
        edges = [now_s - number * self._slice_s for number in range(STALL_SLICES, -1, -1)]
        if self._marks[0].at_s <= edges[0]:
            while self._marks[1].at_s <= edges[0]:
                self._marks.popleft()
            marks = [next(mark for mark in self._marks if mark.at_s >= edge - 1e-6) for edge in edges]
            self.stalled = all(itertools.starmap(_unread, itertools.pairwise(marks)))


def _unread(before: _Mark, after: _Mark) -> bool:
    """Whether the other end seems to have read nothing between two reports."""
    acked = after.acked - before.acked
    if not acked:
        return not before.idle and not after.idle
    if before.window is None or after.window is None:
        return False
    return before.window - after.window >= max(WINDOW_NOISE, WINDOW_SHARE * acked)


async def probe(
    name: str, host: str, port: int, limit_s: float, tls: bool = False, look_up: LookUp | None = None
) -> str:
    """See whether an RTMP server answers: connect, and exchange the first half of the handshake.

    It costs nothing and tells more than FFmpeg does. Returns: the address that answered.
    Raises: TargetAbsent, TargetRefused: with `name` and the cause; what `look_up` raises.
    """
    writer = None
    stage = "was not found"
    try:
        async with asyncio.timeout(limit_s):
            addresses = await (look_up or _resolve)(host, port)
            stage = "does not answer"
            reader, writer = await _connect(addresses, port, limit_s)
            address = str(writer.get_extra_info("peername")[0])
            if tls:
                stage = "takes the connection and does not speak TLS; is it rtmp:// ?"
                context = await asyncio.to_thread(ssl.create_default_context)
                await writer.start_tls(context, server_hostname=host)
            stage = "takes the connection and then says nothing; is it an RTMP server?"
            writer.write(b"\3" + bytes(8) + os.urandom(HANDSHAKE - 8))
            version = (await reader.readexactly(1 + HANDSHAKE))[0]
    except TimeoutError:
        raise TargetAbsent(f"{name}: the server {stage} ({limit_s:g} s)") from None
    except ssl.SSLCertVerificationError as error:
        raise TargetRefused(
            f"{name}: its certificate cannot be trusted ({error.verify_message}); SSL_CERT_FILE names those that can"
        ) from error
    except ssl.SSLError as error:
        raise TargetRefused(f"{name}: it does not speak TLS; is it rtmp:// ?") from error
    except socket.gaierror as error:
        raise TargetAbsent(f"{name}: no such host ({error.strerror})") from error
    except ConnectionRefusedError as error:
        raise TargetAbsent(f"{name}: connection refused; is the server running?") from error
    except (OSError, EOFError) as error:
        what = reason(error) if isinstance(error, OSError) else "it closed the connection"
        raise TargetAbsent(f"{name}: no RTMP handshake ({what})") from error
    finally:
        if writer is not None:
            writer.transport.abort()
    if version != 3:
        raise TargetRefused(f"{name}: what answers there is not an RTMP server")
    return address


async def _connect(
    addresses: Sequence[str], port: int, limit_s: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The first of the addresses that answers in its share of the time: a host may have one that leads nowhere."""
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(limit_s / len(addresses)):
                return await asyncio.open_connection(address, port)
    return await asyncio.open_connection(addresses[-1], port)


_lookups: dict[tuple[str, int], Future[list[str]]] = {}


async def _resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, the best first. Raises: socket.gaierror.

    Not by asyncio's own pool of threads: a name server that is silent would fill it, and a process that ends would wait
    for it. There is one thread for each name that is being looked up, and nobody waits for it for ever.
    """
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    found = _lookups.get((host, port))
    if found is None:
        found = _lookups[host, port] = Future()
        found.set_running_or_notify_cancel()  # so that who gives up waiting does not cancel it for the others

        def look_up() -> None:
            try:
                answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                found.set_result([str(answer[4][0]) for answer in answers])
            except BaseException as error:
                found.set_exception(error)
            finally:
                del _lookups[host, port]

        threading.Thread(target=look_up, name=f"look up {host}", daemon=True).start()
    return await asyncio.wrap_future(found)


def _address(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL. Raises: SinkError."""
    parts = urlsplit(url)
    try:
        port = parts.port or PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise SinkError(f"{redacted(url)}: its port is not a number from 1 to 65535") from error
    if parts.hostname is None or any(character.isspace() or not character.isprintable() for character in url):
        raise SinkError(f"{redacted(url)}: names no server; write {parts.scheme}://HOST/APPLICATION/KEY")
    if parts.scheme in PORTS and not parts.path.strip("/"):
        raise SinkError(f"{redacted(url)}: names no stream; write {parts.scheme}://HOST/APPLICATION/KEY")
    return parts.scheme, parts.hostname, port


def _pinned(url: str, address: str, port: int) -> tuple[str, dict[str, str]]:
    """The same stream at an address instead of a name, and the option that tells an RTMP server its name as before."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    host = f"[{address}]" if ":" in address else address
    pinned = parts._replace(netloc=f"{user}{at}{host}:{port}").geturl()
    if parts.scheme != "rtmp":
        return pinned, {}
    name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return pinned, {"rtmp_tcurl": f"rtmp://{name}:{port}/{_application(parts)}"}


def _application(parts: SplitResult) -> str:
    """The part of an RTMP URL that names the application, as FFmpeg cuts it: its first folder, or its first two."""
    first, _, rest = parts.path.removeprefix("/").partition("/")
    instance, slash, _ = rest.partition("/")
    return f"{first}/{instance}" if slash and ":" not in instance and first != "ondemand" else first


def _check_protocol(scheme: str) -> None:
    try:
        av.open(f"{scheme}://", "r")
    except av.error.ProtocolNotFoundError as error:
        raise SinkError(
            f"{scheme}://: the FFmpeg in this PyAV was built without it; use rtmp:// or rtmps://"
        ) from error
    except (OSError, ValueError):
        return  # it is there, and says that this is no address


def _ca_file() -> str | None:
    """The certificates to trust, as one file. SSL_CERT_FILE is looked at first."""
    return next(filter(os.path.isfile, filter(None, [ssl.get_default_verify_paths().cafile, *CA_FILES])), None)
