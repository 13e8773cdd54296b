"""RTMP outputs against a real server (nginx), and against ones that are absent, mute, frozen, killed or hostile.

Every fault is measured with a heartbeat beside it: the event loop goes on whatever the other end does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from conftest import find_program
from contracts import check_sink
from procs import LoopWatch, children
from proxy import Proxy, certificate, free_port, tls_server
from rtmp import RtmpServer
from waiting import until_async

from avatar.model import FrameBlock
from streaming.encoder import Encoder, EncoderSettings
from streaming.lane import Lane, LanePolicy, LaneStatus
from streaming.network import Flow, Limits, NetworkSink, _pinned, probe
from streaming.sink import TargetAbsent, TargetRefused

LOOP_STALL_S = 0.25
"""Longest gap of the event loop that a shared machine is forgiven; docs/reliability.md has what was measured."""

FAST = Limits(open_s=2.0, stall_s=2.0, close_s=1.0)

QUICK = LanePolicy(backlog_s=0.9, live=True, lost_s=(0.1, 0.3), look_s=0.2, refused_s=0.3, longest_s=1.0)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[RtmpServer]:
    with RtmpServer(tmp_path / "far_side") as server:
        yield server


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
        self.keyframes_at: list[float] = []
        """When each connection wrote its first packet."""
        self.lane = Lane(lambda: self.connect(url, limits), policy=policy, want_keyframe=self.encoder.want_keyframe)
        self.rng = np.random.default_rng(0)
        self.frames = 0
        self.watch = LoopWatch()

    def connect(self, url: str, limits: Limits) -> NetworkSink:
        air = self

        class Watched(NetworkSink):
            begun = False

            async def write(self, packets):
                await super().write(packets)
                if not self.begun and packets[0].is_keyframe and packets[0].stream.type == "video":
                    self.begun = True
                    air.keyframes_at.append(time.monotonic())

        self.sink = Watched(url, limits)
        return self.sink

    async def __aenter__(self) -> Air:
        await self.watch.__aenter__()
        self.playing = asyncio.create_task(self.play())
        await self.lane.open()
        self.running = asyncio.create_task(self.lane.run(self.encoder.streams, {"title": "a test"}))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.playing.cancel()
        self.lane.close(complete=True)
        await self.running
        await asyncio.sleep(0.05)
        await self.watch.__aexit__()
        await asyncio.wait([self.playing])
        self.encoder.close()
        print(f"loop stall {1000 * self.watch.worst_s:.0f} ms, {self.lane.status}")
        assert self.watch.worst_s < LOOP_STALL_S
        assert not publishers(), "a process was left behind"

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


def publishers() -> list[int]:
    return children(os.getpid(), "streaming.publish")


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


async def test_a_host_with_an_address_that_leads_nowhere_is_reached_by_the_other(monkeypatch):
    def both(host: str, port: int, **_: object) -> list:
        return [(0, 0, 0, "", ("::1", port, 0, 0)), (0, 0, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    async with tarpit(b"\3" + bytes(1536)) as port:
        await probe("rtmp://a", "two.example", port, 2)


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
                pictures, sound, _ = read_flv(nginx.recordings("contract")[-1])
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
        await asyncio.sleep(2.0)
        assert air.lane.status.dropped_frames < 25
        assert air.lane.backlog_s < 0.3
    recording = nginx.recordings("plain")[0]
    pictures, sound, keys = read_flv(recording)
    assert keys[0]
    assert min(pictures[0], sound[0]) == 0
    assert np.diff(pictures) == pytest.approx(0.04, abs=0.0011)
    assert np.all(np.diff(sound) > 0)
    assert len(pictures) >= 40
    probe = [str(find_program("ffprobe")), "-v", "error", "-show_entries", "stream=codec_name:format_tags", recording]
    shown = (await asyncio.to_thread(subprocess.run, probe, capture_output=True, text=True, check=True)).stdout
    assert "codec_name=h264" in shown
    assert "codec_name=aac" in shown


@pytest.mark.needs("nginx")
async def test_the_stream_key_is_in_no_command_line_environment_or_log(nginx, caplog):
    caplog.set_level(logging.DEBUG)
    async with Air(nginx.url("SECRET-KEY?token=SECRET-TOKEN")) as air:
        await air.on_air()
        (pid,) = publishers()
        shown = told_to_all(pid)
        shown += f"{air.lane.status} {air.lane!r} {air.sink!r} {air.sink.name}".encode()
        assert b"streaming.publish" in shown
        await asyncio.to_thread(nginx.kill)
        await air.until(lambda status: status.state == "waiting")
        await asyncio.sleep(0.3)
        shown += f"{air.lane.status} {caplog.text} {[repr(task) for task in asyncio.all_tasks()]}".encode()
    assert b"SECRET" not in shown


@pytest.mark.needs("nginx")
async def test_a_name_is_called_at_the_address_that_was_judged_and_told_to_the_server_as_it_is(nginx):
    """The system knows no such name: nobody but the one who judges can have been asked."""
    asked = []

    async def look_up(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    named = nginx.url("by-name").replace("127.0.0.1", "live.example")
    plain, judged = NetworkSink(nginx.url("by-address"), FAST), NetworkSink(named, FAST, look_up)
    encoder = Encoder(128, 128, 25, 1, EncoderSettings(live=True, preset="ultrafast", bitrate_kbps=500))
    for sink in (plain, judged):
        await sink.open()
        await sink.start(encoder.streams, {})
        await sink.close(complete=False)
    encoder.close()
    assert asked == ["live.example"], "once for each connection"
    told = [event.fields["tcurl"] for event in nginx.events if event.event == "publish"]
    assert told == [nginx.url("x").removesuffix("/x"), named.removesuffix("/by-name")]


@pytest.mark.needs("nginx")
async def test_an_address_that_may_not_be_called_is_not_called(nginx):
    async def look_up(host: str, port: int) -> list[str]:
        raise TargetRefused(f"{host}: leads into a private network")

    with pytest.raises(TargetRefused, match="private network"):
        await NetworkSink(nginx.url("key"), FAST, look_up).open()
    assert not nginx.events


@pytest.mark.parametrize(
    ("url", "address", "pinned", "named"),
    [
        ("rtmp://a.example/live/key", "192.0.2.1", "rtmp://192.0.2.1:1935/live/key", "rtmp://a.example:1935/live"),
        ("rtmp://u:p@a.example/x/y/key?t=1", "2001:db8::1", "rtmp://u:p@[2001:db8::1]:1935/x/y/key?t=1",
         "rtmp://a.example:1935/x/y"),
        ("rtmp://[::1]/live/mp4:a/b", "::1", "rtmp://[::1]:1935/live/mp4:a/b", "rtmp://[::1]:1935/live"),
        ("srt://a.example:9000?mode=caller", "192.0.2.1", "srt://192.0.2.1:1935?mode=caller", None),
    ],
)  # fmt: skip
def test_a_pinned_address_keeps_everything_but_the_name(url, address, pinned, named):
    assert _pinned(url, address, 1935) == (pinned, {"rtmp_tcurl": named} if named else {})


# Faults


async def test_a_server_that_is_absent_holds_up_nothing():
    async with Air(f"rtmp://127.0.0.1:{free_port()}/live/key") as air:
        await asyncio.sleep(1.5)
        assert air.lane.status.state == "waiting"
        assert not publishers(), "to look is enough; no process is needed for it"


@pytest.mark.needs("nginx")
async def test_a_server_that_comes_late_gets_its_first_keyframe_soon(nginx):
    nginx.kill()
    async with Air(nginx.url("late"), policy=LanePolicy.LIVE, limits=Limits()) as air:
        await asyncio.sleep(1.2)
        await asyncio.to_thread(nginx.start)
        took_s = await air.on_air()
        print(f"first keyframe {took_s:.2f} s after the server listened")
        assert took_s < 3


async def test_a_server_that_is_silent_after_the_handshake_is_given_up():
    handshake = b"\3" + bytes(1536) * 2
    async with tarpit(handshake) as port:
        sink = NetworkSink(f"rtmp://127.0.0.1:{port}/live/key", Limits(open_s=1.0))
        await sink.open()
        streams = Air("rtmp://127.0.0.1:1/a/b").encoder.streams
        async with LoopWatch() as watch:
            began = time.monotonic()
            with pytest.raises(TargetAbsent, match=r"the server did not take the stream in 1 s"):
                await sink.start(streams, {})
            took_s, began = time.monotonic() - began, time.monotonic()
            await sink.close(complete=False)
            killed_s = time.monotonic() - began
        print(f"given up after {took_s:.2f} s, killed in {1000 * killed_s:.1f} ms, stall {1000 * watch.worst_s:.0f} ms")
        assert killed_s < 0.5
        assert watch.worst_s < LOOP_STALL_S
        assert not publishers()


@pytest.mark.needs("nginx")
async def test_a_server_that_is_killed_and_comes_back_is_on_air_again_within_three_seconds(nginx):
    async with Air(nginx.url("killed"), policy=LanePolicy.LIVE, limits=Limits()) as air:
        await air.on_air()
        await asyncio.sleep(1.5)
        await asyncio.to_thread(nginx.kill)
        noticed_s = await air.until(lambda status: status.state == "waiting")
        assert "connection lost" in air.lane.status.last_error
        await asyncio.sleep(1.0)
        await asyncio.to_thread(nginx.start)
        took_s = await air.on_air(2)
        print(f"noticed after {noticed_s:.2f} s; keyframe {took_s:.2f} s after the server listened")
        assert took_s < 3
        await asyncio.sleep(1.0)
        assert air.lane.status.reconnects == 1
    for recording in nginx.recordings("killed"):
        pictures, sound, keys = read_flv(recording)
        assert keys[0]
        assert min(pictures[0], sound[0]) == 0
        assert np.all(np.diff(pictures) > 0)


@pytest.mark.needs("nginx")
async def test_a_server_that_freezes_is_told_by_its_progress_and_left(nginx):
    """The kernel goes on acknowledging for it, and at this rate would do so for seconds."""
    async with Air(nginx.url("frozen"), kbps=400) as air:
        await air.on_air()
        await asyncio.sleep(1.5)
        nginx.freeze()
        try:
            stalled_s = await air.until(lambda status: status.state == "waiting")
            assert "the server has taken nothing for 2 s" in air.lane.status.last_error
            print(f"{stalled_s:.2f} s after the server froze, with a limit of {FAST.stall_s:g} s")
            assert stalled_s < FAST.stall_s + 1
        finally:
            nginx.thaw()
        took_s = await air.on_air(2)
        print(f"keyframe {took_s:.2f} s after the server went on")
        assert took_s < 3


@pytest.mark.needs("nginx")
async def test_a_refused_key_is_told_as_such_and_asked_for_slowly(nginx):
    nginx.accept = lambda key: False
    async with Air(nginx.url("SECRET")) as air:
        await air.until(lambda status: status.state == "refused")
        error = air.lane.status.last_error
        assert "are application and stream key right?" in error
        assert "/live/***" in error
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
    with Proxy(nginx.port) as line:
        line.reset_each(1000, after_bytes=6000)
        async with Air(line.url(nginx.url())) as air:
            await air.until(lambda status: status.state == "refused")
            assert not air.lane.status.failed


@pytest.mark.needs("nginx")
async def test_flapping_leaves_no_process_thread_or_descriptor_behind(nginx):
    import threading

    async with Air(nginx.url("flap"), policy=replace(QUICK, aired_s=0.0)) as air:
        await air.on_air()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for number in range(2, 5):
            await asyncio.to_thread(nginx.kill)
            await air.until(lambda status: status.state == "waiting")
            await asyncio.to_thread(nginx.start)
            await air.on_air(number)
        await asyncio.sleep(0.2)
        after = len(os.listdir("/proc/self/fd")), threading.active_count()
        assert len(publishers()) == 1
        assert after[0] <= before[0] + 1
        assert after[1] <= before[1] + 1


@pytest.mark.slow
@pytest.mark.needs("nginx")
async def test_a_hundred_resets_in_mid_frame_leave_nothing_behind_and_cost_half_a_second_each(nginx):
    import threading

    with Proxy(nginx.port) as line:
        async with Air(line.url(nginx.url("flap")), policy=replace(QUICK, aired_s=0.0), kbps=2000) as air:
            await air.on_air()
            await asyncio.sleep(1)
            before = len(os.listdir("/proc/self/fd")), threading.active_count(), psutil.Process().memory_info().rss
            took_s = []
            for number in range(2, 102):
                line.reset()
                took_s.append(await air.on_air(number))
            await asyncio.sleep(0.5)
            after = len(os.listdir("/proc/self/fd")), threading.active_count(), psutil.Process().memory_info().rss
            print(
                f"keyframe after {np.median(took_s):.2f} s, at most {max(took_s):.2f}; before {before}, after {after}"
            )
            assert len(publishers()) == 1
            assert after[0] <= before[0] + 2
            assert after[1] <= before[1] + 2
            assert after[2] - before[2] < 20e6
            assert max(took_s) < 3
    assert len(nginx.recordings("flap")) == 101


@pytest.mark.slow
@pytest.mark.needs("nginx")
@pytest.mark.parametrize("kbps", [200, 1000, 4000])
async def test_a_server_that_freezes_is_left_within_five_seconds(nginx, kbps):
    async with Air(nginx.url("frozen"), policy=LanePolicy.LIVE, limits=Limits(), kbps=kbps) as air:
        await air.on_air()
        await asyncio.sleep(6)
        nginx.freeze()
        try:
            stalled_s = await air.until(lambda status: status.state == "waiting")
            await asyncio.sleep(4)
        finally:
            nginx.thaw()
        took_s = await air.on_air(2)
        print(f"{kbps} kbit/s: left after {stalled_s:.2f} s; keyframe {took_s:.2f} s after the server went on")
        assert stalled_s < 5
        assert took_s < 3


@pytest.mark.needs("nginx")
async def test_a_connection_that_is_reset_in_mid_frame_is_made_anew_with_a_keyframe_first(nginx):
    with Proxy(nginx.port) as line:
        async with Air(line.url(nginx.url("torn"))) as air:
            await air.on_air()
            await asyncio.sleep(1.3)
            line.reset()
            took_s = await air.on_air(2)
            print(f"keyframe {took_s:.2f} s after the reset")
            await asyncio.sleep(1.3)
    recordings = nginx.recordings("torn")
    assert len(recordings) == 2
    for recording in recordings:
        pictures, _, keys = read_flv(recording)
        assert keys[0]
        assert np.all(np.diff(pictures) > 0)


@pytest.mark.needs("nginx")
async def test_a_way_that_is_too_narrow_costs_frames_and_nothing_else(nginx):
    with Proxy(nginx.port) as line:
        async with Air(line.url(nginx.url("narrow")), limits=Limits(), kbps=2000) as air:
            await air.on_air()
            line.cap(50_000)
            worst_s = 0.0
            for _ in range(40):
                await asyncio.sleep(0.1)
                worst_s = max(worst_s, air.lane.backlog_s)
            status = air.lane.status
            print(f"backlog {worst_s:.2f} s at most, {status}")
            assert worst_s < 1.2
            assert status.reconnects == 0
            assert status.dropped_frames > 50
            line.cap(None)
            await asyncio.sleep(1.5)
            assert air.lane.status.state == "sending"
            assert air.lane.backlog_s < 0.4
    pictures, _, keys = read_flv(nginx.recordings("narrow")[0])
    gaps = np.flatnonzero(np.diff(pictures) > 0.06) + 1
    assert len(gaps)
    assert all(keys[gap] for gap in gaps)


async def test_a_publishing_process_whose_parent_is_gone_ends_while_it_connects():
    """The kernel does it: nothing else can end a process that waits for a silent server with Python's lock held."""
    async with tarpit(b"\3" + bytes(1536) * 2) as port:
        sink = NetworkSink(f"rtmp://127.0.0.1:{port}/live/key", Limits(open_s=0.3))
        with pytest.raises(TargetAbsent):
            await sink.start(Air("rtmp://127.0.0.1:1/a/b").encoder.streams, {})
        (pid,) = publishers()
        await until_async(lambda: not publishers(), 3, f"the end of {pid}")
        await sink.close(complete=False)


