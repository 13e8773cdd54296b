"""Live sessions over HTTP and WebSockets, over loopback where there is a socket."""

import asyncio
import base64
import contextlib
import json

import pytest
from http_app import TOKENS, bearer, client_of, make_app, picture, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import until_async
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from service.http import make_http


@pytest.fixture
def app(tmp_path):
    return make_app(tmp_path)


@pytest.fixture
async def client(app):
    async with client_of(make_http(app)) as client:
        yield client


# Commands


async def test_a_session_is_opened_told_and_closed(client, app):
    answer = await client.post("/v1/sessions", json={"id": "one", "prompt": "smiles"})
    assert (answer.status_code, answer.headers["location"]) == (201, "/v1/sessions/one")
    assert answer.json()["id"] == "one"
    # Whatever a session says of itself is passed on.
    assert (await client.get("/v1/sessions/one")).json()["frames"] == 12
    assert [session["id"] for session in (await client.get("/v1/sessions")).json()["sessions"]] == ["one"]
    assert (await client.delete("/v1/sessions/one")).json()["id"] == "one"
    assert app.sessions.sessions["one"].closed.is_set()
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/view.mp4"), ("POST", "/interrupt")):
        answer = await client.request(method, f"/v1/sessions/none{path}")
        assert (answer.status_code, answer.json()["detail"]) == (404, "session none: there is none")


async def test_as_many_sessions_as_there_may_be(client):
    assert [(await client.post("/v1/sessions", json={})).status_code for _ in range(3)] == [201, 201, 503]


async def test_a_session_is_spoken_to(client, app):
    await client.post("/v1/sessions", json={"id": "one"})
    session = app.sessions.sessions["one"]
    assert (await client.post("/v1/sessions/one/say", json={"text": "hello", "voice": "anna"})).status_code == 202
    assert session.said == [("hello", "anna")]
    told = await client.post("/v1/sessions/one/interrupt")
    assert (told.status_code, told.json()) == (200, {"played_s": 1.5, "dropped_s": 0.5})
    image = (await client.post("/v1/uploads?kind=image", content=picture())).json()
    assert (await client.post("/v1/sessions/one/set", json={"image": image})).status_code == 200
    assert (await client.post("/v1/sessions/one/set", json={})).status_code == 422
    assert (await client.post("/v1/sessions/one/say", json={"text": "", "interrupt": 1})).status_code == 422


async def test_outputs_come_and_go_under_names_without_secrets(client):
    await client.post("/v1/sessions", json={"id": "one"})
    answer = await client.post("/v1/sessions/one/outputs", json={"target": "rtmp://1.1.1.1/live/secret"})
    assert (answer.status_code, answer.json()) == (201, {"name": "rtmp://1.1.1.1/live/***"})
    name = answer.json()["name"]
    assert (await client.get("/v1/sessions/one")).json()["outputs"] == [name]
    assert (await client.delete(f"/v1/sessions/one/outputs/{name}")).json()["outputs"] == []
    assert (await client.delete(f"/v1/sessions/one/outputs/{name}")).status_code == 404
    for target in ("rtmp://127.0.0.1/live/secret", "/etc/cron.d/x", "ftp://1.1.1.1/x", "rtmp://10.0.0.1/a/secret"):
        answer = await client.post("/v1/sessions/one/outputs", json={"target": target})
        assert (answer.status_code, "secret" in answer.text) == (403, False), target


async def test_hls_is_served_from_its_folder_alone(client, app, tmp_path):
    await client.post("/v1/sessions", json={"id": "one"})
    folder = app.sessions.sessions["one"].hls_folder
    folder.mkdir()
    (folder / "index.m3u8").write_text("#EXTM3U")
    (folder / "notes.txt").write_text("secret")
    (tmp_path / "outputs" / "other.mp4").write_text("secret")
    answer = await client.get("/v1/sessions/one/hls/index.m3u8")
    assert (answer.text, answer.headers["content-type"]) == ("#EXTM3U", "application/vnd.apple.mpegurl")
    assert "attachment" not in answer.headers["content-disposition"]
    for name in ("notes.txt", "..%2fother.mp4", "../other.mp4", "%2e%2e/other.mp4", "none.ts", ".m3u8"):
        answer = await client.get(f"/v1/sessions/one/hls/{name}")
        assert answer.status_code in (404, 422), name
        assert "secret" not in answer.text


