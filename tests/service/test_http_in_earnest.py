"""HTTP with the daemon behind it: what clients send becomes videos, and a voice in a socket a picture in another."""

import asyncio
import contextlib
import io
import json
import socket
import time

import av
import httpx
import numpy as np
import psutil
import pytest
from described import found_wrong, of_server
from http_app import picture, sound
from mp4 import read_mp4
from serve import TOY, Serve
from waiting import until
from websockets.asyncio.client import connect

SETTINGS = ("sessions.limit=4", "auth.requests_per_minute=1000000", "encoder.preset=ultrafast")


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    with Serve(tmp_path_factory.mktemp("daemon"), *SETTINGS) as serve:
        yield serve.ready()
        assert "Traceback" not in serve.text


def test_the_message_of_a_published_lightx2v_client_becomes_a_video(serve, tmp_path):
    """Sent, followed and fetched as those clients do it."""
    message = {
        "prompt": "Two cats in boxing gear",
        "negative_prompt": "blurred, 静态",
        "image_path": "",
        "seed": 42,
        "save_result_path": "./cat_boxing_seed42.mp4",
    }
    assert serve.call("GET", "/v1/service/status").json()["service_status"] == "idle"
    told = serve.call("POST", "/v1/tasks/video/", json=message)
    assert told.status_code == 200
    id = told.json()["task_id"]
    status = until(lambda: ended(serve, id), 60, "the end of the task")
    assert (status["status"], status["save_result_path"]) == ("completed", "cat_boxing_seed42.mp4")
    result = serve.call("GET", f"/v1/tasks/{id}/result")
    (tmp_path / "cats.mp4").write_bytes(result.content)
    # 81 frames at 16 a second, at the toy's 25.
    assert read_mp4(tmp_path / "cats.mp4").frames == 127
    part = httpx.get(f"{serve.url}/v1/tasks/{id}/result", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, result.content[100:200])
    again = serve.call("POST", "/v1/tasks/video/", json=message).json()["task_id"]
    assert until(lambda: ended(serve, again), 60, "the end of the task")["status"] == "completed"


def ended(serve, id):
    status = serve.call("GET", f"/v1/tasks/{id}/status").json()
    return status if status["status"] in ("completed", "failed", "cancelled") else None


def voice(seconds, rate=16_000):
    time_s = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * 220 * time_s) * 9000).astype("<i2").tobytes()


@contextlib.contextmanager
def on_air(serve, **command):
    session = serve.call("POST", "/v1/sessions", json=command).raise_for_status().json()
    path = f"/v1/sessions/{session['id']}"
    try:
        until(lambda: serve.call("GET", path).json()["state"] == "on air", 60, "on air")
        yield path
    finally:
        serve.call("DELETE", path)


