"""What comes from outside: everything here is tried by somebody who means harm, and by somebody who does not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import gzip
import hashlib
import io
import logging
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import av
import numpy as np
import pytest
from mp4 import write_sound
from PIL import Image
from waiting import until_async

from service import inputs as module
from service.addresses import standing
from service.commands import Refusal, Source
from service.config import Settings
from service.inputs import Inputs
from service.spool import GRACE_S, Spool, SpoolFull, suffix
from streaming.sink import TargetAbsent, TargetRefused
from streaming.sinks import open_sink

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]
SECRET = "s3cr3tt0ken"
ROOT = Path(__file__).parent.parent.parent


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


@pytest.mark.parametrize("kind", ["image", "audio"])
async def test_no_paths_are_taken_where_no_roots_are_set(make, tmp_path, kind):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "face.png").write_bytes(PNG)
    await refused(make(roots=[]).fetch(Source(path=str(tmp_path / "root" / "face.png")), kind), "forbidden", "roots")


async def test_a_path_that_leads_out_of_the_roots_is_refused_alike_whether_it_exists_or_not(make, tmp_path):
    inputs = make()
    root = tmp_path / "root"
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "rootlike").mkdir()
    (tmp_path / "rootlike" / "face.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "nowhere.png").symlink_to(tmp_path / "missing.png")
    (root / "up").symlink_to(tmp_path)
    said = set()
    for path in (
        f"{tmp_path}/secret.png",
        f"{tmp_path}/missing.png",
        "../secret.png",
        "../missing.png",
        "../rootlike/face.png",
        f"../{root.name}/../secret.png",
        f"{root}/../secret.png",
        f"{root}//..//secret.png",
        "link.png",
        "nowhere.png",
        "up/secret.png",
        "up/missing.png",
        "/etc/shadow",
        "/etc/no-such-file",
    ):
        message = await refused(inputs.fetch(Source(path=path), "image"), "forbidden")
        said.add(message.removeprefix(path))
    assert len(said) == 1, "what lies outside cannot be asked for"
    assert await left(tmp_path) == []


async def test_a_link_within_the_roots_is_followed(make, tmp_path):
    inputs = make()
    (tmp_path / "root" / "face.png").write_bytes(PNG)
    (tmp_path / "root" / "link.png").symlink_to("face.png")
    assert (await inputs.fetch(Source(path="link.png"), "image")).read_bytes() == PNG


async def test_a_root_may_be_a_link_itself(make, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "face.png").write_bytes(PNG)
    (tmp_path / "alias").symlink_to("real")
    inputs = make(roots=[tmp_path / "alias"])
    for path in ("face.png", f"{tmp_path}/alias/face.png", f"{tmp_path}/real/face.png"):
        assert (await inputs.fetch(Source(path=path), "image")).read_bytes() == PNG


async def test_what_is_no_file_is_refused_and_does_not_hold_anybody_up(make, tmp_path, monkeypatch):
    inputs = make(fetch_s=5)
    root = tmp_path / "root"
    os.mkfifo(root / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(root)  # the name of such a socket may be no longer than 100 bytes
    listener.bind("socket")
    (root / "folder").mkdir()
    (root / "loop").symlink_to("loop")
    began = time.monotonic()
    await refused(inputs.fetch(Source(path="pipe"), "audio"), "forbidden", "pipe")
    await refused(inputs.fetch(Source(path="socket"), "audio"), "forbidden")
    await refused(inputs.fetch(Source(path="folder"), "audio"), "forbidden", "folder")
    await refused(inputs.fetch(Source(path="."), "audio"), "forbidden", "folder")
    await refused(inputs.fetch(Source(path="missing"), "audio"), "invalid", "no such file")
    for path in ("loop", "nul\0byte", "x" * 4000):
        with pytest.raises(Refusal):
            await inputs.fetch(Source(path=path), "audio")
    assert time.monotonic() - began < 4
    listener.close()


@pytest.mark.parametrize(
    "path",
    [
        "/proc/self/environ",
        "/proc/self/mem",
        "/proc/version",
        "/sys/kernel/uevent_seqnum",
        "/dev/zero",
        "/dev/stdin",
        "/dev/tty",
        "/proc/self/fd/0",
        "/proc/kcore",
    ],
)
async def test_nothing_that_the_kernel_makes_up_is_read_even_where_everything_is_a_root(make, path, tmp_path):
    inputs = make(roots=["/"])
    if path in ("/proc/self/environ", "/proc/self/mem", "/proc/version", "/sys/kernel/uevent_seqnum"):
        await refused(inputs.fetch(Source(path=path), "audio"), "forbidden", "outside")
    else:
        with pytest.raises(Refusal):  # what the others are depends on who runs this, and where
            await inputs.fetch(Source(path=path), "audio")
    assert await left(tmp_path) == []


@pytest.mark.parametrize("swap", ["file", "folder"])
async def test_a_name_that_changes_its_meaning_between_check_and_opening_gains_nothing(
    make, tmp_path, monkeypatch, swap
):
    inputs = make()
    folder, outside = tmp_path / "root" / "folder", tmp_path / "outside"
    for each in (folder, outside):
        each.mkdir()
        (each / "face.png").write_bytes(PNG)
    really, swapped = os.open, []

    def swapping(path: str, *arguments: object) -> int:
        if str(path).endswith("face.png") and not swapped:
            swapped.append(path)
            if swap == "file":
                (folder / "face.png").unlink()
                (folder / "face.png").symlink_to(outside / "face.png")
            else:
                folder.rename(tmp_path / "gone")
                folder.symlink_to(outside)
        return really(path, *arguments)

    monkeypatch.setattr(module.os, "open", swapping)
    await refused(inputs.fetch(Source(path="folder/face.png"), "image"), "forbidden")
    assert swapped


async def test_the_thing_that_was_judged_is_the_thing_that_is_read(make, tmp_path, monkeypatch):
    inputs = make()
    (tmp_path / "root" / "face.png").write_bytes(PNG)
    really = os.readlink

    def swapping(path: str) -> str:
        lies_at = really(path)
        if lies_at.endswith("face.png"):
            (tmp_path / "root" / "face.png").rename(tmp_path / "root" / "old.png")
            (tmp_path / "root" / "face.png").write_bytes(b"another")
        return lies_at

    monkeypatch.setattr(module.os, "readlink", swapping)
    assert (await inputs.fetch(Source(path="face.png"), "image")).read_bytes() == PNG


async def test_a_file_that_is_too_large_is_not_read(make, tmp_path, monkeypatch):
    inputs = make(max_mb=1)
    (tmp_path / "root" / "huge.wav").touch()
    os.truncate(tmp_path / "root" / "huge.wav", 2**40)
    really, opened = os.open, []
    monkeypatch.setattr(module.os, "open", lambda path, flags: (opened.append(flags), really(path, flags))[1])
    await refused(inputs.fetch(Source(path="huge.wav"), "audio"), "too large", "1 MB")
    assert [bool(flags & os.O_PATH) for flags in opened] == [True], "a handle that cannot be read, and no other"


async def test_a_file_that_grows_while_it_is_read_is_counted(make, tmp_path, monkeypatch):
    """Its size was looked at before: what is read counts."""
    inputs = make(max_mb=1)
    (tmp_path / "root" / "growing.wav").write_bytes(b"")
    monkeypatch.setattr(module.Inputs, "_open", lambda *_: open("/dev/zero", "rb"))  # noqa: SIM115
    await refused(inputs.fetch(Source(path="growing.wav"), "audio"), "too large")
    assert await left(tmp_path) == []


async def test_what_the_operator_names_may_lie_anywhere(make, tmp_path):
    (tmp_path / "own.png").write_bytes(PNG)
    assert (await make(roots=[]).adopt(tmp_path / "own.png", "image")).read_bytes() == PNG
    await refused(make().adopt(tmp_path / "missing.png", "image"), "invalid", "missing.png: there is no such file")


# Addresses: whom to call


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
        ("64:ff9b::8.8.8.8", "public"),
        *((address, "private") for address in ("127.0.0.1", "127.8.9.1", "10.1.2.3", "172.16.0.1", "172.31.255.255")),
        *((address, "private") for address in ("192.168.1.1", "100.64.0.1", "::1", "fd00::1", "::ffff:10.0.0.1")),
        *((address, "private") for address in ("64:ff9b::127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a00:1")),
        *((address, "never") for address in ("0.0.0.0", "0.1.2.3", "169.254.169.254", "::ffff:169.254.169.254")),
        *((address, "never") for address in ("64:ff9b::a9fe:a9fe", "::", "fe80::1", "fe80::1%eth0", "ff02::1")),
        *((address, "never") for address in ("224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.0.192")),
        *((address, "never") for address in ("2002:7f00:1::", "2001:0:1::1", "::127.0.0.1", "64:ff9b:1::1", "fec0::1")),
        *((address, "never") for address in ("100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254")),
        *((address, "never") for address in ("172.15.0.256", "nonsense", "", "0177.0.0.1", "2130706433")),
        *((address, "public") for address in ("172.15.255.255", "172.32.0.1", "11.0.0.1", "100.128.0.1")),
    ],
)
def test_an_address_is_public_private_or_nobodys(address, expected):
    assert standing(address) == expected


HOSTS = [
    *(
        "127.0.0.1",
        "localhost",
        "localhost.",
        "LOCALHOST",
        "127.1",
        "2130706433",
        "0177.0.0.1",
        "0x7f.0.0.1",
        "0x7f000001",
    ),
    *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "0.0.0.0", "0", "[::]", "①②⑦.⓪.⓪.①"),
    *("169.254.169.254", "[fe80::1]", "10.0.0.1", "192.168.0.1", "user@127.0.0.1", "8.8.8.8@127.0.0.1", "127。0。0。1"),
]


@pytest.mark.parametrize("host", HOSTS)
async def test_no_spelling_of_a_private_address_is_called(make, host):
    async with serving() as web:
        web.answers["/a.png"] = b""
        with pytest.raises(Refusal) as caught:
            await make().fetch(Source(url=web.url("/a.png", host)), "image")
        assert web.requests == []
    assert caught.value.reason in ("forbidden", "invalid"), "invalid: where the system knows no such spelling"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "169.254.169.254", "[fe80::1]", "[::]", "[fd00:ec2::254]", "100.100.100.200"]
)
async def test_what_is_nobodys_is_not_called_even_where_private_networks_are(make, host):
    await refused(make(private_addresses=True).fetch(Source(url=f"http://{host}/"), "image"), "forbidden")


async def test_one_private_address_among_several_refuses_them_all(make):
    resolve = names(mixed_example="8.8.8.8 10.0.0.1")
    await refused(make(resolve).fetch(Source(url="http://mixed.example/a.png"), "image"), "forbidden", "private")


async def test_a_name_that_does_not_exist_says_so(make):
    await refused(make(names()).fetch(Source(url="http://gone.example/a.png"), "image"), "invalid", "no host")


async def test_a_name_that_is_looked_up_twice_with_another_answer_gains_nothing(make):
    """DNS rebinding: the address that was judged is the one that is called."""
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])

    async def resolve(host: str, port: int) -> list[str]:
        return [next(answers)]

    async with serving() as web, serving("127.0.0.2", web.port) as other:
        web.serve("/a.png", PNG)
        other.serve("/a.png", PNG)
        await make(resolve, private_addresses=True).fetch(Source(url=web.url("/a.png", "bot.example")), "image")
        assert len(web.requests) == 1
        assert other.requests == []
        assert f"\r\nHost: bot.example:{web.port}\r\n" in web.requests[0]
    assert next(answers) == "127.0.0.2", "looked up once"


async def test_the_next_address_of_a_name_is_tried_when_the_first_is_dead(make):
    async with serving("127.0.0.2") as web:
        web.serve("/a.png", PNG)
        inputs = make(names(bot_example="127.0.0.3 127.0.0.2"), private_addresses=True)
        await inputs.fetch(Source(url=web.url("/a.png", "bot.example")), "image")


async def test_a_proxy_of_the_environment_is_not_used(make, monkeypatch):
    async with serving() as proxy, serving() as web:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        web.serve("/a.png", PNG)
        await make(private_addresses=True).fetch(Source(url=web.url("/a.png")), "image")
        assert proxy.requests == []


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for speech.example, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=speech.example",
            "-addext",
            "subjectAltName=DNS:speech.example",
            "-keyout",
            folder / "key.pem",
            "-out",
            folder / "cert.pem",
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.needs("openssl")
async def test_tls_is_made_with_the_name_of_the_url_and_its_certificate_checked(make, certificate, monkeypatch):
    asked = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    tls.sni_callback = lambda _, name, __: asked.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with serving(tls=tls) as web:
        web.serve("/a.png", PNG)
        inputs = make(names(speech_example="127.0.0.1", other_example="127.0.0.1"), private_addresses=True)
        await inputs.fetch(Source(url=f"https://speech.example:{web.port}/a.png"), "image")
        assert asked == ["speech.example"]
        assert f"\r\nHost: speech.example:{web.port}\r\n" in web.requests[0]
        other = Source(url=f"https://other.example:{web.port}/a.png")
        await refused(inputs.fetch(other, "image"), "invalid", "certificate")
        monkeypatch.delenv("SSL_CERT_FILE")
        await refused(
            inputs.fetch(Source(url=f"https://speech.example:{web.port}/a.png"), "image"), "invalid", "certificate"
        )
        assert len(web.requests) == 1


@pytest.mark.needs("openssl")
async def test_a_redirect_does_not_take_the_encryption_away(make, certificate, monkeypatch):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with serving(tls=tls) as web, serving() as plain:
        web.redirect("/a.png", plain.serve("/a.png", PNG))
        inputs = make(names(speech_example="127.0.0.1"), private_addresses=True)
        source = Source(url=f"https://speech.example:{web.port}/a.png")
        await refused(inputs.fetch(source, "image"), "forbidden", "from https to http")
        assert plain.requests == []


# Addresses: what they answer


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://x/",
        "unix:///run/docker.sock",
        "concat://a|b",
        "data://x",
    ],
)
async def test_only_http_is_fetched(make, url):
    await refused(make().fetch(Source(url=url), "image"), "forbidden", "http")


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///a", "http://[::1", "http://x:99999/", "http://a b/", "http://\x00/", "http://" + "x" * 300],
)
async def test_what_is_no_address_is_refused(make, url):
    with pytest.raises(Refusal):
        await make(names()).fetch(Source(url=url), "image")


async def test_addresses_can_be_forbidden_altogether(make):
    async with serving() as web:
        url = web.serve("/a.png", PNG)
        await refused(make(urls=False, private_addresses=True).fetch(Source(url=url), "image"), "forbidden", "urls")
        assert web.requests == []


async def test_five_redirects_are_followed_and_no_more(make):
    async with serving() as web:
        inputs = make(private_addresses=True)
        for number in range(6):
            web.redirect(f"/{number}", f"/{number + 1}")
        web.serve("/6", PNG)
        await inputs.fetch(Source(url=web.url("/1")), "image")
        await refused(inputs.fetch(Source(url=web.url("/0")), "image"), "invalid", "redirects more than 5 times")
        web.redirect("/loop", "/loop")
        await refused(inputs.fetch(Source(url=web.url("/loop")), "image"), "invalid", "redirects more than 5 times")


@pytest.mark.parametrize(
    "to",
    ["http://127.0.0.2:PORT/a.png", "http://2130706434:PORT/a.png", "http://metadata.example/", "//127.0.0.2:PORT/a"],
)
async def test_a_redirect_into_a_private_network_is_refused(make, monkeypatch, to):
    """From an address that counts as public, for this test."""
    monkeypatch.setattr(
        "service.addresses.standing", lambda address: "public" if address == "127.0.0.1" else standing(address)
    )

    async def resolve(host: str, port: int) -> list[str]:
        known = {"metadata.example": "169.254.169.254", "2130706434": "127.0.0.2"}
        return [known.get(host, host)]

    async with serving() as web, serving("127.0.0.2", web.port) as inside:
        url = web.redirect("/a.png", to.replace("PORT", str(web.port)))
        message = await refused(make(resolve).fetch(Source(url=url), "image"), "forbidden")
        assert inside.requests == []
        assert "127.0.0.2" not in message
        assert "169.254" not in message


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://x/", "data:image/png;base64,AAAA", "http://", "http://[::1"]
)
async def test_a_redirect_to_anything_but_http_is_refused(make, to):
    async with serving() as web:
        url = web.redirect("/a.png", to)
        with pytest.raises(Refusal) as caught:
            await make(private_addresses=True).fetch(Source(url=url), "image")
        assert caught.value.reason in ("forbidden", "invalid")
        assert "passwd" not in str(caught.value)


async def test_a_slow_drip_ends_with_the_time_for_the_whole(make, tmp_path):
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with serving() as web:
        web.answers["/a.wav"] = drip
        began = time.monotonic()
        await refused(
            make(private_addresses=True, fetch_s=0.5).fetch(Source(url=web.url("/a.wav")), "audio"),
            *("invalid", "0.5 s"),
        )
        assert time.monotonic() - began < 3
    assert await left(tmp_path) == []


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"]
)
async def test_a_server_that_falls_silent_is_given_up(make, said, monkeypatch):
    async def fall_silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: str) -> None:
        writer.write(said)
        await writer.drain()
        await asyncio.sleep(5)

    monkeypatch.setattr(module, "READ_S", 0.2)
    async with serving() as web:
        web.answers["/a.wav"] = fall_silent
        began = time.monotonic()
        await refused(make(private_addresses=True).fetch(Source(url=web.url("/a.wav")), "audio"), "invalid", "nothing")
        assert time.monotonic() - began < 3


async def test_a_length_that_is_too_large_is_believed(make):
    async def announce(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(5)

    async with serving() as web:
        web.answers["/a.wav"] = announce
        began = time.monotonic()
        await refused(make(private_addresses=True).fetch(Source(url=web.url("/a.wav")), "audio"), "too large")
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_without_a_length_is_counted(make, tmp_path, chunked):
    sent = 0

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: str) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n" if chunked else b"") + b"\r\n")
        while not writer.is_closing():
            block = bytes(65536)
            writer.write(b"10000\r\n" + block + b"\r\n" if chunked else block)
            sent += len(block)
            await writer.drain()

    async with serving() as web:
        web.answers["/a.wav"] = endless
        await refused(make(private_addresses=True, max_mb=1).fetch(Source(url=web.url("/a.wav")), "audio"), "too large")
    assert sent < 20e6, "it was hung up on"
    assert await left(tmp_path) == []


@pytest.mark.parametrize("length", ["100000", "-1", "1e3", "x", "5, 6"])
async def test_a_length_that_is_a_lie_gives_no_file(make, wav, length, tmp_path):
    async with serving() as web:
        web.answers["/a.wav"] = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + wav
        await refused(make(private_addresses=True).fetch(Source(url=web.url("/a.wav")), "audio"), "invalid")
    assert await left(tmp_path) == []


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 100 + b"\r\n\r\n", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000]
)
async def test_what_is_no_answer_is_refused(make, garbage):
    async with serving() as web:
        web.answers["/a.wav"] = garbage
        await refused(make(private_addresses=True).fetch(Source(url=web.url("/a.wav")), "audio"), "invalid")


async def test_an_answer_that_is_no_success_is_no_file(make):
    async with serving() as web:
        for status in ("404 Not Found", "500 Oops", "204 No Content", "206 Partial Content", "304 Not Modified"):
            url = web.serve("/a.png", b"" if status[0] != "4" else PNG, status=status)
            await refused(make(private_addresses=True).fetch(Source(url=url), "image"), "invalid", status[:3])


async def test_nothing_compressed_is_asked_for_and_gzip_is_taken_all_the_same(make, wav):
    async with serving() as web:
        url = web.serve("/a.wav", gzip.compress(wav), "Content-Encoding: gzip")
        assert (await make(private_addresses=True).fetch(Source(url=url), "audio")).read_bytes() == wav
        assert "\r\nAccept-Encoding: identity\r\n" in web.requests[0]


async def test_a_gzip_bomb_is_counted_as_it_unfolds(make, tmp_path):
    bomb = gzip.compress(bytes(300_000_000), 9)
    assert len(bomb) < 400_000
    async with serving() as web:
        url = web.serve("/a.wav", bomb, "Content-Encoding: gzip")
        inputs = make(private_addresses=True, max_mb=1)
        tracemalloc.start()
        try:
            await refused(inputs.fetch(Source(url=url), "audio"), "too large")
            assert tracemalloc.get_traced_memory()[1] < 8e6
        finally:
            tracemalloc.stop()
    assert await left(tmp_path) == []


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip, gzip", gzip.compress(gzip.compress(bytes(10**6)))),
        ("br", b"\x8b\x00\x80x\x03"),
        ("deflate", b"x"),
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(PNG)[:-20]),
    ],
    ids=["twice", "brotli", "no deflate", "no gzip", "cut off"],  # what gzip writes has the time in it
)
async def test_other_wrappings_are_refused(make, encoding, body):
    async with serving() as web:
        url = web.serve("/a.png", body, f"Content-Encoding: {encoding}")
        await refused(make(private_addresses=True).fetch(Source(url=url), "image"), "invalid", "compressed")


async def test_no_secret_of_an_address_is_said_or_logged(make, caplog):
    caplog.set_level(logging.DEBUG)
    async with serving() as web:
        inputs = make(private_addresses=True, fetch_s=5, max_mb=1)
        web.serve("/good", PNG)
        web.serve("/404", b"", status=f"404 {SECRET}")
        web.redirect("/away", f"http://127.0.0.1:{web.port}/404?again={SECRET}")
        web.redirect("/file", f"file:///{SECRET}")
        web.serve("/large", b"", "Content-Length: 99999999")
        web.answers["/broken"] = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + SECRET.encode()[:5]
        web.answers["/garbage"] = SECRET.encode() + b"\r\n\r\n"
        await inputs.fetch(Source(url=web.url(f"/good?key={SECRET}", user=f"u:{SECRET}@")), "image")
        for path in ("/404", "/away", "/file", "/large", "/broken", "/garbage"):
            with pytest.raises(Refusal) as caught:
                await inputs.fetch(Source(url=web.url(f"{path}?key={SECRET}", user=f"u:{SECRET}@")), "image")
            assert SECRET not in str(caught.value)
        for url in (f"http://u:{SECRET}@127.0.0.1:1/", f"http://u:{SECRET}@[::1/", f"ftp://u:{SECRET}@x/{SECRET[:0]}"):
            with pytest.raises(Refusal) as caught:
                await inputs.fetch(Source(url=url), "image")
            assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


async def test_a_password_goes_to_the_server_it_is_for_and_no_further(make):
    async with serving() as web, serving("127.0.0.2", web.port) as other:
        other.serve("/b.png", PNG)
        web.redirect("/a.png", other.url("/b.png", "127.0.0.2"))
        await make(private_addresses=True).fetch(Source(url=web.url("/a.png", user=f"u:{SECRET}@")), "image")
        assert "authorization: basic" in web.requests[0].lower()
        assert "authorization" not in other.requests[0].lower()


async def test_who_is_too_much_waits_within_their_own_time(make, monkeypatch):
    """And slow servers hold up nobody who sends the file itself."""
    monkeypatch.setattr(module, "FETCHES", 1)
    silent = asyncio.Event()

    async def wait(*_: object) -> None:
        await silent.wait()

    async with serving() as web:
        web.answers["/slow"] = wait
        web.serve("/a.png", PNG)
        inputs = make(private_addresses=True)
        slow = asyncio.create_task(inputs.fetch(Source(url=web.url("/slow")), "image"))
        await until_async(lambda: web.requests, 5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await inputs.fetch(Source(url=web.url("/a.png")), "image")
        assert len(web.requests) == 1
        inputs.use(Settings.model_validate({"inputs": {"fetch_s": 0.1, "private_addresses": True}}))
        await refused(inputs.fetch(Source(url=web.url("/a.png")), "image"), "invalid", "0.1 s")
        await inputs.fetch(Source(data=base64.b64encode(PNG).decode()), "image")
        silent.set()
        await refused(slow, "invalid")
        inputs.use(Settings.model_validate({"inputs": {"private_addresses": True}}))
        await inputs.fetch(Source(url=web.url("/a.png")), "image")


# Base64 and uploads


@pytest.mark.parametrize(
    "data",
    [
        "A",
        "AAA",
        "AA=A",
        "====",
        "AAAA=AAA",
        "AAAÄ",
        "AA-_",
        "AA A",
        "AAAA" * 90000 + "A*AA",
        "AAA=" + "AAAA" * 90000,
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:" + "x" * 300 + ";base64,AAAA",
        "data:;base64,",
        "\n",
    ],
)
async def test_what_is_not_base64_is_refused(make, data, tmp_path):
    message = await refused(make().fetch(Source(data=data), "image"), "invalid")
    assert len(message) < 200
    assert await left(tmp_path) == []


async def test_base64_is_the_same_wherever_it_is_cut_and_broken_into_lines(make, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 8)

    async def decoded(text: str) -> bytes:
        return b"".join([part async for part in module._decoded(text, 1000, "it")])

    for length in range(1, 40):
        whole = base64.b64encode(bytes(range(length))).decode()
        for width in (1, 5, 8, 76):
            text = "\r\n".join(whole[start : start + width] for start in range(0, len(whole), width))
            assert await decoded(f"{text}\n") == bytes(range(length))
        for wrong in [whole[:-1], f"={whole}", *([f"{whole}AAAA"] if "=" in whole else [])]:
            await refused(decoded(wrong), "invalid", "not base64")


async def test_base64_that_is_too_much_is_not_decoded(make):
    await refused(make(max_mb=1).fetch(Source(data="A" * 2_000_000), "image"), "too large")
    await refused(make(max_mb=1).fetch(Source(data="A" * 1_400_000), "image"), "too large")


async def endless(part: bytes = bytes(65536), wait_s: float = 0.0) -> AsyncIterator[bytes]:
    while True:
        yield part
        await asyncio.sleep(wait_s)


async def once(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_an_upload_without_an_end_is_refused_in_bounded_memory(make, tmp_path):
    inputs = make(max_mb=20)
    tracemalloc.start()
    try:
        await refused(inputs.keep(endless(), "audio", "a\nb.wav"), "too large", "a?b.wav", "20 MB")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert await left(tmp_path) == []
    assert inputs.spool_bytes == 0


@pytest.mark.parametrize("stream", [lambda: endless(b"", 0.01), lambda: endless(b"x", 0.01)])
async def test_an_upload_that_stalls_or_drips_is_given_up(make, monkeypatch, stream, tmp_path):
    monkeypatch.setattr(module, "STALL_S", 0.3)
    began = time.monotonic()
    await refused(make().keep(stream(), "audio"), "invalid", "nothing came")
    assert time.monotonic() - began < 3
    assert await left(tmp_path) == []


async def test_an_upload_that_is_fast_enough_takes_as_long_as_it_needs(make, monkeypatch, wav):
    monkeypatch.setattr(module, "STALL_S", 0.2)

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(wav), 3000):
            yield wav[start : start + 3000]
            await asyncio.sleep(0.1)

    assert len(wav) / 3000 * 0.1 > 0.4
    await make().keep(parts(), "audio")


async def test_too_many_uploads_at_once_are_refused_with_a_time(make, monkeypatch):
    monkeypatch.setattr(module, "UPLOADS", 1)
    inputs = make()
    first = asyncio.create_task(inputs.keep(endless(b"x" * 1000, 0.01), "image"))
    await asyncio.sleep(0.05)
    with pytest.raises(Refusal) as caught:
        await inputs.keep(once(PNG), "image")
    assert (caught.value.reason, caught.value.retry_s) == ("full", 5.0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await inputs.keep(once(PNG), "image")


async def test_an_upload_whose_sender_goes_leaves_nothing_behind(make, tmp_path):
    inputs = make()
    for limit_s in (0.02, 0.05, 0.1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(limit_s):
                await inputs.keep(endless(bytes(300_000), 0.001), "audio")

    async def break_off() -> AsyncIterator[bytes]:
        yield bytes(300_000)
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        await inputs.keep(break_off(), "audio")
    assert await left(tmp_path) == []
    assert inputs.spool_bytes == 0


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", ".incoming-1", "a" * 64, "a" * 64 + ".png", "x.png", "/etc/passwd"]
)
async def test_only_what_is_in_the_spool_is_an_upload(make, name, tmp_path):
    inputs = make()
    (tmp_path / "state" / "spool" / "x.png").write_bytes(PNG)
    await refused(inputs.fetch(Source.model_construct(upload=name), "image"), "invalid", "no such upload")


async def test_the_event_loop_goes_on_while_much_is_brought_in(make, tmp_path):
    """Live sessions share it: the longest that its thread worked in one go. Not by the wall: others use the machine."""
    text = base64.b64encode(bytes(10_000_000)).decode()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "large.wav").write_bytes(bytes(10_000_000))
    inputs = make()
    longest_s = 0.0

    async def beat() -> None:
        nonlocal longest_s
        worked_s = time.thread_time()
        while True:
            await asyncio.sleep(0.002)
            longest_s = max(longest_s, time.thread_time() - worked_s)
            worked_s = time.thread_time()

    async with serving() as web:
        web.serve("/large.wav", bytes(10_000_000))
        beating = asyncio.create_task(beat())
        for source in (Source(data=text), Source(path="large.wav"), Source(url=web.url("/large.wav"))):
            with pytest.raises(Refusal):
                await inputs.fetch(source, "audio")
        await refused(inputs.keep(once(*[bytes(60_000)] * 160), "audio"), "invalid")
        beating.cancel()
    print(f"worked for {1000 * longest_s:.0f} ms in one go")
    assert longest_s < 0.1


# What it is


def png_header(width: int, height: int) -> bytes:
    """A picture of that size in a few hundred bytes; what is missing would be found out by decoding it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("image", b""),
        ("image", b"text"),
        ("image", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"),
        ("image", b"%!PS\n(/etc/passwd) (r) file"),
        ("image", PNG[: len(PNG) // 2]),
        ("image", png_header(60_000, 60_000)),
        ("image", png_header(2**31 - 1, 2**31 - 1)),
        ("image", png_header(1000, 2)),
        ("audio", b""),
        ("audio", b"text"),
        ("audio", PNG),
        ("audio", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ("audio", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n"),
        ("audio", b"RIFF\xff\xff\xff\xffWAVEfmt "),
        ("audio", b"\x00" * 5000),
    ],
)
async def test_what_cannot_be_used_is_refused_before_it_gets_a_name(make, kind, body, tmp_path):
    message = await refused(make().keep(once(body), kind, "mine"), "invalid", "mine: ")
    assert str(tmp_path) not in message
    assert await left(tmp_path) == []


async def test_a_picture_is_no_sound_and_a_sound_is_no_picture_also_when_kept_as_the_other(make, wav):
    inputs = make()
    picture, sound = await inputs.keep(once(PNG), "image"), await inputs.keep(once(wav), "audio")
    await refused(inputs.fetch(Source(upload=picture.name), "audio"), "invalid", "no sound")
    await refused(inputs.fetch(Source(upload=sound.name), "image"), "invalid", "not a picture")


async def test_the_limits_of_the_settings_hold(make, tmp_path, wav):
    settings = Settings.model_validate(
        {
            "daemon": {"state": tmp_path / "state"},
            "limits": {"audio_hours": 0.4 / 3600, "picture_megapixels": 0.001},
        }
    )
    inputs = Inputs(settings)
    await refused(inputs.keep(once(PNG), "image"), "invalid", "million pixels")
    await refused(inputs.keep(once(wav), "audio"), "invalid", "limit")


async def test_smaller_limits_hold_for_what_is_there_already(make, tmp_path):
    inputs = make()
    path = await inputs.keep(once(PNG), "image")
    inputs.use(Settings.model_validate({"limits": {"picture_megapixels": 0.001}}))
    await refused(inputs.fetch(Source(upload=path.name), "image"), "invalid", "million pixels")


async def test_a_file_is_looked_into_once(make, monkeypatch):
    looked = []
    really = Inputs._look_into
    monkeypatch.setattr(Inputs, "_look_into", lambda *arguments: (looked.append(1), really(*arguments)))
    inputs = make()
    path = await inputs.keep(once(PNG), "image")
    await inputs.keep(once(PNG), "image")
    await inputs.fetch(Source(upload=path.name), "image")
    assert len(looked) == 1


def peak_mib(program: str, *arguments: object) -> int:
    """The most memory that a Python program held, in a process of its own.

    From /proc: what getrusage tells includes the process that started it.
    """
    program += "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    return int(done.stdout) // 1024


def test_the_largest_picture_that_is_allowed_takes_bounded_memory(tmp_path):
    """79 million pixels of 16 bits in 150 kB."""
    make_it = "import sys; from PIL import Image; Image.new('I;16', (8900, 8900), 300).save(sys.argv[1]); "
    read_it = "from avatar.picture import read_picture; read_picture(sys.argv[1])"
    assert peak_mib(make_it + read_it, tmp_path / "large.png") < 800


def test_a_picture_beside_a_sound_takes_no_memory_however_large_it_is(tmp_path):
    """FFmpeg looks at a picture of each track, and a few kilobytes can be one of 200 million pixels."""
    path = tmp_path / "film.mov"
    with av.open(path, "w") as film:
        pictures, sound = film.add_stream("png", rate=25), film.add_stream("pcm_s16le", rate=16_000, layout="mono")
        pictures.width = pictures.height = 9000
        pictures.pix_fmt = "gray"
        frame = av.VideoFrame.from_ndarray(np.zeros((9000, 9000), np.uint8), "gray")
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), "s16", "mono")
        heard.sample_rate = 16_000
        film.mux(pictures.encode(frame) + sound.encode(heard) + pictures.encode(None) + sound.encode(None))
    assert path.stat().st_size < 1e6
    opens = "import sys; from audio.decode import open_sound; "
    nothing = peak_mib(opens)
    assert peak_mib(f"{opens} assert open_sound(sys.argv[1]).sample_rate == 16_000", path) < nothing + 40


async def test_few_files_are_decoded_at_once(make, monkeypatch):
    running, most = 0, 0
    lock = threading.Lock()

    def look_into(*_: object) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    monkeypatch.setattr(Inputs, "_look_into", look_into)
    inputs = make()
    await asyncio.gather(*(inputs.keep(once(bytes([number])), "image") for number in range(10)))
    assert most == module.CHECKS


async def test_a_file_that_takes_too_long_to_look_into_holds_nobody_up(make, monkeypatch, tmp_path):
    go = threading.Event()
    monkeypatch.setattr(Inputs, "_look_into", lambda *_: go.wait(5))
    monkeypatch.setattr(module, "CHECK_S", 0.2)
    try:
        await refused(make().keep(once(PNG), "image"), "full", "try again")
    finally:
        go.set()
    assert await left(tmp_path) == []


# The spool


async def test_many_bring_the_same_file_at_once_and_it_is_one(make, tmp_path):
    inputs = make()
    paths = await asyncio.gather(*(inputs.keep(once(PNG), "image") for _ in range(20)))
    assert len(set(paths)) == 1
    assert await left(tmp_path) == [paths[0].name]
    assert inputs.spool_bytes == len(PNG)


async def test_a_full_spool_takes_no_more_and_says_when_to_come_again(make, tmp_path):
    inputs = make(spool_gb=len(PNG) * 1.5 / 1e9)
    await inputs.keep(once(PNG), "image")
    with pytest.raises(Refusal) as caught:
        await inputs.keep(once(png(40, 60)), "image")
    assert caught.value.reason == "full"
    assert caught.value.retry_s
    await until_async(lambda: inputs.spool_bytes == len(PNG), 5)


async def test_a_full_disk_is_told_and_leaves_nothing_behind(make, monkeypatch, tmp_path):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    inputs = make()
    with monkeypatch.context() as patch:
        patch.setattr("service.spool.os.fsync", full)
        await refused(inputs.keep(once(PNG), "image"), "full", "no room left on the disk")
    assert await left(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(
            "service.spool.os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
        await refused(inputs.keep(once(PNG), "image"), "unavailable", "Input/output error")
    await inputs.keep(once(PNG), "image")


async def test_a_file_is_on_the_disk_before_it_has_its_name(make, monkeypatch):
    done = []
    for name in ("fsync", "rename"):
        module_os = __import__("os")
        really = getattr(module_os, name)
        monkeypatch.setattr(module_os, name, lambda *a, name=name, really=really: (done.append(name), really(*a))[1])
    await make().keep(once(PNG), "image")
    assert done == ["fsync", "rename", "fsync"], "the file, its name, the folder"


async def none_needed() -> list[Path]:
    return []


async def test_what_nobody_needs_is_deleted_when_it_is_old(make, tmp_path, wav):
    now = [1_000_000.0]
    inputs = make(clock=lambda: now[0], spool_hours=1)
    picture, sound = await inputs.keep(once(PNG), "image"), await inputs.keep(once(wav), "audio")
    now[0] += 3500
    assert await inputs.prune(none_needed) == 0
    now[0] += 200

    async def needed() -> list[Path]:
        return [sound]

    assert await inputs.prune(needed) == 1
    assert await left(tmp_path) == [sound.name]
    assert inputs.spool_bytes == len(wav)
    await refused(inputs.fetch(Source(upload=picture.name), "image"), "invalid", "no such upload")


async def test_what_was_asked_for_again_is_young_again(make):
    now = [1_000_000.0]
    inputs = make(clock=lambda: now[0], spool_hours=1)
    path = await inputs.keep(once(PNG), "image")
    for again in (lambda: inputs.keep(once(PNG), "image"), lambda: inputs.fetch(Source(upload=path.name), "image")):
        now[0] += 3500
        await again()
        now[0] += 3500
        assert await inputs.prune(none_needed) == 0


async def test_what_has_just_come_is_kept_even_where_nothing_is_kept_for_long(make):
    """A job that needs it is about to be stored."""
    now = [1_000_000.0]
    inputs = make(clock=lambda: now[0], spool_hours=1e-6)
    await inputs.keep(once(PNG), "image")
    now[0] += GRACE_S - 1
    assert await inputs.prune(none_needed) == 0
    now[0] += 2
    assert await inputs.prune(none_needed) == 1


async def test_the_oldest_make_room_but_nothing_young_does(make):
    now = [1_000_000.0]
    inputs = make(clock=lambda: now[0], spool_gb=len(PNG) * 2.2 / 1e9)
    first = await inputs.keep(once(PNG), "image")
    second = await inputs.keep(once(png()), "image")
    assert await inputs.prune(none_needed) == 0
    now[0] += GRACE_S + 1
    await inputs.fetch(Source(upload=second.name), "image")
    assert await inputs.prune(none_needed) == 1
    assert not first.exists()
    assert second.exists()


def test_what_a_killed_process_left_half_written_is_gone_at_the_next_start(tmp_path):
    spool = Spool(tmp_path / "spool", 10**6)
    spool.receive().write(b"half")
    kept = spool.receive()
    kept.write(PNG)
    kept.finish()
    path = kept.place()
    again = Spool(tmp_path / "spool", 10**6)
    assert list((tmp_path / "spool").iterdir()) == [path]
    assert again.bytes == len(PNG)


def test_a_file_that_was_found_is_never_deleted_under_its_finder(tmp_path):
    """Whoever prunes and whoever looks up, at the same time, over and over: what was found is still there."""
    now = [0.0]
    spool = Spool(tmp_path / "spool", 10**6, lambda: now[0])
    for _ in range(60):
        incoming = spool.receive()
        incoming.write(PNG)
        incoming.finish()
        path = incoming.place()
        incoming.discard()
        now[0] += GRACE_S + 1
        start = threading.Barrier(2)
        pruning = threading.Thread(target=lambda start=start: (start.wait(), spool.prune([], 1.0)))
        pruning.start()
        start.wait()
        found = spool.find(path.name)
        pruning.join()
        assert found is None or found.exists()
    assert spool.bytes == sum(file.stat().st_size for file in (tmp_path / "spool").iterdir())


def test_a_spool_is_full_by_what_is_under_way_too(tmp_path):
    spool = Spool(tmp_path / "spool", 100)
    one, two = spool.receive(), spool.receive()
    one.write(bytes(60))
    with pytest.raises(SpoolFull):
        two.write(bytes(60))
    one.discard()
    two.write(bytes(60))
    two.discard()
    two.write(bytes(60))
    assert spool.bytes == 0


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"RIFF1234WAVEfmt ", ".wav"),
        (b"RIFF1234WEBPVP8 ", ".webp"),
        (b"\x00\x00\x00 ftypM4A ", ".mp4"),
        (b"", ".bin"),
        (b"\xff\xd8\xff\xe0", ".jpg"),
        (b"ID3\x03", ".mp3"),
        (b"#!/bin/sh", ".bin"),
        (b"../../x", ".bin"),
    ],
)
def test_a_suffix_is_told_by_content(head, expected):
    assert suffix(head) == expected