PARENT = """
import asyncio, sys
from streaming.encoder import Encoder, EncoderSettings
from streaming.network import NetworkSink

async def main():
    sink = NetworkSink(sys.stdin.readline().strip())
    await sink.start(Encoder(64, 64, 25, 1, EncoderSettings(live=True)).streams, {})
    print(sink._process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.needs("nginx")
def test_a_publishing_process_whose_parent_is_killed_ends_by_itself(nginx):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(nginx.url() + "\n")
    parent.stdin.flush()
    publisher = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert publisher.wait(3) is None or not publisher.is_running()


# RTMPS


@pytest.fixture
def own_certificate(tmp_path: Path) -> Path:
    return certificate(tmp_path / "certificate")


@pytest.mark.needs("nginx", "openssl")
async def test_rtmps_reaches_a_server_whose_certificate_is_trusted(nginx, own_certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(own_certificate))
    with Proxy(nginx.port, tls=tls_server(own_certificate)) as line:
        async with Air(line.url(nginx.url("tls"))) as air:
            await air.on_air()
            await asyncio.sleep(1.5)
            assert air.lane.backlog_s < 0.4
    assert len(read_flv(nginx.recordings("tls")[0])[0]) > 20


@pytest.mark.needs("nginx", "openssl")
async def test_rtmps_sends_no_key_to_a_server_whose_certificate_is_not_trusted(nginx, own_certificate):
    with Proxy(nginx.port, tls=tls_server(own_certificate)) as line:
        sink = NetworkSink(line.url(nginx.url("tls")))
        with pytest.raises(TargetRefused, match=r"its certificate cannot be trusted \(self.signed certificate\)"):
            await sink.open()
        # Nor does the process that connects afterwards take another's word for it.
        with pytest.raises(TargetRefused, match="its certificate cannot be trusted"):
            await sink.start(Air("rtmp://127.0.0.1:1/a/b").encoder.streams, {})
        await sink.close(complete=False)
    assert not nginx.events


@pytest.mark.needs("nginx")
async def test_rtmps_to_a_server_without_tls_is_told(nginx):
    with pytest.raises(TargetAbsent, match=r"takes the connection and does not speak TLS; is it rtmp:// \?"):
        await NetworkSink(nginx.url("key").replace("rtmp:", "rtmps:"), Limits(open_s=0.3)).open()
