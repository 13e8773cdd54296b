"""What comes from outside: everything here is tried by somebody who means harm, and by somebody who does not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from mp4 import write_sound
from PIL import Image
from waiting import until_async

from service.commands import Refusal, Source
from service.config import Settings
from service.inputs import Inputs

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]
SECRET = "s3cr3tt0ken"


def png(width: int = 32, height: int = 48) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


PNG = png()


@pytest.fixture
def wav(tmp_path: Path) -> bytes:
    return write_sound(tmp_path / "tone.wav", np.sin(np.arange(8000) / 20), 16_000).read_bytes()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Inputs]:
    """Inputs whose state, outputs and only root are folders of the test; keywords go into the inputs section."""

    def make(resolve: object = None, clock: object = None, sessions: dict = {}, **options: object) -> Inputs:  # noqa: B006
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        settings = Settings.model_validate(
            {
                "daemon": {"state": tmp_path / "state", "outputs": tmp_path / "out"},
                "inputs": {"roots": [root], **options},
                "sessions": sessions,
            }
        )
        more = {name: value for name, value in (("resolve", resolve), ("clock", clock)) if value}
        return Inputs(settings, **more)

    return make


def spooled(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "state" / "spool").iterdir())


async def left(tmp_path: Path) -> list[str]:
    """What is in the spool once nothing is under way there any more."""
    await until_async(lambda: not any(name.startswith(".") for name in spooled(tmp_path)), 5, "temporary files gone")
    return spooled(tmp_path)


class Web:
    """A server on loopback that answers as it is told, byte by byte, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer | bytes] = {}
        self.requests: list[str] = []
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1", user: str = "") -> str:
        return f"http://{user}{host}:{self.port}{path}"

    def serve(self, path: str, body: bytes, *headers: str, status: str = "200 OK") -> str:
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
        self.answers[path] = "\r\n".join(head).encode() + b"\r\n\r\n" + body
        return self.url(path)

    def redirect(self, path: str, to: str) -> str:
        return self.serve(path, b"", f"Location: {to}", status="302 Found")

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(request)
            answer = self.answers[request.split(" ")[1].split("?")[0]]
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(reader, writer, request)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def serving(host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    web = Web()
    server = await asyncio.start_server(web.answer, host, port, ssl=tls)
    web.port = server.sockets[0].getsockname()[1]
    try:
        yield web
    finally:
        server.close()


def names(**hosts: str) -> Callable[[str, int], Awaitable[list[str]]]:
    """A resolver that knows these names and nothing else; what it was asked is in `.asked`."""

    async def resolve(host: str, port: int) -> list[str]:
        resolve.asked.append(host)
        try:
            return hosts[host.replace(".", "_")].split()
        except KeyError:
            raise socket.gaierror(socket.EAI_NONAME, "no such host") from None

    resolve.asked = []
    return resolve


async def refused(work: Awaitable[object], reason: str, *words: str) -> str:
    with pytest.raises(Refusal) as caught:
        await work
    message = str(caught.value)
    assert caught.value.reason == reason, message
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message


# Paths


async def test_a_file_below_a_root_comes_into_the_spool_named_by_its_content(make, tmp_path):
    inputs = make()
    (tmp_path / "root" / "face.png").write_bytes(PNG)
    path = await inputs.fetch(Source(path=str(tmp_path / "root" / "face.png")), "image")
    assert path == tmp_path / "state" / "spool" / f"{hashlib.sha256(PNG).hexdigest()}.png"
    assert path.read_bytes() == PNG
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert await inputs.fetch(Source(path="face.png"), "image") == path, "relative to a root"
    assert await left(tmp_path) == [path.name]
    assert inputs.spool_bytes == len(PNG)


async def test_a_url_is_fetched(make, wav):
    async with serving() as web:
        web.serve("/a.wav", wav)
        path = await make(private_addresses=True).fetch(Source(url=web.url("/a.wav")), "audio")
    assert path.read_bytes() == wav
    assert path.suffix == ".wav"


async def test_base64_is_decoded(make, wav):
    text = base64.encodebytes(wav).decode()
    assert (await make().fetch(Source(data=text), "audio")).read_bytes() == wav
    assert (await make().fetch(Source(data=f"data:audio/wav;base64,{text}"), "audio")).read_bytes() == wav


async def test_an_upload_is_kept_and_found_again(make, wav, tmp_path):
    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(wav), 1000):
            yield wav[start : start + 1000]

    inputs = make()
    path = await inputs.keep(parts(), "audio", "tone.wav")
    assert await inputs.fetch(Source(upload=path.name), "audio") == path
    assert await left(tmp_path) == [path.name]
