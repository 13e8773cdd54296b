"""What viewers in a browser are given: one MP4 without end, from a keyframe on, and nobody waits for anybody."""

from __future__ import annotations

import asyncio
import io
import itertools

import av
import numpy as np
import pytest
from contracts import check_sink

from avatar.model import FrameBlock
from streaming.encoder import SOUND_RATE, Encoder, EncoderSettings
from streaming.view import BEHIND_BYTES, BEHIND_S, FRESH_S, STUCK_S, Viewer, ViewSink

FPS = 25


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Show:
    """A session that is on air, frame by frame: frame n is a grey of its own, and has a click in its sound."""

    def __init__(self, keyframe_interval_s: float = 2.0) -> None:
        settings = EncoderSettings(live=True, bitrate_kbps=1000, channels=2, keyframe_interval_s=keyframe_interval_s)
        self.encoder = Encoder(64, 64, FPS, 1, settings)
        self.clock = Clock()
        self.keyframes_wanted = 0
        self.sink = ViewSink(self._want_keyframe, self.clock)
        self.frame = 0

    def _want_keyframe(self) -> None:
        self.keyframes_wanted += 1
        self.encoder.want_keyframe()

    async def begin(self) -> None:
        await self.sink.open()
        await self.sink.start(self.encoder.streams, {"title": "a test"})

    async def go_on(self, frames: int) -> None:
        for _ in range(frames):
            picture = np.full((1, 64, 64, 3), grey(self.frame), np.uint8)
            sound = np.zeros((SOUND_RATE // FPS, 1), np.float32)
            packets = self.encoder.encode(FrameBlock(picture, np.zeros(0, np.float32), self.frame), sound)
            for packet in packets:
                await self.sink.write([packet])
            self.frame += 1
            self.clock.now += 1 / FPS


def grey(frame: int) -> int:
    return 16 + 8 * (frame % 25)


async def take(viewer: Viewer, most: int = 10_000) -> list[bytes]:
    """What is there for a viewer, without waiting for more."""
    pieces: list[bytes] = []
    while len(pieces) < most:
        try:
            pieces.append(await asyncio.wait_for(anext(viewer), 0.02))
        except (TimeoutError, StopAsyncIteration):
            break
    return pieces


def decoded(pieces: list[bytes]) -> list[tuple[int, int]]:
    """What a player shows of it: number and grey of each frame."""
    with av.open(io.BytesIO(b"".join(pieces))) as container:
        return [
            (round(float(frame.pts * frame.time_base) * FPS), round(float(frame.to_ndarray(format="rgb24").mean())))
            for frame in container.decode(video=0)
        ]


def is_right(frames: list[tuple[int, int]]) -> bool:
    return bool(frames) and all(abs(shown - grey(number)) <= 3 for number, shown in frames)


async def test_a_viewer_who_is_there_from_the_beginning_sees_every_frame():
    show = Show()
    viewer = show.sink.view()
    await show.begin()
    await show.go_on(30)
    await show.sink.close(complete=True)
    frames = decoded(await take(viewer))
    assert [number for number, _ in frames] == list(range(30))
    assert is_right(frames)
    assert viewer.skipped == 0


async def test_a_frame_is_with_its_viewer_when_the_next_two_are_made():
    show = Show()
    await show.begin()
    viewer = show.sink.view()
    await show.go_on(10)
    frames = decoded(await take(viewer))
    assert frames[-1][0] >= 7
    await show.go_on(1)
    assert len(await take(viewer)) == 1


async def test_the_sound_is_there_and_in_time():
    show = Show()
    viewer = show.sink.view()
    await show.begin()
    await show.go_on(25)
    pieces = await take(viewer)
    await show.go_on(25)
    await show.sink.close(complete=True)
    with av.open(io.BytesIO(b"".join(pieces + await take(viewer)))) as container:
        times = [frame.time for frame in container.decode(audio=0)]
    assert times[0] == pytest.approx(0, abs=0.03)
    assert times[-1] == pytest.approx(2.0, abs=0.1)


async def test_who_joins_soon_after_a_keyframe_begins_with_it_at_once():
    show = Show()
    await show.begin()
    await show.go_on(60)  # keyframes at 0 and 50
    viewer = show.sink.view()
    frames = decoded(await take(viewer))
    assert frames[0][0] == 50
    assert is_right(frames)
    assert show.keyframes_wanted == 0


async def test_who_joins_late_after_a_keyframe_is_given_one_of_their_own():
    show = Show()
    await show.begin()
    await show.go_on(round(FRESH_S * FPS) + 10)
    joined = show.frame
    viewer = show.sink.view()
    await show.go_on(5)
    frames = decoded(await take(viewer))
    assert show.keyframes_wanted == 1
    assert frames[0][0] == joined
    assert is_right(frames)


async def test_who_joins_together_costs_one_keyframe():
    show = Show()
    await show.begin()
    await show.go_on(round(FRESH_S * FPS) + 10)
    viewers = []
    for _ in range(10):
        viewers.append(show.sink.view())
        await show.go_on(4)
    assert show.keyframes_wanted <= 3
    for viewer in viewers:
        assert is_right(decoded(await take(viewer)))


async def test_a_slow_viewer_misses_frames_and_goes_on_at_a_keyframe():
    show = Show()
    await show.begin()
    slow, quick = show.sink.view(), show.sink.view()
    seen, shown = [], []
    for _ in range(8):
        await show.go_on(round(BEHIND_S * FPS))
        shown += await take(quick)
        seen += await take(slow, 20)  # about half
    frames = decoded(seen)
    assert is_right(frames)
    assert slow.skipped > 0
    numbers = [number for number, _ in frames]
    gaps = [after for before, after in itertools.pairwise(numbers) if after != before + 1]
    assert gaps
    assert all(number % 50 == 0 for number in gaps)
    assert [number for number, _ in decoded(shown)][:290] == list(range(290))


async def test_what_waits_for_a_viewer_has_a_bound():
    clock = Clock()
    viewer = Viewer(clock, lambda _: None)
    viewer.begin(b"header")
    for number in range(1000):
        viewer.offer(bytes(BEHIND_BYTES // 10), keyframe=number % 3 == 0)
        assert viewer._bytes <= BEHIND_BYTES


async def test_who_reads_nothing_is_a_viewer_no_more():
    show = Show()
    await show.begin()
    idle, waiting = show.sink.view(), show.sink.view()
    pieces = await take(waiting)
    reading = asyncio.ensure_future(_read_all(waiting))
    await asyncio.sleep(0)
    for _ in range(round(STUCK_S + 1)):
        await show.go_on(FPS)
        await asyncio.sleep(0)
    assert show.sink.viewers == 1
    assert await take(idle) == []
    await show.sink.close(complete=True)
    assert is_right(decoded(pieces + await reading))


async def _read_all(viewer: Viewer) -> list[bytes]:
    return [piece async for piece in viewer]


async def test_a_viewer_ends_when_the_session_does_also_while_it_waits():
    show = Show()
    viewer = show.sink.view()
    reading = asyncio.ensure_future(_read_all(viewer))
    await asyncio.sleep(0)
    await show.sink.close(complete=False)
    assert await asyncio.wait_for(reading, 1) == []
    assert show.sink.viewers == 0


async def test_a_viewer_who_leaves_or_is_cancelled_makes_room():
    show = Show()
    await show.begin()
    viewer = show.sink.view()
    reading = asyncio.ensure_future(_read_all(viewer))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await viewer.aclose()
    assert show.sink.viewers == 0
    await show.go_on(3)
    assert await take(viewer) == []


async def test_the_type_is_that_of_the_stream():
    show = Show()
    assert show.sink.type == 'video/mp4; codecs="avc1.640028, mp4a.40.2"'
    await show.begin()
    await show.go_on(4)
    profile = show.encoder.streams[0].codec_context.extradata[5:8].hex()
    assert show.sink.type == f'video/mp4; codecs="avc1.{profile}, mp4a.40.2"'


async def test_it_begins_again_after_it_was_closed():
    show = Show()
    await show.begin()
    await show.go_on(5)
    await show.sink.close(complete=False)
    viewer = show.sink.view()
    await show.begin()
    show.encoder.want_keyframe()
    await show.go_on(5)
    await show.sink.close(complete=True)
    assert [number for number, _ in decoded(await take(viewer))] == list(range(5))


async def test_it_keeps_the_contract_of_a_sink():
    viewers: dict[int, Viewer] = {}

    def make() -> ViewSink:
        sink = ViewSink(lambda: None)
        viewers[id(sink)] = sink.view()
        return sink

    def read(sink: ViewSink) -> list[float]:
        viewer = viewers[id(sink)]
        pieces = [viewer._header, *(fragment for _, fragment in viewer._waiting)]
        return [number / FPS for number, _ in decoded(pieces)]

    await check_sink(make, read)