# Where results and streams may go


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.mp4", "cat.mp4"),
        ("./cat.mp4", "cat.mp4"),
        ("cat", "cat.mp4"),
        ("sub/dir/x.mov", "sub/dir/x.mov"),
        ("小猫.MP4", "小猫.MP4"),
        ("a..b.mp4", "a..b.mp4"),
    ],
)
def test_a_result_goes_below_the_outputs(make, tmp_path, name, expected):
    assert make().allowed_output(name) == tmp_path / "out" / expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "forbidden") for name in ("/etc/cron.d/x.mp4", "../x.mp4", "a/../../x.mp4", "a/..", "..", "~/x.mp4")),
        *((name, "forbidden") for name in (".hidden.mp4", "a/.ssh/x.mp4", "link/x.mp4", "./../x.mp4", ".")),
        *((name, "invalid") for name in ("", "a//b.mp4", "a/", "x\0.mp4", "x\n.mp4", "a\\b.mp4", "x" * 300, "x.sh")),
        *((name, "invalid") for name in ("x.m3u8", "\u2028.mp4", "x.mp4\x1b[2J")),
    ],
)
def test_a_result_goes_nowhere_else(make, tmp_path, name, reason):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal) as caught:
        make().allowed_output(name)
    assert caught.value.reason == reason
    assert str(caught.value).isprintable()


