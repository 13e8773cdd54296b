"""Texts spoken aloud: by a service on the network, or by espeak-ng on this machine; as sound while it is made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import wave
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from audio.chunk import AudioChunk
from audio.decode import AudioError, PcmDecoder, PcmFormat
from audio.live import LISTENER_RATE
from audio.reader import open_live
from audio.source import PushSource
from audio.urls import redacted
from service import log as service_log
from service.commands import Refusal
from service.config import Settings, VoiceSection
from service.secrets import read_secret

log = logging.getLogger(__name__)

Speech = AsyncGenerator[AudioChunk, None]

PCM_RATE = 24_000
"""Hz of what such services call pcm: 16 bits, mono."""

ESPEAK = "espeak-ng"

AHEAD_S = 2.0
"""Sound that is decoded before somebody takes it."""

MOST_S_PER_CHARACTER, MOST_S = 1.0, 30.0
"""Who speaks longer than this for a text will not stop by itself."""

MOST_COMPLAINT = 2000
"""Bytes that are read of an answer that is an error."""

VOICE_NAME = r"[A-Za-z0-9][A-Za-z0-9_+.-]*(/[A-Za-z0-9][A-Za-z0-9_+.-]*)?"
"""Of espeak-ng: it takes a path too, and a name may come from anybody."""

CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


class Voice:
    """Speaks texts; made by `Voice.make`.

    name: who speaks, for people.
    """

    @classmethod
    def make(cls, settings: Settings) -> Voice | None:
        """What the settings name; None where no text can be spoken. Raises: ConfigError: its key cannot be read."""
        section = settings.voice
        if section.url:
            key = read_secret("voice.key", section.key_file, section.key_env)
            service_log.hide(key)
            service = _Service(section, key)
            return cls(redacted(section.url), section, service.speak)
        program = shutil.which(ESPEAK)
        if program is None:
            log.info("no text can be spoken: voice.url is not set, and %s is not installed", ESPEAK)
            return None
        return cls(ESPEAK, section, _Espeak(section, program).speak)

    def __init__(self, name: str, section: VoiceSection, speak: Callable[[str, str], Speech]) -> None:
        self.name = name
        self._section, self._speak = section, speak

    async def speak(self, text: str, voice: str | None = None) -> Speech:
        """The sound of a text, mono, all chunks at one rate, as it comes. Left early (`aclose`), nothing goes on.

        Raises: Refusal: too large; invalid (no text, or no such voice); unavailable, what is wrong with who speaks.
        """
        if len(text) > self._section.max_characters:
            raise Refusal(
                "too large",
                f"text: {len(text)} characters, and voice.max_characters is {self._section.max_characters}; "
                "send it in parts",
            )
        if not text.strip():
            raise Refusal("invalid", "text: is empty")
        left_s = MOST_S + MOST_S_PER_CHARACTER * len(text)
        heard = False
        try:
            async with contextlib.aclosing(self._speak(text, voice or self._section.voice)) as chunks:
                async for chunk in chunks:
                    if not chunk.samples.size:
                        continue
                    heard = True
                    left_s -= chunk.samples.size / chunk.sample_rate
                    if left_s < 0:
                        raise _Failed("does not come to an end")
                    yield chunk
            if not heard:
                raise _Failed("gave no sound")
        except (_Failed, AudioError) as error:
            raise Refusal("unavailable", f"voice {self.name}: {error}") from error

    async def write(self, text: str, voice: str | None, path: Path) -> None:
        """The sound of a text as a WAV of 16 bits, there in full or not at all.

        Raises: Refusal, as `speak`; OSError.
        """
        part = path.with_name(f".{path.name}.part")
        try:
            async with contextlib.aclosing(self.speak(text, voice)) as chunks:
                with await asyncio.to_thread(wave.open, str(part), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(PCM_RATE)
                    async for chunk in chunks:
                        if not file.getnframes():
                            file.setframerate(chunk.sample_rate)
                        await asyncio.to_thread(file.writeframesraw, _s16(chunk))
            await asyncio.to_thread(_keep, part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


class _Failed(Exception):
    """What went wrong with who speaks, in words that follow its name."""


# A service


class _Service:
    """An address in the manner of OpenAI's /v1/audio/speech."""

    def __init__(self, section: VoiceSection, key: str) -> None:
        self._section, self._key = section, key
        # Of each: connecting, sending, and silence between two parts of the answer.
        self._client = httpx.AsyncClient(timeout=section.timeout_s)

    async def speak(self, text: str, voice: str) -> Speech:
        section = self._section
        asked = {"model": section.model, "input": text, "response_format": "pcm"}
        asked |= {"voice": voice} if voice else {}
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with self._client.stream("POST", section.url, json=asked, headers=headers) as answer:
                if answer.status_code != 200:
                    raise await self._refused(answer)
                async with contextlib.aclosing(self._sound(answer)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        except httpx.TimeoutException as error:
            raise _Failed(f"nothing came for {section.timeout_s:g} s; see voice.timeout_s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # Not its own words: they may hold the address.
            raise _Failed(f"cannot be reached, or broke off ({type(error).__name__}); see voice.url") from error

    async def _sound(self, answer: httpx.Response) -> Speech:
        """PCM as it is; anything else by FFmpeg. Not every service gives what it is asked for."""
        kind, _, rest = answer.headers.get("content-type", "").lower().partition(";")
        if "json" in kind or kind.startswith("text/"):
            raise _Failed(f"answered with {kind} in place of sound; is voice.url its /v1/audio/speech?")
        # Without a size: with one, httpx holds back what is less.
        parts = answer.aiter_bytes()
        first = await anext(parts, b"")
        async with contextlib.aclosing(_joined(first, parts)) as whole:
            if _is_container(first):
                sound = self._unpacked(whole)
            else:
                rate = re.search(r"\brate=(\d{4,6})\b", rest)
                sound = _bare(whole, int(rate[1]) if rate else PCM_RATE)
            async with contextlib.aclosing(sound) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _unpacked(self, parts: AsyncIterator[bytes]) -> Speech:
        read_end, write_end = os.pipe()
        pipe = os.fdopen(write_end, "wb", buffering=0)
        writing = asyncio.create_task(_write_all(parts, pipe), name="speech into the decoder")
        try:
            async with contextlib.aclosing(_decoded(read_end, self._section.timeout_s)) as chunks:
                async for chunk in chunks:
                    yield chunk
            # FFmpeg takes the end of a line that broke for the end of the sound.
            await writing
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            pipe.close()

    async def _refused(self, answer: httpx.Response) -> Exception:
        """One line of what a service that says no has said."""
        said = b""
        async for part in answer.aiter_bytes():
            said += part
            if len(said) >= MOST_COMPLAINT:
                break
        message = _complaint(said[:MOST_COMPLAINT])
        if self._key:
            message = message.replace(self._key, "***")
        words = f"answered {answer.status_code}" + (f" ({message})" if message else "")
        if answer.status_code in (401, 403):
            return _Failed(f"{words}; see voice.key_file or voice.key_env")
        if answer.status_code in (400, 422):
            return Refusal("invalid", f"voice {redacted(self._section.url)}: {words}")
        return _Failed(words)


def _complaint(said: bytes) -> str:
    """The message in {"error": {"message": ...}} and its relatives, or the beginning of the text; one line."""
    text = said.decode(errors="replace")
    with contextlib.suppress(ValueError):
        found: Any = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found)
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())[:200]


