"""Who brings live sound into a session: a pipe of PCM, a file, any URL or device that FFmpeg opens.

A reader is one task that never blocks the event loop, and never ends a session because a peer is gone: it waits and
tries again. FFmpeg works in a thread. For input, unlike for output, PyAV (18.1) lets the interpreter go while it opens,
reads and closes, and keeps its deadlines: against servers that accept and stay silent, over TCP, RTMP, RTSP, HTTP and
TLS, an event loop stood still for 7 ms at most. The thread ends with the process, so what hangs there keeps no command
from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import select
import stat
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import av
import av.error

from audio.chunk import AudioChunk
from audio.decode import AudioError, PcmDecoder, PcmFormat, SoundFile, SoundReport, decode_live, open_sound
from audio.live import LISTENER_RATE
from audio.source import FileSource, PushSource, SourceClosed
from audio.urls import redacted

log = logging.getLogger(__name__)

FIRST_RETRY_S, RETRY_GROWTH, LONGEST_RETRY_S = 1.0, 1.5, 30.0
HEALTHY_S = 10.0
"""A connection that gave this much sound was a good one: after it the waiting between attempts begins anew."""

QUIET_S = 0.2
"""A pipe silent for so long pauses: what the resampler holds back for its sake is given."""

READ_EVERY_S = 0.005
"""A pipe into which single samples are written is read no more often than this."""

PIECE_S = 0.25
"""Of a pipe that is full, so much is read at once."""

LOOK_S = 1.0
"""How often a waiting FIFO is looked at: it may have been deleted and made anew under the same name."""

JOINED = ("rtmp", "rtmps", "rtsp", "rtsps", "rtp", "udp", "srt")
"""Broadcasts one joins in the middle. What FFmpeg collects while it looks what they are is old by then, and dropped;
of any other source, such as an answer over HTTP that is an utterance, it is the beginning and is kept."""

SCHEMES = (*JOINED, "http", "https", "tcp", "tls")
DEVICES = ("alsa", "pulse", "oss", "sndio", "jack", "avfoundation", "dshow")

PROBE = {"analyzeduration": "500000", "probesize": "1000000"}
"""Half a second and 1 MB for finding out what a stream is; FFmpeg's own 5 s would be 5 s of delay."""
NEWEST = {"fflags": "nobuffer", "rtsp_flags": "prefer_tcp"}

ITEMS_AHEAD = 4

HEADERS = {b"RIFF": "a WAV", b"OggS": "an Ogg", b"fLaC": "a FLAC", b"ID3": "an MP3", b"FORM": "an AIFF"}
"""How files begin that are taken for bare samples by mistake."""

State = Literal["waiting", "connected", "ended"]


@dataclass(frozen=True)
class ReaderStatus:
    """How a source is doing.

    state: waiting for it (it is absent, or nobody writes), connected, or ended for good; received_s: sound so far;
    connections: how often sound began to come; last_error: why it is waiting, or why it has ended, where that is one.
    """

    state: State = "waiting"
    received_s: float = 0.0
    connections: int = 0
    last_error: str = ""


Decoding = Generator[AudioChunk, None, None]
Chunks = AsyncGenerator[AudioChunk, None]
Connection = Callable[[], AsyncGenerator[AudioChunk | None, None]]
"""One connection: chunks at 48 kHz until the source has ended for good; None where it pauses, with an utterance whole.

Raises: AudioError: it cannot be had, or is lost.
"""


