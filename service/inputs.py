"""What jobs and sessions refer to from outside: a path, an address, base64 or an upload becomes a file in the spool.

Whoever sends a command chooses every byte of it. So nothing is opened, called or written that the settings do not
allow, nothing is taken without a bound, and what is refused is refused in one line without a secret.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import os
import re
import ssl
import stat
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import urlsplit

import httpx

from audio.errors import AvatardError
from audio.urls import redacted
from service import isolated
from service.addresses import CheckedTransport, Resolve, allowed_addresses, look_up
from service.commands import Refusal, Source
from service.config import Settings
from service.spool import Spool, SpoolFull
from streaming.sink import TargetAbsent, TargetRefused

R = TypeVar("R")
Kind = Literal["image", "audio"]

# Both write addresses into the log, with passwords and tokens in them, at levels that an operator may well set.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

logger = logging.getLogger(__name__)

REDIRECTS = 5
FETCHES = 16
"""At once, from each kind of source; whoever is too much waits, within its time."""
UPLOADS = 32
"""At once; whoever is too much is refused."""
READ_S = 10.0
"""Seconds for one answer of a server, and for one part of it."""
STALL_S = 30.0
"""Seconds without a byte until an upload is given up."""
SLOWEST = 10_000
"""Bytes each second that an upload has to bring, after its first STALL_S."""
CHECKS = 2
"""Files that are decoded at once to see what they are: a large picture takes several hundred megabytes."""
CHECK_S = 60.0
KNOWN = 4096
"""Files whose check is remembered."""
PIECE = 256 * 1024
FULL_RETRY_S = 60.0

UNREAL = ("/proc", "/sys")
"""Folders whose files are no files, although they say so; no root makes them any."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What no line of text should hold; halves of characters among it, which cannot even be sent."""
VIDEO_TYPES = (".mp4", ".m4v", ".mov")
NETWORK_PORTS = {"rtmp": 1935, "rtmps": 443, "srt": 0}


