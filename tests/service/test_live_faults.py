"""Live against faults, and its figures, by name: `pytest -m slow tests/service/test_live_faults.py -s`.

What they print goes into docs/reliability.md. AVATARD_FLAPS, AVATARD_UTTERANCES and AVATARD_MEDIA_S say how many
resets, utterances and seconds of media, if not 100, 100 and 7200.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import skew
from live import FLASHING, TOY, Live
from PIL import Image
from procs import LoopWatch
from proxy import Proxy
from rtmp import RtmpServer
from speech import Speaker, Speech
from toy_model import ToyModel
from virtual_loop import VirtualLoop, run_virtual
from waiting import until, until_async

from audio.chunk import AudioChunk
from audio.source import PushSource
from avatar.model import Reference
from service.config import load_settings
from service.live import LiveRequest, LiveResult, LiveWatcher, _Broadcast
from streaming.lane import Lane, LanePolicy
from streaming.live import LiveSession
from streaming.sinks import open_sink

FLAPS = int(os.environ.get("AVATARD_FLAPS", "100"))
UTTERANCES = int(os.environ.get("AVATARD_UTTERANCES", "100"))
MEDIA_S = float(os.environ.get("AVATARD_MEDIA_S", "7200"))

LOOP_STALL_S = 0.25
"""What a shared machine is forgiven; what was measured is in docs/reliability.md."""

pytestmark = [pytest.mark.slow]


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[RtmpServer]:
    with RtmpServer(tmp_path / "server") as server:
        yield server


def report(what: str, **figures: Any) -> None:
    """One line of JSON with the figures and the load of the machine."""
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"what": what, **rounded, "load_1min": round(os.getloadavg()[0], 2)}), flush=True)


# Faults of the server, with a heartbeat in the loop of the broadcast


@dataclass
class Air:
    """A broadcast in the loop of a test: the toy from a FIFO to a file and by way of a line to a server."""

    folder: Path
    nginx: RtmpServer
    line: Proxy
    broadcast: _Broadcast
    watch: LoopWatch
    events: list[dict[str, Any]]

    @property
    def lane(self) -> Any:
        assert self.broadcast._session is not None
        return self.broadcast._session.status.outputs[1]

    async def until(self, true: Callable[[Any], bool], limit_s: float = 60.0) -> float:
        """Wait until something is true of the lane to the server; when that was (monotonic seconds)."""
        await until_async(lambda: true(self.lane), limit_s, f"the lane, {self.lane}")
        return time.monotonic()

    async def first_keyframe(self, recording: int, limit_s: float = 60.0) -> float:
        """When the first keyframe of that connection had arrived (monotonic seconds)."""
        await until_async(lambda: len(self.nginx.recordings()) > recording, limit_s, "the stream")
        with skew.Watch(self.nginx.recordings()[recording], growing=True) as seen:
            await until_async(lambda: seen.reading.first_arrival_s, limit_s, "the first keyframe")
            assert seen.reading.first_arrival_s is not None
            return seen.reading.first_arrival_s


@contextlib.asynccontextmanager
async def on_air(folder: Path, nginx: RtmpServer, line: Proxy, direct: bool = False) -> AsyncIterator[Air]:
    """direct: without the line, whose buffers take in seconds of a narrow stream that nobody reads any more."""
    os.mkdir(folder)
    fifo, picture = folder / "voice", folder / "presenter.png"
    os.mkfifo(fifo)
    Image.new("RGB", (300, 400), (90, 120, 140)).save(picture)
    settings = load_settings(None, ["encoder.preset=ultrafast"], model__name=TOY, model__width=192, model__height=192)
    events: list[dict[str, Any]] = []
    watcher = LiveWatcher()
    watcher.event = events.append  # type: ignore[method-assign]
    targets = (str(folder / "show.mp4"), nginx.url() if direct else line.url(nginx.url()))
    request = LiveRequest(picture, str(fifo), targets, "s16le:16000:1", stay=True)
    broadcast = _Broadcast(request, settings, watcher, time.monotonic(), time.monotonic)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    async with LoopWatch() as watch:
        task = asyncio.create_task(broadcast.run())
        await until_async(lambda: any(event["event"] == "on air" for event in events) or task.done(), 60, "on air")
        began = time.monotonic()
        watch.worst_s = 0.0  # what is imported before takes time, and nobody waits
        air = Air(folder, nginx, line, broadcast, watch, events)
        with Speaker(os.open(fifo, os.O_WRONLY), Speech()):
            try:
                yield air
            finally:
                broadcast._stop.set()
                ended = time.monotonic()
                result = await task
                for number, handler in before.items():
                    signal.signal(number, handler)
    check(air, result, ended - began, time.monotonic() - ended)


def check(air: Air, result: LiveResult, aired_s: float, end_s: float) -> None:
    """Whatever happened: the file has all of it, in time, and the loop was never held up."""
    reading = skew.read(air.folder / "show.mp4")
    report(
        "beside it",
        loop_stall_ms=1000 * air.watch.worst_s,
        frames=result.frames,
        in_file=reading.frames,
        held=result.held,
        expected=round(aired_s * 25),
        end_s=end_s,
        pairs=reading.skew.pairs,
        skew_p95_ms=reading.skew.p95,
        skew_max_ms=reading.skew.max,
    )
    assert air.watch.worst_s < LOOP_STALL_S
    assert reading.frames == result.frames == pytest.approx(aired_s * 25, abs=30)
    assert reading.video.gaps.count == reading.audio.gaps.count == 0
    assert reading.black == 0
    assert reading.skew.max <= 80
    assert end_s < 10


async def absent(air: Air) -> dict[str, Any]:
    """Nobody listened from the start on; now somebody does."""
    await asyncio.sleep(5)
    back = air.nginx.start()
    return {"first_keyframe_s": await air.first_keyframe(0) - back}


async def silent(air: Air) -> dict[str, Any]:
    """The connection was taken from the start on, and nothing said; now it answers."""
    await asyncio.sleep(8)
    back = time.monotonic()
    air.line.mend()
    return {"first_keyframe_s": await air.first_keyframe(0) - back, "tarpitted": air.line.tarpitted}


async def killed(air: Air) -> dict[str, Any]:
    await air.first_keyframe(0)
    await asyncio.sleep(3)
    air.nginx.kill()
    gone = time.monotonic()
    noticed = await air.until(lambda lane: lane.state == "waiting")
    await asyncio.sleep(6)
    back = air.nginx.start()
    return {"noticed_s": noticed - gone, "first_keyframe_s": await air.first_keyframe(1) - back}


async def frozen(air: Air) -> dict[str, Any]:
    await air.first_keyframe(0)
    await asyncio.sleep(3)
    air.nginx.freeze()
    gone = time.monotonic()
    noticed = await air.until(lambda lane: lane.state != "sending")
    await asyncio.sleep(6)
    back = time.monotonic()
    air.nginx.thaw()
    return {"noticed_s": noticed - gone, "first_keyframe_s": await air.first_keyframe(1) - back}


async def narrow(air: Air) -> dict[str, Any]:
    await air.first_keyframe(0)
    air.line.cap(50_000)
    most_s = 0.0
    for _ in range(150):
        await asyncio.sleep(0.1)
        most_s = max(most_s, air.lane.backlog_s)
    dropped = air.lane.dropped_frames
    air.line.cap(None)
    back = time.monotonic()
    recovered = await air.until(lambda lane: lane.state == "sending" and lane.backlog_s < 0.3) - back
    assert air.lane.reconnects == 0
    assert dropped > 100
    return {"most_backlog_s": most_s, "dropped_frames": dropped, "recovered_s": recovered}


async def resets(air: Air) -> dict[str, Any]:
    """Whenever it is in the middle of a packet that is larger than what the line takes at once."""
    took = []
    for number in range(5):
        await air.first_keyframe(number)
        await asyncio.sleep(1.7)
        air.line.cap(20_000)
        await asyncio.sleep(0.3)
        began = time.monotonic()
        air.line.reset()
        air.line.cap(None)
        took.append(await air.first_keyframe(number + 1) - began)
    return {"first_keyframe_s": max(took)}


async def refused(air: Air) -> dict[str, Any]:
    air.nginx.accept = lambda key: False
    air.line.reset()
    began = time.monotonic()
    told = await air.until(lambda lane: lane.state == "refused", 90) - began
    air.nginx.accept = lambda key: True
    back = time.monotonic()
    known = len(air.nginx.recordings())
    return {"first_keyframe_s": await air.first_keyframe(known, 60) - back, "told_s": told}


@pytest.mark.needs("nginx")
@pytest.mark.parametrize(
    ("fault", "soon_s"),
    [(absent, 3), (silent, 3), (killed, 3), (frozen, 3), (narrow, None), (resets, 3), (refused, 33)],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_fault_of_the_server_costs_the_file_nothing_and_the_stream_comes_back(
    tmp_path: Path, fault: Callable[[Air], Awaitable[dict[str, Any]]], soon_s: float | None
) -> None:
    nginx = RtmpServer(tmp_path / "server")
    try:
        if fault is not absent:
            nginx.start()
        with Proxy(nginx.port) as line:
            if fault is silent:
                line.tarpit()
            async with on_air(tmp_path / "live", nginx, line, direct=fault is frozen) as air:
                figures = await fault(air)
                await asyncio.sleep(3)
                report(fault.__name__, **figures, lane=air.lane.state, reconnects=air.lane.reconnects)
                if soon_s is not None:
                    assert figures["first_keyframe_s"] <= soon_s
                if fault is frozen:
                    assert figures["noticed_s"] <= 5
    finally:
        nginx.close()


@pytest.mark.needs("nginx")
async def test_a_hundred_flaps_cost_the_file_nothing_and_leave_nothing_behind(tmp_path, nginx):
    me = psutil.Process()
    with Proxy(nginx.port) as line:
        async with on_air(tmp_path / "live", nginx, line) as air:
            await air.first_keyframe(0)
            before = (me.num_fds(), me.num_threads(), len(me.children(recursive=True)))
            began = time.monotonic()
            for number in range(FLAPS):
                await until_async(lambda n=number: len(nginx.recordings()) > n, 30, "the stream")
                await air.until(lambda lane: lane.state == "sending")
                await asyncio.sleep(1.1)  # less would count as refused, and be asked for ever more slowly
                line.reset()
            seconds = time.monotonic() - began
            await until_async(lambda: len(nginx.recordings()) > FLAPS, 30, "the stream")
            await asyncio.sleep(3)
            after = (me.num_fds(), me.num_threads(), len(me.children(recursive=True)))
            names = ("descriptors", "threads", "processes")
            grown = {name: now - then for name, now, then in zip(names, after, before)}
            report("flaps", flaps=FLAPS, each_s=seconds / FLAPS, reconnects=air.lane.reconnects, grown=grown)
            assert air.lane.reconnects >= FLAPS
            assert max(grown.values()) <= 3


# The model's process


class Changes:
    """When pictures arrived at the server, and which of them were new: what `skew.Watch` shows to who looks."""

    def __init__(self) -> None:
        self._last: np.ndarray | None = None
        self.seen: list[tuple[float, float, bool]] = []
        """(stream time, arrival, whether it differs from the one before)"""

    def __call__(self, picture: skew.Picture) -> None:
        small = picture.luma[::4, ::4].astype(np.int16)
        new = self._last is None or np.abs(small - self._last).mean() > skew.SAME
        self._last = small
        self.seen.append((picture.time_s, picture.arrived_s, bool(new)))

    def first_after(self, moment: float) -> float | None:
        """When the first new picture arrived after that (monotonic seconds)."""
        return next((at for _, at, new in list(self.seen) if new and at > moment), None)


@pytest.mark.needs("nginx")
def test_the_models_process_killed_in_mid_speech_is_on_air_again_soon(tmp_path, nginx):
    changes = Changes()
    with Live(tmp_path / "live", ["show.mp4", nginx.url()], "--set=encoder.preset=ultrafast", model=FLASHING) as live:
        live.wait_for("on air", 60)
        until(lambda: nginx.recordings(), 10, "the stream")
        with skew.Watch(nginx.recordings()[0], growing=True, look=changes):
            live.speak(Speech())
            last = live.wait_for("speaking")
            for _ in range(3):
                time.sleep(8)
                killed = live.kill_engine()
                last = live.wait_for("engine", 60, where=lambda event: event["state"] == "ready", since=last)
                new = until(
                    lambda at=last.at_s: [seen for seen in changes.seen if seen[1] > at and seen[2]],
                    30,
                    "a new picture",
                )
                report(
                    "engine killed",
                    to_ready_s=last.at_s - killed,
                    ready_to_new_picture_s=new[0][1] - last.at_s,
                    load_s=last["why"],
                )
                assert new[0][1] - last.at_s <= 4
            time.sleep(5)
            assert live.stop() == 0
    ended = live.of("ended")[-1]
    for path in (tmp_path / "live" / "show.mp4", *nginx.recordings()):
        reading = skew.read(path)
        report(path.name, held=ended["held"], **{key: reading.summary()[key] for key in SHOWN})
        assert reading.skew.max <= 80
        assert reading.video.gaps.count == 0
    assert len(nginx.recordings()) == 1, "the connection was broken"
    assert ended["engine_restarts"] == 3


SHOWN = (
    *("frames", "pairs", "skew_p50_ms", "skew_p95_ms", "skew_max_ms", "lone_clicks", "lone_flashes", "freezes"),
    *("longest_freeze_s", "black_frames", "video_gaps", "audio_gaps"),
)


# Delays


class Voice:
    """Writes utterances into a FIFO that stays open, at the pace of a voice or at once."""

    RATE = 16_000
    CHUNK = 320

    def __init__(self, fifo: Path) -> None:
        self._descriptor = os.open(fifo, os.O_WRONLY)

    def say(self, sound: np.ndarray, paced: bool = True) -> float:
        """When its first chunk was written (monotonic seconds)."""
        data = (sound * 32767).astype("<i2")
        began = time.monotonic()
        for number, at in enumerate(range(0, len(data), self.CHUNK)):
            if paced:
                time.sleep(max(0.0, began + number * self.CHUNK / self.RATE - time.monotonic()))
            os.write(self._descriptor, data[at : at + self.CHUNK].tobytes())
        return began

    def close(self) -> None:
        os.close(self._descriptor)


def spread(values: list[float]) -> dict[str, float]:
    """In ms."""
    found = np.array(values) * 1000
    return {
        "n": len(found),
        "p50": round(float(np.quantile(found, 0.5)), 1),
        "p95": round(float(np.quantile(found, 0.95)), 1),
        "max": round(float(found.max()), 1),
    }


def clicking(seconds: float, every_s: float | None) -> np.ndarray:
    """A voice that clicks at its first sample, and so often afterwards."""
    sound = 0.2 * np.sign(np.sin(2 * np.pi * 150 * np.arange(round(seconds * Voice.RATE)) / Voice.RATE))
    for at in np.arange(0, seconds, every_s) if every_s else [0.0]:
        sound[round(at * Voice.RATE) :][:80] = 0.9
    return sound


def loud_times(path: Path) -> np.ndarray:
    """When somebody is heard, in seconds of the stream: the ends of all packets (21 ms) that are not silent."""
    found = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            if np.abs(frame.to_ndarray()).max() > 0.02:
                found.append(frame.time + frame.samples / frame.sample_rate)
    return np.array(found)


def beginning(live: Live) -> float:
    """When frame 0 was due, on the monotonic clock: frame n is due after an event that tells of n frames."""
    told = [(event.at_s, event.fields["frames"]) for event in live.events if event.fields.get("on_air")]
    return max(at_s - frames / 25 for at_s, frames in told)


@pytest.mark.needs("nginx")
@pytest.mark.parametrize("model", [TOY, FLASHING], ids=["toy", "pocket"])
def test_speech_begins_and_stops_within_a_block_and_a_quarter_of_a_second(tmp_path, nginx, model):
    rng = np.random.default_rng(0)
    folder = tmp_path / "live"
    folder.mkdir()
    os.mkfifo(folder / "voice")
    command = Live(
        folder,
        ["show.mp4", nginx.url()],
        *("--set=encoder.preset=ultrafast", "--stay"),
        audio=str(folder / "voice"),
        model=model,
    )
    with command as live:
        live.wait_for("on air", 60)
        until(lambda: nginx.recordings(), 10, "the stream")
        voice, changes = Voice(folder / "voice"), Changes()
        with skew.Watch(nginx.recordings()[0], growing=True, look=changes) as watch:
            time.sleep(2)
            said = []
            for _ in range(UTTERANCES):
                said.append(voice.say(clicking(0.5, None)))
                time.sleep(1.3 + float(rng.uniform(0, 0.96)))
            time.sleep(1)
            reading = watch.reading
            flashes = np.array(reading.arrivals)
            assert len(flashes) == len(said)
            delays = [float(flash - at) for flash, at in zip(flashes, said)]
            report("speech to flash", **spread(delays))

            closed, pressed = [], []
            for _ in range(UTTERANCES // 4):
                voice.say(clicking(4.0, 0.08), paced=False)
                time.sleep(1.4 + float(rng.uniform(0, 0.48)))
                pressed.append(time.monotonic())
                live.send(signal.SIGUSR1)
                time.sleep(1.6)
            time.sleep(1)
            # A moment of the stream is on air when its picture arrives.
            ages = np.array([arrived - at for at, arrived, _ in changes.seen])
            age = float(np.median(ages))
            flashes = np.array(reading.arrivals)
            for at in pressed:
                seen = flashes[(flashes > at - 0.5) & (flashes < at + 1.3)]
                assert len(seen), f"it did not speak when it was interrupted; flashes {flashes - at}"
                closed.append(float(seen.max() + 0.04 - at))
            report("signal to first picture without it", **spread(closed))

            held = live.of("status")[-1]["held"]
            for _ in range(200):
                voice.say(clicking(0.3, None), paced=False)
                live.send(signal.SIGUSR1)
                time.sleep(0.1)
            time.sleep(2)
            before = len(reading.flashes)
            at = voice.say(clicking(0.5, None))
            time.sleep(2)
            assert len(reading.flashes) == before + 1, "after the storm it speaks as before"
            report(
                "storm",
                interruptions=len(live.of("interrupted")),
                held=live.of("status")[-1]["held"] - held,
                speech_to_flash_after_ms=1000 * (reading.arrivals[-1] - at),
            )
        voice.close()
        loud = loud_times(nginx.recordings()[0]) + age
        silent = [float(loud[(loud > at - 0.5) & (loud < at + 1.3)].max() - at) for at in pressed]
        report("signal to silence", **spread(silent))
        status = live.of("status")[-1]
        assert live.stop() == 0
    ended = live.of("ended")[-1]
    file = skew.read(folder / "show.mp4")
    begun = beginning(live)
    left = np.array(file.flashes) + begun
    leaving = [float(left[left > at].min() - at) for at in said]
    report("speech to flash leaving the encoder", **spread(leaving))
    report("all of it", load=status["load"], held=ended["held"], slips=status["slips"], age_s=age, frames=file.frames)
    assert file.frames == ended["frames"]
    assert file.video.gaps.count == 0
    assert spread(leaving)["p95"] <= 1500
    assert spread(closed)["p95"] <= 1500


def test_speech_leaves_the_encoder_within_a_block_and_a_quarter_of_a_second(tmp_path):
    """The embedded model to a file alone: nobody on these cores reads the stream beside it."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "live"
    folder.mkdir()
    os.mkfifo(folder / "voice")
    fast = "--set=encoder.preset=ultrafast"
    # As many threads as it takes by itself; other tests give each process one, so that several go on at once.
    own = {"OMP_NUM_THREADS": os.environ.get("AVATARD_THREADS", "")}
    voiced = str(folder / "voice")
    with Live(folder, ["show.mp4"], fast, "--stay", audio=voiced, model=FLASHING, environment=own) as live:
        live.wait_for("on air", 60)
        voice, said = Voice(folder / "voice"), []
        time.sleep(3)
        for _ in range(UTTERANCES):
            said.append(voice.say(clicking(0.5, None)))
            time.sleep(1.3 + float(rng.uniform(0, 0.96)))
        voice.close()
        status = live.of("status")[-1]
        assert live.stop() == 0
    moments = np.array(skew.read(folder / "show.mp4").flashes)
    begun, frames = beginning(live), np.floor(moments * 25 + 1e-3) / 25
    # The moment of the sound in its picture; and when that picture left, of which the moment is a part.
    first = [int(np.argmax(moments + begun > at)) for at in said]
    leaving = spread([float(frames[i] + begun - at) for i, at in zip(first, said, strict=True)])
    moment = spread([float(moments[i] + begun - at) for i, at in zip(first, said, strict=True)])
    more = {"load": status["load"], "held": live.of("ended")[-1]["held"]}
    report("speech to its picture, to a file alone", **leaving, moment=moment, **more)
    assert leaving["n"] == UTTERANCES
    assert leaving["p95"] <= 1500