PUBLIC = {"live_example": "8.8.8.8", "inner_example": "10.0.0.9", "mixed_example": "8.8.8.8 127.0.0.1"}


@pytest.mark.parametrize(
    "target", ["rtmp://live.example/app/key", "rtmps://live.example:444/app/key", "srt://live.example:9000?mode=caller"]
)
async def test_a_stream_goes_to_a_public_server(make, target):
    assert await make(names(**PUBLIC)).check_target(target) == target


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "0.0.0.0",
        "169.254.169.254",
        "[64:ff9b::a00:1]",
    ],
)
@pytest.mark.parametrize("scheme", ["rtmp", "srt"])
async def test_a_stream_does_not_go_into_a_private_network(make, host, scheme):
    message = await refused(make().check_target(f"{scheme}://{host}:1935/app/{SECRET}"), "forbidden")
    if scheme == "rtmp":
        assert SECRET not in message


async def test_a_name_that_stands_for_a_private_address_takes_no_stream(make):
    for host in ("inner.example", "mixed.example"):
        message = await refused(make(names(**PUBLIC)).check_target(f"rtmp://{host}/app/{SECRET}"), "forbidden")
        assert SECRET not in message


async def test_a_stream_goes_into_a_private_network_where_that_is_allowed(make):
    inputs = make(sessions={"private_targets": True})
    assert await inputs.check_target("rtmp://127.0.0.1:1935/live/key") == "rtmp://127.0.0.1:1935/live/key"
    await refused(inputs.check_target("rtmp://169.254.169.254/live/key"), "forbidden")


