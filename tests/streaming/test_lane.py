"""Lane: whatever a target does, packets are waited for, dropped to a keyframe, or kept, as its policy says."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from virtual_loop import run_virtual

from avatar.model import FrameBlock
from streaming.encoder import Encoder, EncoderSettings
from streaming.lane import Lane, LanePolicy
from streaming.muxer import length_s
from streaming.sinks import FileSink, NullSink, SinkError, TargetAbsent, TargetRefused, open_sink

FPS = 25
LIVE = LanePolicy.LIVE


@dataclass
class Server:
    """What the far end is like, and what it got: one list of packets for each connection."""

    up: bool = True
    refuses: bool = False
    bandwidth: float = float("inf")
    """Seconds of the stream that it takes in a second."""
    silent: bool = False
    stalled: bool = False
    """Its connections have been given up as dead, and what was on its way will never leave."""
    connects_in_s: float = 0.1
    begun_at: list[float] = field(default_factory=list)
    got: list[list[tuple[str, float, bool]]] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)

    def frames(self, connection: int) -> list[float]:
        return [time for kind, time, _ in self.got[connection] if kind == "video"]


class Connection:
    """A live sink whose far end is a `Server`; half a second of the stream may be on its way."""

    live = True
    output = None
    name = "rtmp://host/live/***"

    def __init__(self, server: Server) -> None:
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.written_s = self.left_s = 0.0
        self.at = self.loop.time()
        self.error: Exception | None = None

    @property
    def pending_s(self) -> float:
        now = self.loop.time()
        self.left_s = min(self.written_s, self.left_s + (now - self.at) * self.server.bandwidth)
        self.at = now
        return self.written_s - self.left_s

    @property
    def failed(self) -> bool:
        return self.server.stalled

    async def open(self) -> None:
        if self.server.silent:
            await asyncio.sleep(5)
        if not self.server.up:
            raise TargetAbsent(f"{self.name}: connection refused; is the server running?")

    async def start(self, streams, metadata) -> None:
        await asyncio.sleep(self.server.connects_in_s)
        if self.server.refuses:
            raise TargetRefused(f"{self.name}: the server refuses the stream")
        self.server.begun_at.append(self.loop.time())
        self.server.got.append([])

    async def write(self, packets) -> None:
        for packet in packets:
            while self.pending_s > 0.5:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            if not self.server.up:
                raise SinkError(f"{self.name}: connection lost (connection reset by peer)")
            if self.failed:
                raise SinkError(f"{self.name}: the server has taken nothing for 4 s")
            time = float(packet.pts * packet.time_base)
            self.written_s += length_s([packet])
            self.server.got[-1].append((packet.stream.type, time, packet.is_keyframe))

    async def close(self, complete: bool) -> None:
        self.server.closed.append(complete)


class Show:
    """An encoder in real time, one lane, and what it counts."""

    def __init__(self, lane: Callable[[Callable[[], None]], Lane]) -> None:
        self.loop = asyncio.get_running_loop()
        self.encoder = Encoder(64, 64, FPS, 1, EncoderSettings(live=True, preset="ultrafast"))
        self.asked: list[float] = []
        self.lane = lane(self.want_keyframe)
        self.frames = 0
        self.began = self.loop.time()
        self.worst_backlog_s = 0.0

    def want_keyframe(self) -> None:
        self.asked.append(self.loop.time())
        self.encoder.want_keyframe()

    def packets(self) -> list:
        picture = np.full((1, 64, 64, 3), self.frames % 200, np.uint8)
        block = FrameBlock(picture, np.zeros(0, np.float32), self.frames)
        self.frames += 1
        return self.encoder.encode(block, np.zeros((48_000 // FPS, 1), np.float32))

    async def until(self, seconds: float) -> None:
        while self.frames < seconds * FPS:
            await asyncio.sleep(max(0.0, self.began + self.frames / FPS - self.loop.time()))
            self.lane.offer(self.packets())
            self.worst_backlog_s = max(self.worst_backlog_s, self.lane.backlog_s)


def on_air(server: Server, play: Callable[[Show], Coroutine[Any, Any, Any]], policy: LanePolicy = LIVE) -> Show:
    """Run a show in virtual time to a server, close it as complete, and give what it was."""

    async def run() -> Show:
        loop = asyncio.get_running_loop()
        show = Show(
            lambda want: Lane(
                lambda: Connection(server), policy=policy, want_keyframe=want, clock=loop.time, rng=random.Random(1)
            )
        )
        await show.lane.open()
        running = asyncio.create_task(show.lane.run(show.encoder.streams, {}))
        await play(show)
        show.lane.close(complete=True)
        await running
        return show

    return run_virtual(run())


def test_a_target_that_is_there_and_keeps_up_gets_every_frame():
    server = Server()
    show = on_air(server, lambda show: show.until(5.0))
    frames = server.frames(0)
    assert frames == pytest.approx([n / FPS for n in range(125)])
    assert server.got[0][0][0] == "video"
    assert server.got[0][0][2]
    assert show.asked == [], "a stream begins with a keyframe"
    status = show.lane.status
    assert (status.state, status.reconnects, status.last_error) == ("ended", 0, None)
    assert status.dropped_frames == 0
    assert server.closed == [True]


def test_a_target_that_connects_slowly_begins_where_the_stream_is_then():
    server = Server(connects_in_s=2.0)
    show = on_air(server, lambda show: show.until(5.0))
    assert show.worst_backlog_s < 1.0
    assert len(show.asked) == 1
    frames = server.frames(0)
    assert frames[0] == pytest.approx(show.asked[0] - show.began, abs=2 / FPS)
    assert frames == pytest.approx([frames[0] + n / FPS for n in range(len(frames))])
    assert server.got[0][0][2]
    assert show.lane.status.dropped_frames == 125 - len(frames)


def test_a_server_that_is_absent_is_only_a_warning_and_gets_the_stream_when_it_comes(caplog):
    server = Server(up=False)

    async def play(show):
        await show.until(20.0)
        assert show.lane.status.state == "waiting"
        assert "connection refused" in show.lane.status.last_error
        server.up, show.came_at = True, show.loop.time()
        await show.until(25.0)
        assert show.lane.status.state == "sending"

    show = on_air(server, play)
    assert server.begun_at[0] - show.came_at < 1.2
    assert server.frames(0)[0] - 20.0 < 1.3
    assert [record.levelno for record in caplog.records if "refused" in record.message].count(logging.WARNING) == 1


def test_a_lost_connection_is_made_again_in_half_a_second_with_a_keyframe_first():
    server = Server()

    async def play(show):
        await show.until(3.0)
        server.up = False
        await show.until(3.1)
        server.up = True
        await show.until(8.0)

    show = on_air(server, play)
    assert len(server.got) == 2
    assert server.got[1][0][:1] + server.got[1][0][2:] == ("video", True)
    assert 3.5 <= server.frames(1)[0] <= 3.9
    status = show.lane.status
    assert status.reconnects == 1
    assert status.dropped_frames == 200 - len(server.frames(0)) - len(server.frames(1))
    assert status.sent_s == pytest.approx(len(server.frames(0) + server.frames(1)) / FPS, abs=0.15)


def lost_at(server: Server, *times: float, until: float) -> list[float]:
    """How long it took from each loss to the next connection."""

    async def play(show):
        show.lost = []
        for time in times:
            await show.until(time)
            server.up = False
            await show.until(time + 0.08)
            server.up = True
            show.lost.append(show.loop.time())
        await show.until(until)

    show = on_air(server, play)
    return [begun - lost for lost, begun in zip(show.lost, server.begun_at[1:], strict=True)]


def test_losses_that_follow_each_other_are_two_seconds_apart_until_a_minute_was_healthy():
    delays = lost_at(Server(), 5.0, 10.0, 15.0, 80.0, until=85.0)
    assert delays[0] == pytest.approx(0.6, abs=0.1)
    assert delays[1] == pytest.approx(2.2, abs=0.2)
    assert delays[2] == pytest.approx(2.2, abs=0.2)
    assert delays[3] == pytest.approx(0.6, abs=0.1)


def test_a_server_that_refuses_is_asked_ever_more_slowly_and_the_state_says_so():
    server = Server(refuses=True)
    tries: list[float] = []

    class Refused(Connection):
        async def start(self, streams, metadata):
            tries.append(self.loop.time())
            await super().start(streams, metadata)

    async def run():
        loop = asyncio.get_running_loop()
        lane = Lane(
            lambda: Refused(server), policy=LIVE, want_keyframe=lambda: None, clock=loop.time, rng=random.Random(1)
        )
        running = asyncio.create_task(lane.run((), {}))
        await asyncio.sleep(3)
        assert lane.status.state == "waiting"
        await asyncio.sleep(200)
        assert lane.status.state == "refused"
        assert not lane.status.failed
        server.refuses = False
        await asyncio.sleep(34)
        assert lane.status.state == "sending"
        lane.close(complete=True)
        await running

    run_virtual(run())
    waits = np.diff(tries) - 0.1
    for wait, least in zip(waits, [2, 3, 4.5, 6.75, 10.1, 15.2, 22.8, 30, 30]):
        assert least <= wait <= 1.1 * least + 0.1


def test_a_target_that_is_too_slow_gets_the_newest_from_keyframe_to_keyframe():
    server = Server(bandwidth=0.4)

    async def play(show):
        await show.until(30.0)
        assert show.lane.status.state in ("behind", "sending")

    show = on_air(server, play)
    assert show.worst_backlog_s <= LIVE.backlog_s + 0.1
    assert len(server.got) == 1
    frames = server.frames(0)
    gaps = [number for number, (a, b) in enumerate(itertools.pairwise(frames), 1) if b - a > 1.5 / FPS]
    assert len(gaps) > 5
    keys = {time for kind, time, key in server.got[0] if kind == "video" and key}
    assert all(frames[number] in keys for number in gaps)
    assert 0.3 < len(frames) / 750 < 0.55
    assert show.lane.status.dropped_frames == 750 - len(frames)


def test_a_connection_that_dies_while_the_lane_is_behind_and_writes_nothing_is_made_again():
    server = Server(bandwidth=0.3)

    async def play(show: Show) -> None:
        while not (show.lane.status.state == "behind" and 0.3 < show.lane.backlog_s < 0.45):
            await show.until((show.frames + 1) / FPS)
        server.bandwidth, server.stalled = 0.0, True
        await show.until(show.frames / FPS + 0.2)
        server.bandwidth, server.stalled = float("inf"), False
        await show.until(show.frames / FPS + 2.0)

    show = on_air(server, play)
    assert (show.lane.status.state, show.lane.status.reconnects) == ("ended", 1)
    assert len(server.frames(1)) > FPS


def test_a_target_that_was_slow_for_a_moment_loses_nothing():
    server = Server()

    async def play(show):
        await show.until(2.0)
        server.bandwidth = 0.0
        await show.until(2.7)
        server.bandwidth = 20.0
        await show.until(6.0)
        assert show.lane.backlog_s < 0.1

    on_air(server, play)
    assert np.diff(server.frames(0)) == pytest.approx(1 / FPS)


@pytest.mark.parametrize("how", ["nobody there", "in its handshake", "stuck", "fine"])
def test_closing_is_quick_whatever_the_target_does(how):
    server = Server(up=how != "nobody there", silent=how == "in its handshake")

    async def play(show):
        await show.until(2.0)
        server.bandwidth = 0.0 if how == "stuck" else server.bandwidth
        await show.until(4.0)
        show.closed_at = show.loop.time()

    async def timed(show):
        await play(show)

    show = on_air(server, timed)
    took_s = show.loop.time() - show.closed_at
    assert took_s <= (LIVE.close_s + 0.1 if how == "stuck" else 0.01)
    assert server.closed[-1:] == [how == "fine"]


def test_a_lane_whose_task_is_cancelled_leaves_no_open_sink():
    server = Server()

    async def run():
        show = Show(lambda want: Lane(lambda: Connection(server), policy=LIVE, want_keyframe=want))
        running = asyncio.create_task(show.lane.run(show.encoder.streams, {}))
        await show.until(1.0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert len(asyncio.all_tasks()) == 1

    run_virtual(run())
    assert server.closed == [False]


def test_a_bug_in_a_live_sink_is_told_with_its_traceback_and_the_lane_goes_on(caplog):
    class Broken(Connection):
        async def write(self, packets):
            if len(self.server.got) == 1:
                raise ZeroDivisionError("a bug")
            await super().write(packets)

    server = Server()

    async def run():
        show = Show(lambda want: Lane(lambda: Broken(server), policy=LIVE, want_keyframe=want))
        running = asyncio.create_task(show.lane.run(show.encoder.streams, {}))
        await show.until(5.0)
        assert show.lane.status.state == "sending"
        show.lane.close(complete=True)
        await running

    run_virtual(run())
    assert "ZeroDivisionError" in caplog.text


class SlowDisk(NullSink):
    """A file that takes a second for each write, and counts what it got."""

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__()
        self.name = "show.mp4"
        self.seconds, self.frames, self.closed = seconds, 0, None

    async def write(self, packets):
        await asyncio.sleep(self.seconds)
        self.frames += sum(packet.stream.type == "video" for packet in packets)

    async def close(self, complete):
        self.closed = complete


def test_a_file_is_waited_for():
    disk = SlowDisk()

    async def run():
        show = Show(lambda want: Lane(lambda: disk, policy=LanePolicy.FILE, want_keyframe=want))
        running = asyncio.create_task(show.lane.run(show.encoder.streams, {}))
        while show.frames < 250:
            await show.lane.put(show.packets())
            assert show.lane.backlog_s < 1.2
        show.lane.close(complete=True)
        await running
        return show.loop.time() - show.began

    assert run_virtual(run()) > 7
    assert (disk.frames, disk.closed) == (250, True)


def test_a_file_beside_a_live_stream_may_be_late_but_loses_nothing():
    disk = SlowDisk(seconds=5)

    async def run():
        show = Show(lambda want: Lane(lambda: disk, policy=LanePolicy.FILE_IN_LIVE, want_keyframe=want))
        running = asyncio.create_task(show.lane.run(show.encoder.streams, {}))
        await show.until(60)
        show.lane.close(complete=True)
        await running

    run_virtual(run())
    assert (disk.frames, disk.closed) == (1500, True)


def test_a_file_that_is_half_a_minute_behind_a_live_stream_ends_and_says_why():
    disk = SlowDisk(seconds=40)

    async def run():
        show = Show(lambda want: Lane(lambda: disk, policy=LanePolicy.FILE_IN_LIVE, want_keyframe=want))
        running = asyncio.create_task(show.lane.run(show.encoder.streams, {}))
        await show.until(29)
        assert not show.lane.status.failed
        await show.until(32)
        assert show.lane.status.failed
        await show.until(50)
        with pytest.raises(SinkError, match=r"show\.mp4: is 30 s behind the stream; is the disk too slow\?"):
            await running
        assert show.lane.status.failed
        assert "30 s behind" in show.lane.status.last_error

    run_virtual(run())
    assert disk.closed is False


async def test_a_file_that_joins_a_stream_begins_at_a_keyframe_and_at_time_zero(tmp_path):
    from mp4 import read_mp4

    show = Show(
        lambda want: Lane(lambda: FileSink(tmp_path / "a.mp4"), policy=LanePolicy.FILE_IN_LIVE, want_keyframe=want)
    )
    for _ in range(30):
        show.packets()
    running = asyncio.create_task(show.lane.run(show.encoder.streams, {}))
    for _ in range(75):
        show.lane.offer(show.packets())
    show.lane.close(complete=True)
    await running
    file = read_mp4(tmp_path / "a.mp4")
    assert file.times == pytest.approx([n / FPS for n in range(55)])  # the keyframe is frame 50 of 105
    assert file.sound_start < 0.022


async def test_a_file_that_cannot_be_written_is_an_error_before_anything_begins(tmp_path):
    lane = Lane(
        lambda: FileSink(tmp_path / "missing" / "a.mp4"), policy=LanePolicy.FILE_IN_LIVE, want_keyframe=lambda: None
    )
    with pytest.raises(SinkError, match="there is no folder"):
        await lane.open()


async def test_a_lane_that_was_opened_and_never_run_leaves_nothing(tmp_path):
    lane = Lane(lambda: FileSink(tmp_path / "a.mp4"), policy=LanePolicy.FILE, want_keyframe=lambda: None)
    await lane.open()
    lane.close(complete=False)
    await lane.wait_closed()
    assert not list(tmp_path.iterdir())
    assert lane.status.state == "ended"


async def test_no_part_of_a_lane_shows_the_stream_key():
    lane = Lane(
        lambda: open_sink("rtmp://127.0.0.1:1/live/SECRET?token=SECRET"), policy=LIVE, want_keyframe=lambda: None
    )
    await lane.open()
    shown = f"{lane!r} {lane.name} {lane.status}"
    assert "rtmp://127.0.0.1:1/live/***?***: connection refused" in shown
    assert "SECRET" not in shown
    lane.close(complete=False)
    await lane.wait_closed()
