"""What a session says comes in its order, from whatever sender, and is forgotten when it is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import av
import numpy as np
import pytest
from waiting import until_async

from audio.chunk import AudioChunk
from service.commands import Refusal
from service.speaking import TEXTS, Speaking

RATE = 48_000


class Speaker:
    """Speaks each text as a level: "0.5" is 100 ms of 0.5. `hold` cleared: it says no more."""

    def __init__(self, chunks: int = 5, rate: int = RATE) -> None:
        self.chunks, self.rate = chunks, rate
        self.hold = asyncio.Event()
        self.hold.set()
        self.speaking = 0
        self.spoken: list[str] = []

    async def speak(self, text: str, voice: str | None = None) -> AsyncIterator[AudioChunk]:
        self.speaking += 1
        self.spoken.append(text)
        try:
            for _ in range(self.chunks):
                await self.hold.wait()
                if text == "no":
                    raise Refusal("unavailable", "voice: broke")
                yield AudioChunk(np.full(self.rate // 50, float(text), np.float32), self.rate)
                await asyncio.sleep(0)
        finally:
            self.speaking -= 1


def level(value: float, seconds: float = 0.1, rate: int = RATE) -> np.ndarray:
    return np.full(round(seconds * rate), value, np.float32)


async def heard(speaking: Speaking) -> np.ndarray:
    """All that is in the source, whatever utterances it is of."""
    found = [np.zeros(0, np.float32)]
    with contextlib.suppress(TimeoutError):
        while (chunk := await asyncio.wait_for(speaking.source.read(), 0.05)) is not None:
            found.append(chunk.samples)
    return np.concatenate(found)


def order(samples: np.ndarray) -> list[float]:
    """The levels in it, one after the other."""
    levels = np.round(samples[np.flatnonzero(np.abs(samples) > 0.05)], 1)
    return [float(levels[0]), *(float(b) for a, b in itertools.pairwise(levels) if a != b)] if levels.size else []


async def test_sound_and_texts_are_said_in_the_order_they_were_brought():
    speaking, speaker = Speaking("a", 60), Speaker()
    work = [
        asyncio.create_task(speaking.push(level(0.1), RATE)),
        asyncio.create_task(speaking.say(speaker, "0.2", None)),
        asyncio.create_task(speaking.push(level(0.3), RATE)),
        asyncio.create_task(speaking.say(speaker, "0.4", None)),
    ]
    await asyncio.gather(*work)
    assert order(await heard(speaking)) == pytest.approx([0.1, 0.2, 0.3, 0.4])


async def test_sound_that_comes_while_a_text_is_spoken_waits_for_its_end():
    speaking, speaker = Speaking("a", 60), Speaker()
    speaker.hold.clear()
    text = asyncio.create_task(speaking.say(speaker, "0.2", None))
    await until_async(lambda: speaker.speaking == 1)
    sound = asyncio.create_task(speaking.push(level(0.3), RATE))
    await asyncio.sleep(0.02)
    assert not sound.done()
    speaker.hold.set()
    await asyncio.gather(text, sound)
    assert order(await heard(speaking)) == pytest.approx([0.2, 0.3])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
async def test_every_sample_of_a_text_is_said_at_any_rate(rate):
    speaking, speaker = Speaking("a", 60), Speaker(chunks=50, rate=rate)
    await speaking.say(speaker, "0.5", None)
    samples = await heard(speaking)
    assert samples.size == pytest.approx(RATE * (rate // 50 * 50) / rate, abs=2)


async def test_an_interruption_stops_what_is_spoken_and_forgets_what_waits():
    speaking, speaker = Speaking("a", 60), Speaker()
    speaker.hold.clear()
    work = [asyncio.create_task(speaking.say(speaker, text, None)) for text in ("0.2", "0.3", "0.4")]
    work.append(asyncio.create_task(speaking.push(level(0.5), RATE)))
    await until_async(lambda: speaker.speaking == 1)
    speaking.forget()
    speaking.source.drop()
    await asyncio.wait_for(asyncio.gather(*work), 1)
    assert speaker.speaking == 0
    assert speaker.spoken == ["0.2"]
    assert speaking.texts == 0
    speaker.hold.set()
    await speaking.say(speaker, "0.6", None)
    assert order(await heard(speaking)) == pytest.approx([0.6])


async def test_an_interruption_ends_the_wait_of_a_sender_who_is_too_far_ahead():
    speaking = Speaking("a", 0.5)
    waiting = asyncio.create_task(speaking.push(level(0.1, 10.0), RATE))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    speaking.forget()
    speaking.source.drop()
    await asyncio.wait_for(waiting, 1)
    assert (await heard(speaking)).size == 0
    await speaking.push(level(0.3), RATE)
    assert order(await heard(speaking)) == pytest.approx([0.3])


async def test_a_burst_of_ten_seconds_is_all_said_by_who_waits():
    speaking = Speaking("a", 1.0)
    pushing = asyncio.create_task(speaking.push(level(0.1, 10.0, 16_000), 16_000))
    found = 0
    while not pushing.done() or speaking.source.waiting_s:
        assert speaking.source.waiting_s <= 1.0
        with contextlib.suppress(TimeoutError):
            found += (await asyncio.wait_for(speaking.source.read(), 0.05)).samples.size
    speaking.utterance_ended()
    await until_async(lambda: not speaking.busy or speaking.source.waiting_s > 0)
    found += (await heard(speaking)).size
    assert found == pytest.approx(10 * RATE, abs=3)


async def test_the_last_syllable_is_not_held_back():
    speaking = Speaking("a", 60)
    feed = speaking.feed("s16le:8000:1")
    await feed.bytes((level(0.5, 0.1, 8000) * 32767).astype("<i2").tobytes())
    speaking.utterance_ended()
    await until_async(lambda: not speaking._bringing and not speaking._later)
    assert speaking.source.waiting_s == pytest.approx(0.1, abs=0.001)
    assert (await speaking.source.read()).samples.size
    assert not (await speaking.source.read()).samples.size, "the reader is told that it is whole"


async def test_who_only_falls_silent_is_heard_to_the_end_too():
    speaking = Speaking("a", 60)
    feed = speaking.feed("s16le:8000:1")
    await feed.bytes((level(0.5, 0.1, 8000) * 32767).astype("<i2").tobytes())
    await until_async(lambda: speaking.source.waiting_s > 0.0999)


async def test_bytes_may_be_cut_anywhere():
    whole = (np.sin(np.arange(960) / 7) * 20_000).astype("<i2").tobytes()
    said = []
    for cut in (1, 7, 480, len(whole)):
        speaking = Speaking("a", 60)
        feed = speaking.feed("s16le:48000:1")
        for begin in range(0, len(whole), cut):
            await feed.bytes(whole[begin : begin + cut])
        said.append(await heard(speaking))
    for other in said[1:]:
        np.testing.assert_array_equal(other, said[0])


async def test_bytes_after_an_interruption_begin_where_their_samples_do():
    speaking = Speaking("a", 0.2)
    feed = speaking.feed("s16le:48000:1")
    sound = (level(0.5, 1.0) * 32767).astype("<i2").tobytes()
    waiting = asyncio.create_task(feed.bytes(sound[:-1]))
    await asyncio.sleep(0.02)
    speaking.forget()
    speaking.source.drop()
    await asyncio.wait_for(waiting, 1)
    await feed.bytes(sound[-1:] + (level(0.25) * 32767).astype("<i2").tobytes())
    np.testing.assert_allclose((await heard(speaking))[1:], 0.25, atol=0.001)


async def test_what_is_no_number_is_silence_and_what_is_too_loud_is_at_full_scale():
    speaking = Speaking("a", 60)
    await speaking.push(np.array([np.nan, np.inf, -np.inf, 7.0, -7.0, 0.5], np.float32), RATE)
    np.testing.assert_array_equal(await heard(speaking), np.array([0, 0, 0, 1, -1, 0.5], np.float32))


async def test_one_sample_at_a_time_is_the_same_as_all_at_once():
    sine = np.sin(np.arange(800) / 5).astype(np.float32) / 2
    said = []
    for size in (1, 800):
        speaking = Speaking("a", 60)
        for begin in range(0, 800, size):
            await speaking.push(sine[begin : begin + size], 16_000)
        speaking.utterance_ended()
        await until_async(lambda speaking=speaking: not speaking._bringing and not speaking._later)
        said.append(await heard(speaking))
    np.testing.assert_allclose(said[0], said[1], atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.zeros((10, 2), np.float32), 16_000, "mono"),
        (np.zeros(10, np.float32), 0, "rate"),
        (np.zeros(10, np.float32), -16_000, "rate"),
        (np.zeros(10, np.float32), 10**9, "rate"),
    ],
)
async def test_sound_that_is_none_is_refused_in_one_line(samples, rate, words):
    with pytest.raises(Refusal, match=words) as refused:
        await Speaking("a", 60).push(samples, rate)
    assert refused.value.reason == "invalid"
    assert "\n" not in str(refused.value)


async def test_another_rate_in_the_middle_loses_nothing():
    speaking = Speaking("a", 60)
    for rate in (16_000, 8_000, 48_000):
        await speaking.push(level(0.5, 0.5, rate), rate)
    assert (await heard(speaking)).size == pytest.approx(1.5 * RATE, abs=6)


@pytest.mark.parametrize("format", ["", "mp3", "s16le:x", "s16le:16000:99", "s16le:1", "a" * 500])
async def test_a_format_that_is_none_is_refused(format):
    with pytest.raises(Refusal) as refused:
        Speaking("a", 60).feed(format)
    assert refused.value.reason == "invalid"


async def test_opus_is_said_packet_by_packet_and_what_is_none_is_refused():
    speaking = Speaking("a", 60)
    feed = speaking.feed("opus:48000:1")
    for number, packet in enumerate(_opus(level(0.5, 1.0) * np.sin(np.arange(RATE) / 20))):
        await feed.bytes(packet)
        if number % 10 == 5:
            with pytest.raises(Refusal, match="not an Opus packet"):
                await feed.bytes(b"\xff" * 200)
            with pytest.raises(Refusal, match="too many"):
                await feed.bytes(b"\xff" * 5000)
        await feed.bytes(b"")
    samples = await heard(speaking)
    assert samples.size == pytest.approx(RATE, abs=960)
    assert 0.3 < np.abs(samples[RATE // 2 :]).max() < 0.7


async def test_too_many_texts_are_refused():
    speaking, speaker = Speaking("a", 60), Speaker()
    speaker.hold.clear()
    work = [asyncio.create_task(speaking.say(speaker, "0.1", None)) for _ in range(TEXTS)]
    await asyncio.sleep(0)
    with pytest.raises(Refusal, match="interrupt it or wait") as refused:
        await speaking.say(speaker, "0.1", None)
    assert refused.value.reason == "full"
    speaking.forget()
    await asyncio.gather(*work)


async def test_a_flood_of_ends_of_utterances_gathers_nothing():
    speaking, speaker = Speaking("a", 60), Speaker()
    speaker.hold.clear()
    text = asyncio.create_task(speaking.say(speaker, "0.2", None))
    await until_async(lambda: speaker.speaking == 1)
    for _ in range(10_000):
        speaking.utterance_ended()
    assert len(asyncio.all_tasks()) < 200
    speaker.hold.set()
    await text
    await until_async(lambda: not speaking._later)
    assert order(await heard(speaking)) == pytest.approx([0.2])


async def test_a_text_that_breaks_off_is_told_and_the_next_is_spoken():
    speaking, speaker = Speaking("a", 60), Speaker()
    with pytest.raises(Refusal, match="broke"):
        await speaking.say(speaker, "no", None)
    await speaking.say(speaker, "0.3", None)
    assert order(await heard(speaking)) == pytest.approx([0.3])


async def test_a_sender_who_is_cancelled_stops_its_speaker_and_lets_others_go_on():
    speaking, speaker = Speaking("a", 60), Speaker()
    speaker.hold.clear()
    text = asyncio.create_task(speaking.say(speaker, "0.2", None))
    await until_async(lambda: speaker.speaking == 1)
    sound = asyncio.create_task(speaking.push(level(0.3), RATE))
    text.cancel()
    await asyncio.wait_for(sound, 1)
    assert speaker.speaking == 0
    assert order(await heard(speaking)) == pytest.approx([0.3])


async def test_when_the_session_ends_whoever_waits_is_told():
    speaking, speaker = Speaking("a", 0.1), Speaker()
    speaker.hold.clear()
    work = [
        asyncio.create_task(speaking.push(level(0.1, 5.0), RATE)),
        asyncio.create_task(speaking.say(speaker, "0.2", None)),
    ]
    await asyncio.sleep(0.02)
    speaking.close()
    for ended in await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 1):
        assert isinstance(ended, Refusal)
        assert ended.reason == "not found"
    with pytest.raises(Refusal, match="is over"):
        await speaking.push(level(0.1), RATE)
    speaking.utterance_ended()


def _opus(samples: np.ndarray) -> list[bytes]:
    codec = av.CodecContext.create("libopus", "w")
    codec.sample_rate, codec.layout, codec.format = RATE, "mono", "flt"
    packets = []
    for begin in range(0, len(samples), 960):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 960].astype(np.float32), "flt", "mono")
        frame.sample_rate, frame.pts = RATE, begin
        packets += [bytes(packet) for packet in codec.encode(frame)]
    return packets
