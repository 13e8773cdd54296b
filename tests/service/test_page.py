"""The page in a real browser, served by a stand-in whose answers and failures the test decides."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
import uvicorn
from browser import PIXELS, Visit, chromium, visit
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from mp4 import write_sound
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from waiting import until, until_async

from service.http import PAGE_HEADERS
from service.store import State as JobState
from streaming.engine import EngineState
from streaming.lane import State as LaneState

pytestmark = pytest.mark.needs("chromium")

PAGE = Path(__file__).parent.parent.parent / "service" / "page"
SCRIPTS = sorted(PAGE.glob("*.js"))
FPS = 25
FRAGMENT_S = 0.08
FILM_S = 60


@dataclass
class Film:
    """A minute of video in which every frame is a keyframe, each brighter than the one before, anew every second.

    type: as MediaSource wants it; head: what comes first; fragments: of FRAGMENT_S each; file: all of it, as one file.
    """

    type: str
    head: bytes
    fragments: list[bytes]
    file: Path


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        yield data[at + 4 : at + 8], data[at : at + size]
        at += size


def shoot(folder: Path) -> Film:
    path = folder / "film.mp4"
    options = {"movflags": "empty_moov+default_base_moof", "frag_duration": str(round(FRAGMENT_S * 1e6))}
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream("libx264", FPS, options={"preset": "ultrafast", "tune": "zerolatency"})
        video.width = video.height = 64
        video.pix_fmt, video.gop_size = "yuv420p", 1
        audio = container.add_stream("aac", 48_000, layout="mono")
        for number in range(FPS * FILM_S):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 + 8 * (number % FPS), np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.float32), "fltp", "mono")
            sound.sample_rate, sound.pts = 48_000, number * 1920
            container.mux(audio.encode(sound))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    parts = list(boxes(path.read_bytes()))
    head = b"".join(box for kind, box in parts if kind in (b"ftyp", b"moov"))
    profile = head[head.index(b"avcC") + 5 :][:3].hex()
    fragments: list[bytes] = []
    for kind, box in parts:
        if kind == b"moof":
            fragments.append(box)
        elif kind == b"mdat":
            fragments[-1] += box
    return Film(f'video/mp4; codecs="avc1.{profile}, mp4a.40.2"', head, fragments, path)


@dataclass
class StandIn:
    """A daemon that answers as it is told to, and remembers what it was asked.

    token: what it wants to see, if anything; refusals: what it says to the next calls of "METHOD path"; job: whether
    jobs run to their end by themselves. asked: ("METHOD path", body) of each call. heard: bytes of microphone.
    """

    film: Film
    token: str | None = None
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    finish_jobs: bool = True
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    heard: bytearray = field(default_factory=bytearray)
    controls: list[Any] = field(default_factory=list)
    viewers: list[WebSocket] = field(default_factory=list)
    views: int = 0
    silent: bool = False
    """Viewers are connected, and get nothing."""
    talkative: bool = False
    """A text takes until this is false again."""
    url: str = ""
    loop: asyncio.AbstractEventLoop | None = None

    def start_over(self) -> None:
        self.__dict__.update(StandIn(self.film, url=self.url, loop=self.loop).__dict__)

    def calls(self, what: str) -> list[Any]:
        return [body for called, body in self.asked if called == what]

    def cut_off(self) -> None:
        """Break the connections of all viewers."""
        assert self.loop is not None
        for viewer in list(self.viewers):
            asyncio.run_coroutine_threadsafe(viewer.close(1011), self.loop).result(5)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def door(request: Request, go_on: Any) -> Response:
            path = request.url.path
            if path == "/" or path.startswith("/page/") or path == "/readyz":
                return await go_on(request)
            what = f"{request.method} {path}"
            body = await request.body()
            is_json = request.headers.get("content-type") == "application/json"
            self.asked.append((what, json.loads(body) if is_json and body else body))
            self.tokens.append(request.headers.get("authorization"))
            if self.token is not None and self.tokens[-1] != f"Bearer {self.token}":
                return JSONResponse({"detail": "a token is needed"}, 401)
            if what in self.refusals:
                status, detail = self.refusals.pop(what)
                return JSONResponse({"detail": detail}, status)
            return await go_on(request)

        @app.get("/")
        def index() -> Response:
            return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

        @app.get("/page/{name}")
        def part(name: str) -> Response:
            return FileResponse(PAGE / name, headers=PAGE_HEADERS)

        @app.get("/readyz")
        def ready() -> Any:
            return {"engine": "ready"}

        self._add_clips(app)
        self._add_sessions(app)
        return app

    def _add_clips(self, app: FastAPI) -> None:
        @app.post("/v1/uploads", status_code=201)
        def uploaded(kind: str) -> Any:
            return {"upload": f"{kind}-1"}

        @app.post("/v1/jobs", status_code=201)
        def submit() -> Any:
            job = {"id": f"job-{len(self.jobs) + 1}", "state": "queued", "frames": 0, "total_frames": None}
            return self.jobs.setdefault(str(job["id"]), job)

        @app.get("/v1/jobs/{id}")
        def job(id: str) -> Response:
            if id not in self.jobs:
                return JSONResponse({"detail": f"job {id}: there is none"}, 404)
            return JSONResponse(self.jobs[id])

        @app.delete("/v1/jobs/{id}")
        def cancel(id: str) -> Any:
            return self.jobs[id].update(state="cancelled") or self.jobs[id]

        @app.get("/v1/jobs/{id}/events")
        def news(id: str) -> Response:
            async def tell() -> AsyncIterator[str]:
                job, told = self.jobs[id], None
                yield ": hello\n\n"
                for done in range(0, 101, 10):
                    if done == 50:
                        await until_async(lambda: self.finish_jobs or job["state"] != "running", 60)
                    if job["state"] in ("cancelled", "failed"):
                        break
                    job.update(state="running", frames=done, total_frames=100)
                    told = {"kind": "job", "id": id, "what": "progress", "frames": done, "total_frames": 100}
                    yield f"event: progress\ndata: {json.dumps(told)}\n\n"
                    await asyncio.sleep(0.02)
                else:
                    result = {"seconds": 60.0, "frames": 1500, "width": 64, "height": 64, "fps": 25}
                    job.update(state="completed", result=result)
                yield f"event: {job['state']}\ndata: {json.dumps({'id': id})}\n\n"

            return StreamingResponse(tell(), media_type="text/event-stream")

        @app.get("/v1/jobs/{id}/result")
        def result(id: str) -> Response:
            return FileResponse(self.film.file, media_type="video/mp4", filename=f"{id}.mp4")

    def _add_sessions(self, app: FastAPI) -> None:
        @app.get("/v1/sessions")
        def sessions() -> Any:
            return {"sessions": list(self.sessions.values())}

        @app.post("/v1/sessions", status_code=201)
        def go_on_air() -> Any:
            id = f"live-{len(self.sessions) + 1}"
            self.sessions[id] = {
                "id": id, "state": "on air", "on_air": True, "speaking": False, "frames": 0, "held": 0, "skipped": 0,
                "ahead_s": 0.31, "step_s": 0.2, "load": 0.42, "skew_s": 0.0004, "waiting_s": 0.0, "slips": 0,
                "interruptions": 0, "outputs": [], "viewers": 1, "engine": "ready", "began": time.monotonic(),
            }  # fmt: skip
            return self.sessions[id]

        @app.get("/v1/sessions/{id}")
        def status(id: str) -> Response:
            if id not in self.sessions:
                return JSONResponse({"detail": f"session {id}: there is none"}, 404)
            session = self.sessions[id]
            return JSONResponse(session | {"frames": round((time.monotonic() - session["began"]) * FPS)})

        @app.delete("/v1/sessions/{id}")
        def end(id: str) -> Any:
            return self.sessions.pop(id)

        @app.post("/v1/sessions/{id}/outputs", status_code=201)
        async def add_output(id: str, request: Request) -> Any:
            name = (await request.json())["target"].rsplit("/", 1)[0] + "/***"
            lane = {"name": name, "state": "sending", "dropped_frames": 0, "last_error": None}
            self.sessions[id]["outputs"].append(lane)
            return {"name": name}

        @app.delete("/v1/sessions/{id}/outputs/{name:path}", status_code=204)
        def remove_output(id: str, name: str) -> None:
            outputs = self.sessions[id]["outputs"]
            outputs[:] = [lane for lane in outputs if lane["name"] != name]

        @app.post("/v1/sessions/{id}/{what}")
        async def do(id: str, what: str) -> Any:
            if what == "say":
                await until_async(lambda: not self.talkative, 60)
            return {"played_s": 1.5, "dropped_s": 2.25} if what == "interrupt" else {}

        @app.websocket("/v1/sessions/{id}/view")
        async def view(socket: WebSocket, id: str) -> None:
            if self.token is not None and f"bearer.{self.token}" not in _protocols(socket):
                await socket.close(1008)
                return
            self.views += 1
            await socket.accept("avatard")
            self.viewers.append(socket)
            try:
                await socket.send_json({"type": self.film.type})
                await socket.send_bytes(self.film.head)
                began = self.sessions[id]["began"]
                number = int((time.monotonic() - began) / FRAGMENT_S)
                while id in self.sessions:
                    await asyncio.sleep(max(0.0, began + (number + 1) * FRAGMENT_S - time.monotonic()))
                    if not self.silent:
                        await socket.send_bytes(self.film.fragments[number % len(self.film.fragments)])
                    number += 1
            except (WebSocketDisconnect, RuntimeError):
                pass
            finally:
                with contextlib.suppress(ValueError):
                    self.viewers.remove(socket)

        @app.websocket("/v1/sessions/{id}/audio")
        async def audio(socket: WebSocket, id: str) -> None:
            await socket.accept("avatard")
            with contextlib.suppress(WebSocketDisconnect):
                while True:
                    message = await socket.receive()
                    if message["type"] == "websocket.disconnect":
                        break
                    if message.get("bytes"):
                        self.heard += message["bytes"]
                    else:
                        self.controls.append(json.loads(message["text"]))


def _protocols(socket: WebSocket) -> list[str]:
    """What the browser offers, its token decoded."""
    offered = socket.scope["subprotocols"]
    pad = lambda text: text + "=" * (-len(text) % 4)
    return [f"bearer.{base64.urlsafe_b64decode(pad(one[7:])).decode()}" for one in offered if one.startswith("bearer.")]


@contextlib.contextmanager
def serving(app: Any) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """That application on a free port of loopback, in a thread with an event loop of its own."""
    loops: list[asyncio.AbstractEventLoop] = []

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            loops.append(asyncio.get_running_loop())
            await super().startup(sockets)

    server = Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, what="the stand-in serves")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", loops[0]
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the microphone hears: a second of a tone of 1 kHz, a second of nothing."""
    second = np.arange(48_000) / 48_000
    sound = np.concatenate([0.5 * np.sin(2000 * np.pi * second), np.zeros(48_000)]).astype(np.float32)
    return write_sound(tmp_path_factory.mktemp("speech") / "tone.wav", sound, 48_000)


