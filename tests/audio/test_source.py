"""What a session reads: files, silence, and sound that is pushed; with every way a wait can end."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio.chunk import AudioChunk
from audio.decode import AudioError, open_sound
from audio.source import FileSource, PushSource, SourceClosed, silence

RATE = 1000


def chunk(*values: float, rate: int = RATE) -> AudioChunk:
    return AudioChunk(np.array(values, np.float32), rate)


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def sound(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * 48_000)
    soundfile.write(tmp_path / "speech.wav", samples, 48_000)
    return open_sound(tmp_path / "speech.wav")


# Files


async def test_a_file_source_gives_what_the_file_gives(sound):
    got = [chunk.samples async for chunk in FileSource(sound, 16_000)]
    expected = [chunk.samples for chunk in sound.chunks(16_000)]
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(expected))


async def test_a_file_is_decoded_outside_the_event_loops_thread(sound, monkeypatch):
    threads = set()
    chunks = sound.chunks

    def watched(sample_rate):
        for chunk in chunks(sample_rate):
            threads.add(threading.get_ident())
            yield chunk

    monkeypatch.setattr(sound, "chunks", watched)
    async for _ in FileSource(sound, 16_000):
        pass
    assert threads
    assert threading.get_ident() not in threads


async def test_a_file_that_is_too_long_gives_its_sound_before_the_error(sound):
    sound.max_duration_s = 3.0
    got = 0
    with pytest.raises(AudioError, match="the limit is 3 s"):  # noqa: PT012
        async for chunk in FileSource(sound, 16_000):
            got += chunk.samples.size
    assert got > 2.5 * 16_000


def open_files() -> list[str]:
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(descriptor))
        except OSError:  # closed in the meantime
            continue
    return links


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
async def test_a_reader_that_leaves_closes_the_file(sound):
    reading = asyncio.Event()

    async def read_one() -> None:
        async for _ in FileSource(sound, 16_000):
            reading.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(read_one())
    await reading.wait()
    assert str(sound.path) in open_files()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.get_running_loop().shutdown_asyncgens()
    await asyncio.get_running_loop().shutdown_default_executor()
    gc.collect()
    assert str(sound.path) not in open_files()


async def test_silence_has_the_length_asked_for():
    chunks = [chunk async for chunk in silence(16_000, duration_s=1.0)]
    assert sum(chunk.samples.size for chunk in chunks) == 16_000
    assert not any(chunk.samples.any() for chunk in chunks)


async def test_silence_without_a_duration_does_not_end():
    chunks = silence(16_000)
    for _ in range(100):
        assert (await anext(chunks)).samples.size == 7680
    await chunks.aclose()


# Reading what is pushed: the four ends of the wait


async def test_reading_gives_what_is_there():
    source = PushSource(RATE)
    await source.push(chunk(0.1, 0.2))
    await source.push(chunk(0.3))
    assert (await source.read()).samples.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert source.waiting_s == 0


async def test_reading_waits_for_what_comes_later():
    source = PushSource(RATE)
    reading = asyncio.create_task(source.read())
    await settle()
    assert not reading.done()
    await source.push(chunk(0.5))
    assert (await reading).samples.tolist() == [0.5]


async def test_closing_ends_a_wait_of_the_reader():
    source = PushSource(RATE)
    reading = asyncio.create_task(source.read())
    await settle()
    source.close()
    assert await reading is None
    assert await source.read() is None


async def test_an_error_ends_a_wait_of_the_reader():
    source = PushSource(RATE)
    reading = asyncio.create_task(source.read())
    await settle()
    source.close(AudioError("the peer went away"))
    with pytest.raises(AudioError, match="went away"):
        await reading


async def test_a_cancelled_read_loses_no_sound():
    source = PushSource(RATE)
    reading = asyncio.create_task(source.read())
    await settle()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await source.push(chunk(0.5))
    assert (await source.read()).samples.tolist() == [0.5]


# Pushing: the four ends of the wait


async def full() -> PushSource:
    source = PushSource(RATE, ahead_s=0.004)
    await source.push(chunk(0.1, 0.2, 0.3, 0.4))
    return source


async def test_pushing_does_not_wait_while_there_is_room():
    source = await full()
    assert source.waiting_s == pytest.approx(0.004)


async def test_pushing_too_far_ahead_waits_for_the_reader():
    source = await full()
    pushing = asyncio.create_task(source.push(chunk(0.5)))
    await settle()
    assert not pushing.done()
    assert (await source.read()).samples.size == 4
    await pushing
    assert (await source.read()).samples.tolist() == [0.5]


async def test_closing_ends_a_wait_of_the_pusher():
    source = await full()
    pushing = asyncio.create_task(source.push(chunk(0.5)))
    await settle()
    source.close()
    with pytest.raises(SourceClosed):
        await pushing
    assert (await source.read()).samples.size == 4


async def test_a_reader_that_leaves_ends_a_wait_of_the_pusher():
    source = await full()
    pushing = asyncio.create_task(source.push(chunk(0.5)))
    await settle()
    source.abandon()
    with pytest.raises(SourceClosed):
        await pushing
    assert source.waiting_s == 0


async def test_a_cancelled_push_adds_nothing_more():
    source = await full()
    pushing = asyncio.create_task(source.push(chunk(0.5)))
    await settle()
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    assert (await source.read()).samples.size == 4
    source.close()
    assert await source.read() is None


async def test_a_chunk_longer_than_the_room_goes_in_parts():
    source = PushSource(RATE, ahead_s=0.1)
    sound = np.random.default_rng(0).uniform(-1, 1, 1001).astype(np.float32)

    async def push() -> None:
        await source.push(AudioChunk(sound, RATE))
        source.close()

    got = []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(push())
        async for part in source:
            assert part.samples.size <= 100
            got.append(part.samples)
    np.testing.assert_array_equal(np.concatenate(got), sound)


async def test_pushing_the_newest_drops_the_oldest_and_counts():
    source = await full()
    assert source.push_newest(chunk(0.5)) == 1
    assert source.push_newest(chunk(*np.linspace(0.6, 0.9, 7))) == 7
    assert source.dropped_samples == 8
    assert (await source.read()).samples.tolist() == pytest.approx([0.75, 0.8, 0.85, 0.9])


async def test_an_error_comes_after_the_sound_and_stays():
    source = PushSource(RATE)
    await source.push(chunk(0.5))
    source.close(AudioError("the peer went away"))
    source.close()
    assert (await source.read()).samples.tolist() == [0.5]
    for _ in range(2):
        with pytest.raises(AudioError, match="went away"):
            await source.read()


async def test_dropping_forgets_what_waits_and_makes_room():
    source = await full()
    pushing = asyncio.create_task(source.push(chunk(0.5)))
    await settle()
    assert source.drop() == 4
    await pushing
    assert (await source.read()).samples.tolist() == [0.5]


async def test_pushing_after_the_end_is_refused():
    source = PushSource(RATE)
    source.close()
    with pytest.raises(SourceClosed):
        await source.push(chunk(0.5))
    with pytest.raises(SourceClosed):
        source.push_newest(chunk(0.5))


async def test_what_is_not_a_number_becomes_silence_and_the_callers_buffer_stays_his():
    source = PushSource(RATE)
    samples = np.array([np.nan, np.inf, -np.inf, 2.0, -3.0, 0.5], np.float32)
    await source.push(AudioChunk(samples, RATE))
    samples[5] = 0.25
    assert (await source.read()).samples.tolist() == [0, 0, 0, 1, -1, 0.5]


async def test_another_sample_rate_is_refused():
    with pytest.raises(ValueError, match="8000 Hz for a source at 1000 Hz"):
        await PushSource(RATE).push(chunk(0.5, rate=8000))


# Utterances


async def test_the_end_of_an_utterance_is_told_after_its_sound():
    source = PushSource(RATE)
    await source.push(chunk(1, 0.5))
    await source.push(chunk(0.25))
    source.end_utterance()
    await source.push(chunk(0.125))
    assert (await source.read()).samples.tolist() == [1, 0.5, 0.25]
    assert (await source.read()).samples.size == 0
    assert (await source.read()).samples.tolist() == [0.125]


async def test_the_end_of_an_utterance_is_told_though_its_sound_was_read_before():
    source = PushSource(RATE)
    await source.push(chunk(1))
    await source.read()
    reader = asyncio.create_task(source.read())
    await settle()
    source.end_utterance()
    assert (await reader).samples.size == 0


async def test_an_utterance_ends_once_and_not_without_sound():
    source = PushSource(RATE)
    source.end_utterance()
    await source.push(chunk(1))
    source.end_utterance()
    source.end_utterance()
    source.close()
    source.end_utterance()
    assert [c.samples.tolist() async for c in source] == [[1.0], []]


async def test_sound_that_was_dropped_has_no_end():
    source = PushSource(RATE)
    await source.push(chunk(1))
    source.end_utterance()
    source.drop()
    await source.push(chunk(0.5))
    assert (await source.read()).samples.tolist() == [0.5]


async def test_dropping_the_oldest_sound_keeps_the_count_where_utterances_end():
    source = PushSource(RATE, ahead_s=0.004)
    for number in range(10):
        source.push_newest(chunk(number / 10))
        source.end_utterance()
    got = []
    while source.waiting_s:
        got += (await source.read()).samples.tolist()
    assert got == pytest.approx([0.6, 0.7, 0.8, 0.9])