async def test_a_stream_whose_server_moves_into_a_private_network_does_not_follow_it(make):
    """DNS rebinding: it is judged at each connection, and called at the address that was judged."""
    answers = iter(["8.8.8.8", "8.8.4.4", "10.0.0.9"])

    async def resolve(host: str, port: int) -> list[str]:
        try:
            return [next(answers)]
        except StopIteration:
            raise socket.gaierror(socket.EAI_NONAME, "no such host") from None

    inputs = make(resolve)
    await inputs.check_target(f"rtmp://live.example/app/{SECRET}")
    assert await inputs.target_addresses("live.example", 1935) == ["8.8.4.4"]
    sink = open_sink(f"rtmp://live.example/app/{SECRET}", look_up=inputs.target_addresses)
    with pytest.raises(TargetRefused, match="private network"):
        await sink.open()
    with pytest.raises(TargetAbsent, match="no host"):
        await sink.open()


@pytest.mark.parametrize(
    "target",
    [
        f"srt://live.example:9000?mode=listener&passphrase={SECRET}",
        "srt://live.example:1?mode=rendezvous",
        "srt://:9000",
        "srt://live.example:1?a=b&mode=Listener",
        "srt://live.example:1?mode=caller&mode=listener",
        "srt://live.example:1?mode=callerx",
        "srt://live.example:1?mode=",
    ],
)
async def test_a_session_does_not_make_the_daemon_listen(make, target):
    with pytest.raises(Refusal) as caught:
        await make(names(**PUBLIC)).check_target(target)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        f"rtmp://live.example/app/{SECRET} live=1",
        f"rtmp://live.example/app/{SECRET}\n",
        f"rtmp://live.example:99999/app/{SECRET}",
        f"rtmp://[::1/app/{SECRET}",
        f"rtmp:///app/{SECRET}",
        f"rtmp://u:{SECRET}@/app/x",
    ],
)
async def test_an_address_of_a_stream_that_is_none_is_refused_without_its_key(make, target):
    assert SECRET not in await refused(make(names(**PUBLIC)).check_target(target), "invalid")


