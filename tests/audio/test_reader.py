"""Live sources: pipes, FIFOs, servers; those that come and go, and those that never answer."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.server
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from proxy import free_port
from waiting import until_async

from audio.chunk import AudioChunk
from audio.decode import AudioError, PcmDecoder, PcmFormat
from audio.reader import Reader, open_live
from audio.source import PushSource

RATE = 48_000
ROOT = Path(__file__).parent.parent.parent


def voice(seconds: float, rate: int) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def s16(samples: np.ndarray) -> bytes:
    return (samples * 2**15).astype("<i2").tobytes()


def expected(data: bytes, form: str) -> np.ndarray:
    decoder = PcmDecoder(PcmFormat.parse(form), RATE, live=True)
    return np.concatenate([decoder.feed(data).samples, decoder.flush().samples])


class Listening:
    """A reader that runs, and all that it has brought: `sound`, and where utterances ended, in samples."""

    def __init__(self, target: str, pcm: str | None, ahead_s: float = 60.0, **how: Any) -> None:
        self.source = PushSource(RATE, ahead_s)
        self.reader = open_live(target, pcm, self.source, **how)
        self.chunks = [np.zeros(0, np.float32)]
        self.utterances: list[int] = []

    @property
    def sound(self) -> np.ndarray:
        return np.concatenate(self.chunks)

    @property
    def state(self) -> str:
        return self.reader.status.state

    async def listen(self) -> None:
        async for chunk in self.source:
            self.chunks.append(chunk.samples)
            if not chunk.samples.size:
                self.utterances.append(self.sound.size)

    async def to_the_end(self, limit_s: float = 10.0) -> np.ndarray:
        """Run until the source has ended; raises what it ended with."""
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as tasks:
            tasks.create_task(self.reader.run())
            try:
                await self.listen()
            except AudioError as error:
                raise _Ended(error) from error
        return self.sound

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Listening]:
        tasks = [asyncio.create_task(self.reader.run()), asyncio.create_task(self.listen())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Ended(Exception):
    """What an AudioError became on its way through a task group."""


async def told(listening: Listening) -> str:
    """The error that the source ends with."""
    async with asyncio.timeout(10):
        await listening.reader.run()
        with pytest.raises(AudioError) as info:  # noqa: PT012
            while await listening.source.read() is not None:
                pass
    return str(info.value)


@pytest.fixture
def pipe() -> Iterator[tuple[str, int]]:
    """fd:N to read, and a descriptor to write."""
    ends = list(os.pipe())
    yield f"fd:{ends[0]}", ends[1]
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


# Pipes


@pytest.mark.parametrize("form", ["s16le:16000:1", "s16le:44100:2", "f32le:48000:1", "mulaw:8000"])
async def test_all_that_is_written_into_a_pipe_is_heard_and_its_end_is_the_end(pipe, form):
    name, write = pipe
    pcm = PcmFormat.parse(form)
    data = np.random.default_rng(0).bytes(pcm.sample_rate * pcm.bytes_per_frame // 2)
    if pcm.encoding == "f32le":
        data = voice(0.5, pcm.sample_rate).tobytes()
    listening = Listening(name, form)
    threading.Thread(
        target=lambda: (os.write(write, data[:5001]), os.write(write, data[5001:]), os.close(write))
    ).start()
    sound = await listening.to_the_end()
    np.testing.assert_allclose(sound, expected(data, form), atol=1e-6)
    assert listening.reader.status.state == "ended"
    assert listening.reader.status.received_s == pytest.approx(0.5, abs=0.001)
    assert listening.utterances == [len(sound)]


async def test_single_bytes_and_pauses_within_a_sample_do_no_harm(pipe):
    name, write = pipe
    data = s16(voice(0.01, 16_000))
    listening = Listening(name, "s16le:16000")
    async with listening.running():
        for i in range(0, 100):
            os.write(write, data[i : i + 1])
            await asyncio.sleep(0.25 if i == 50 else 0.0005)
        await asyncio.sleep(0.25)
        os.write(write, data[100:])
        os.close(write)
        await until_async(lambda: listening.state == "ended")
    assert listening.sound.size == pytest.approx(480, abs=2)
    assert np.abs(listening.sound[10:60] - voice(0.01, RATE)[10:60]).max() < 0.01


async def test_what_the_resampler_holds_back_is_heard_in_a_pause(pipe):
    name, write = pipe
    listening = Listening(name, "s16le:8000")
    async with listening.running():
        os.write(write, s16(voice(0.1, 8000)))
        await until_async(lambda: listening.sound.size == 4800)
        assert listening.state == "connected"
        assert listening.utterances == []


async def test_what_is_not_a_number_is_silence_and_too_much_of_it_is_told(pipe, caplog):
    name, write = pipe
    samples = voice(1.5, 16_000)
    samples[::2] = np.nan
    threading.Thread(target=lambda: (os.write(write, samples.tobytes()), os.close(write))).start()
    sound = await Listening(name, "f32le:16000").to_the_end()
    assert np.isfinite(sound).all()
    assert "is it really f32le:16000:1?" in caplog.text


async def test_a_file_that_is_taken_for_bare_samples_is_told(pipe, tmp_path, caplog):
    name, write = pipe
    soundfile.write(tmp_path / "a.wav", voice(0.1, 16_000), 16_000)
    os.write(write, (tmp_path / "a.wav").read_bytes())
    os.close(write)
    await Listening(name, "s16le:16000:1").to_the_end()
    assert "begins like a WAV file; without --format it would be decoded" in caplog.text


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
async def test_without_a_format_a_pipe_is_decoded(pipe, tmp_path, kind):
    name, write = pipe
    soundfile.write(tmp_path / "a", voice(1.0, 16_000), 16_000, format=kind)
    data = (tmp_path / "a").read_bytes()
    threading.Thread(target=lambda: (os.write(write, data), os.close(write))).start()
    sound = await Listening(name, None).to_the_end()
    assert sound.size == pytest.approx(RATE, abs=RATE * 0.06)
    assert np.abs(sound).max() == pytest.approx(0.4, abs=0.08)


async def test_bare_samples_without_a_format_are_told_how_to_be_read(pipe):
    name, write = pipe
    os.write(write, s16(np.random.default_rng(0).uniform(-0.3, 0.3, 20_000)))
    os.close(write)
    assert "if it is bare samples, say which: --format s16le:16000:1" in await told(Listening(name, None))


async def test_nobody_is_read_faster_than_it_is_taken(pipe):
    name, write = pipe
    os.set_blocking(write, False)
    listening = Listening(name, "s16le:16000", ahead_s=0.5)
    reading = asyncio.create_task(listening.reader.run())
    written = 0
    for _ in range(60):
        with contextlib.suppress(BlockingIOError):
            written += os.write(write, bytes(32_000))
        await asyncio.sleep(0.005)
    assert listening.source.waiting_s <= 0.5
    capacity = fcntl.fcntl(write, fcntl.F_GETPIPE_SZ)
    assert written <= capacity + 2 * 32_000, "what is not taken waits in the pipe"
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_session_that_has_ended_ends_its_reader(pipe):
    name, write = pipe
    listening = Listening(name, "s16le:16000")
    listening.source.abandon()
    os.write(write, bytes(1000))
    async with asyncio.timeout(5):
        await listening.reader.run()
    assert listening.state == "ended"


async def test_a_pipe_stays_as_it_was(pipe):
    name, write = pipe
    listening = Listening(name, "s16le:16000")
    async with listening.running():
        os.write(write, bytes(1000))
        await until_async(lambda: listening.sound.size > 0)
    assert os.get_blocking(int(name[3:]))


async def test_a_file_on_stdin_is_read_too(tmp_path):
    data = s16(voice(2.0, 16_000))
    (tmp_path / "a.pcm").write_bytes(data)
    with (tmp_path / "a.pcm").open("rb") as file:
        listening = Listening(f"fd:{file.fileno()}", "s16le:16000")
        assert listening.reader.is_file
        np.testing.assert_allclose(await listening.to_the_end(), expected(data, "s16le:16000"), atol=1e-6)


async def test_a_terminal_is_refused():
    ends = os.openpty()
    try:
        assert "is a terminal" in await told(Listening(f"fd:{ends[1]}", "s16le:16000"))
    finally:
        for end in ends:
            os.close(end)


EXIT = """
import asyncio, sys
from audio.reader import open_live
from audio.source import PushSource