# Hours at once


class OnTheClock:
    """The toy as an engine's session, a step of which takes a tenth of a virtual second."""

    def __init__(self, reference: Reference) -> None:
        self._toy = ToyModel((64, 64))
        self.spec = self._toy.spec
        self._state = self._toy.start(reference)

    @property
    def blocks(self) -> int:
        return self._state.blocks

    async def step(self, audio: Any, on_frames: Any, half_rate: bool = False) -> list[Any]:
        await asyncio.sleep(0.1)
        made = self._toy.step(self._state, audio)
        for block in made:
            on_frames(block)
        return made

    async def rewind(self, block: int) -> None:
        raise AssertionError("nobody interrupts")

    async def close(self) -> None:
        pass


def test_hours_of_media_leave_picture_and_sound_together_and_memory_flat(tmp_path):
    """A voice whose clock is 0.1 % fast, in pieces of odd lengths, with pauses; into parts of ten minutes."""
    me, samples = psutil.Process(), []

    async def run() -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        source, stop, speech = PushSource(48_000, ahead_s=60), asyncio.Event(), Speech(rate=48_000, click_every_s=2.0)

        async def open_model(reference: Reference) -> Any:
            return OnTheClock(reference)

        async def speak() -> None:
            began, at = loop.time(), 0
            while True:
                count = 480 + at % 1777
                await asyncio.sleep(max(0.0, began + (at + count) / 48_000 / 1.001 - loop.time()))
                await source.push(AudioChunk(speech.samples(at, count), 48_000))
                at += count

        async def watch() -> None:
            while session.status.frames < MEDIA_S * 25:
                await asyncio.sleep(30.0)
                if session.status.frames % 7500 < 750:
                    gc.collect()
                status = session.status
                sizes = (me.memory_info().rss / 2**20, me.num_fds(), me.num_threads())
                samples.append((status.frames / 25, *sizes, status.skew_s, status.waiting_s))
            stop.set()

        lane = Lane(
            lambda: open_sink(f"segment:600:{tmp_path}/part.mp4"),
            policy=LanePolicy.FILE,
            want_keyframe=lambda: None,
            clock=loop.time,
        )
        grey = Reference(np.full((8, 8, 3), 120, np.uint8))
        session = LiveSession(source, open_model, grey, [lane], clock=loop.time)
        others = [asyncio.create_task(work()) for work in (speak, watch)]
        try:
            return await session.run(stop)
        finally:
            for task in others:
                task.cancel()

    began = time.monotonic()
    status = run_virtual(run())
    wall_s = time.monotonic() - began
    table = np.array(samples)
    settled = table[table[:, 0] > min(600, MEDIA_S / 5)]
    slope = np.polyfit(settled[:, 0] / 3600, settled[:, 1], 1)[0]
    readings = [skew.read(path) for path in sorted(tmp_path.glob("part-*.mp4"))]
    ms = np.concatenate([reading.skew.ms for reading in readings])
    report(
        "hours at once",
        media_s=status.frames / 25,
        wall_s=wall_s,
        held=status.held,
        slips=status.slips,
        rss_mib_first=float(settled[0, 1]),
        rss_mib_last=float(settled[-1, 1]),
        rss_mib_per_media_hour=float(slope),
        descriptors=(int(settled[:, 2].min()), int(settled[:, 2].max())),
        threads=(int(settled[:, 3].min()), int(settled[:, 3].max())),
        waiting_most_s=float(settled[:, 5].max()),
        parts=len(readings),
        frames=sum(reading.frames for reading in readings),
        pairs=len(ms),
        skew_p95_ms=float(np.quantile(np.abs(ms), 0.95)),
        skew_max_ms=float(np.abs(ms).max()),
        lone_clicks=sum(reading.lone_clicks for reading in readings),
        lone_flashes=sum(reading.lone_flashes for reading in readings),
    )
    assert sum(reading.frames for reading in readings) == status.frames
    assert np.abs(ms).max() <= 80
    assert status.held == status.slips == 0
    assert settled[:, 5].max() < 2
    assert slope < 20
    assert settled[-1, 2] <= settled[0, 2] + 3