class Reader:
    """Brings one source's sound into a PushSource, for as long as either lives; made by `open_live`.

    name: what it reads, without secrets; is_file: its sound is all there already, and comes as fast as it is taken;
    newest: it goes on without us, so that what is too much is dropped at its old end: waited for, it would stay late.
    """

    def __init__(
        self,
        name: str,
        connect: Connection,
        source: PushSource,
        *,
        is_file: bool = False,
        retries: bool = False,
        newest: bool = False,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.name, self.is_file = name, is_file
        self._connect, self._source, self._retries, self._newest = connect, source, retries, newest
        self._sleep, self._rng = sleep, rng or random.Random()
        self._state: State = "waiting"
        self._received = 0
        self._connections = 0
        self._last_error = ""
        self._retry_s = FIRST_RETRY_S
        self.failure: Exception | None = None
        """What it has ended by, where that is no end of the sound."""

    @property
    def status(self) -> ReaderStatus:
        """As of now."""
        return ReaderStatus(self._state, self._received / LISTENER_RATE, self._connections, self._last_error)

    async def run(self) -> None:
        """Read until the source has ended for good, or nobody takes its sound any more; then close the PushSource.

        A lost source is tried again for ever. What no trying mends, or a bug, goes into the PushSource as its error.
        """
        try:
            while not await self._read():
                await self._sleep(self._next_wait_s())
        except SourceClosed:
            pass
        except Exception as failure:
            self.failure = failure
            self._last_error = str(failure)
        finally:
            self._state = "ended"
            self._source.close(self.failure)

    async def _read(self) -> bool:
        """One connection; whether it was the last, since the source has ended."""
        before = self._received
        try:
            async with contextlib.aclosing(self._connect()) as chunks:
                async for chunk in chunks:
                    await self._take(chunk)
            return True
        except _Hopeless:
            raise
        except AudioError as error:
            if not self._retries:
                raise
            if self._received - before >= HEALTHY_S * LISTENER_RATE:
                self._retry_s = FIRST_RETRY_S
            # An absent server is not told of anew at every attempt.
            log.log(logging.DEBUG if str(error) == self._last_error else logging.WARNING, "%s; trying again", error)
            self._last_error = str(error)
            return False
        finally:
            self._pause()

    async def _take(self, chunk: AudioChunk | None) -> None:
        if chunk is None:
            self._pause()
        elif chunk.samples.size:
            if self._state != "connected":
                self._state, self._last_error = "connected", ""
                self._connections += 1
                log.info("%s: sound comes", self.name)
            if self._newest:
                self._source.push_newest(chunk)
            else:
                await self._source.push(chunk)
            self._received += chunk.samples.size

    def _pause(self) -> None:
        self._state = "waiting"
        self._source.end_utterance()

    def _next_wait_s(self) -> float:
        """Before the next attempt; spread, so that many readers of one server do not come back all at once."""
        wait_s = self._retry_s * self._rng.uniform(0.7, 1.0)
        self._retry_s = min(self._retry_s * RETRY_GROWTH, LONGEST_RETRY_S)
        return wait_s


def open_live(
    target: str,
    pcm: str | PcmFormat | None,
    source: PushSource,
    *,
    open_timeout_s: float = 10.0,
    read_timeout_s: float = 10.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    rng: random.Random | None = None,
) -> Reader:
    """The reader for what a user wrote after --audio; nothing is connected yet.

    Args:
        target: "-" for stdin, fd:N for a descriptor, the path of a FIFO or a file, a URL, or a device, as alsa:NAME.
        pcm: how bare samples lie in a pipe or file, such as s16le:16000:1; a device is asked for that rate and those
            channels. None: FFmpeg finds out by itself.
        source: mono at 48 kHz; closed at the end.
        open_timeout_s, read_timeout_s: after which a silent peer is given up.
        sleep, rng: for the waiting between attempts.

    stdin, a descriptor, a file, and an answer over HTTP that tells its length end once. Writers of a FIFO come and go;
    devices and all other addresses are tried again for ever.

    Raises: AudioError: what nobody here reads, a path where there is nothing, a wrong format.
    """
    if source.sample_rate != LISTENER_RATE:
        raise ValueError(f"a live source has {LISTENER_RATE} Hz, not {source.sample_rate}")
    form = PcmFormat.parse(pcm) if isinstance(pcm, str) else pcm
    once, again = partial(Reader, source=source), partial(Reader, source=source, retries=True, sleep=sleep, rng=rng)
    joined = partial(again, newest=True)
    scheme, colon, rest = target.partition(":")
    if target == "-" or scheme == "fd":
        descriptor = 0 if target == "-" else _descriptor(target)
        return once(target, partial(_pipe, descriptor, form, target), is_file=_is_regular(descriptor))
    if scheme in SCHEMES and colon:
        if not rest.startswith("//"):
            raise AudioError(f"{scheme}:***: not an address; write {scheme}://HOST and what follows")
        options = PROBE | (NEWEST if scheme in JOINED else {})
        opened = partial(_open, target, None, options, open_timeout_s, read_timeout_s)
        join = joined if scheme in JOINED else again
        return join(redacted(target), partial(_stream, redacted(target), opened))
    if scheme in DEVICES:
        asked = {"sample_rate": str(form.sample_rate), "channels": str(form.channels)} if form else {}
        opened = partial(_open, rest.removeprefix("//"), scheme, asked, open_timeout_s, read_timeout_s)
        return joined(target, partial(_stream, target, opened))
    if "://" in target and scheme != "file":
        kinds = ", ".join(SCHEMES)
        raise AudioError(f"{redacted(target)}: no such source; use {kinds}, a device, a path, or - for stdin")
    path = Path(unquote(urlsplit(target).path) if target.startswith("file://") else target)
    if _is_fifo(path):
        return again(str(path), partial(_fifo, path, form))
    if form is not None:
        _check_file(path)
        return once(str(path), partial(_bare_file, path, form), is_file=True)
    return once(str(path), partial(_file, open_sound(path)), is_file=True)


class _Hopeless(AudioError):
    """No trying again will help."""


# Files


async def _file(sound: SoundFile) -> Chunks:
    async for chunk in FileSource(sound, LISTENER_RATE):
        yield chunk
    for line in sound.report.warnings():
        log.warning("%s: %s", sound.path, line)


def _check_file(path: Path) -> None:
    """Raises: AudioError: nothing is there, or a folder."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: cannot be read ({_why(error)}); check the path and its permissions") from error
    if stat.S_ISDIR(mode):
        raise AudioError(f"{path}: is a folder; name a file of bare samples in it")


def _why(error: OSError | ValueError) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


async def _bare_file(path: Path, pcm: PcmFormat) -> Chunks:
    descriptor = _opened(path, os.O_RDONLY)
    try:
        async with contextlib.aclosing(_pipe(descriptor, pcm, str(path))) as chunks:
            async for chunk in chunks:
                yield chunk
    finally:
        os.close(descriptor)


def _opened(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: cannot be read ({_why(error)}); check the path and its permissions") from error


# Pipes


def _descriptor(target: str) -> int:
    number = target.removeprefix("fd:")
    try:
        os.fstat(int(number))
    except (ValueError, OverflowError, OSError) as error:
        raise AudioError(f"{target}: not an open file descriptor; write fd:3 for number 3") from error
    return int(number)


def _is_regular(descriptor: int) -> bool:
    with contextlib.suppress(OSError):  # stdin may be closed
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    return False


def _is_fifo(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISFIFO(path.stat().st_mode)
    return False


async def _fifo(path: Path, pcm: PcmFormat | None) -> AsyncGenerator[AudioChunk | None, None]:
    """One writer after the other, without end.

    Opened anew after each, since its end is told again and again otherwise; and always before the old descriptor is
    closed: a writer that finds nobody reading is killed.
    """
    descriptor = _opened(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            while not await _readable(descriptor, LOOK_S) and _is_same(path, descriptor):
                pass
            if _is_same(path, descriptor):
                async with contextlib.aclosing(_pipe(descriptor, pcm, str(path))) as chunks:
                    async for chunk in chunks:
                        yield chunk
                yield None
            fresh = _opened(path, os.O_RDONLY | os.O_NONBLOCK)
            os.close(descriptor)
            descriptor = fresh
    finally:
        os.close(descriptor)


def _is_same(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to what was opened: somebody may have deleted it and made it anew."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


async def _pipe(descriptor: int, pcm: PcmFormat | None, name: str) -> Chunks:
    """All that comes out of a pipe, socket or file until its end; it stays open."""
    try:
        os.fstat(descriptor)
    except OSError as error:
        raise _Hopeless(f"{name}: is closed, so there is nothing to read") from error
    if os.isatty(descriptor):
        raise _Hopeless(f"{name}: is a terminal; let a program write the sound into a pipe")
    if pcm is not None:
        chunks = _bare(descriptor, pcm, name)
    else:
        # The thread's own descriptor: it may be reading still when ours has been closed.
        chunks = _in_thread(partial(_decoded_pipe, os.dup(descriptor), name), name)
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            yield chunk


async def _bare(descriptor: int, pcm: PcmFormat, name: str) -> Chunks:
    decoder = PcmDecoder(pcm, LISTENER_RATE, live=True)
    piece = max(4096, int(pcm.sample_rate * PIECE_S) * pcm.bytes_per_frame)
    quiet_s: float | None = None
    doubted = False
    while (data := await _read(descriptor, piece, quiet_s, name)) != b"":
        if data is None:
            quiet_s = None
            yield decoder.pause()
            continue
        quiet_s = QUIET_S
        if not decoder.report.decoded_s and (kind := HEADERS.get(data[:4], HEADERS.get(data[:3]))):
            log.warning(
                "%s: begins like %s file; without --format it would be decoded, as %s it is noise", name, kind, pcm
            )
        yield decoder.feed(data)
        if not doubted and (doubted := _is_nonsense(decoder)):
            log.warning("%s: most samples are no sound within full scale; is it really %s?", name, pcm)
        await asyncio.sleep(READ_EVERY_S)
    yield decoder.flush()


def _is_nonsense(decoder: PcmDecoder) -> bool:
    report, pcm = decoder.report, decoder.pcm
    samples = report.decoded_s * pcm.sample_rate * pcm.channels
    return report.decoded_s >= 1 and report.not_numbers + report.clamped > samples / 4


async def _read(descriptor: int, size: int, limit_s: float | None, name: str) -> bytes | None:
    """What is there, at most so many bytes, waiting for some; b"" at the end; None when the time is over."""
    try:
        try:
            while await _readable(descriptor, limit_s):
                with contextlib.suppress(BlockingIOError):  # somebody else has read it
                    return os.read(descriptor, size)
            return None
        except PermissionError:
            # A file: it is always ready, and its disk may be slow.
            return await asyncio.to_thread(os.read, descriptor, size)
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({_why(error)})") from error


async def _readable(descriptor: int, limit_s: float | None) -> bool:
    """Wait until reading would not block. Raises: PermissionError: it is a file."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    # The descriptor stays as it is: set to non-blocking it would be so for all who share it, the shell among them.
    loop.add_reader(descriptor, ready.set)
    try:
        async with asyncio.timeout(limit_s):
            await ready.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)