@pytest.fixture(scope="module")
def browser(speech: Path) -> Iterator[Browser]:
    with chromium(microphone=speech) as browser:
        yield browser


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Film:
    return shoot(tmp_path_factory.mktemp("film"))


@pytest.fixture(scope="module")
def stand_in(filmed: Film) -> Iterator[StandIn]:
    stand_in = StandIn(filmed)
    with serving(stand_in.app()) as (url, loop):
        stand_in.url, stand_in.loop = url, loop
        yield stand_in


@pytest.fixture
def daemon(stand_in: StandIn) -> StandIn:
    """As if it had just been started."""
    stand_in.start_over()
    return stand_in


@pytest.fixture(scope="module")
def tab(browser: Browser, stand_in: StandIn) -> Iterator[Visit]:
    with visit(browser, stand_in.url) as visited:
        yield visited


@pytest.fixture
def seen(tab: Visit, daemon: StandIn) -> Iterator[Visit]:
    """The page, seen for the first time."""
    tab.leave()
    daemon.start_over()
    tab.page.goto(daemon.url)
    yield tab
    tab.check()


# What the files say


def test_both_languages_have_the_same_words_and_the_page_needs_no_other() -> None:
    english, chinese = (
        set(re.findall(r'^  "([\w.]+)":', (PAGE / name).read_text(), re.M)) for name in ("en.js", "zh.js")
    )
    assert english == chinese
    sources = "".join(path.read_text() for path in [PAGE / "index.html", *SCRIPTS])
    named = set(re.findall(r'data-t(?:-\w+)?="([\w.]+)"', sources)) | set(
        re.findall(r'(?<![\w.])(?:t|add)\("([\w.]+)"', sources)
    )
    assert named <= english