async def _joined(first: bytes, parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    yield first
    async for part in parts:
        yield part


def _is_container(begin: bytes) -> bool:
    """Whether it begins like a WAV, Ogg, FLAC, MP3, ADTS, MP4 or WebM."""
    if begin.startswith((b"RIFF", b"OggS", b"fLaC", b"ID3", b"\x1aE\xdf\xa3")) or begin[4:8] == b"ftyp":
        return True
    # A frame of MPEG: eleven bits set, then a version, layer, bit rate and rate that there are.
    return len(begin) > 2 and begin[0] == 0xFF and begin[1] & 0xE0 == 0xE0 and begin[1] != 0xFF and begin[2] >> 4 != 15


async def _bare(parts: AsyncIterator[bytes], rate: int) -> Speech:
    decoder = PcmDecoder(PcmFormat("s16le", rate), rate)
    async for part in parts:
        yield decoder.feed(part)


async def _decoded(read_end: int, silence_s: float) -> Speech:
    """What FFmpeg finds in a pipe as it is filled, at 48 kHz; closes it. Raises: _Failed."""
    source = PushSource(LISTENER_RATE, AHEAD_S)
    reading = asyncio.create_task(open_live(f"fd:{read_end}", None, source).run(), name="speech out of the decoder")
    try:
        while True:
            async with asyncio.timeout(silence_s):
                chunk = await source.read()
            if chunk is None:
                return
            yield chunk
    except AudioError as error:
        raise _Failed("gave something that FFmpeg does not know as sound") from error
    except TimeoutError as error:
        raise _Failed(f"gave no sound for {silence_s:g} s; see voice.timeout_s") from error
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        os.close(read_end)


async def _write_all(parts: AsyncIterator[bytes], pipe: BinaryIO) -> None:
    """Into a pipe, waiting while it is full; closes it."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, pipe)
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    try:
        with contextlib.suppress(ConnectionError):  # nobody reads any more
            async for part in parts:
                writer.write(part)
                await writer.drain()
        transport.close()  # after what is still on its way
    except BaseException:
        transport.abort()
        raise


# espeak-ng


class _Espeak:
    """The program, once for each text: the text goes in by its input, where no list of processes shows it."""

    def __init__(self, section: VoiceSection, program: str) -> None:
        self._section, self._program = section, program

    async def speak(self, text: str, voice: str) -> Speech:
        if voice and not re.fullmatch(VOICE_NAME, voice):
            raise Refusal("invalid", f"voice {ESPEAK}: {voice[:40]!r} is no name of a voice, such as en-gb")
        # It would spell Chinese out in English.
        voice = voice or ("cmn" if CHINESE.search(text) else "")
        # Straight into the decoder's pipe: asyncio's own are not seen to end while they are full.
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(self._program, "--stdin", "--stdout", "-b", "1"),
                *(("-v", voice) if voice else ()),
                stdin=asyncio.subprocess.PIPE,
                stdout=write_end,
                stderr=asyncio.subprocess.PIPE,
            )
        except BaseException as error:
            os.close(read_end)
            if isinstance(error, OSError):
                raise _Failed(f"cannot be started ({(error.strerror or str(error)).lower()})") from error
            raise
        finally:
            os.close(write_end)
        assert process.stdin is not None
        assert process.stderr is not None
        writing = asyncio.create_task(_tell(process.stdin, text), name=f"text for {ESPEAK}")
        complaining = asyncio.create_task(process.stderr.read(MOST_COMPLAINT), name=f"errors of {ESPEAK}")
        heard = False
        try:
            async with contextlib.aclosing(_decoded(read_end, self._section.timeout_s)) as chunks:
                async for chunk in chunks:
                    heard = True
                    yield chunk
        except _Failed:
            # Its sound has ended, so it has or is killed now, and its errors end too.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if heard or not (said := _complaint(await complaining)):
                raise
            raise Refusal("invalid", f"voice {ESPEAK}: {said}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            writing.cancel()
            complaining.cancel()
            await asyncio.gather(writing, complaining, return_exceptions=True)


async def _tell(stdin: asyncio.StreamWriter, text: str) -> None:
    with contextlib.suppress(ConnectionError):
        stdin.write(text.encode())
        await stdin.drain()
        stdin.close()


# WAV


def _s16(chunk: AudioChunk) -> bytes:
    return (chunk.samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes()


def _keep(part: Path, path: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, path)
