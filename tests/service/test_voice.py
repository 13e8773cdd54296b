"""Texts are spoken by a service as it answers, or by espeak-ng; what goes wrong is one line without a key."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import wave
from collections.abc import Awaitable, Callable
from pathlib import Path

import av
import numpy as np
import procs
import pytest
from waiting import until_async

from audio.chunk import AudioChunk
from service.commands import Refusal
from service.config import ConfigError, load_settings
from service.voice import Voice

KEY = "sk-very-secret-0123456789"
RATE = 24_000


class Service:
    """Stands in for an OpenAI-compatible service: one answer for all, written by the test.

    asked: the JSON of each request, with `key` as its authorisation; broken_off: clients that left in the middle.
    """

    def __init__(self, answer: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._answer = answer
        self.asked: list[dict] = []
        self.broken_off = 0

    async def __aenter__(self) -> Service:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1/audio/speech"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        fields = {name.lower(): value for name, value in fields.items()}
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        self.asked.append(body | {"key": fields.get("authorization", "")})
        try:
            await self._answer(writer)
        except ConnectionError:
            self.broken_off += 1
        finally:
            writer.close()


def head(writer: asyncio.StreamWriter, status: str = "200 OK", kind: str = "audio/pcm") -> None:
    writer.write(f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode())


def answer(*parts: bytes, status: str = "200 OK", kind: str = "audio/pcm") -> Callable:
    async def write(writer: asyncio.StreamWriter) -> None:
        head(writer, status, kind)
        for part in parts:
            writer.write(part)
            await writer.drain()

    return write


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    return (np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate) * 0.5).astype(np.float32)


def pcm(samples: np.ndarray) -> bytes:
    return (samples * 32768).astype("<i2").tobytes()


def voice_of(url: str, *assignments: str) -> Voice:
    made = Voice.make(load_settings(None, [f"voice.url={url}", *assignments]))
    assert made is not None
    return made


async def speech(voice: Voice, text: str = "Hello", who: str | None = None) -> list[AudioChunk]:
    return [chunk async for chunk in voice.speak(text, who)]


def joined(chunks: list[AudioChunk]) -> np.ndarray:
    assert len({chunk.sample_rate for chunk in chunks}) == 1
    return np.concatenate([chunk.samples for chunk in chunks])


# A service


async def test_a_service_is_asked_as_it_wants_to_be_and_what_it_gives_is_spoken(tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    async with Service(answer(pcm(tone(1.0)))) as service:
        voice = voice_of(service.url, f"voice.key_file={file}", "voice.model=m", "voice.voice=alloy")
        chunks = await speech(voice, "Hello there")
        await speech(voice, "Hello there", "nova")
    asked = {"model": "m", "input": "Hello there", "response_format": "pcm", "voice": "alloy", "key": f"Bearer {KEY}"}
    assert service.asked == [asked, asked | {"voice": "nova"}]
    np.testing.assert_allclose(joined(chunks), tone(1.0), atol=1e-4)
    assert chunks[0].sample_rate == RATE


async def test_sound_is_given_while_the_rest_is_not_there_yet():
    more = asyncio.Event()

    async def slowly(writer: asyncio.StreamWriter) -> None:
        head(writer)
        writer.write(pcm(tone(1.0)))
        await writer.drain()
        await more.wait()
        writer.write(pcm(tone(1.0))[:-1])  # half a sample is none

    async with Service(slowly) as service, contextlib.aclosing(voice_of(service.url).speak("Hello", None)) as chunks:
        got = 0
        while got < RATE:
            got += (await asyncio.wait_for(anext(chunks), 2)).samples.size
        more.set()
        got += sum([chunk.samples.size async for chunk in chunks])
    assert got == 2 * RATE - 1


@pytest.mark.parametrize(
    ("container", "codec", "kind"),
    [("wav", "pcm_s16le", "audio/wav"), ("mp3", "libmp3lame", "audio/mpeg"), ("ogg", "libopus", "audio/ogg")],
)
async def test_a_service_that_gives_a_file_in_place_of_samples_is_understood(container, codec, kind, tmp_path):
    path = tmp_path / f"a.{container}"
    _write(path, container, codec, tone(2.0, 48_000))
    data = path.read_bytes()
    cut = [data[begin : begin + 1000] for begin in range(0, len(data), 1000)]
    async with Service(answer(*cut, kind=kind)) as service:
        chunks = await speech(voice_of(service.url))
    samples = joined(chunks)
    assert samples.size / chunks[0].sample_rate == pytest.approx(2.0, abs=0.1)
    assert 0.3 < np.abs(samples[samples.size // 2 :]).max() < 0.7


async def test_samples_at_another_rate_are_understood_where_the_service_says_so():
    async with Service(answer(pcm(tone(1.0, 16_000)), kind="audio/pcm;rate=16000")) as service:
        chunks = await speech(voice_of(service.url))
    assert (chunks[0].sample_rate, joined(chunks).size) == (16_000, 16_000)


@pytest.mark.parametrize(
    ("status", "body", "reason", "words"),
    [
        ("401 Unauthorized", {"error": {"message": f"Incorrect API key: {KEY}"}}, "unavailable", "voice.key_file"),
        ("400 Bad Request", {"error": {"message": "no such voice\nat all"}}, "invalid", "no such voice at all"),
        ("422 Unprocessable", {"detail": [{"msg": "input"}]}, "invalid", "input"),
        ("500 Internal Server Error", "it broke", "unavailable", "answered 500"),
        ("302 Found", "", "unavailable", "answered 302"),
    ],
)
async def test_a_service_that_says_no_is_told_in_one_line_without_the_key(
    status, body, reason, words, monkeypatch, caplog
):
    monkeypatch.setenv("SPEECH_KEY", KEY)
    async with Service(answer(json.dumps(body).encode(), status=status, kind="application/json")) as service:
        with pytest.raises(Refusal) as refused:
            await speech(voice_of(service.url, "voice.key_env=SPEECH_KEY"))
    assert refused.value.reason == reason
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert KEY not in str(refused.value) + caplog.text


async def test_a_long_complaint_is_neither_read_nor_told_to_its_end():
    async def endless(writer: asyncio.StreamWriter) -> None:
        head(writer, "500 Internal Server Error", "text/plain")
        while True:
            writer.write(b"x" * 10_000)
            await writer.drain()

    async with Service(endless) as service:
        with pytest.raises(Refusal) as refused:
            await asyncio.wait_for(speech(voice_of(service.url)), 5)
    assert len(str(refused.value)) < 400


async def test_a_page_in_place_of_sound_is_not_spoken():
    async with Service(answer(b"<html>", kind="text/html")) as service:
        with pytest.raises(Refusal, match="in place of sound"):
            await speech(voice_of(service.url))


async def test_nonsense_in_place_of_a_file_is_an_error():
    async with Service(answer(b"RIFF" + bytes(5000), kind="audio/wav")) as service:
        with pytest.raises(Refusal, match="FFmpeg does not know"):
            await asyncio.wait_for(speech(voice_of(service.url)), 10)


async def test_no_sound_at_all_is_an_error():
    async with Service(answer()) as service:
        with pytest.raises(Refusal, match="gave no sound"):
            await speech(voice_of(service.url))


@pytest.mark.parametrize("begun", [False, True])
async def test_a_service_that_falls_silent_is_given_up(begun):
    async def silent(writer: asyncio.StreamWriter) -> None:
        if begun:
            head(writer)
            writer.write(pcm(tone(0.5)))
            await writer.drain()
        await asyncio.sleep(30)

    async with Service(silent) as service:
        began = time.monotonic()
        with pytest.raises(Refusal, match=r"nothing came for 0\.3 s"):
            await speech(voice_of(service.url, "voice.timeout_s=0.3"))
        assert time.monotonic() - began < 3


async def test_a_service_that_is_not_there_is_told():
    async with Service(answer()) as service:
        url = service.url.replace("//", "//user:hunter22@")
    with pytest.raises(Refusal, match=r"voice\.url") as refused:
        await speech(voice_of(url))
    assert "hunter22" not in str(refused.value)


async def test_a_service_that_does_not_stop_is_stopped():
    async def endless(writer: asyncio.StreamWriter) -> None:
        head(writer)
        while True:
            writer.write(pcm(tone(5.0)))
            await writer.drain()

    async with Service(endless) as service:
        with pytest.raises(Refusal, match="does not come to an end"):
            await asyncio.wait_for(speech(voice_of(service.url), "Hi"), 20)


async def test_who_has_heard_enough_ends_the_request():
    service = Service(answer(*[pcm(tone(5.0))] * 1000))
    async with service:
        async with contextlib.aclosing(voice_of(service.url).speak("Hello " * 500, None)) as chunks:
            await anext(chunks)
        await until_async(lambda: service.broken_off, 5)


async def test_a_line_that_breaks_in_the_middle_of_a_file_is_told(tmp_path):
    path = tmp_path / "a.wav"
    _write(path, "wav", "pcm_s16le", tone(5.0, 48_000))

    async def broken(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ncontent-length: 480000\r\n\r\n")
        writer.write(path.read_bytes()[:100_000])
        await writer.drain()

    async with Service(broken) as service:
        with pytest.raises(Refusal, match="broke off"):
            await asyncio.wait_for(speech(voice_of(service.url)), 10)


@pytest.mark.parametrize(("text", "reason"), [("", "invalid"), (" \n", "invalid"), ("x" * 11, "too large")])
async def test_a_text_that_cannot_be_spoken_asks_nobody(text, reason):
    async with Service(answer(pcm(tone(0.1)))) as service:
        with pytest.raises(Refusal) as refused:
            await speech(voice_of(service.url, "voice.max_characters=10"), text)
    assert refused.value.reason == reason
    assert not service.asked


def test_a_key_that_cannot_be_read_is_an_error_of_the_settings():
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        voice_of("http://127.0.0.1:1/", "voice.key_env=NO_SUCH_VARIABLE")


# Files


async def test_a_text_is_written_as_a_wav_that_is_there_in_full_or_not_at_all(tmp_path):
    async with Service(answer(pcm(tone(1.0)))) as service:
        await voice_of(service.url).write("Hello", None, tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        samples = np.frombuffer(file.readframes(RATE * 2), "<i2") / 32768
    np.testing.assert_allclose(samples, tone(1.0), atol=1e-3)
    async with Service(answer(status="500 Internal Server Error")) as service:
        with pytest.raises(Refusal, match="answered 500"):
            await voice_of(service.url).write("Hello", None, tmp_path / "b.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


# espeak-ng


@pytest.mark.needs("espeak-ng")
async def test_without_a_service_espeak_ng_speaks():
    voice = Voice.make(load_settings(None, []))
    assert voice is not None
    samples = joined(await speech(voice, "Hello world, how are you today?"))
    assert 1 < samples.size / 48_000 < 5
    assert 0.05 < np.abs(samples).max() <= 1


@pytest.mark.needs("espeak-ng")
async def test_espeak_ng_speaks_chinese_without_being_told():
    voice = Voice.make(load_settings(None, []))
    assert voice is not None
    plain, told = [joined(await speech(voice, "你好，世界", who)) for who in (None, "cmn")]
    np.testing.assert_array_equal(plain, told)


@pytest.mark.needs("espeak-ng")
@pytest.mark.parametrize("who", ["nosuch", "../../etc/passwd", "-h", "en;ls", "en\n", "/etc/passwd", "a" * 128])
async def test_a_voice_that_there_is_not_is_refused_in_one_line(who):
    voice = Voice.make(load_settings(None, []))
    assert voice is not None
    with pytest.raises(Refusal) as refused:
        await speech(voice, "Hello", who)
    assert refused.value.reason == "invalid"
    assert "\n" not in str(refused.value)


@pytest.mark.needs("espeak-ng")
async def test_left_early_espeak_ng_is_gone_and_nothing_is_open():
    voice = Voice.make(load_settings(None, []))
    assert voice is not None
    await speech(voice, "Hello")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        async with contextlib.aclosing(voice.speak("A long story about nothing. " * 150, None)) as chunks:
            await anext(chunks)
            assert procs.children(os.getpid(), "espeak-ng")
            assert all("story" not in _command(pid) for pid in procs.children(os.getpid(), "espeak-ng"))
        assert not procs.children(os.getpid(), "espeak-ng")
    # The decoder's thread closes its end by itself.
    await until_async(lambda: len(os.listdir("/proc/self/fd")) <= before, 5)


def test_without_a_service_and_without_espeak_ng_no_text_is_spoken(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert Voice.make(load_settings(None, [])) is None


async def test_a_program_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    voice = Voice.make(load_settings(None, ["voice.timeout_s=0.3"]))
    assert voice is not None
    with pytest.raises(Refusal, match=r"0\.3 s"):
        await asyncio.wait_for(speech(voice), 5)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _write(path: Path, container: str, codec: str, samples: np.ndarray) -> None:
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), "s16", "mono")
        frame.sample_rate = 48_000
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 48_000, stream.codec_context.frame_size)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in stream.encode(piece):
                out.mux(packet)