def _decoded_pipe(descriptor: int, name: str, gone: threading.Event) -> Decoding:
    """What FFmpeg finds in a pipe; in a thread. Closes the descriptor."""
    try:
        file = _PatientFile(descriptor, gone)
        report = SoundReport()
        try:
            container = av.open(
                file, "r", container_options=PROBE | {"protocol_whitelist": "none"}, metadata_errors="replace"
            )
        except (av.error.FFmpegError, ValueError) as error:
            raise AudioError(
                f"{name}: no sound that FFmpeg can read; if it is bare samples, say which: --format s16le:16000:1"
            ) from error
        except OSError as error:  # our own read() of it
            raise AudioError(f"{name}: cannot be read ({_why(error)})") from error
        with container:
            yield from decode_live(container, name, LISTENER_RATE, report)
        if report.broke_off:
            log.warning("%s: reading broke off (%s); what came before is used", name, report.broke_off)
    finally:
        os.close(descriptor)


class _PatientFile:
    """What PyAV reads a pipe through: it waits for bytes, but not when nobody wants them any more."""

    def __init__(self, descriptor: int, gone: threading.Event) -> None:
        self._descriptor, self._gone = descriptor, gone
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def read(self, size: int) -> bytes:
        while not self._gone.is_set():
            if self._poll.poll(200):
                with contextlib.suppress(BlockingIOError):
                    return os.read(self._descriptor, size)
        return b""