class Inputs:
    """Brings what a command refers to into `<daemon.state>/spool`, and judges where results and streams may go.

    Every method that waits has an end. Blocking work happens in threads of its own.
    """

    def __init__(
        self, settings: Settings, *, resolve: Resolve = look_up, clock: Callable[[], float] = time.time
    ) -> None:
        """Makes the spool. Raises: OSError: it cannot be made."""
        self._settings = settings
        self._resolve = resolve
        self._outputs = Path(os.path.expanduser(settings.daemon.outputs))
        self._most_bytes = round(settings.inputs.max_mb * 1e6)
        self._spool = Spool(
            Path(os.path.expanduser(settings.daemon.state)) / "spool", round(settings.inputs.spool_gb * 1e9), clock
        )
        self._threads = ThreadPoolExecutor(2 * FETCHES + UPLOADS, thread_name_prefix="inputs")
        # Slow servers, or a folder of a network that hangs, hold up their own kind alone.
        self._slots = {kind: asyncio.Semaphore(FETCHES) for kind in ("path", "url", "data")}
        self._uploads = 0
        self._checks = asyncio.Semaphore(CHECKS)
        self._known: OrderedDict[tuple[str, Kind], None] = OrderedDict()

    def use(self, settings: Settings) -> None:
        """Go on with other limits and roots; what is under way keeps those it began with, or takes the new ones."""
        self._settings = settings
        self._most_bytes = round(settings.inputs.max_mb * 1e6)
        self._known.clear()  # they were looked into with the old limits
        self._spool.limit = round(settings.inputs.spool_gb * 1e9)

    @property
    def spool_bytes(self) -> int:
        """What lies in the spool, and what is on its way there."""
        return self._spool.bytes

    async def fetch(self, source: Source, kind: Kind) -> Path:
        """The picture or sound as a file in the spool, whole and on the disk, looked into: it can be opened.

        Raises: Refusal: forbidden (path, scheme or address not allowed), too large, full, or invalid (not there, not
        to be had in time, not of that kind).
        """
        shown = _shown(source, kind)
        if source.upload is not None:
            return await self._uploaded(source.upload, kind, shown)
        if source.path is not None:
            path = source.path
            return await self._bring("path", self._read(lambda: self._open(path, shown), shown), kind, shown)
        if source.url is not None:
            return await self._bring("url", self._download(source.url, shown), kind, shown)
        assert source.data is not None
        return await self._bring("data", _decoded(source.data, self._most_bytes, shown), kind, shown)

    async def adopt(self, path: Path, kind: Kind) -> Path:
        """A file that the operator named in the settings, wherever it lies, as `fetch` gives it. Raises: Refusal."""
        parts = self._read(lambda: path.expanduser().open("rb"), str(path))
        return await self._bring("path", parts, kind, str(path))

    async def keep(self, stream: AsyncIterator[bytes], kind: Kind, name: str = "") -> Path:
        """An upload as a file in the spool, whole and on the disk, looked into; its name is what `upload` refers to.

        name: what its sender calls it, for messages only.
        Raises: Refusal: too large, full, or invalid (empty, not of that kind, stalled or slower than SLOWEST).
        """
        shown = _printable(name, 100) or f"the {kind}"
        if self._uploads >= UPLOADS:
            raise Refusal("full", f"{shown}: {UPLOADS} uploads are under way, which is the limit; try again later", 5.0)
        self._uploads += 1
        try:
            async with asyncio.timeout(STALL_S) as limit:
                return await self._store(_in_time(stream, limit), kind, shown, limit)
        except TimeoutError:
            raise Refusal(
                "invalid",
                f"{shown}: nothing came for {STALL_S:g} s, or less than {SLOWEST // 1000} kB/s; send it again",
            ) from None
        finally:
            self._uploads -= 1

    def allowed_output(self, name: str) -> Path:
        """Where a result of that name goes: below daemon.outputs, an .mp4 where no type is given.

        Its folder may have to be made. Raises: Refusal: forbidden (leads elsewhere), or invalid (no name for a file).
        """
        path = self._below_outputs(name)
        if not path.suffix:
            path = path.with_name(f"{path.name}.mp4")
        if path.suffix.lower() not in VIDEO_TYPES:
            raise Refusal("invalid", f"{_printable(name)}: is no name of a video; end it in .mp4, or in nothing")
        return path

    async def check_target(self, target: str) -> str:
        """Whether a live output may go there; returns the target as it is to be opened: a file below daemon.outputs.

        A name may stand for another address by the time it is called: open it with `look_up=inputs.target_addresses`.

        Raises: Refusal: forbidden (a kind or an address that sessions.targets and sessions.private_targets do not
        allow, or a path outside), or invalid.
        """
        sessions = self._settings.sessions
        scheme, separator, rest = target.partition("://")
        if not separator or scheme == "file":
            return self._file_target(rest if separator else target)
        shown = _printable(redacted(target))
        if scheme not in sessions.targets or scheme not in (*NETWORK_PORTS, "null"):
            what = f"{_printable(scheme, 20)}://"
            raise Refusal("forbidden", f"{what}: no output of this kind is allowed; {_allowed(sessions.targets)}")
        if scheme == "null":
            return target
        if CONTROL.search(target) or " " in target:
            # librtmp takes options behind a blank.
            raise Refusal("invalid", f"{shown}: holds a blank or a control character")
        try:
            parts = urlsplit(target)
            host, port = parts.hostname, parts.port or NETWORK_PORTS[scheme]
        except ValueError:
            raise Refusal("invalid", f"{shown}: is no address; write {scheme}://HOST/...") from None
        if not host:
            raise Refusal("invalid", f"{shown}: names no server; write {scheme}://HOST/...")
        if scheme == "srt" and re.search(r"(^|&)mode=(?!caller(&|$))", parts.query, re.IGNORECASE):
            raise Refusal("forbidden", f"{shown}: only mode=caller is allowed; the daemon does not listen for others")
        try:
            async with asyncio.timeout(READ_S):
                await allowed_addresses(host, port, shown, private=sessions.private_targets, resolve=self._resolve)
        except TimeoutError:
            raise Refusal("invalid", f"{shown}: its name could not be looked up in {READ_S:g} s") from None
        return target

    async def target_addresses(self, host: str, port: int) -> Sequence[str]:
        """The addresses at which a live output may call that host: for `open_sink(look_up=...)`, at each connection.

        Raises: TargetRefused: it may not be called, as in `check_target`; TargetAbsent: there is no such host.
        """
        private = self._settings.sessions.private_targets
        try:
            return await allowed_addresses(host, port, host, private=private, resolve=self._resolve)
        except Refusal as error:
            raise (TargetRefused if error.reason == "forbidden" else TargetAbsent)(str(error)) from error

    async def prune(self, needed: Callable[[], Awaitable[Collection[Path]]]) -> int:
        """Delete from the spool what is old, or too much, and not among what `needed` tells. Returns: files deleted."""
        keep = await needed()
        return await self._in_thread(self._spool.prune, keep, self._settings.inputs.spool_hours * 3600)

    # Into the spool

    async def _bring(self, slot: str, parts: AsyncGenerator[bytes, None], kind: Kind, shown: str) -> Path:
        fetch_s = self._settings.inputs.fetch_s
        try:
            async with asyncio.timeout(fetch_s) as limit, self._slots[slot]:
                return await self._store(parts, kind, shown, limit)
        except TimeoutError:
            raise Refusal(
                "invalid", f"{shown}: did not come within {fetch_s:g} s; use a nearer place or raise inputs.fetch_s"
            ) from None

    async def _store(self, parts: AsyncGenerator[bytes, None], kind: Kind, shown: str, limit: asyncio.Timeout) -> Path:
        """Write what comes, look into it, and give it its name; `limit` is for what comes alone."""
        incoming = self._spool.receive()
        try:
            # In pieces of about PIECE, however small the parts are: each costs a way to a thread and back.
            gathered = bytearray()
            async with contextlib.aclosing(parts):
                async for part in parts:
                    if incoming.bytes + len(gathered) + len(part) > self._most_bytes:
                        raise _too_large(shown, self._most_bytes)
                    gathered += part
                    if len(gathered) >= PIECE:
                        await self._kept(shown, incoming.write, bytes(gathered))
                        gathered.clear()
            limit.reschedule(None)
            async with _looking(shown):
                if gathered:
                    await self._kept(shown, incoming.write, bytes(gathered))
                if not incoming.bytes:
                    raise Refusal("invalid", f"{shown}: is empty (0 bytes)")
                await self._kept(shown, incoming.finish)
                await self._check(incoming.path, incoming.name, kind, shown)
                return await self._kept(shown, incoming.place)
        finally:
            # Not waited for: a write that was cut off may still hold it.
            self._threads.submit(incoming.discard)

    async def _kept(self, shown: str, work: Callable[..., R], *arguments: bytes) -> R:
        """One step of writing, in a thread. Raises: Refusal: there is no room, or the disk fails."""
        try:
            return await self._in_thread(work, *arguments)
        except SpoolFull as error:
            raise Refusal("full", f"{shown}: {error}; try again later", FULL_RETRY_S) from error
        except OSError as error:
            logger.warning("the spool cannot be written: %s", error.strerror)
            raise Refusal("unavailable", f"{shown}: could not be kept ({error.strerror})") from error

    async def _uploaded(self, name: str, kind: Kind, shown: str) -> Path:
        path = await self._in_thread(self._spool.find, name)
        if path is None:
            raise Refusal("invalid", f"{shown}: there is no such upload, or no more; send the file again")
        async with _looking(shown):
            await self._check(path, name, kind, shown)
        return path

    async def _check(self, path: Path, name: str, kind: Kind, shown: str) -> None:
        """Make sure once that a file is of its kind, by opening it as a job would."""
        if (name, kind) in self._known:
            self._known.move_to_end((name, kind))
            return
        try:
            async with self._checks:
                await self._in_thread(self._look_into, path, kind)
        except AvatardError as error:
            raise Refusal("invalid", f"{shown}: {_without(path, str(error))}") from error
        self._known[name, kind] = None
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)

    def _look_into(self, path: Path, kind: Kind) -> None:
        look = isolated.picture if kind == "image" else isolated.sound
        look(path, self._settings.limits)

    async def _in_thread(self, work: Callable[..., R], *arguments: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    # Paths

    async def _read(self, open_file: Callable[[], BinaryIO], shown: str) -> AsyncGenerator[bytes, None]:
        try:
            file = await self._in_thread(open_file)
            try:
                while piece := await self._in_thread(file.read, PIECE):
                    yield piece
            finally:
                # In a thread, where it waits for a read that was cut off.
                self._threads.submit(file.close)
        except FileNotFoundError as error:
            raise Refusal("invalid", f"{shown}: there is no such file") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL byte
            why = getattr(error, "strerror", None) or "no name of a file"
            raise Refusal("invalid", f"{shown}: cannot be read ({why.lower()})") from error

    def _open(self, path: str, shown: str) -> BinaryIO:
        """The file, after it was seen to lie below a root and to be one. Raises: Refusal, OSError, ValueError.

        First a handle that cannot be read (O_PATH), so that opening has no effect on a device or a pipe; what it is and
        where it lies is asked of the handle; then the same thing is opened through it. Names may change meanwhile.
        """
        roots = [os.path.realpath(os.path.expanduser(root)) for root in self._settings.inputs.roots]
        if not roots:
            raise Refusal(
                "forbidden", f"{shown}: no paths are taken here; send the file, or list folders in inputs.roots"
            )
        below = [os.path.join(root, path) for root in roots]  # the path itself, where it is absolute
        wanted = os.path.realpath(next(filter(os.path.exists, below), below[0]))
        if not _below(wanted, roots):
            raise _outside(shown)
        handle = os.open(wanted, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            lies_at = os.readlink(f"/proc/self/fd/{handle}")
            if not _below(lies_at, roots) or _below(lies_at, UNREAL):
                raise _outside(shown)
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a device or a link"
                raise Refusal("forbidden", f"{shown}: is {what}; name a file")
            if found.st_size > self._most_bytes:
                raise _too_large(shown, self._most_bytes)
            return open(os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC), "rb")
        finally:
            os.close(handle)

    def _below_outputs(self, name: str) -> Path:
        shown = _printable(name)
        parts = name.removeprefix("./").split("/")
        if CONTROL.search(name) or "\\" in name or any(len(os.fsencode(part)) > 200 for part in parts):
            raise Refusal("invalid", f"{shown}: is no name for a file; use letters, digits, and / for folders")
        if name.startswith(("/", "~")) or any(part.startswith(".") for part in parts):
            raise Refusal(
                "forbidden", f"{shown}: leads out of the folder of results, or to a hidden file; name one in it"
            )
        if not all(parts):
            raise Refusal("invalid", f"{shown}: is no name for a file")
        outputs = self._outputs.resolve()
        path = outputs.joinpath(*parts)
        if not _below(str(path.resolve()), [str(outputs)]):
            raise _outside(shown)  # by a link in the folder of results
        return path

    def _file_target(self, target: str) -> str:
        """What may stand before a name, such as segment:600:, stays before it."""
        before, name = "", target
        if found := re.match(r"(segment:[^:/]*:|event:)(.*)", target, re.DOTALL):
            before, name = found.groups()
        kind = "hls" if name.lower().endswith(".m3u8") else "file"
        if kind not in self._settings.sessions.targets:
            raise Refusal(
                "forbidden", f"{_printable(target)}: no output of kind {kind} is allowed; "
                f"{_allowed(self._settings.sessions.targets)}"
            )  # fmt: skip
        path = self._below_outputs(name)
        fits = {"": ("file", "hls"), "event:": ("hls",)}.get(before, ("file",))
        if kind not in fits or (kind == "file" and path.suffix.lower() not in VIDEO_TYPES):
            raise Refusal("invalid", f"{_printable(target)}: write NAME.mp4, segment:SECONDS:NAME.mp4 or NAME.m3u8")
        return f"{before}{path}"

    # Addresses

    async def _download(self, url: str, shown: str) -> AsyncGenerator[bytes, None]:
        """The body at the end of at most REDIRECTS redirects, each of which is judged as if it had been given."""
        if not self._settings.inputs.urls:
            raise Refusal("forbidden", f"{shown}: no addresses are fetched here (inputs.urls); send the file")
        here = _address(url, shown)
        try:
            for _ in range(REDIRECTS + 1):
                async with await self._client(here, shown) as client, client.stream("GET", here) as response:
                    if not response.has_redirect_location:
                        async with contextlib.aclosing(_body(response, self._most_bytes, shown)) as parts:
                            async for part in parts:
                                yield part
                        return
                    there = _address(str(here.join(response.headers["location"])), shown)
                    if here.scheme == "https" and there.scheme == "http":
                        raise Refusal("forbidden", f"{shown}: redirects from https to http")
                    here = there
            raise Refusal("invalid", f"{shown}: redirects more than {REDIRECTS} times")
        except httpx.TimeoutException as error:
            raise Refusal("invalid", f"{shown}: its server said nothing for {READ_S:g} s") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Refusal("invalid", f"{shown}: {_trouble(error)}; check the address and try again") from error

    async def _client(self, url: httpx.URL, shown: str) -> httpx.AsyncClient:
        """For one request to that address. Without what the environment says of proxies and passwords."""

        async def allowed(host: str, port: int) -> Sequence[str]:
            private = self._settings.inputs.private_addresses
            return await allowed_addresses(host, port, shown, private=private, resolve=self._resolve)

        inner = await self._in_thread(_transport, url.scheme == "https")
        return httpx.AsyncClient(
            transport=CheckedTransport(allowed, inner),
            trust_env=False,
            timeout=httpx.Timeout(READ_S),
            headers={"Accept-Encoding": "identity", "User-Agent": "avatard"},
        )


def _transport(encrypted: bool) -> httpx.AsyncHTTPTransport:
    """Blocks: certificates are read, and at the first time a library."""
    # One that trusts nobody, where none is asked: the certificates of the world take long to load.
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if encrypted:
        tls = httpx.create_ssl_context(trust_env=False)
        tls.load_default_certs()  # beside those that httpx brings: a company has its own
    return httpx.AsyncHTTPTransport(verify=tls, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def _trouble(error: BaseException) -> str:
    """What went wrong with a connection; not in its own words, which may quote the address."""
    if isinstance(error, httpx.InvalidURL):
        return "redirects to what is no address"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted ({cause.verify_message})"
        cause = cause.__cause__ or cause.__context__
    return "cannot be reached" if isinstance(error, httpx.ConnectError) else "the connection broke off"


async def _body(response: httpx.Response, most: int, shown: str) -> AsyncGenerator[bytes, None]:
    """The body as it was meant, at most PIECE bytes at once whatever it is compressed to. Raises: Refusal."""
    if response.status_code != 200:
        raise Refusal("invalid", f"{shown}: its server answered {response.status_code}; check the address")
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_large(shown, most)
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        async for part in response.aiter_raw():
            yield part
        return
    if encoding not in ("gzip", "x-gzip"):
        raise Refusal(
            "invalid", f"{shown}: comes compressed in a way nobody asked for; use an address of the bare file"
        )
    unpack = zlib.decompressobj(wbits=31)
    try:
        async for part in response.aiter_raw():
            while part and not unpack.eof:
                yield unpack.decompress(part, PIECE)
                part = unpack.unconsumed_tail
        while more := unpack.decompress(unpack.unconsumed_tail, PIECE):
            yield more
    except zlib.error as error:
        raise Refusal("invalid", f"{shown}: comes compressed, and damaged") from error
    if not unpack.eof:
        raise Refusal("invalid", f"{shown}: comes compressed, and broke off")


async def _decoded(data: str, most: int, shown: str) -> AsyncGenerator[bytes, None]:
    """The bytes of base64, strictly, but for line breaks; piece by piece, so that the event loop is never held up."""
    start = 0
    if data.startswith("data:"):
        found = re.match(r"data:[^,]{0,200};base64,", data)
        if found is None:
            raise Refusal("invalid", f"{shown}: not of the form data:TYPE;base64,...")
        start = found.end()
    if (len(data) - start) * 3 / 4 > most * 1.1:  # line breaks are some hundredths; what is decoded is counted as well
        raise _too_large(shown, most)
    rest = ""
    for at in range(start, len(data), PIECE):
        rest += data[at : at + PIECE].replace("\r", "").replace("\n", "")
        # The last four wait: only they may end in "=".
        ready = rest[: max(0, len(rest) - 1) // 4 * 4]
        rest = rest[len(ready) :]
        if "=" in ready:
            raise _not_base64(shown)
        yield _bytes_of(ready, shown)
        await asyncio.sleep(0)
    yield _bytes_of(rest, shown)


def _bytes_of(text: str, shown: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _not_base64(shown) from error


def _not_base64(shown: str) -> Refusal:
    return Refusal("invalid", f"{shown}: is not base64 (A-Z a-z 0-9 + / and = at the end)")


async def _in_time(stream: AsyncIterator[bytes], limit: asyncio.Timeout) -> AsyncGenerator[bytes, None]:
    """The same; `limit` moves on with what comes, as long as that is enough."""
    clock = asyncio.get_running_loop().time
    began, received = clock(), 0
    async for part in stream:
        received += len(part)
        limit.reschedule(min(clock(), began + received / SLOWEST) + STALL_S)
        yield part


@contextlib.asynccontextmanager
async def _looking(shown: str) -> AsyncIterator[None]:
    """What is looked into inside takes no longer than CHECK_S, or is refused."""
    try:
        async with asyncio.timeout(CHECK_S):
            yield
    except TimeoutError:
        what = f"{shown}: could not be looked into in {CHECK_S:g} s"
        raise Refusal("full", f"{what}; try again later", FULL_RETRY_S) from None


def _address(url: str, shown: str) -> httpx.URL:
    """Raises: Refusal: not http, not https, or no address at all."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise Refusal("invalid", f"{shown}: is no address") from None
    if parsed.scheme not in ("http", "https"):
        raise Refusal(
            "forbidden", f"{shown}: leads to {_printable(parsed.scheme, 20) or 'no scheme'}; http and https are fetched"
        )
    if not parsed.host:
        raise Refusal("invalid", f"{shown}: names no host")
    return parsed


def _shown(source: Source, kind: Kind) -> str:
    """A source in one line, without secrets."""
    if source.url is not None:
        return _printable(redacted(source.url))
    if source.path is not None:
        return _printable(source.path)
    return f"the {kind} in base64" if source.data is not None else f"upload {source.upload}"


def _printable(text: str, most: int = 300) -> str:
    text = CONTROL.sub("?", text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _without(path: Path, message: str) -> str:
    """A message about a file in the spool, for somebody who knows it by another name."""
    return message.removeprefix(f"{path}: ").replace(str(path), "the file")


def _below(path: str, folders: Collection[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _allowed(targets: Collection[str]) -> str:
    return f"allowed: {', '.join(targets)}" if targets else "none is allowed"


def _outside(shown: str) -> Refusal:
    return Refusal("forbidden", f"{shown}: lies outside of the folders that are allowed")


def _too_large(shown: str, most: int) -> Refusal:
    return Refusal("too large", f"{shown}: is over {most / 1e6:g} MB, the limit; shorten it or raise inputs.max_mb")