async def test_a_voice_in_one_socket_is_a_picture_in_another(serve):
    with on_air(serve) as path:
        base = serve.url.replace("http:", "ws:") + path
        async with (
            connect(f"{base}/view", max_size=None) as view,
            connect(f"{base}/audio?format=s16le:16000:1") as audio,
            asyncio.timeout(60),
        ):
            assert json.loads(await view.recv())["type"].startswith("video/mp4; codecs=")
            assert json.loads(await audio.recv())["event"] == "ready"
            await audio.send(voice(2.0))
            await audio.send('{"type": "end"}')
            seen = []
            while "speaking" not in seen:
                seen.append(json.loads(await audio.recv())["event"])
            film = b""
            for _ in range(60):
                film += await view.recv()
            await audio.send(voice(30.0))
            await audio.send('{"type": "interrupt"}')
            told = {}
            while told.get("event") != "interrupted":
                told = json.loads(await audio.recv())
            assert told["dropped_s"] > 0
            # Of half a minute nothing is left, wherever it was.
            await asyncio.sleep(0.5)
            status = serve.call("GET", path).json()
            assert (status["waiting_s"], status["interruptions"]) == (0.0, 1)
    with av.open(io.BytesIO(film)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        frames = sum(1 for _ in container.decode(video=0))
    assert frames > 20


def test_a_playlist_and_its_segments_are_served(serve):
    with on_air(serve) as path:
        assert serve.call("GET", f"{path}/hls/index.m3u8").status_code == 404
        name = serve.call("POST", f"{path}/outputs", json={"target": "hls:main"}).raise_for_status().json()["name"]

        def segments():
            answer = serve.call("GET", f"{path}/hls/index.m3u8")
            return answer.status_code == 200 and [line for line in answer.text.splitlines() if line[:1] not in "#"]

        segment = until(segments, 60, "a segment")[0]
        answer = serve.call("GET", f"{path}/hls/{segment}")
        assert answer.status_code == 200
        assert len(answer.content) > 1000
        assert name in [output["name"] for output in serve.call("GET", path).json()["outputs"]]
        assert serve.call("DELETE", f"{path}/outputs/{name}").status_code == 200


@pytest.mark.slow
def test_the_daemon_is_as_it_is_described(serve):
    """Two minutes."""
    audio = serve.call("POST", "/v1/uploads?kind=audio", content=sound()).json()
    serve.call("POST", "/v1/uploads?kind=image", content=picture()).raise_for_status()
    for id in ("waits", "done"):
        serve.call("POST", "/v1/jobs", json={"id": id, "audio": audio}).raise_for_status()
    serve.finished("done")
    serve.call("POST", "/v1/sessions", json={"id": "one"}).raise_for_status()
    wrong = found_wrong(of_server(serve.url), 60)
    for session in serve.call("GET", "/v1/sessions").json()["sessions"]:
        serve.call("DELETE", f"/v1/sessions/{session['id']}")
    assert not wrong, "\n\n".join(f"{place}: {told}" for place, told in wrong.items())
    assert "bug" not in serve.text


@pytest.mark.slow
@pytest.mark.parametrize("model", [TOY, "pocket"], ids=["toy", "pocket"])
async def test_fifty_clients_beside_a_live_session(tmp_path, model):
    """A minute and a half: what the session and the daemon's memory are like with fifty clients, and without."""
    with Serve(tmp_path, *SETTINGS, model=model) as serve:
        await fifty_clients(serve.ready())
        assert "Traceback" not in serve.text


async def fifty_clients(serve):
    daemon = psutil.Process(serve.process.pid)
    big = serve.outputs / "big.mp4"
    big.write_bytes(bytes(200_000_000))

    async def work(client, end):
        done = 0
        while time.monotonic() < end:
            (await client.get("/v1/jobs")).raise_for_status()
            (await client.get("/v1/service/status")).raise_for_status()
            (await client.get("/readyz")).raise_for_status()
            done += 3
            await asyncio.sleep(1.0)
        return done

    def figures(path):
        status = serve.call("GET", path).json()
        return {key: status[key] for key in ("frames", "held", "skipped", "ahead_s", "skew_s", "load")}

    with on_air(serve) as path, contextlib.ExitStack() as stack:
        serve.call("POST", f"{path}/outputs", json={"target": "beside.mp4"})
        await asyncio.sleep(30)
        alone, alone_mb = figures(path), daemon.memory_info().rss / 1e6
        host, _, port = serve.url.removeprefix("http://").rpartition(":")
        for _ in range(10):
            slow = stack.enter_context(socket.create_connection((host, int(port))))
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(b"GET /v1/files/download/big.mp4 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=serve.url, limits=limits, timeout=60) as client:
            end = time.monotonic() + 30
            done = sum(await asyncio.gather(*(work(client, end) for _ in range(40))))
        crowded, crowded_mb = figures(path), daemon.memory_info().rss / 1e6
    print(f"\nalone {alone}, {alone_mb:.0f} MB; beside 40 clients with {done} requests and 10 slow readers {crowded}, ")
    print(f"{crowded_mb:.0f} MB")
    assert crowded_mb - alone_mb < 100
    frames = crowded["frames"] - alone["frames"]
    assert crowded["held"] - alone["held"] < max(0.05 * frames, 2 * alone["held"])
    assert abs(crowded["skew_s"]) < 0.1