# Addresses and devices


async def _stream(name: str, opened: Callable[[str], Any]) -> Chunks:
    async with contextlib.aclosing(_in_thread(partial(_decoded_stream, name, opened), name)) as chunks:
        async for chunk in chunks:
            yield chunk


def _decoded_stream(name: str, opened: Callable[[str], Any], gone: threading.Event) -> Decoding:
    """All that one connection gives; in a thread."""
    report = SoundReport()
    with opened(name) as container:
        whole = container.size > 0
        yield from decode_live(container, name, LISTENER_RATE, report)
    if not whole:
        raise AudioError(
            f"{name}: {f'the sound broke off ({report.broke_off})' if report.broke_off else 'it has ended'}"
        )
    if report.broke_off:
        log.warning("%s: reading broke off (%s); what came before is used", name, report.broke_off)


def _open(
    address: str, device: str | None, options: dict[str, str], open_timeout_s: float, read_timeout_s: float, name: str
) -> Any:
    """Connect. Raises: AudioError."""
    try:
        return av.open(
            address,
            "r",
            format=device,
            container_options=options,
            metadata_errors="replace",
            timeout=(open_timeout_s, read_timeout_s),
        )
    except av.error.ProtocolNotFoundError as error:
        raise _Hopeless(f"{name}: this FFmpeg does not speak {address.partition(':')[0]}; use another way") from error
    except ValueError as error:
        if device is None or "no container format" not in str(error):
            raise AudioError(f"{name}: what it sends is no sound that FFmpeg can read") from error
        raise _Hopeless(f"{name}: this FFmpeg has no {device}; let a program record into a pipe, and read -") from error
    except av.error.ExitError as error:
        raise AudioError(f"{name}: no answer in {open_timeout_s:g} s; is it the right address?") from error
    except ConnectionRefusedError as error:
        raise AudioError(f"{name}: connection refused; nothing listens there") from error
    except av.error.FFmpegError as error:
        # Only what kind of error: FFmpeg's whole message has the address in it, with the key.
        raise AudioError(f"{name}: cannot be opened ({(error.strerror or 'unknown error').lower()})") from error


async def _in_thread(make: Callable[[threading.Event], Decoding], name: str) -> Chunks:
    """Decode in a thread of its own, a little ahead.

    Left early, the thread is not waited for: it is told by its event, and ends after the call that it is in, or with
    the process.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Queue[AudioChunk | Exception | None] = asyncio.Queue()
    room, gone = threading.Semaphore(ITEMS_AHEAD), threading.Event()

    def give(item: AudioChunk | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(found.put_nowait, item)

    def work() -> None:
        try:
            with contextlib.closing(make(gone)) as chunks:
                for chunk in chunks:
                    room.acquire()
                    if gone.is_set():
                        return
                    give(chunk)
            give(None)
        except Exception as error:
            give(error)

    threading.Thread(target=work, name=f"reader {name}", daemon=True).start()
    try:
        while (item := await found.get()) is not None:
            room.release()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        gone.set()
        room.release()