async def main():
    reader = open_live(sys.argv[1], sys.argv[2] or None, PushSource(48_000), open_timeout_s=60)
    task = asyncio.create_task(reader.run())
    await asyncio.sleep(0.3)
    print("ready", flush=True)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("what", ["samples", "something to decode", "silent server"])
def test_a_source_that_is_silent_keeps_no_process_from_ending(what, tarpit):
    target = f"rtmp://127.0.0.1:{tarpit}/live/key" if what == "silent server" else "-"
    form = "s16le:16000" if what == "samples" else ""
    process = subprocess.Popen(
        [sys.executable, "-c", EXIT, target, form],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.wait(5) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()


# FIFOs


@pytest.fixture
def fifo(tmp_path) -> Path:
    os.mkfifo(tmp_path / "voice")
    return tmp_path / "voice"


def write_into(path: Path, data: bytes) -> None:
    """As another process does: a FIFO that nobody reads would wait for a reader, one that is left raises."""
    with path.open("wb", buffering=0) as file:
        file.write(data)


async def test_writers_of_a_fifo_come_and_go(fifo):
    listening = Listening(str(fifo), "s16le:48000")
    assert not listening.reader.is_file
    async with listening.running():
        for number in range(1, 6):
            await asyncio.to_thread(write_into, fifo, s16(voice(0.1, RATE)) + b"x")
            await until_async(lambda n=number: len(listening.utterances) == n)
            assert listening.state == "waiting"
        assert listening.utterances == [4800 * number for number in range(1, 6)]
        assert listening.reader.status.connections == 5
        assert listening.reader.status.last_error == ""


async def test_a_writer_that_follows_at_once_loses_nothing(fifo):
    listening = Listening(str(fifo), "s16le:48000")

    def write_many() -> None:
        for _ in range(200):
            write_into(fifo, s16(voice(0.001, RATE)))

    async with listening.running():
        await asyncio.to_thread(write_many)
        await until_async(lambda: listening.sound.size == 200 * 48)


async def test_a_fifo_that_is_made_anew_is_found(fifo, monkeypatch):
    monkeypatch.setattr("audio.reader.LOOK_S", 0.02)
    listening = Listening(str(fifo), "s16le:48000", sleep=lambda s: asyncio.sleep(0.01))
    async with listening.running():
        await asyncio.sleep(0.05)
        fifo.unlink()
        await until_async(lambda: "cannot be read" in listening.reader.status.last_error)
        os.mkfifo(fifo)
        await asyncio.to_thread(write_into, fifo, bytes(960))
        await until_async(lambda: listening.sound.size == 480)


async def test_every_writer_of_a_fifo_may_bring_a_file(fifo, tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(0.5, 16_000), 16_000)
    listening = Listening(str(fifo), None)
    async with listening.running():
        for number in range(1, 3):
            await asyncio.to_thread(write_into, fifo, (tmp_path / "a.wav").read_bytes())
            await until_async(lambda n=number: len(listening.utterances) == n)
        assert listening.sound.size == pytest.approx(RATE, abs=4)


# Files


async def test_a_file_is_read_to_its_end(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(3.0, 16_000), 16_000)
    for target in (str(tmp_path / "a.wav"), f"file://{tmp_path}/a.wav"):
        listening = Listening(target, None)
        assert listening.reader.is_file
        assert (await listening.to_the_end()).size == pytest.approx(3 * RATE, abs=2)


async def test_a_file_of_bare_samples_is_read_to_its_end(tmp_path):
    (tmp_path / "a.pcm").write_bytes(s16(voice(3.0, 16_000)))
    listening = Listening(str(tmp_path / "a.pcm"), "s16le:16000")
    assert listening.reader.is_file
    assert (await listening.to_the_end()).size == pytest.approx(3 * RATE, abs=2)


# What cannot be


@pytest.mark.parametrize(
    ("target", "pcm", "says"),
    [
        ("gopher://host/x?token=SECRET", None, r"gopher://host/x\?\*\*\*: no such source; use rtmp, rtmps"),
        ("rtmp:/host/live/SECRET", None, r"rtmp:\*\*\*: not an address; write rtmp://HOST"),
        ("fd:x", "s16le", "fd:x: not an open file descriptor; write fd:3"),
        ("fd:99999", "s16le", "not an open file descriptor"),
        ("-", "s16", "PCM format 's16': unknown; did you mean 's16le'?"),
        ("no/such/file", None, "no/such/file: no such file"),
        ("no/such/\0file", None, "no such file"),
        ("no/such/file", "s16le", "no/such/file: cannot be read .no such file or directory.; check the path"),
        (".", "s16le", "[.]: is a folder; name a file"),
    ],
)
def test_what_nobody_reads_is_told_in_one_line(target, pcm, says):
    with pytest.raises(AudioError, match=says) as info:
        open_live(target, pcm, PushSource(RATE))
    assert "\n" not in str(info.value)
    assert "SECRET" not in str(info.value)


@pytest.mark.parametrize(
    ("target", "pcm", "says"),
    [
        ("pulse:nobody", None, "this FFmpeg has no pulse; let a program record into a pipe"),
        ("srt://127.0.0.1:9?passphrase=SECRET", None, "this FFmpeg does not speak srt; use another way"),
    ],
)
async def test_what_no_trying_mends_ends_the_source(target, pcm, says):
    """Said of the FFmpeg in the wheel of PyAV; another one may know these."""
    error = await told(Listening(target, pcm))
    assert says in error
    assert "SECRET" not in error


async def test_a_closed_stdin_is_told():
    descriptor = os.open(os.devnull, os.O_RDONLY)
    listening = Listening(f"fd:{descriptor}", "s16le")
    os.close(descriptor)
    assert "is closed" in await told(listening)


async def test_a_wrong_source_rate_is_our_own_mistake():
    with pytest.raises(ValueError, match="48000 Hz, not 16000"):
        open_live("-", "s16le", PushSource(16_000))


# Servers


@pytest.fixture
def tarpit() -> Iterator[int]:
    """A port where connections are accepted and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        accepted = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in accepted:
            connection.close()


@contextlib.contextmanager
def broadcasting(url: str, *codec: str, seconds: float = 30.0) -> Iterator[subprocess.Popen[bytes]]:
    """ffmpeg sends 300 Hz in real time to the first who connects to that address."""
    process = subprocess.Popen(
        [
            *("ffmpeg", "-nostdin", "-loglevel", "quiet", "-re", "-f", "lavfi", "-i", "sine=300:sample_rate=44100"),
            *("-t", str(seconds), *codec, "-listen", "1", url),
        ]
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def at_once(seconds: list[float]) -> Callable[[float], Any]:
    """A sleep that only notes how long it should have been, but lets servers start."""

    async def sleep(s: float) -> None:
        seconds.append(s)
        await asyncio.sleep(0.05)

    return sleep


@pytest.mark.needs("ffmpeg")
@pytest.mark.parametrize(
    ("scheme", "codec"),
    [("rtmp", ["-c:a", "aac", "-f", "flv"]), ("http", ["-c:a", "libmp3lame", "-f", "mp3"])],
)
async def test_a_broadcast_is_heard_and_joined_again_after_it_was_lost(scheme, codec, caplog):
    url = f"{scheme}://127.0.0.1:{free_port()}/live/KEY?token=TOKEN"
    listening = Listening(url, None, sleep=at_once([]))
    async with listening.running():
        for number in (1, 2):
            with broadcasting(url, *codec) as server:
                await until_async(lambda n=number: listening.reader.status.connections == n)
                before = listening.sound.size
                await until_async(lambda n=before: listening.sound.size > n + 0.2 * RATE)
                server.kill()
                await until_async(lambda n=number: len(listening.utterances) == n)
            assert listening.state == "waiting"
        assert listening.reader.status.last_error.startswith(f"{scheme}://127.0.0.1:")
    heard = listening.sound[-8000:-2000]
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    assert np.argmax(spectrum) * RATE / len(heard) == pytest.approx(300, abs=10)
    told = caplog.text + listening.reader.status.last_error + listening.reader.name
    assert "TOKEN" not in told
    if scheme == "rtmp":
        assert "KEY" not in told


@pytest.mark.needs("ffmpeg")
async def test_a_broadcast_comes_with_little_delay():
    """From the first packet on: what was collected while FFmpeg looked what it is, is not heard seconds later."""
    url = f"rtmp://127.0.0.1:{free_port()}/live/key"
    listening = Listening(url, None, sleep=at_once([]))
    with broadcasting(url, "-c:a", "aac", "-f", "flv"):
        async with listening.running():
            await until_async(lambda: listening.state == "connected")
            began = time.monotonic()
            await asyncio.sleep(1.5)
            heard_s = listening.sound.size / RATE
            assert heard_s - (time.monotonic() - began) < 0.5


async def test_an_absent_server_is_tried_for_ever_and_told_of_once(caplog):
    waits: list[float] = []
    listening = Listening(f"rtmp://127.0.0.1:{free_port()}/live/KEY", None, sleep=at_once(waits), rng=random.Random(1))
    with caplog.at_level(logging.WARNING):
        async with listening.running():
            await until_async(lambda: len(waits) >= 14)
    longest = [min(1.5**attempt, 30.0) for attempt in range(len(waits))]
    for wait, most in zip(waits, longest):
        assert 0.7 * most <= wait <= most
    assert len({round(wait / most, 3) for wait, most in zip(waits, longest)}) > 5
    assert len(caplog.records) == 1
    assert "connection refused; nothing listens there; trying again" in caplog.text
    assert "KEY" not in caplog.text
    assert listening.state == "ended"


@pytest.mark.parametrize("scheme", ["rtmp", "http", "https", "tcp"])
async def test_a_server_that_never_answers_freezes_nothing(tarpit, scheme):
    listening = Listening(f"{scheme}://127.0.0.1:{tarpit}/x", None, sleep=at_once([]), open_timeout_s=0.3)
    gaps = []
    async with listening.running():
        last = time.monotonic()
        while not listening.reader.status.last_error:
            await asyncio.sleep(0.002)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
    assert "no answer in 0.3 s" in listening.reader.status.last_error or scheme == "https"
    assert max(gaps) < 0.25


@pytest.fixture
def web(tmp_path) -> Iterator[str]:
    """The address of tmp_path, over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


async def test_an_answer_that_has_a_length_is_heard_whole_and_once(web, tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(2.0, 16_000), 16_000)
    listening = Listening(f"{web}/a.wav", None)
    assert (await listening.to_the_end()).size == pytest.approx(2 * RATE, abs=2)
    assert listening.reader.status.connections == 1


async def test_an_answer_that_is_missing_is_asked_for_again(web, tmp_path, caplog):
    listening = Listening(f"{web}/a.wav?token=SECRET", None, sleep=at_once([]))
    async with listening.running():
        await until_async(lambda: "404" in listening.reader.status.last_error)
        # There as a whole or not at all: it is asked for all the time.
        soundfile.write(tmp_path / "written.wav", voice(0.5, 16_000), 16_000)
        (tmp_path / "written.wav").rename(tmp_path / "a.wav")
        await until_async(lambda: listening.state == "ended")
    assert listening.sound.size == pytest.approx(RATE / 2, abs=2)
    assert "SECRET" not in caplog.text


async def test_many_flaps_leave_no_thread_and_no_descriptor(web, tmp_path):
    """Each connection gives some sound, then breaks."""
    soundfile.write(tmp_path / "a.wav", voice(0.2, 16_000), 16_000)
    data = (tmp_path / "a.wav").read_bytes()
    waits: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + data)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        listening = Listening(f"http://127.0.0.1:{server.getsockname()[1]}/radio", None, sleep=at_once(waits))
        process = psutil.Process()
        async with listening.running():
            await until_async(lambda: len(waits) >= 5)
            before = process.num_fds(), threading.active_count()
            await until_async(lambda: len(waits) >= 30, 20)
            after = process.num_fds(), threading.active_count()
        server.shutdown(socket.SHUT_RDWR)
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 1
    assert listening.reader.status.connections >= 29
    assert waits[-1] > 20, "a connection that breaks soon is no reason for haste"


def test_a_reader_names_its_source_without_secrets():
    reader: Reader = open_live("rtmp://user:word@host/live/KEY?a=b", None, PushSource(RATE))
    assert reader.name == "rtmp://***@host/live/***?***"


async def test_of_a_broadcast_that_goes_on_without_us_the_newest_is_kept():
    """Who waited for room would be late by what gathered meanwhile, for ever."""

    async def hour() -> AsyncIterator[AudioChunk | None]:
        for second in range(3600):
            yield AudioChunk(np.full(10, second / 3600, np.float32), RATE)

    source = PushSource(RATE, ahead_s=50 / RATE)
    async with asyncio.timeout(10):
        await Reader("a broadcast", hour, source, newest=True).run()
        kept = await source.read()
    assert kept is not None
    assert kept.samples == pytest.approx(np.repeat(np.arange(3595, 3600) / 3600, 10))


@pytest.mark.parametrize(
    ("target", "newest"), [("rtmp://host/live/k", True), ("alsa:mic", True), ("http://h/x", False)]
)
def test_which_sources_go_on_without_us(target, newest):
    assert open_live(target, None, PushSource(RATE))._newest is newest
