"""run_session: sound in, a finished file out; in time, in bounds, and with an end whatever fails."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from mp4 import clicks_at, read_mp4, write_sound
from toy_model import ToyModel

from audio.chunk import AudioChunk
from audio.decode import SoundReader, open_sound
from audio.errors import AvatardError
from audio.source import FileSource
from avatar.model import Reference
from streaming.encoder import Encoder
from streaming.lane import Lane, LanePolicy
from streaming.session import run_session
from streaming.sinks import FileSink, NullSink, Sink, SinkError

GREY = Reference(np.full((8, 8, 3), 120, np.uint8))


class InThisProcess:
    """The toy model behind the two calls of an engine's session."""

    def __init__(self, toy: ToyModel) -> None:
        self.toy, self.spec = toy, toy.spec
        self.state = toy.start(GREY)
        self.steps = 0

    async def step(self, audio):
        await asyncio.sleep(0)
        self.steps += 1
        return self.toy.step(self.state, audio)

    async def finish(self):
        return self.toy.finish(self.state)


def model(**options) -> InThisProcess:
    return InThisProcess(ToyModel((64, 64), **options))


async def opened(*sinks: Sink) -> list[Lane]:
    """A lane for each sink, as for files."""
    lanes = [Lane(lambda sink=sink: sink, policy=LanePolicy.FILE, want_keyframe=lambda: None) for sink in sinks]
    for lane in lanes:
        await lane.open()
    return lanes


async def speak(sound_path: Path, sinks, speaker=None, **options):
    sound = open_sound(sound_path)
    lanes = await opened(*sinks)
    speaker = speaker or model()
    return await run_session(FileSource(sound, 16_000), sound.original(), speaker, lanes, **options)


@pytest.fixture
def three_seconds(tmp_path) -> Path:
    return write_sound(tmp_path / "three.wav", clicks_at([1.0], 3.0), 16_000)


class FailingSink(NullSink):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.closed = after, []

    async def write(self, packets):
        await super().write(packets)
        if self.packets > self.after:
            raise SinkError("null://: the far side has left")

    async def close(self, complete):
        self.closed.append(complete)


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("delay", [0, 3])
async def test_a_flash_is_seen_when_its_click_is_heard_at_start_middle_and_end(tmp_path, sample_rate, delay):
    times = [0.0, 3.2, 7.0, 9.44]
    sound = write_sound(tmp_path / "clicks.wav", clicks_at(times, 10.0, sample_rate), sample_rate)
    sink = FileSink(tmp_path / "out.mp4")
    await speak(sound, [sink], model(delay=delay))
    file = read_mp4(tmp_path / "out.mp4")
    assert file.frames == 250
    assert file.flashes() == pytest.approx(times, abs=0.0401)
    assert file.clicks() == pytest.approx(times, abs=0.005)
    for flash, click in zip(file.flashes(), file.clicks()):
        assert abs(flash - click) <= 0.04


