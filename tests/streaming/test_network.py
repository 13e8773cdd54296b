"""RTMP outputs against a real server (nginx), and against ones that are absent, mute, frozen, killed or hostile.

Every fault is measured with a heartbeat beside it: the event loop goes on whatever the other end does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import find_program
from contracts import check_sink

from avatar.model import FrameBlock
from streaming.encoder import Encoder, EncoderSettings
from streaming.lane import Lane, LanePolicy, LaneStatus
from streaming.network import Flow, Limits, NetworkSink, probe
from streaming.sink import TargetAbsent, TargetRefused

LOOP_STALL_S = 0.25
"""Longest gap of the event loop that a shared machine is forgiven; docs/reliability.md has what was measured."""

FAST = Limits(open_s=2.0, stall_s=2.0, close_s=1.0)

QUICK = LanePolicy(backlog_s=0.9, live=True, lost_s=(0.1, 0.3), look_s=0.2, refused_s=0.3, longest_s=1.0)


class Nginx:
    """An RTMP server of our own on loopback; every stream is recorded. `denied` refuses keys as a web hook says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recordings = folder, folder / "rec"
        self.recordings.mkdir()
        self.port, http = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "nginx.conf").write_text(
            f"""
            daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log info;
            load_module /usr/lib/nginx/modules/ngx_rtmp_module.so;
            events {{}}
            rtmp {{ server {{
                listen 127.0.0.1:{self.port};
                application live {{ live on; record all; record_path {self.recordings}; record_unique on; }}
                application denied {{ live on; on_publish http://127.0.0.1:{http}/no; }}
                application closed {{ live on; deny publish all; }}
            }} }}
            http {{
                access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
                uwsgi_temp_path {folder}; scgi_temp_path {folder};
                server {{ listen 127.0.0.1:{http}; location /no {{ return 403; }} }}
            }}
            """
        )

    def url(self, key: str, application: str = "live") -> str:
        return f"rtmp://127.0.0.1:{self.port}/{application}/{key}"

    def start(self) -> None:
        nginx = find_program("nginx")
        assert nginx
        log = str(self.folder / "error.log")
        self.process = subprocess.Popen(
            [nginx, "-p", str(self.folder), "-c", str(self.folder / "nginx.conf"), "-e", log],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.01)
        raise AssertionError((self.folder / "error.log").read_text())

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def recorded(self, key: str) -> list[Path]:
        return sorted(self.recordings.glob(f"{key}-*.flv"), key=lambda path: path.stat().st_mtime_ns)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    server = Nginx(tmp_path)
    server.start()
    yield server
    server.kill()


@contextlib.asynccontextmanager
async def tarpit(answer: bytes = b"", then_close: bool = False) -> AsyncIterator[int]:
    """A server that takes connections, says so much, and then nothing. Gives its port."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(answer)
        if then_close:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


class Air:
    """A live show in real time on one lane, with a heartbeat that measures how long the loop was ever held up."""

    def __init__(self, url: str, policy: LanePolicy = QUICK, limits: Limits = FAST, kbps: int = 500) -> None:
        settings = EncoderSettings(live=True, preset="ultrafast", bitrate_kbps=kbps)
        self.encoder = Encoder(128, 128, 25, 1, settings)
        self.sinks: list[NetworkSink] = []
        self.keyframes_at: list[float] = []
        """When each connection wrote its first packet."""
        self.lane = Lane(lambda: self.connect(url, limits), policy=policy, want_keyframe=self.encoder.want_keyframe)
        self.rng = np.random.default_rng(0)
        self.frames = 0
        self.stall_s = 0.0

    def connect(self, url: str, limits: Limits) -> NetworkSink:
        air = self

        class Watched(NetworkSink):
            begun = False

            async def write(self, packets):
                await super().write(packets)
                if not self.begun and packets[0].is_keyframe and packets[0].stream.type == "video":
                    self.begun = True
                    air.keyframes_at.append(time.monotonic())

        self.sinks.append(Watched(url, limits))
        return self.sinks[-1]

    async def __aenter__(self) -> Air:
        self.tasks = [asyncio.create_task(self.beat()), asyncio.create_task(self.play())]
        await self.lane.open()
        self.running = asyncio.create_task(self.lane.run(self.encoder.streams, {"title": "a test"}))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.tasks[1].cancel()
        self.lane.close(complete=True)
        await self.running
        await asyncio.sleep(0.05)
        self.tasks[0].cancel()
        await asyncio.wait(self.tasks)
        self.encoder.close()
        print(f"loop stall {1000 * self.stall_s:.0f} ms, {self.lane.status}")
        assert self.stall_s < LOOP_STALL_S
        assert not children(), "a process was left behind"

    async def beat(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            self.stall_s = max(self.stall_s, now - last - 0.005)
            last = now

    async def play(self) -> None:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(0.0, began + self.frames / 25 - time.monotonic()))
            # New noise in each picture, so that the stream is as large as its bit rate allows.
            picture = self.rng.integers(60, 120, (1, 128, 128, 3), np.uint8)
            block = FrameBlock(picture, np.zeros(0, np.float32), self.frames)
            self.frames += 1
            sound = np.zeros((1920, 1), np.float32)
            self.lane.offer(await loop.run_in_executor(None, self.encoder.encode, block, sound))

    async def until(self, true: Callable[[LaneStatus], bool], limit_s: float = 15.0) -> float:
        """Wait until something is true of the lane; gives the seconds it took."""
        began = time.monotonic()
        while not true(self.lane.status):
            await asyncio.sleep(0.01)
            assert time.monotonic() - began < limit_s, self.lane.status
        return time.monotonic() - began

    async def on_air(self, connections: int = 1, limit_s: float = 15.0) -> float:
        return await self.until(
            lambda status: len(self.keyframes_at) >= connections and status.state == "sending", limit_s
        )


def children() -> list[int]:
    """Publishing processes of this one, by their command lines; zombies too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"streaming.publish" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
    return found