# Watching


@contextlib.asynccontextmanager
async def on_air(app, **options):
    """A session of the name "one" behind a real socket: its base address, and the session."""
    async with served(app) as place:
        from service.commands import OpenSession

        session = await app.sessions.open(OpenSession.model_validate({"id": "one"}))
        yield f"ws://{place}/v1/sessions/one", session


async def test_a_viewer_gets_the_type_the_beginning_and_the_fragments(app):
    async with on_air(app) as (url, session):
        session.pieces = [b"one", b"two"]
        async with connect(f"{url}/view") as socket:
            assert json.loads(await socket.recv()) == {"type": session.view_type}
            assert [await socket.recv() for _ in range(3)] == [b"beginning", b"one", b"two"]
            with pytest.raises(ConnectionClosed) as ended:
                await socket.recv()
            assert ended.value.rcvd.code == 1000


async def test_a_viewer_who_leaves_makes_room_at_once(app):
    async with on_air(app) as (url, session):
        async with connect(f"{url}/view") as one, connect(f"{url}/view") as two:
            await one.recv()
            await two.recv()
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"{url}/view")
            assert refused.value.response.status_code == 503
            assert json.loads(refused.value.response.body) == {"detail": "2 viewers watch, which is the limit"}
            await one.close()
            await until_async(lambda: session.viewers == 1)
            async with connect(f"{url}/view"):
                pass
        await until_async(lambda: session.viewers == 0)


async def test_pictures_come_over_plain_http_too_and_end_with_the_session(app):
    import httpx

    async with on_air(app) as (url, session), httpx.AsyncClient() as client:
        async with client.stream("GET", url.replace("ws:", "http:") + "/view.mp4") as answer:
            assert answer.headers["content-type"].startswith("video/mp4; codecs=")
            pieces = answer.aiter_raw()
            assert (await anext(pieces)).startswith(b"beginning")
            assert session.viewers == 1
        await until_async(lambda: session.viewers == 0)
        session.pieces = [b"last"]
        assert (await client.get(url.replace("ws:", "http:") + "/view.mp4")).content == b"beginninglast"


# Speaking


async def heard(socket, event):
    """The next message of that kind."""
    async with asyncio.timeout(10):
        while (message := json.loads(await socket.recv()))["event"] != event:
            pass
    return message


async def closed(socket):
    """The code with which the server closes."""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionClosed):
            while True:
                await socket.recv()
    return socket.close_code


@pytest.mark.parametrize("in_address", [True, False])
async def test_sound_and_commands_arrive_in_their_order(app, in_address):
    async with on_air(app) as (url, session):
        address = f"{url}/audio?format=s16le:16000:1" if in_address else f"{url}/audio"
        async with connect(address) as socket:
            if not in_address:
                await socket.send('{"format": "s16le:16000:1"}')
            assert (await heard(socket, "ready"))["id"] == "one"
            await socket.send(b"abcd")
            await socket.send('{"type": "say", "text": "hello", "voice": "anna"}')
            await socket.send(b"efgh")
            await socket.send('{"type": "end"}')
            await until_async(lambda: session.ended_utterances == 1)
            assert (session.heard, session.said) == ([b"abcd", b"efgh"], [("hello", "anna")])


async def test_what_happens_to_the_session_is_told_to_its_speaker(app):
    async with on_air(app) as (url, session), connect(f"{url}/audio?format=s16le:16000:1") as socket:
        await heard(socket, "ready")
        app.hub.tell("session", "other", "speaking")
        app.hub.tell("session", "one", "too slow", load=1.2)
        told = await heard(socket, "too slow")
        assert (told["id"], told["load"]) == ("one", 1.2)
        await session.close()
        assert (await heard(socket, "closed"))["id"] == "one"
        assert await closed(socket) == 1000