@pytest.mark.parametrize("samples", [320, 639, 640, 7680, 7681, 30_000])
async def test_the_file_is_as_long_as_the_sound(tmp_path, samples):
    sound = write_sound(tmp_path / "a.wav", clicks_at([], samples / 16_000), 16_000)
    result = await speak(sound, [FileSink(tmp_path / "out.mp4")])
    file = read_mp4(tmp_path / "out.mp4")
    assert result.frames == file.frames == -(-samples // 640)
    assert abs(file.duration_s - samples / 16_000) <= 0.04


async def test_the_file_has_the_original_sound_in_stereo(tmp_path):
    time = np.arange(3 * 44_100) / 44_100
    stereo = 0.3 * np.stack([np.sin(2 * np.pi * 300 * time), np.sin(2 * np.pi * 9000 * time)], 1)
    sound = write_sound(tmp_path / "stereo.wav", stereo, 44_100)
    await speak(sound, [FileSink(tmp_path / "out.mp4")])
    heard = read_mp4(tmp_path / "out.mp4").sound
    spectrum = np.abs(np.fft.rfft(heard[24_000:120_000], axis=0))
    assert [np.argmax(spectrum[:, side]) * 48_000 / 96_000 for side in (0, 1)] == pytest.approx([300, 9000], abs=1)


async def test_two_sinks_get_the_same(tmp_path, three_seconds):
    sinks = [FileSink(tmp_path / "a.mp4"), FileSink(tmp_path / "b.mp4")]
    await speak(three_seconds, sinks)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


async def test_one_lost_sink_does_not_stop_the_file(tmp_path, three_seconds, caplog):
    lost = FailingSink(after=60)
    result = await speak(three_seconds, [lost, FileSink(tmp_path / "a.mp4")])
    assert result.frames == read_mp4(tmp_path / "a.mp4").frames == 75
    assert "the far side has left; 1 of 2 outputs are complete" in caplog.text
    assert True not in lost.closed


async def test_all_sinks_lost_ends_the_session_early(three_seconds, tmp_path):
    long = write_sound(tmp_path / "long.wav", clicks_at([], 60.0), 16_000)
    speaker = model()
    with pytest.raises(SinkError, match="the far side has left"):
        await speak(long, [FailingSink(after=0), FailingSink(after=30)], speaker)
    assert speaker.steps < 20


@pytest.mark.parametrize(("how", "error"), [("user", AvatardError), ("bug", RuntimeError)])
async def test_blocks_made_before_the_model_fails_still_reach_the_file(tmp_path, three_seconds, how, error):
    sink = FileSink(tmp_path / "out.mp4")
    with pytest.raises(error):
        await speak(three_seconds, [sink], model(fail_at=3, how=how))
    assert not (tmp_path / "out.mp4").exists()
    assert read_mp4(sink.output).frames == 36


async def test_blocks_cut_before_the_sound_fails_still_reach_the_file(tmp_path):
    async def chunks():
        yield AudioChunk(np.zeros(7680 * 3 + 1280, np.float32), 16_000)
        raise AvatardError("speech.wav: can no longer be read")

    sink = FileSink(tmp_path / "out.mp4")
    silence = SoundReader(iter([np.zeros((200_000, 1), np.float32)]), 48_000, 1)
    with pytest.raises(AvatardError, match="can no longer be read"):
        await run_session(chunks(), silence, model(), await opened(sink))
    assert read_mp4(sink.output).frames == 36


async def test_a_failure_ends_the_session_though_the_source_never_ends(tmp_path):
    async def chunks():
        yield AudioChunk(np.zeros(7680 * 2 + 1280, np.float32), 16_000)
        await asyncio.Event().wait()

    sink = FileSink(tmp_path / "out.mp4")
    silence = SoundReader(iter([np.zeros((200_000, 1), np.float32)]), 48_000, 1)
    with pytest.raises(RuntimeError, match="the toy broke"):
        await asyncio.wait_for(run_session(chunks(), silence, model(fail_at=1), await opened(sink)), 5)
    assert read_mp4(sink.output).frames == 12


async def test_no_sound_at_all_is_an_error_and_leaves_nothing(tmp_path):
    async def chunks():
        return
        yield

    sink = FileSink(tmp_path / "out.mp4")
    with pytest.raises(AvatardError, match="the sound is empty"):
        await run_session(chunks(), SoundReader(iter(()), 48_000, 1), model(), await opened(sink))
    assert list(tmp_path.iterdir()) == []


async def test_stopped_early_all_that_was_made_is_in_the_part(tmp_path):
    long = write_sound(tmp_path / "long.wav", clicks_at([], 60.0), 16_000)
    stop, sink, seen = asyncio.Event(), FileSink(tmp_path / "out.mp4"), []

    def on_progress(progress):
        seen.append(progress.frames)
        if progress.frames == 48:
            stop.set()

    result = await speak(long, [sink], on_progress=on_progress, stop=stop)
    assert result.stopped
    assert 48 <= result.frames <= 120
    assert seen[-1] == result.frames
    assert not (tmp_path / "out.mp4").exists()
    assert read_mp4(sink.output).frames == result.frames


async def test_stopped_in_a_step_that_does_not_end(tmp_path, three_seconds):
    class Stuck(InThisProcess):
        async def step(self, audio):
            if self.steps == 2:
                stop.set()
                await asyncio.Event().wait()
            return await super().step(audio)

    stop, sink = asyncio.Event(), FileSink(tmp_path / "out.mp4")
    result = await speak(three_seconds, [sink], Stuck(ToyModel((64, 64))), stop=stop)
    assert result.frames == read_mp4(sink.output).frames == 24


async def test_a_stop_while_the_file_is_finished_comes_too_late_to_lose_it(tmp_path, three_seconds):
    class Finishing(FileSink):
        async def close(self, complete):
            stop.set()
            await asyncio.sleep(0)
            await super().close(complete)

    stop, sink = asyncio.Event(), Finishing(tmp_path / "out.mp4")
    result = await speak(three_seconds, [sink], stop=stop)
    assert not result.stopped
    assert read_mp4(tmp_path / "out.mp4").frames == result.frames == 75


async def test_cancelled_the_part_is_closed_and_no_thread_is_left(tmp_path):
    long = write_sound(tmp_path / "long.wav", clicks_at([], 60.0), 16_000)
    going, sink = asyncio.Event(), FileSink(tmp_path / "out.mp4")

    def on_progress(progress):
        if progress.frames >= 60:  # more than the queues hold, so some of it has been written
            going.set()

    task = asyncio.ensure_future(speak(long, [sink], on_progress=on_progress))
    await going.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert read_mp4(sink.output).frames > 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]