@pytest.mark.parametrize(
    "target",
    [
        "http://live.example/x",
        "tcp://live.example:25",
        "hls://x/y.m3u8",
        "null://",
        "tee://x",
        "RTMP://127.0.0.1/a/b",
        "concat://a",
        "udp://10.0.0.1:1",
        "whip://live.example/x",
        "://x",
        "crypto+file://x.mp4",
        "segment:600://x.mp4",
    ],
)
async def test_other_kinds_of_stream_are_refused(make, target):
    await refused(make(names(**PUBLIC)).check_target(target), "forbidden", "allowed: rtmp")


async def test_only_kinds_that_are_set_are_allowed(make):
    inputs = make(names(**PUBLIC), sessions={"targets": ["rtmps"]})
    for target in ("rtmp://live.example/a/b", "x.mp4", "x.m3u8", "event:x.m3u8", "srt://live.example:1"):
        await refused(inputs.check_target(target), "forbidden", "allowed: rtmps")
    await inputs.check_target("rtmps://live.example/a/b")
    await refused(make(sessions={"targets": []}).check_target("x.mp4"), "forbidden", "none is allowed")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("show.mp4", "OUT/show.mp4"),
        ("file://show.mp4", "OUT/show.mp4"),
        ("a/show.m3u8", "OUT/a/show.m3u8"),
        ("event:a/show.m3u8", "event:OUT/a/show.m3u8"),
        ("segment:600:show.mp4", "segment:600:OUT/show.mp4"),
        ("segment:600:%Y-%m-%d.mp4", "segment:600:OUT/%Y-%m-%d.mp4"),
        ("tcp:host.mp4", "OUT/tcp:host.mp4"),
    ],
)
async def test_a_file_of_a_session_lies_below_the_outputs(make, tmp_path, target, expected):
    assert await make().check_target(target) == expected.replace("OUT", str(tmp_path / "out"))