async def test_an_interruption_overtakes_the_sound_that_waits(app):
    async with on_air(app) as (url, session), connect(f"{url}/audio?format=s16le:16000:1") as socket:
        await heard(socket, "ready")
        session.room.clear()
        for number in range(20):
            await socket.send(b"old %d" % number)
        await socket.send('{"type": "interrupt"}')
        told = await heard(socket, "interrupted")
        assert (told["played_s"], told["dropped_s"]) == (1.5, 0.5)
        await socket.send(b"new")
        session.room.set()
        await until_async(lambda: session.heard)
        assert session.heard == [b"new"]
        # One that came another way is told, and drops what waits.
        session.room.clear()
        await socket.send(b"old again")
        await asyncio.sleep(0.05)
        session.interrupt()
        assert (await heard(socket, "interrupted"))["kind"] == "session"
        await socket.send(b"newer")
        session.room.set()
        await until_async(lambda: len(session.heard) == 2)
        assert session.heard == [b"new", b"newer"]


async def test_to_say_instead_interrupts_first(app):
    async with on_air(app) as (url, session), connect(f"{url}/audio?format=s16le:16000:1") as socket:
        session.room.clear()
        await socket.send(b"old")
        await socket.send('{"type": "say", "text": "stop", "interrupt": true}')
        await heard(socket, "interrupted")
        session.room.set()
        await until_async(lambda: session.said)
        assert (session.heard, session.said) == ([], [("stop", None)])


async def test_who_sends_more_than_is_taken_has_to_wait(app):
    async with on_air(app) as (url, session), connect(f"{url}/audio?format=s16le:16000:1", write_limit=1000) as socket:
        await heard(socket, "ready")
        session.room.clear()
        sent = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while sent < 100_000_000:
                    await socket.send(bytes(100_000))
                    sent += 100_000
        # What the server read, and what the sockets of this machine hold.
        assert sent < 20_000_000
        session.room.set()
        await socket.send(b"end")
        await until_async(lambda: session.heard[-1:] == [b"end"])


BAD = [
    "{",
    "[]",
    "7",
    "null",
    '"say"',
    "{}",
    '{"type": "dance"}',
    '{"type": "say"}',
    '{"type": "say", "text": ""}',
    '{"type": "say", "text": 7}',
    '{"type": "interrupt", "now": true}',
    "[" * 100_000,
]


async def test_a_bad_message_is_answered_and_the_next_is_taken(app):
    async with on_air(app) as (url, session), connect(f"{url}/audio?format=s16le:16000:1") as socket:
        for text in BAD:
            await socket.send(text)
            assert (await heard(socket, "error"))["detail"]
        await socket.send(b"not opus")
        assert (await heard(socket, "error"))["detail"] == "this packet is not Opus"
        await socket.send(b"good")
        await until_async(lambda: session.heard == [b"good"])


async def test_who_sends_nothing_but_nonsense_is_sent_away(app):
    async with on_air(app) as (url, _), connect(f"{url}/audio?format=s16le:16000:1") as socket:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(100):
                await socket.send("nonsense")
        assert await closed(socket) == 1008


async def test_without_a_format_there_is_nothing_to_hear(app):
    async with on_air(app) as (url, session):
        for first in ("{", "{}", '{"format": 7}', '{"format": "mp3"}', b"sound", '{"format": "s16le:0:1"}'):
            async with connect(f"{url}/audio") as socket:
                await socket.send(first)
                assert (await heard(socket, "error"))["detail"]
                assert await closed(socket) == 1008
        assert not session.heard


async def test_a_format_in_the_address_that_is_none_is_refused(app):
    async with on_air(app) as (url, _):
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"{url}/audio?format=mp3")
        assert refused.value.response.status_code == 422
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"{url.replace('one', 'none')}/audio")
        assert refused.value.response.status_code == 404


async def test_a_message_that_is_too_long_ends_the_socket_and_nothing_else(app):
    async with on_air(app) as (url, session):
        async with connect(f"{url}/audio?format=s16le:16000:1") as socket:
            await socket.send(bytes(1_000_001))
            assert await closed(socket) == 1009
        async with connect(f"{url}/audio?format=s16le:16000:1") as socket:
            await socket.send(b"good")
            await until_async(lambda: session.heard == [b"good"])


async def test_the_client_who_came_last_speaks(app):
    async with on_air(app) as (url, session), connect(f"{url}/audio?format=s16le:16000:1") as one:
        await heard(one, "ready")
        async with connect(f"{url}/audio?format=s16le:16000:1") as two:
            assert await closed(one) == 1008
            assert one.close_reason == "another client speaks now"
            await two.send(b"good")
            await until_async(lambda: session.heard == [b"good"])