async def test_the_first_frame_is_dated_on_the_clock_that_was_passed(tmp_path, three_seconds):
    seconds = iter(range(1000, 2000))
    result = await speak(three_seconds, [NullSink()], clock=lambda: float(next(seconds)))
    assert result.first_frame_at == 1002


async def test_generation_goes_on_while_the_block_before_is_encoded(three_seconds, monkeypatch):
    """The encoder waits until the model has begun the next block: it would wait for ever if they took turns."""
    speaker, encode = model(), Encoder.encode
    began = [threading.Event() for _ in range(8)]

    async def step(audio, inner=speaker.step):
        began[audio.start // 7680].set()
        return await inner(audio)

    def slow(self, block, sound):
        following = block.start // 12 + 1
        assert following > 6 or began[following].wait(5), "the model waited for the encoder"
        return encode(self, block, sound)

    monkeypatch.setattr(speaker, "step", step)
    monkeypatch.setattr(Encoder, "encode", slow)
    assert (await speak(three_seconds, [NullSink()], speaker)).frames == 75


async def test_a_slow_sink_holds_the_model_back(tmp_path):
    long = write_sound(tmp_path / "long.wav", clicks_at([], 30.0), 16_000)
    speaker, let_go = model(), asyncio.Event()

    class Slow(NullSink):
        async def write(self, packets):
            await let_go.wait()

    task = asyncio.ensure_future(speak(long, [Slow()], speaker))
    steps = -1
    while steps != speaker.steps or steps < 1:
        steps = speaker.steps
        await asyncio.sleep(0.1)
    assert speaker.steps <= 8
    let_go.set()
    assert (await task).frames == 750


async def test_memory_does_not_grow_with_the_length(tmp_path):
    held = []
    for seconds in (10, 60):
        sound = write_sound(tmp_path / f"{seconds}.wav", clicks_at([], seconds), 16_000)
        tracemalloc.start()
        await speak(sound, [NullSink()])
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert held[1] < held[0] * 1.25  # six times the sound; the rest is what the collector has not come to yet