def told_to_all(pid: int) -> bytes:
    """What every process of the machine, or at least of the user, can read of another."""
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


def read_flv(path: Path) -> tuple[list[float], list[float], list[bool]]:
    """Times of pictures and of sound in seconds, and which pictures are keyframes."""
    pictures, sound, keys = [], [], []
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.dts is not None and packet.stream.type == "video":
                pictures.append(float(packet.pts * packet.time_base))
                keys.append(packet.is_keyframe)
            elif packet.dts is not None:
                sound.append(float(packet.pts * packet.time_base))
    return pictures, sound, keys


# How far a stream has come


def flow(reports: int, wrote: Callable[[int], int], report: Callable[[int], dict[str, int]]) -> int | None:
    """After how many reports, a tenth of a second apart, a stream counts as stalled; None: never."""
    stream = Flow(stall_s=4.0)
    for number in range(reports):
        stream.wrote(wrote(number), 0.1)
        stream.report(at_s=1000 + number / 10, **report(number))
        if stream.stalled:
            return number
    return None


def test_a_server_that_reads_is_never_stalled():
    windows = np.random.default_rng(0).integers(60, 70, 600) * 1024
    for rate in (100, 3000, 50_000):
        reported = lambda n, rate=rate: {"taken": rate * n, "acked": rate * n + 99, "window": int(windows[n])}
        assert flow(600, lambda n, rate=rate: rate, reported) is None


@pytest.mark.parametrize("share", [0.35, 1.0])
def test_a_server_that_stops_reading_is_stalled_although_its_kernel_goes_on_acknowledging(share):
    def reported(number: int) -> dict[str, int]:
        window = round((100_000 - share * 3000 * max(0, number - 50)) / 1024) * 1024
        return {"taken": 3000 * number, "acked": 3000 * number, "window": max(0, window)}

    frozen = flow(100, lambda n: 3000, reported)
    assert frozen is not None
    assert 80 <= frozen <= 92  # the first of four slices may have been begun well


def test_a_server_whose_window_is_shut_is_stalled():
    shut = flow(100, lambda n: 3000, lambda n: {"taken": 3000 * n, "acked": 3000 * min(n, 50), "window": 0})
    assert shut is not None
    assert 89 <= shut <= 92


def test_a_server_that_reads_now_and_then_is_not_stalled():
    """As a slow reader does: the window opens every second and a half, and is filled at once."""

    def reported(number: int) -> dict[str, int]:
        acked = number // 15 * 60_000
        return {"taken": acked, "acked": acked, "unsent": 0, "window": 0 if number % 15 else 60_000}

    assert flow(600, lambda n: 4500, reported) is None


def test_a_narrow_way_is_not_a_stall():
    def reported(number: int) -> dict[str, int]:
        return {"taken": 15_000 + 500 * number, "acked": 450 * number, "window": 0}

    assert flow(600, lambda n: 3000 if n < 5 else 500, reported) is None


def test_where_the_system_tells_nothing_of_the_socket_what_the_process_takes_counts():
    assert flow(600, lambda n: 3000, lambda n: {"taken": 3000 * n}) is None
    stuck = flow(600, lambda n: 3000, lambda n: {"taken": 3000 * min(n, 50)})
    assert stuck is not None
    assert 89 <= stuck <= 92


