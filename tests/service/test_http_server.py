"""The server on a real socket: clients who say nothing, read nothing, send too slowly, or are too many."""

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import subprocess

import httpx
import pytest
from http_app import TOKENS, make_app, served, sound
from waiting import until_async

from audio.errors import AvatardError
from service import http_door, http_server
from service.commands import OpenSession, SubmitJob

JSON_HEAD = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@contextlib.asynccontextmanager
async def raw(place, data=b"", **options):
    """A plain connection: reader and writer."""
    host, _, port = place.rpartition(":")
    async with asyncio.timeout(120):
        reader, writer = await asyncio.open_connection(host, int(port), **options)
        try:
            writer.write(data)
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def ended(reader):
    """Everything until the server closes, however it does that."""
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


async def test_it_tells_where_it_listens_and_answers_there(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    async with served(make_app(tmp_path)) as place, httpx.AsyncClient() as client:
        assert (await client.get(f"http://{place}/livez")).json() == {"status": "ok"}
    assert f"listening on http://{place}" in caplog.text


async def test_a_port_in_use_is_told_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AvatardError) as told:
            async with served(make_app(tmp_path, f"http.port={port}")):
                pass
    assert str(told.value) == (
        f"http.host 127.0.0.1, http.port {port}: cannot listen (address already in use); 0 takes a free port"
    )


async def test_a_host_that_is_not_ours_is_told_in_one_line(tmp_path):
    with pytest.raises(AvatardError, match=r"http.host 127\.0\.0\.1\.example\.invalid.*cannot listen"):
        async with served(make_app(tmp_path, "http.host=127.0.0.1.example.invalid", tokens=True)):
            pass