def test_every_state_that_the_daemon_names_has_a_word() -> None:
    words = (PAGE / "en.js").read_text()
    states = {"job": JobState, "lane": LaneState, "engine": EngineState}
    wanted = [f"{kind}.{state}" for kind, all_of_them in states.items() for state in get_args(all_of_them)]
    assert [word for word in wanted if f'"{word}":' not in words] == []


@pytest.mark.parametrize("path", [PAGE / "index.html", PAGE / "style.css", *SCRIPTS], ids=lambda path: path.name)
def test_nothing_is_inline_and_nobody_else_is_asked(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|\burl\(", text)
    if path.suffix == ".html":
        assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", text)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


# Clips


def choose(page: Page, folder: Path, name: str = "me.png") -> None:
    Image.new("RGB", (300, 400), (90, 120, 140)).save(folder / name)
    page.locator("#clip-image input").set_input_files(folder / name)
    page.locator("#clip-audio input").set_input_files(write_sound(folder / "hello.wav", np.zeros(8000), 16_000))


def test_a_picture_and_a_sound_become_a_video_that_plays(seen: Visit, daemon: StandIn, tmp_path: Path) -> None:
    page = seen.page
    choose(page, tmp_path)
    page.get_by_text("More settings").first.click()
    page.get_by_label("Prompt").first.fill("she smiles")
    page.get_by_label("Seed").first.fill("7")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#clip-done")).to_be_visible()
    assert daemon.calls("POST /v1/uploads")[1] == (tmp_path / "hello.wav").read_bytes()
    assert daemon.calls("POST /v1/jobs") == [
        {"image": {"upload": "image-1"}, "audio": {"upload": "audio-1"}, "prompt": "she smiles", "seed": 7}
    ]
    video = page.locator("#clip-video")
    first = video.evaluate("async (video) => { await video.play(); return video.currentTime; }")
    page.wait_for_function("(first) => document.getElementById('clip-video').currentTime > first + 0.2", arg=first)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == daemon.film.file.read_bytes()


def test_progress_is_shown_and_told_to_a_screen_reader(seen: Visit, daemon: StandIn, tmp_path: Path) -> None:
    daemon.finish_jobs = False
    choose(seen.page, tmp_path)
    seen.page.get_by_role("button", name="Generate").click()
    bar = seen.page.get_by_role("progressbar", name="Generating")
    expect(bar).to_have_js_property("value", 0.4)
    expect(seen.page.get_by_text("40 of 100 frames")).to_be_visible()
    expect(seen.page.locator("#clip-told")).to_have_text("Generating, 40 %")


def test_a_job_can_be_cancelled(seen: Visit, daemon: StandIn, tmp_path: Path) -> None:
    daemon.finish_jobs = False
    choose(seen.page, tmp_path)
    seen.page.get_by_role("button", name="Generate").click()
    expect(seen.page.get_by_text("40 of 100 frames")).to_be_visible()
    seen.page.get_by_role("button", name="Cancel").click()
    expect(seen.page.locator("#clip-error")).to_have_text("Cancelled")
    assert daemon.jobs["job-1"]["state"] == "cancelled"


def test_a_typed_text_is_handed_in_without_a_file(seen: Visit, daemon: StandIn) -> None:
    seen.page.get_by_text("Text", exact=True).first.click()
    seen.page.locator("#clip-text").fill("Hello there.")
    seen.page.get_by_role("button", name="Generate").click()
    expect(seen.page.locator("#clip-done")).to_be_visible()
    assert daemon.calls("POST /v1/jobs") == [{"text": "Hello there."}]
    expect(seen.page.locator(".job")).to_contain_text("Hello there.")


def test_the_last_clips_survive_a_reload_and_a_running_one_goes_on(
    seen: Visit, daemon: StandIn, tmp_path: Path
) -> None:
    daemon.finish_jobs = False
    choose(seen.page, tmp_path)
    seen.page.get_by_role("button", name="Generate").click()
    expect(seen.page.get_by_text("40 of 100 frames")).to_be_visible()
    seen.page.reload()
    expect(seen.page.locator(".job")).to_contain_text("hello.wav")
    daemon.finish_jobs = True
    expect(seen.page.locator("#clip-done")).to_be_visible()
    expect(seen.page.locator(".job")).to_contain_text("Done")


def test_a_clip_that_the_server_no_longer_keeps_leaves_the_list(seen: Visit, daemon: StandIn) -> None:
    test_a_typed_text_is_handed_in_without_a_file(seen, daemon)
    seen.forgiven.append("404")
    daemon.jobs.clear()
    seen.page.reload()
    expect(seen.page.get_by_text("Clips that you make in this browser are listed here.")).to_be_visible()


def test_the_server_is_shown_in_its_own_words(seen: Visit, daemon: StandIn, tmp_path: Path) -> None:
    seen.forgiven.append("422")
    choose(seen.page, tmp_path)
    daemon.refusals["POST /v1/jobs"] = (422, "hello.wav: holds no sound; is it a recording?")
    seen.page.get_by_role("button", name="Generate").click()
    expect(seen.page.get_by_role("alert")).to_have_text("hello.wav: holds no sound; is it a recording?")
    expect(seen.page.locator("#clip-empty")).to_be_visible()


def test_a_job_that_fails_says_why(seen: Visit, daemon: StandIn) -> None:
    daemon.finish_jobs = False
    seen.page.get_by_text("Text", exact=True).first.click()
    seen.page.locator("#clip-text").fill("Hello there.")
    seen.page.get_by_role("button", name="Generate").click()
    expect(seen.page.get_by_text("40 of 100 frames")).to_be_visible()
    daemon.jobs["job-1"].update(state="failed", error="the model ran out of memory; try a smaller size")
    daemon.finish_jobs = True
    expect(seen.page.locator("#clip-error")).to_have_text("the model ran out of memory; try a smaller size")


def test_what_is_no_picture_is_not_sent(seen: Visit, daemon: StandIn, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    seen.page.locator("#clip-image input").set_input_files(tmp_path / "broken.png")
    expect(seen.page.get_by_role("alert")).to_have_text("broken.png is not a picture that this browser can show.")
    assert daemon.asked == []


def test_a_file_may_be_dropped_anywhere(seen: Visit) -> None:
    seen.page.evaluate(
        """async () => {
            const canvas = document.createElement("canvas");
            const blob = await new Promise((resolve) => canvas.toBlob(resolve));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([blob], "dropped.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }"""
    )
    expect(seen.page.locator("#clip-image .chosen")).to_have_text("dropped.png")


# The token


def test_a_token_is_asked_for_once_and_kept_in_this_tab_only(browser: Browser, daemon: StandIn) -> None:
    daemon.token = "s3cr3t"
    with visit(browser, daemon.url + "#live") as seen:
        seen.forgiven.append("401")
        page = seen.page
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Token").fill("wrong")
        dialog.get_by_role("button", name="Continue").click()
        expect(dialog.get_by_role("alert")).to_have_text("The server does not take this token.")
        dialog.get_by_label("Token").fill("s3cr3t")
        dialog.get_by_label("Token").press("Enter")
        expect(dialog).to_be_hidden()
        page.get_by_role("button", name="Go on air").click()
        playing(page)
        assert "s3cr3t" not in page.evaluate("JSON.stringify(localStorage) + document.cookie + document.body.outerHTML")
        assert page.evaluate("sessionStorage.getItem('avatard.token')") == "s3cr3t"
        assert not [request.url for request in seen.requests if "s3cr3t" in request.url]


# Live


def go_live(page: Page) -> None:
    page.get_by_role("link", name="Live").click()
    page.get_by_role("button", name="Go on air").click()
    playing(page)


def playing(page: Page) -> None:
    page.wait_for_function(
        """() => {
            const video = document.getElementById("live-video");
            return video.currentTime > 0 && !video.paused && document.getElementById("live-held").hidden
                && document.getElementById("live-veil").hidden;
        }"""
    )


BEHIND = """() => {
    const { buffered, currentTime } = document.getElementById("live-video");
    return buffered.end(buffered.length - 1) - currentTime;
}"""


def test_on_air_the_picture_moves_close_behind_what_arrives(seen: Visit, daemon: StandIn) -> None:
    page = seen.page
    go_live(page)
    video = page.locator("#live-video")
    pictures = []
    for _ in range(4):
        page.wait_for_timeout(130)
        pictures.append(video.evaluate(PIXELS))
    assert len(set(pictures)) > 1
    assert page.evaluate(BEHIND) < 1.0
    expect(page.locator("#live-badge")).to_have_text("On air")
    for figure, text in [
        ("ahead", "0.31 s"),
        ("skew", "0.4 ms"),
        ("drops", "0"),
        ("load", "42 %"),
        ("engine", "Ready"),
    ]:
        expect(page.locator(f"[data-figure={figure}]")).to_have_text(text)
    expect(page.locator("[data-figure=fps]")).to_have_text(re.compile(r"2[3-7]\.\d"))
    page.get_by_role("button", name="End").click()
    expect(page.get_by_text("The session has ended.")).to_be_visible()
    assert daemon.sessions == {}


def test_a_player_that_fell_back_catches_up(seen: Visit) -> None:
    go_live(seen.page)
    seen.page.evaluate("document.getElementById('live-video').pause()")
    seen.page.wait_for_timeout(1800)
    seen.page.evaluate("document.getElementById('live-video').play()")
    seen.page.wait_for_function(f"() => ({BEHIND})() < 1.0")


def test_an_iphone_with_a_media_source_of_its_own_plays_it(browser: Browser, daemon: StandIn) -> None:
    only_managed = "window.ManagedMediaSource = window.MediaSource; delete window.MediaSource;"
    with visit(browser, daemon.url, script=only_managed) as seen:
        go_live(seen.page)


def test_a_lost_view_is_got_back(seen: Visit, daemon: StandIn) -> None:
    go_live(seen.page)
    daemon.cut_off()
    expect(seen.page.locator("#live-note")).to_have_text("Connected again.")
    playing(seen.page)
    assert daemon.views == 2
    assert seen.page.evaluate(BEHIND) < 1.0


def test_a_view_without_pictures_says_so(seen: Visit, daemon: StandIn) -> None:
    go_live(seen.page)
    daemon.silent = True
    expect(seen.page.get_by_text("Waiting for pictures …")).to_be_visible()
    daemon.silent = False
    playing(seen.page)


def test_the_microphone_is_heard_at_16_khz(seen: Visit, daemon: StandIn) -> None:
    go_live(seen.page)
    microphone = seen.page.get_by_role("button", name="Microphone")
    microphone.click()
    expect(microphone).to_have_attribute("aria-pressed", "true")
    until(lambda: len(daemon.heard) >= 2 * 16_000 * 1.5, what="a second of the tone is heard")
    assert seen.page.locator("#live-video").evaluate("(video) => video.muted")
    microphone.click()
    until(lambda: daemon.controls, what="the end of it is told")
    assert daemon.controls == [{"type": "end"}]
    heard = np.frombuffer(bytes(daemon.heard[: len(daemon.heard) // 2 * 2]), "<i2").astype(float)
    assert np.argmax(np.abs(np.fft.rfft(heard))) / (len(heard) / 16_000) == pytest.approx(1000, abs=5)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_resampling_keeps_what_is_below_7_khz_and_nothing_above_9(seen: Visit, rate: int) -> None:
    gains = seen.page.evaluate(
        """async (rate) => {
            const gains = [];
            for (const hz of [100, 1000, 7000, 9000, 12000]) {
                const context = new OfflineAudioContext(1, rate, rate);
                await context.audioWorklet.addModule("page/capture.js");
                const capture = new AudioWorkletNode(context, "capture");
                const pieces = [];
                capture.port.onmessage = ({ data }) => pieces.push(new Int16Array(data.sound));
                const tone = new OscillatorNode(context, { frequency: hz });
                const half = new GainNode(context, { gain: 0.5 });
                tone.connect(half).connect(capture).connect(context.destination);
                tone.start();
                await context.startRendering();
                await new Promise((resolve) => setTimeout(resolve, 50));
                const sound = pieces.flatMap((piece) => [...piece]).slice(2000, 14000);
                gains.push(Math.sqrt(2 * sound.reduce((sum, value) => sum + value ** 2, 0) / sound.length) / 16383.5);
            }
            return gains;
        }""",
        rate,
    )
    low, middle, high, *folded = gains
    assert (low, middle) == pytest.approx((1, 1), abs=0.01)
    if rate > 16_000:
        assert high > 0.8
        assert max(folded) < 0.02


def test_a_text_is_said_and_escape_interrupts(seen: Visit, daemon: StandIn) -> None:
    go_live(seen.page)
    seen.page.get_by_label("Text to say").fill("Good morning.")
    seen.page.get_by_label("Text to say").press("Enter")
    expect(seen.page.get_by_label("Text to say")).to_have_value("")
    until(lambda: daemon.calls("POST /v1/sessions/live-1/say"))
    assert daemon.calls("POST /v1/sessions/live-1/say") == [{"text": "Good morning.", "interrupt": False}]
    seen.page.keyboard.press("Escape")
    expect(seen.page.locator("#live-note")).to_have_text("Interrupted; 2.3 s left out.")


def test_texts_that_wait_are_forgotten_by_an_interruption(seen: Visit, daemon: StandIn) -> None:
    go_live(seen.page)
    daemon.talkative = True
    for text in ("One.", "Two.", "Three."):
        seen.page.get_by_label("Text to say").fill(text)
        seen.page.get_by_role("button", name="Say").click()
    until(lambda: daemon.calls("POST /v1/sessions/live-1/say"))
    seen.page.get_by_role("button", name="Interrupt", exact=True).click()
    expect(seen.page.locator("#live-note")).to_have_text("Interrupted; 2.3 s left out.")
    daemon.talkative = False
    seen.page.get_by_label("Text to say").fill("Four.")
    seen.page.get_by_role("button", name="Say").click()
    until(lambda: len(daemon.calls("POST /v1/sessions/live-1/say")) == 2)
    assert [body["text"] for body in daemon.calls("POST /v1/sessions/live-1/say")] == ["One.", "Four."]


def test_the_picture_is_changed_on_air(seen: Visit, daemon: StandIn, tmp_path: Path) -> None:
    go_live(seen.page)
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    seen.page.locator("#live-image input").set_input_files(tmp_path / "other.png")
    seen.page.get_by_role("button", name="Change", exact=True).click()
    expect(seen.page.get_by_text("The picture changes with the next block.")).to_be_visible()
    assert daemon.calls("POST /v1/sessions/live-1/set") == [{"image": {"upload": "image-1"}}]


def test_an_output_comes_and_goes_and_its_key_is_never_shown(seen: Visit, daemon: StandIn) -> None:
    page = seen.page
    go_live(page)
    page.get_by_label("RTMP server").fill("rtmp://example.net/live")
    key = page.get_by_label("Stream key")
    assert key.get_attribute("type") == "password"
    key.fill("k3y")
    page.get_by_role("button", name="Add output").click()
    expect(page.locator("#live-lanes")).to_contain_text("rtmp://example.net/live/***")
    assert daemon.calls("POST /v1/sessions/live-1/outputs") == [{"target": "rtmp://example.net/live/k3y"}]
    expect(key).to_have_value("")
    assert "k3y" not in page.content()
    page.get_by_role("button", name="Remove rtmp://example.net/live/***").click()
    expect(page.locator("#live-lanes li")).to_have_count(0)


def test_a_reload_finds_the_session_again(seen: Visit, daemon: StandIn) -> None:
    go_live(seen.page)
    seen.page.reload()
    playing(seen.page)
    assert len(daemon.calls("POST /v1/sessions")) == 1


def test_a_session_that_has_ended_elsewhere_is_left(seen: Visit, daemon: StandIn) -> None:
    seen.forgiven += ["404", "WebSocket"]
    go_live(seen.page)
    daemon.sessions.clear()
    expect(seen.page.get_by_role("button", name="Go on air")).to_be_visible()


def test_who_is_on_air_already_can_be_taken_over(seen: Visit, daemon: StandIn, browser: Browser) -> None:
    go_live(seen.page)
    with visit(browser, daemon.url + "#live") as other:
        other.page.get_by_role("button", name="Take over: live-1").click()
        playing(other.page)


EDGE = """async (arrivals) => {
    const { LiveEdge } = await import(new URL("page/edge.js", document.baseURI));
    const edge = new LiveEdge();
    let [now, end, shown, stalls, behinds] = [0, 0, 0, 0, []];
    let rate = 1;
    for (; now < 60; now += 0.05) {
        while (arrivals.length && arrivals[0][0] <= now) end = arrivals.shift()[1];
        const next = Math.min(end, shown + rate * 0.05);
        if (next - shown < rate * 0.049 && end > 0) { stalls++; edge.stalled(now); }
        shown = next;
        if (end - shown < 0.001) continue;
        const told = edge.decide(end - shown, now);
        rate = told.rate;
        shown += told.jump_s;
        if (now > 30) behinds.push(end - shown);
    }
    return { stalls, most: Math.max(...behinds), mean: behinds.reduce((a, b) => a + b) / behinds.length };
}"""


def test_pieces_at_even_times_are_played_a_fifth_of_a_second_behind(seen: Visit) -> None:
    told = seen.page.evaluate(EDGE, [[0.5 + 0.08 * n, 0.08 * n] for n in range(800)])
    assert told["mean"] < 0.3
    assert told["stalls"] < 12


def test_pieces_at_uneven_times_are_waited_for_longer_but_not_for_ever(seen: Visit) -> None:
    random = np.random.default_rng(1)
    late = np.maximum.accumulate(0.08 * np.arange(800) + random.uniform(0, 0.5, 800))
    told = seen.page.evaluate(EDGE, [[float(at), 0.08 * n] for n, at in enumerate(late)])
    assert told["most"] < 1.2
    assert told["stalls"] < 40


# For everybody


@pytest.mark.parametrize(("view", "locale"), [("clip", "zh-CN"), ("live", "en-GB")])
def test_it_fits_a_phone_of_320_pixels(browser: Browser, daemon: StandIn, view: str, locale: str) -> None:
    with visit(browser, f"{daemon.url}#{view}", viewport={"width": 320, "height": 568}, locale=locale) as seen:
        page = seen.page
        if view == "live":
            page.locator("#live-go").click()
            playing(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        small = page.evaluate(
            """() => [...document.querySelectorAll("button, a, select, textarea, summary, label:has(input), input")]
                .filter((one) => one.checkVisibility() && !one.matches(".skip, label input"))
                .map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
                .filter(([, box]) => box.height < 43.5 || box.width < 43.5 || box.right > 320.5)"""
        )
        assert small == []


def test_the_language_is_the_browsers_and_can_be_changed(browser: Browser, daemon: StandIn) -> None:
    with visit(browser, daemon.url, locale="zh-CN") as seen:
        expect(seen.page.get_by_role("heading", name="制作短片")).to_be_visible()
        assert seen.page.evaluate("document.documentElement.lang") == "zh-Hans"
        seen.page.get_by_label("语言").select_option("en")
        expect(seen.page.get_by_role("heading", name="Make a clip")).to_be_visible()
        seen.page.reload()
        expect(seen.page.get_by_role("heading", name="Make a clip")).to_be_visible()


def test_everything_can_be_reached_by_keyboard_and_has_a_name(seen: Visit) -> None:
    page = seen.page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, a, video, audio, progress, meter")]
            .filter((one) => !(one.getAttribute("aria-label") || one.getAttribute("aria-labelledby")
                || one.textContent.trim() || [...(one.labels ?? [])].some((label) => label.textContent.trim())))
            .map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert [one for one in nameless if 'id="live-go"' not in one] == []
    page.get_by_text("Text", exact=True).first.click()
    page.locator("body").click(position={"x": 5, "y": 5})
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.className"
            )
        )
    assert {"skip", "go-clip", "go-live", "language", "speech", "clip-text", "clip-go"} <= reached


CONTRAST = """() => {
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
            .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const under = (one) => {
        for (; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour;
        }
    };
    return [...document.querySelectorAll("main *, header *")]
        .filter((one) => one.checkVisibility())
        .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
        .map((one) => {
            const [a, b] = [light(getComputedStyle(one).color), light(under(one))].sort((x, y) => y - x);
            return [one.outerHTML.slice(0, 80), (a + 0.05) / (b + 0.05)];
        })
        .filter(([, ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_on_its_ground(browser: Browser, daemon: StandIn, scheme: Any) -> None:
    with visit(browser, daemon.url, color_scheme=scheme) as seen:
        assert seen.page.evaluate(CONTRAST) == []
        go_live(seen.page)
        assert seen.page.evaluate(CONTRAST) == []