def test_a_stream_with_nothing_to_send_is_not_stalled():
    assert flow(600, lambda n: 3000 if n < 10 else 0, lambda n: {"taken": 3000 * min(n + 1, 10)}) is None


def test_a_machine_that_slept_blames_nobody():
    stream = Flow(stall_s=4.0)
    for number in range(100):
        stream.wrote(1000, 0.1)
        asleep_s = 7200 if number > 50 else 0
        stream.report(at_s=number / 10 + asleep_s, taken=1000 * number, acked=1000 * (number // 20 * 20), window=5000)
        assert not stream.stalled


def test_what_has_left_this_machine_is_not_pending_though_it_may_be_on_its_way():
    stream = Flow(stall_s=4.0)
    for _ in range(10):
        stream.wrote(1000, 0.04)
    assert stream.pending_s == pytest.approx(0.4)
    stream.report(at_s=1.0, taken=10_000, acked=0, unsent=2500, window=5000)
    assert stream.pending_s == pytest.approx(0.12)
    stream.report(at_s=1.1, taken=10_000, acked=0, unsent=0, window=5000)
    assert stream.pending_s == pytest.approx(0.0)


# Looking whether a server is there


async def test_a_server_that_is_not_there_is_told_at_once():
    began = time.monotonic()
    with pytest.raises(TargetAbsent, match=r"rtmp://127\.0\.0\.1:\d+/live/\*\*\*: connection refused; is the server"):
        await NetworkSink(f"rtmp://127.0.0.1:{free_port()}/live/key").open()
    assert time.monotonic() - began < 1


async def test_a_server_that_takes_the_connection_and_is_silent_is_given_up():
    async with tarpit() as port:
        with pytest.raises(TargetAbsent, match=r"takes the connection and then says nothing.*\(0\.3 s\)"):
            await probe("rtmp://a", "127.0.0.1", port, 0.3)


async def test_what_is_not_an_rtmp_server_is_told():
    async with tarpit(b"HTTP/1.1 400 Bad Request\r\n" * 100) as port:
        with pytest.raises(TargetRefused, match="what answers there is not an RTMP server"):
            await probe("rtmp://a", "127.0.0.1", port, 2)


async def test_a_proxy_whose_server_is_gone_counts_as_absent():
    async with tarpit(then_close=True) as port:
        with pytest.raises(TargetAbsent, match="no RTMP handshake"):
            await probe("rtmp://a", "127.0.0.1", port, 2)


async def test_a_host_that_does_not_exist_is_told(monkeypatch):
    def unknown(*_: object, **__: object) -> list:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(TargetAbsent, match="no such host"):
        await probe("rtmp://a", "nowhere.example", 1935, 2)


async def test_a_name_server_that_is_silent_holds_up_nothing_and_costs_one_thread(monkeypatch):
    import threading

    answer = threading.Event()

    def silent(*_: object, **__: object) -> list:
        answer.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    threads = threading.active_count()
    for _ in range(5):
        with pytest.raises(TargetAbsent, match=r"the server was not found \(0\.1 s\)"):
            await probe("rtmp://a", "slow.example", 1935, 0.1)
    assert threading.active_count() == threads + 1
    answer.set()


# A connection


@pytest.mark.needs("nginx")
async def test_rtmp_keeps_the_contract_of_sinks(nginx):
    def times(sink):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(av.error.FFmpegError, IndexError):
                pictures, sound, _ = read_flv(nginx.recorded("contract")[-1])
                if len(pictures) == 48:
                    assert len(sound) > 85
                    return [picture - pictures[0] for picture in pictures]
            time.sleep(0.05)
        raise AssertionError("nginx did not record the stream")

    await check_sink(lambda: NetworkSink(nginx.url("contract")), times)


@pytest.mark.needs("nginx", "ffprobe")
async def test_a_stream_is_h264_and_aac_with_its_tags_and_a_keyframe_first(nginx):
    async with Air(nginx.url("plain")) as air:
        await air.on_air()
        await asyncio.sleep(3.0)
        assert air.lane.status.dropped_frames < 25
        assert air.lane.backlog_s < 0.3
    recording = nginx.recorded("plain")[0]
    pictures, sound, keys = read_flv(recording)
    assert keys[0]
    assert min(pictures[0], sound[0]) == 0
    assert np.diff(pictures) == pytest.approx(0.04, abs=0.0011)
    assert np.all(np.diff(sound) > 0)
    assert len(pictures) >= 60
    probe = [str(find_program("ffprobe")), "-v", "error", "-show_entries", "stream=codec_name:format_tags", recording]
    shown = (await asyncio.to_thread(subprocess.run, probe, capture_output=True, text=True, check=True)).stdout
    assert "codec_name=h264" in shown
    assert "codec_name=aac" in shown


@pytest.mark.needs("nginx")
async def test_the_stream_key_is_in_no_command_line_environment_or_log(nginx, caplog):
    caplog.set_level(logging.DEBUG)
    async with Air(nginx.url("SECRET-KEY?token=SECRET-TOKEN")) as air:
        await air.on_air()
        (pid,) = children()
        shown = told_to_all(pid)
        shown += f"{air.lane.status} {air.lane!r} {air.sinks[0]!r} {air.sinks[0].name}".encode()
        assert b"streaming.publish" in shown
        nginx.kill()
        await air.until(lambda status: status.state == "waiting")
        await asyncio.sleep(0.3)
        shown += f"{air.lane.status} {caplog.text} {[repr(task) for task in asyncio.all_tasks()]}".encode()
    assert b"SECRET" not in shown


# Faults


async def test_a_server_that_is_absent_holds_up_nothing():
    async with Air(f"rtmp://127.0.0.1:{free_port()}/live/key") as air:
        await asyncio.sleep(1.5)
        assert air.lane.status.state == "waiting"
        assert not children(), "to look is enough; no process is needed for it"


@pytest.mark.needs("nginx")
async def test_a_server_that_comes_late_gets_its_first_keyframe_soon(nginx):
    nginx.kill()
    async with Air(nginx.url("late"), policy=LanePolicy.LIVE, limits=Limits()) as air:
        await asyncio.sleep(1.2)
        nginx.start()
        took_s = await air.on_air()
        print(f"first keyframe {took_s:.2f} s after the server listened")
        assert took_s < 3


async def test_a_server_that_is_silent_after_the_handshake_is_given_up():
    handshake = b"\3" + bytes(1536) * 2
    async with tarpit(handshake) as port:
        sink = NetworkSink(f"rtmp://127.0.0.1:{port}/live/key", Limits(open_s=1.0))
        await sink.open()
        beat = Air("rtmp://127.0.0.1:1/a/b")
        beating = asyncio.create_task(beat.beat())
        began = time.monotonic()
        with pytest.raises(TargetAbsent, match=r"the server did not take the stream in 1 s"):
            await sink.start(beat.encoder.streams, {})
        took_s, began = time.monotonic() - began, time.monotonic()
        await sink.close(complete=False)
        killed_s = time.monotonic() - began
        beating.cancel()
        print(f"given up after {took_s:.2f} s, killed in {1000 * killed_s:.1f} ms, stall {1000 * beat.stall_s:.0f} ms")
        assert killed_s < 0.5
        assert beat.stall_s < LOOP_STALL_S
        assert not children()


@pytest.mark.needs("nginx")
async def test_a_server_that_is_killed_and_comes_back_is_on_air_again_within_three_seconds(nginx):
    async with Air(nginx.url("killed"), policy=LanePolicy.LIVE, limits=Limits()) as air:
        await air.on_air()
        await asyncio.sleep(1.5)
        nginx.kill()
        noticed_s = await air.until(lambda status: status.state == "waiting")
        assert "connection lost" in air.lane.status.last_error
        await asyncio.sleep(1.0)
        nginx.start()
        took_s = await air.on_air(2)
        print(f"noticed after {noticed_s:.2f} s; keyframe {took_s:.2f} s after the server listened")
        assert took_s < 3
        await asyncio.sleep(1.0)
        assert air.lane.status.reconnects == 1
    for recording in nginx.recorded("killed"):
        pictures, sound, keys = read_flv(recording)
        assert keys[0]
        assert min(pictures[0], sound[0]) == 0
        assert np.all(np.diff(pictures) > 0)


@pytest.mark.needs("nginx")
@pytest.mark.parametrize("kbps", [400, 4000])
async def test_a_server_that_freezes_is_told_by_its_progress_and_left(nginx, kbps):
    async with Air(nginx.url("frozen"), kbps=kbps) as air:
        await air.on_air()
        await asyncio.sleep(1.5)
        nginx.send(signal.SIGSTOP)
        try:
            stalled_s = await air.until(lambda status: status.state == "waiting")
            assert "the server has taken nothing for 2 s" in air.lane.status.last_error
            print(f"{kbps} kbit/s: {stalled_s:.2f} s after the server froze, with a limit of {FAST.stall_s:g} s")
            assert stalled_s < FAST.stall_s + 1
        finally:
            nginx.send(signal.SIGCONT)
        took_s = await air.on_air(2)
        print(f"keyframe {took_s:.2f} s after the server went on")
        assert took_s < 3


@pytest.mark.needs("nginx")
async def test_a_refused_key_is_told_as_such_and_asked_for_slowly(nginx):
    async with Air(nginx.url("SECRET", "denied")) as air:
        await air.until(lambda status: status.state == "refused")
        error = air.lane.status.last_error
        assert "are application and stream key right?" in error
        assert "/denied/***" in error
        assert "SECRET" not in error
        assert not air.lane.status.failed


@pytest.mark.needs("nginx")
async def test_a_key_that_is_taken_is_told_in_the_servers_words(nginx):
    async with Air(nginx.url("taken")) as first:
        await first.on_air()
        sink = NetworkSink(nginx.url("taken"))
        await sink.open()
        with pytest.raises(TargetRefused, match="the server refuses the stream: Already publishing"):
            await sink.start(first.encoder.streams, {})
        await sink.close(complete=False)


@pytest.mark.needs("nginx")
async def test_a_server_that_hangs_up_on_every_stream_counts_as_a_refusal(nginx):
    async with Air(nginx.url("key", "closed")) as air:
        await air.until(lambda status: status.state == "refused")
        assert not air.lane.status.failed


@pytest.mark.needs("nginx")
async def test_flapping_leaves_no_process_thread_or_descriptor_behind(nginx):
    import threading

    async with Air(nginx.url("flap"), policy=replace(QUICK, aired_s=0.0)) as air:
        await air.on_air()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for number in range(2, 8):
            nginx.kill()
            await air.until(lambda status: status.state == "waiting")
            nginx.start()
            await air.on_air(number)
        await asyncio.sleep(0.2)
        after = len(os.listdir("/proc/self/fd")), threading.active_count()
        assert len(children()) == 1
        assert after[0] <= before[0] + 1
        assert after[1] <= before[1] + 1


async def test_the_publishing_process_ends_with_its_parent(tmp_path):
    """It is killed by the kernel while FFmpeg holds the lock, if nobody else does it."""
    handshake = b"\3" + bytes(1536) * 2
    async with tarpit(handshake) as port:
        sink = NetworkSink(f"rtmp://127.0.0.1:{port}/live/key", Limits(open_s=0.3))
        with pytest.raises(TargetAbsent):
            await sink.start(Air("rtmp://127.0.0.1:1/a/b").encoder.streams, {})
        began = time.monotonic()
        status = await sink._process.wait()
        assert status == -signal.SIGALRM
        assert time.monotonic() - began < 3
        await sink.close(complete=False)


# RTMPS


@contextlib.asynccontextmanager
async def tls_in_front(port: int, certificate: Path) -> AsyncIterator[int]:
    """TLS on its way to a server that speaks none. Gives its port."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that only who is told trusts."""
    openssl = find_program("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    path = tmp_path / "own.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(path), "-out", f"{path}.crt", "-days", "2"]
    subprocess.run([openssl, "req", "-x509", *key, *names], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.mark.needs("nginx", "openssl")
async def test_rtmps_reaches_a_server_whose_certificate_is_trusted(nginx, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    async with (
        tls_in_front(nginx.port, certificate) as port,
        Air(f"rtmps://127.0.0.1:{port}/live/tls") as air,
    ):
        await air.on_air()
        await asyncio.sleep(1.5)
        assert air.lane.backlog_s < 0.4
    assert len(read_flv(nginx.recorded("tls")[0])[0]) > 20


@pytest.mark.needs("nginx", "openssl")
async def test_rtmps_sends_no_key_to_a_server_whose_certificate_is_not_trusted(nginx, certificate):
    async with tls_in_front(nginx.port, certificate) as port:
        sink = NetworkSink(f"rtmps://127.0.0.1:{port}/live/tls")
        with pytest.raises(TargetRefused, match=r"its certificate cannot be trusted \(self.signed certificate\)"):
            await sink.open()
        # Nor does the process that connects afterwards take another's word for it.
        with pytest.raises(TargetRefused, match="its certificate cannot be trusted"):
            await sink.start(Air("rtmp://127.0.0.1:1/a/b").encoder.streams, {})
        await sink.close(complete=False)
    assert not nginx.recorded("tls")


@pytest.mark.needs("nginx")
async def test_rtmps_to_a_server_without_tls_is_told(nginx):
    with pytest.raises(TargetAbsent, match=r"takes the connection and does not speak TLS; is it rtmp:// \?"):
        await NetworkSink(nginx.url("key").replace("rtmp:", "rtmps:"), Limits(open_s=0.3)).open()