async def test_when_the_server_ends_its_sockets_do(app):
    async with contextlib.AsyncExitStack() as stack:
        async with on_air(app) as (url, _):
            audio = await stack.enter_async_context(connect(f"{url}/audio?format=s16le:16000:1"))
            view = await stack.enter_async_context(connect(f"{url}/view"))
            await heard(audio, "ready")
        assert await closed(audio) in (1001, 1012)
        assert await closed(view) in (1000, 1012)


# Who may


async def test_a_token_comes_in_a_header_or_as_a_subprotocol(tmp_path):
    app = make_app(tmp_path, tokens=True)
    async with on_air(app) as (url, _):
        address = f"{url}/audio?format=s16le:16000:1"
        async with connect(address, additional_headers=bearer("live")) as socket:
            await heard(socket, "ready")
        encoded = base64.urlsafe_b64encode(TOKENS["live"].encode()).decode().rstrip("=")
        async with connect(address, subprotocols=["avatard", f"bearer.{encoded}"]) as socket:
            assert socket.subprotocol == "avatard"
            await heard(socket, "ready")
        for options, status in (
            ({}, 401),
            ({"subprotocols": ["avatard", "bearer.!!"]}, 401),
            ({"subprotocols": ["avatard", "bearer.d3Jvbmc"]}, 401),
            ({"additional_headers": bearer("read")}, 403),
            ({"additional_headers": bearer("jobs")}, 403),
        ):
            with pytest.raises(InvalidStatus) as refused:
                await connect(address, **options)
            assert refused.value.response.status_code == status
        async with connect(f"{url}/view", additional_headers=bearer("read")) as socket:
            await socket.recv()


async def test_a_page_of_another_site_opens_no_socket(app):
    async with on_air(app) as (url, _):
        for way in ("audio?format=s16le:16000:1", "view"):
            for origin in ("https://evil.example", "null", "http://localhost:1"):
                with pytest.raises(InvalidStatus) as refused:
                    await connect(f"{url}/{way}", origin=origin)
                assert refused.value.response.status_code == 403
            async with connect(f"{url}/{way}", origin=url.replace("ws:", "http:").partition("/v1")[0]):
                pass


MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100),
    st.sampled_from(BAD),
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=True) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "voice"]), inner),
        max_leaves=5,
    ).map(json.dumps),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["say", "interrupt", "end"])},
        optional={"text": st.text(max_size=50), "voice": st.text(max_size=10), "interrupt": st.booleans()},
    ).map(json.dumps),
)


def fuzz(tmp_path, examples):
    """Any messages: no crash, no bug, and afterwards a good one is heard."""
    app = make_app(tmp_path)

    async def talk(url, first, messages):
        async with connect(f"{url}/audio" + ("?format=s16le:16000:1" if first is None else "")) as socket:
            with contextlib.suppress(ConnectionClosed):
                for message in ([] if first is None else [first]) + messages:
                    await socket.send(message)
                    # Something to tell, at whatever moment.
                    app.hub.tell("session", "one", "speaking")
                await socket.send('{"type": "end"}')
        app.hub.tell("session", "one", "idle")
        assert socket.close_code in (1000, 1001, 1007, 1008)

    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        url, session = runner.run(stack.enter_async_context(on_air(app)))

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.none() | MESSAGES, st.lists(MESSAGES, max_size=6))
        def any_messages(first, messages):
            runner.run(talk(url, first, messages))

        try:
            any_messages()
            session.heard.clear()
            runner.run(talk(url, None, [b"good"]))
            runner.run(until_async(lambda: session.heard == [b"good"]))
        finally:
            runner.run(stack.aclose())
    assert {status for _, _, status in app.metrics.requests} == {101}


def test_no_message_makes_it_crash(tmp_path, caplog):
    fuzz(tmp_path, 40)
    assert "Traceback" not in caplog.text


@pytest.mark.slow
def test_no_message_out_of_many_makes_it_crash(tmp_path, caplog):
    """Half a minute."""
    fuzz(tmp_path, 3000)
    assert "Traceback" not in caplog.text