def self_signed(certificate, key):
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    whose = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", "req", "-x509", *curve.split(), *whose.split(), "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.needs("openssl")
async def test_tls_from_the_settings(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    self_signed(certificate, key)
    app = make_app(tmp_path, f"http.tls_cert={certificate}", f"http.tls_key={key}")
    context = ssl.create_default_context(cafile=str(certificate))
    async with served(app) as place, httpx.AsyncClient(verify=context) as client:
        assert (await client.get(f"{place}/livez")).status_code == 200
    with pytest.raises(AvatardError, match=r"http.tls_cert, http.tls_key: cannot be used"):
        async with served(make_app(tmp_path, f"http.tls_cert={key}", f"http.tls_key={key}")):
            pass


# Clients who do nothing


@pytest.mark.parametrize("said", [b"", b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
async def test_who_does_not_say_what_they_want_is_cut_off(tmp_path, monkeypatch, said):
    monkeypatch.setattr(http_server, "HEAD_S", 0.3)
    async with served(make_app(tmp_path)) as place, raw(place, said) as (reader, _):
        assert await ended(reader) == b""


async def test_who_drips_their_headers_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_S", 0.5)
    async with served(make_app(tmp_path)) as place, raw(place, b"GET /livez HTTP/1.1\r\n") as (reader, writer):

        async def drip():
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"X: y\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert await ended(reader) == b""
        dripping.cancel()


async def test_a_connection_is_used_again_and_closed_when_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(http_server, "IDLE_S", 1.5)
    monkeypatch.setattr(http_server, "HEAD_S", 0.2)
    asked = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    async with served(make_app(tmp_path)) as place, raw(place, asked) as (reader, writer):
        assert (await reader.readuntil(b'"ok"}')).startswith(b"HTTP/1.1 200")
        # Longer than a head may take: between two requests another limit counts.
        await asyncio.sleep(0.4)
        writer.write(asked)
        assert b"200 OK" in await reader.readuntil(b'"ok"}')
        assert await ended(reader) == b""


async def test_headers_without_end_are_refused(tmp_path):
    async with served(make_app(tmp_path)) as place:
        async with raw(place, b"GET /livez HTTP/1.1\r\nX: " + b"x" * 100_000) as (reader, _):
            assert b" 400 " in await ended(reader)
        async with raw(place, b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n") as (reader, _):
            assert b" 400 " in await ended(reader)
        async with raw(place, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc") as (reader, _):
            assert b" 400 " in await ended(reader)


async def test_a_body_that_does_not_come_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(http_door, "BODY_GRACE_S", 0.3)
    head = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    async with served(make_app(tmp_path)) as place, raw(place, head + b'{"te') as (reader, _):
        answer = await ended(reader)
        assert b" 408 " in answer
        assert b"the body came too slowly" in answer


async def test_who_leaves_in_the_middle_is_no_error(tmp_path, caplog):
    app = make_app(tmp_path)
    for path in (b"/v1/uploads?kind=audio", b"/v1/jobs", b"/v1/tasks/video/form"):
        head = b"POST " + path + JSON_HEAD[13:] % 1000
        async with served(app) as place, raw(place, head + b'{"te') as (_, writer):
            await asyncio.sleep(0.05)
            writer.transport.abort()
            await until_async(lambda: app.metrics.requests)
            assert app.metrics.requests.pop()[2] in (400, 422, 499)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_body_that_is_too_large_is_refused_at_its_announcement(tmp_path):
    head = b"POST /v1/uploads?kind=audio HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99000000000\r\n\r\n"
    async with served(make_app(tmp_path)) as place, raw(place, head) as (reader, _):
        answer = await ended(reader)
        assert b" 413 " in answer
        assert b"the body is larger than 200 MB" in answer


async def test_large_bodies_are_not_all_held_at_once(tmp_path):
    app = make_app(tmp_path, "http.max_json_mb=1")
    head = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 900000\r\n\r\n"
    )
    async with served(app) as place, contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(raw(place, head))
        await asyncio.sleep(0.2)
        async with raw(place, head) as (reader, _):
            answer = await ended(reader)
            assert b" 503 " in answer
            assert b"retry-after: 2" in answer.lower()
        # A small one still finds room.
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"http://{place}/v1/jobs", json={"text": "hello"})
            assert answer.status_code == 201


async def test_who_takes_nothing_of_what_they_asked_for_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(http_server, "STALL_S", 0.5)
    app = make_app(tmp_path)
    await app.jobs.submit(SubmitJob.model_validate({"id": "one", "text": "a"}))
    app.jobs.complete("one", bytes(50_000_000))
    await app.sessions.open(OpenSession.model_validate({"id": "one"}))
    asked = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    upgrade = (
        b"GET /v1/sessions/one/view HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    async with served(app) as place:
        for request in (asked % b"/v1/jobs/one/result", asked % b"/v1/sessions/one/view.mp4", upgrade):
            host, _, port = place.rpartition(":")
            with socket.create_connection((host, int(port))) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(request)
                await until_async(lambda: len(app.metrics.requests) == 1, what=str(request))
                app.metrics.requests.clear()
        session = app.sessions.sessions["one"]
        assert session.viewers == 0


@pytest.fixture
def transports(monkeypatch):
    """The server's side of each connection, as they are made."""
    made = []
    original = http_server._HttpProtocol.connection_made

    def remember(self, transport):
        original(self, transport)
        made.append(transport)

    monkeypatch.setattr(http_server._HttpProtocol, "connection_made", remember)
    return made


async def test_who_vanishes_without_a_word_is_noticed(tmp_path, transports):
    """The kernel asks whether the other end is still there: nothing else would, of one that only listens."""
    async with served(make_app(tmp_path)) as place, raw(place):
        await until_async(lambda: transports)
        connection = transports[0].get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


# Crowds


async def test_who_is_too_many_is_told_so_and_probes_are_answered(tmp_path):
    app = make_app(tmp_path, "http.connections=5")
    async with served(app) as place, contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(raw(place))
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://{place}/v1/jobs")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["detail"] == "5 connections are open, which is the limit; try again later"
            assert (await client.get(f"http://{place}/livez")).status_code == 200
        for _ in range(http_server.SPARE_CONNECTIONS):
            await stack.enter_async_context(raw(place))
        async with raw(place, b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as (reader, _):
            assert await ended(reader) == b""
    async with served(app) as place, httpx.AsyncClient() as client:
        assert (await client.get(f"http://{place}/v1/jobs")).status_code == 200


async def test_fifty_clients_with_slow_readers_among_them_cost_little(tmp_path, transports):
    """Forty who work, ten who ask for a large file and read none of it: nobody waits for those, who hold little."""
    app = make_app(tmp_path)
    await app.jobs.submit(SubmitJob.model_validate({"id": "one", "text": "a"}))
    app.jobs.complete("one", bytes(20_000_000))
    asked = b"GET /v1/jobs/one/result HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

    async def work(client, number):
        answer = await client.post("/v1/jobs", json={"id": f"job-{number}", "text": "hello"})
        assert answer.status_code == 201
        assert (await client.get(f"/v1/jobs/job-{number}")).status_code == 200
        part = await client.get("/v1/jobs/one/result", headers={"Range": "bytes=0-999"})
        assert (part.status_code, len(part.content)) == (206, 1000)

    async with served(app) as place, contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(raw(place, asked))
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=f"http://{place}", limits=limits, timeout=60) as client:
            await asyncio.gather(*(work(client, number) for number in range(40)))
        await until_async(lambda: sum(transport.get_write_buffer_size() > 0 for transport in transports) == 10)
        # The high-water mark of a transport, and one piece of a file.
        assert all(transport.get_write_buffer_size() < 200_000 for transport in transports)


# The end


async def test_what_was_asked_for_is_answered_before_the_end(tmp_path, monkeypatch):
    app = make_app(tmp_path)
    begun, go_on = asyncio.Event(), asyncio.Event()
    original = app.jobs.get

    async def slow(id):
        begun.set()
        await go_on.wait()
        return await original(id)

    await app.jobs.submit(SubmitJob.model_validate({"id": "one", "text": "a"}))
    async with httpx.AsyncClient() as client, contextlib.AsyncExitStack() as stack:
        place = await stack.enter_async_context(served(app))
        monkeypatch.setattr(app.jobs, "get", slow)
        asking = asyncio.create_task(client.get(f"http://{place}/v1/jobs/one"))
        await begun.wait()
        ending = asyncio.create_task(stack.aclose())
        await asyncio.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient() as other:
                await other.get(f"http://{place}/livez")
        go_on.set()
        assert (await asking).status_code == 200
        await ending


async def test_streams_end_with_the_server_and_nobody_holds_it_up(tmp_path):
    app = make_app(tmp_path, "daemon.shutdown_s=2")
    clock = asyncio.get_running_loop().time
    async with httpx.AsyncClient() as client, contextlib.AsyncExitStack() as stack:
        async with served(app) as place:
            answer = await stack.enter_async_context(client.stream("GET", f"http://{place}/v1/events"))
            text = answer.aiter_text()
            assert await anext(text) == ": hello\n\n"
            # One who sends a body that never ends.
            head = b"POST /v1/uploads?kind=audio HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n"
            await stack.enter_async_context(raw(place, head + sound(1.0)[:1000]))
            await asyncio.sleep(0.1)
            began = clock()
        assert clock() - began < 5
        with contextlib.suppress(httpx.RemoteProtocolError, StopAsyncIteration):
            while True:
                await anext(text)
        assert not app.hub._listeners


async def test_nothing_of_a_request_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    app = make_app(tmp_path, tokens=True)
    async with served(app) as place, httpx.AsyncClient() as client:
        for token in (TOKENS["admin"], "a-wrong-token-0123456789"):
            await client.get(f"http://{place}/v1/jobs/secret-id?x=secret", headers={"Authorization": f"Bearer {token}"})
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("httpx")]
    assert "secret" not in json.dumps(ours)
    assert "token-0123456789" not in json.dumps(ours)