@pytest.mark.parametrize(
    "target",
    [
        "/etc/x.mp4",
        "file:///etc/x.mp4",
        "../x.mp4",
        "event:../x.m3u8",
        "event:/tmp/x.m3u8",
        "segment:600:/tmp/x.mp4",
        "segment:600:../x.mp4",
        "a/../../x.m3u8",
        ".x.mp4",
        "segment:1:.ssh/x.mp4",
        "event:.x.m3u8",
    ],
)
async def test_a_file_of_a_session_lies_nowhere_else(make, target):
    await refused(make().check_target(target), "forbidden")


@pytest.mark.parametrize(
    "target",
    ["x.sh", "x", "pipe:1", "event:x.mp4\n", "segment:600:", "", "x.ts", "event:", "event:x.mp4", "segment:600:x.m3u8"],
)
async def test_a_file_of_a_session_is_a_video(make, target):
    with pytest.raises(Refusal) as caught:
        await make().check_target(target)
    assert str(caught.value).isprintable()


async def test_halves_of_characters_are_refused_in_a_line_that_can_be_sent(make):
    """JSON can bring them; whoever writes them into an answer fails."""
    inputs = make(names())
    works = [inputs.fetch(Source.model_construct(**{name: "http://x/\ud800" if name == "url" else "\ud800"}), "image")
             for name in ("path", "url", "data")]  # fmt: skip
    works += [
        inputs.check_target(target) for target in ("rtmp://\ud800/a/b", "\ud800.mp4", "\ud800://x", "srt://x\udfff:1")
    ]
    works += [inputs.keep(once(b"x"), "image", "\ud800.png"), asyncio.to_thread(inputs.allowed_output, "\udc80.mp4")]
    for work in works:
        with pytest.raises(Refusal) as caught:
            await work
        str(caught.value).encode()


async def test_a_name_server_that_never_answers_holds_nobody_up(make, monkeypatch):
    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(5)
        return []

    monkeypatch.setattr(module, "READ_S", 0.2)
    await refused(make(resolve).check_target("rtmp://slow.example/a/b"), "invalid", "could not be looked up")
    await refused(make(resolve, fetch_s=0.2).fetch(Source(url="http://slow.example/"), "image"), "invalid", "0.2 s")
