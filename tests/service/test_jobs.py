"""Jobs: nothing that was taken is lost, nothing is done twice, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from jobs_daemon import command as daemon_command
from jobs_daemon import settings_in
from mp4 import clicks_at, read_mp4, write_sound
from PIL import Image
from waiting import until_async

from audio.chunk import AudioChunk
from service import isolated
from service import jobs as jobs_module
from service.commands import OpenSession, Refusal, SubmitJob
from service.config import Settings
from service.hub import Hub, News
from service.inputs import Inputs
from service.jobs import Jobs
from service.render import DiskFull, RenderRequest, RenderResult, Stopped
from service.run import engine_settings
from service.sessions import Session, Sessions
from service.store import Job, JobStore, StoreFull
from service.turns import Turns
from service.voice import Voice
from streaming.engine import Engine, EngineError, Restarts

HERE = Path(__file__).parent.parent
DAEMON = HERE / "jobs_daemon.py"


class FakeVoice(Voice):
    """Reads a text at ten characters a second; fails as often as it is told first."""

    def __init__(self, failures: int = 0, reason: Any = "unavailable", chunks: int | None = None) -> None:
        super().__init__("fake", Settings().voice, self._read)
        self.failures, self.reason, self.heard, self.chunks = failures, reason, [], chunks

    async def _read(self, text: str, voice: str) -> AsyncIterator[AudioChunk]:
        self.heard.append((text, voice))
        if self.failures:
            self.failures -= 1
            raise Refusal(self.reason, "voice.url: no answer in 20 s")
        for _ in range(len(text) if self.chunks is None else self.chunks):
            yield AudioChunk(np.full(800, 0.1, np.float32), 8_000)


@dataclass
class Heard:
    """What the hub was told, as it came."""

    news: list[News] = field(default_factory=list)

    def of(self, id: str) -> list[str]:
        return [item.what for item in self.news if item.id == id and item.kind == "job" and item.what != "progress"]

    def progress(self, id: str) -> list[News]:
        return [item for item in self.news if item.id == id and item.what == "progress"]

    def intake(self) -> list[str]:
        return [item.what for item in self.news if item.kind == "daemon"]


@dataclass
class House:
    """Everything that jobs need, in one folder, and themselves at work."""

    folder: Path
    settings: Settings
    store: JobStore
    hub: Hub
    jobs: Jobs
    turns: Turns
    heard: Heard

    @property
    def outputs(self) -> Path:
        return self.folder / "out"

    def left(self) -> list[str]:
        """What lies in the folders of results and of work in progress."""
        # os.walk passes over a folder that goes while it looks; rglob does not.
        walks = [*os.walk(self.outputs), *os.walk(self.folder / "state" / "jobs")]
        return sorted(str((Path(at) / name).relative_to(self.folder)) for at, _, names in walks for name in names)

    async def submit(self, id: str, **more: Any) -> Job:
        job, new = await self.jobs.submit(self.command(id, **more))
        assert new
        return job

    def command(self, id: str | None, **more: Any) -> SubmitJob:
        said = {"id": id, "image": str(self.folder / "place" / "face.png")}
        if "text" not in more:
            said["audio"] = str(self.folder / "place" / "a.wav")
        return SubmitJob.model_validate(said | more)

    async def ended(self, id: str) -> Job:
        job = await self.jobs.wait(id, 30)
        assert job.ended, job
        return job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    Image.new("RGB", (300, 400), (90, 120, 140)).save(place / "face.png")
    write_sound(place / "a.wav", clicks_at([0.5], 1.0), 16_000)
    write_sound(place / "long.wav", clicks_at([1.0], 8.0), 16_000)
    return tmp_path


@contextlib.asynccontextmanager
async def house(
    folder: Path, engine: Any, *assignments: str, at_work: bool = True, **options: Any
) -> AsyncIterator[House]:
    settings, hub, turns, heard = settings_in(folder, *assignments), Hub(), Turns(), Heard()
    store = await JobStore.open(folder / "state" / "jobs.sqlite")
    jobs = Jobs(store, Inputs(settings), engine, turns, hub, settings, **options)

    async def listen() -> None:
        with hub.listen(10_000) as news:
            async for item in news:
                heard.news.append(item)

    tasks = [asyncio.create_task(listen())]
    await asyncio.sleep(0)
    if at_work:
        tasks.append(asyncio.create_task(jobs.run()))
    try:
        yield House(folder, settings, store, hub, jobs, turns, heard)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.close()


@contextlib.asynccontextmanager
async def toy(folder: Path, *assignments: str, **more: Any) -> AsyncIterator[Engine]:
    async with await Engine.launch(replace(engine_settings(settings_in(folder, *assignments)), **more)) as engine:
        yield engine


class NoEngine:
    """A model that is ready and is never used."""

    state = "ready"

    async def ready(self) -> None:
        pass


class FakeRender:
    """render(), without a model: waits until it is let go on, then makes a small file. `fails`: each does instead."""

    def __init__(self, *fails: BaseException) -> None:
        self.fails, self.requests, self.let_go = list(fails), [], asyncio.Event()
        self.at_work = 0

    async def __call__(
        self,
        request: RenderRequest,
        engine: Any,
        settings: Settings,
        *,
        turn: Any,
        on_progress: Any,
        stop: Any,
        **_: Any,
    ) -> RenderResult:
        self.requests.append(request)
        on_progress(12, 24)
        request.folder.mkdir(parents=True, exist_ok=True)
        (request.folder / "video.packets").write_bytes(b"x")
        self.at_work += 1
        try:
            if self.fails:
                raise self.fails.pop(0)
            waiting = [asyncio.create_task(event.wait()) for event in (self.let_go, stop)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
        finally:
            self.at_work -= 1
        if stop.is_set():
            raise Stopped
        request.target.parent.mkdir(parents=True, exist_ok=True)
        told = note_film(request.folder)
        request.target.write_bytes(b"film")
        return RenderResult(request.target, 24, 0.96, 64, 64, 25, told, 4, (), 0, 0.0, 0.0)


def note_film(work: Path) -> str:
    """As a render does before its file has its name; returns the file's hash."""
    told = hashlib.sha256(b"film").hexdigest()
    (work / "result.json").write_text(json.dumps({"sha256": told}))
    return told


@pytest.fixture
async def fake(monkeypatch) -> FakeRender:
    fake = FakeRender()
    monkeypatch.setattr(jobs_module, "render", fake)
    monkeypatch.setattr(jobs_module, "DISK_EVERY_S", 0.02)
    monkeypatch.setattr(jobs_module, "DISK_RETRY_S", 0.02)
    monkeypatch.setattr(jobs_module, "DISK_FULL_S", 0.1)
    monkeypatch.setattr(jobs_module, "VOICE_WAIT_S", 0.01)
    return fake


# With the real thing.


async def test_a_picture_and_a_sound_become_a_film(folder):
    async with toy(folder) as engine, house(folder, engine) as h:
        job = await h.submit("hello", name="greetings/hello", prompt="a person", seed=7)
        assert (job.state, job.seed, job.request["prompt"]) == ("queued", 7, "a person")
        job = await h.ended("hello")
        assert job.state == "completed", job.error
        path = h.jobs.result_path(job)
        assert path == h.outputs / "greetings" / "hello.mp4"
        assert job.result == {
            "path": "greetings/hello.mp4",
            "bytes": path.stat().st_size,
            "sha256": job.result["sha256"],
            "seconds": 1.0,
            "frames": 25,
            "width": 64,
            "height": 64,
            "fps": 25,
        }
        assert (job.frames, job.total_frames, job.attempts) == (25, 25, 1)
        assert read_mp4(path).flashes() == [0.48]
        await until_async(lambda: h.heard.of("hello") == ["queued", "running", "completed"])
        await until_async(lambda: h.left() == ["out/greetings/hello.mp4"])


async def test_an_interactive_job_does_not_wait_for_the_end_of_a_batch_job(folder):
    async with toy(folder, "model.options.step_s=0.05") as engine, house(folder, engine) as h:
        await h.submit("film", priority="batch", audio=str(folder / "place" / "long.wav"))
        await until_async(lambda: h.heard.progress("film"))
        await h.submit("answer")
        assert (await h.ended("answer")).state == "completed"
        assert (await h.jobs.get("film")).state == "running"
        assert (await h.ended("film")).state == "completed"


async def test_a_cancelled_job_ends_at_a_blocks_border_and_leaves_nothing(folder):
    async with toy(folder, "model.options.step_s=0.05") as engine, house(folder, engine) as h:
        await h.submit("film", audio=str(folder / "place" / "long.wav"))
        # Until there is something in its folder.
        await until_async(lambda: len(h.left()) > 1)
        made = engine.steps
        assert (await h.jobs.cancel("film")).state == "cancelled"
        await h.submit("next")
        assert (await h.ended("next")).state == "completed"
        # Three blocks of the next one, and the one under way.
        assert engine.steps - made <= 3 + 1
        await until_async(lambda: h.left() == ["out/next.mp4"])
        assert (await h.jobs.cancel("film")).state == "cancelled"
        assert h.heard.of("film") == ["queued", "running", "cancelled"]


async def test_a_job_that_was_let_go_in_an_orderly_way_goes_on_and_becomes_the_same_film(folder):
    async with toy(folder, "model.options.step_s=0.02") as engine:
        long = str(folder / "place" / "long.wav")
        async with house(folder, engine) as h:
            await h.submit("film", audio=long)
            await until_async(lambda: any("checkpoint" in name for name in h.left()))
        async with house(folder, engine, "jobs.attempts=1") as h:
            assert (await h.jobs.get("film")).state in ("queued", "running")
            await h.submit("whole", audio=long, name="whole/film")
            film, whole = await h.ended("film"), await h.ended("whole")
            assert (film.state, film.attempts) == ("completed", 2)
            assert film.result["sha256"] == whole.result["sha256"]
            assert min(item.body["frames"] for item in h.heard.progress("film")) >= 24


async def test_a_model_that_dies_is_waited_for(folder):
    options = (f"model.options.diary={folder / 'diary'}", "model.options.deaths=[1, 1]")
    async with toy(folder, *options) as engine, house(folder, engine, *options) as h:
        await h.submit("a")
        assert (await h.ended("a")).state == "completed"
        assert engine.restarts == 2


async def test_a_job_at_which_the_model_always_dies_is_given_up_and_others_go_on(folder):
    options = ("model.options.fail_at=5", "model.options.how=kill", "jobs.attempts=2")
    at_once = Restarts(deaths_per_block=1, backoff_s=0.01)
    async with toy(folder, *options, restarts=at_once) as engine, house(folder, engine, *options) as h:
        await h.submit("deadly", audio=str(folder / "place" / "long.wav"))
        await h.submit("short")
        job = await h.ended("deadly")
        assert (job.state, job.error_type) == ("failed", "Interrupted")
        assert "was begun 2 times and never got further" in job.error
        assert "at block 5" in job.error
        assert (await h.ended("short")).state == "completed"


async def test_a_file_that_ends_who_reads_it_fails_its_own_job_alone(folder):
    async with toy(folder, "model.options.step_s=0.05") as engine, house(folder, engine) as h:
        await h.submit("deadly", audio=str(folder / "place" / "long.wav"))
        await until_async(lambda: h.heard.progress("deadly"))
        readers = psutil.Process(isolated._READER._process.pid).children()
        assert readers
        for reader in readers:
            reader.send_signal(signal.SIGSEGV)
        await h.submit("good")
        job = await h.ended("deadly")
        assert (job.state, job.error_type) == ("failed", "AudioError")
        assert "ends whatever reads it" in job.error
        assert str(folder) not in job.error
        assert (await h.ended("good")).state == "completed"


async def test_what_the_model_refuses_fails_with_that_line(folder):
    options = ("model.options.fail_at=1", "model.options.how=user")
    async with toy(folder, *options) as engine, house(folder, engine, *options) as h:
        await h.submit("a")
        job = await h.ended("a")
        assert (job.state, job.error_type) == ("failed", "AvatardError")
        assert job.error == "toy: this block is not to my taste; give me another"
        await until_async(lambda: h.left() == [])


async def test_a_bug_in_the_model_fails_its_job_and_is_logged_with_its_traceback(folder, caplog):
    options = ("model.options.fail_at=1", "model.options.how=bug")
    async with toy(folder, *options) as engine, house(folder, engine, *options) as h:
        await h.submit("a")
        job = await h.ended("a")
        assert (job.state, job.error_type) == ("failed", "ModelFailure")
        assert job.error == "failed by a bug in avatard; its log says more"
        assert "the toy broke" in caplog.text
        assert "Traceback" in caplog.text


async def test_without_a_model_jobs_wait(folder):
    options = (f"model.options.diary={folder / 'diary'}", "model.options.deaths=[load]")
    async with toy(folder, *options) as engine, house(folder, engine, *options, at_work=False) as h:
        await h.submit("a")
        with pytest.raises(ExceptionGroup) as failed:
            await h.jobs.run()
        assert isinstance(failed.value.exceptions[0], EngineError)
        job = await h.jobs.get("a")
        assert (job.state, job.attempts) == ("queued", 0)


async def test_a_live_session_comes_first_and_jobs_work_in_its_pauses(folder):
    async with toy(folder, "model.options.step_s=0.02") as engine, house(folder, engine) as h:
        busy = True
        with h.turns.live(lambda: 0.0 if busy else 0.3):
            await h.submit("a")
            await until_async(lambda: h.heard.of("a") == ["queued", "running"])
            await asyncio.sleep(0.1)
            assert engine.steps == 0
            busy = False
            assert (await h.ended("a")).state == "completed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "seconds", "least"),
    [(("model.options.step_s=0.1",), 8, 5), (("model.name=pocket",), 30, 1)],
    ids=["toy", "pocket"],
)
async def test_a_live_session_does_not_feel_a_hundred_jobs_beside_it(folder, model, seconds, least):
    """Real time; the toy works 0.1 s for a block of 0.48 s."""
    options = (*model, "sessions.targets=['null']")

    async def watched(session: Session, seconds: float) -> tuple[int, int, float, float]:
        before, seen = session.status(), []
        for _ in range(round(seconds / 0.1)):
            await asyncio.sleep(0.1)
            seen.append(session.status())
        held, skipped = (seen[-1][name] - before[name] for name in ("held", "skipped"))
        return (
            held,
            skipped,
            statistics.median(s["step_s"] for s in seen),
            statistics.median(s["ahead_s"] for s in seen),
        )

    async with toy(folder, *options) as engine, house(folder, engine, *options, at_work=False) as h:
        await engine.ready()
        sessions = Sessions(h.settings, engine, Inputs(h.settings), h.turns, h.hub, None)
        session = await sessions.open(OpenSession(outputs=("null://",)))
        await until_async(lambda: session.status().get("frames", 0) > 50)
        alone = await watched(session, seconds)
        for n in range(100):
            await h.submit(f"j{n}", priority="batch")
        working = asyncio.create_task(h.jobs.run())
        beside = await watched(session, seconds)
        made = (await h.jobs.counts())["completed"]
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await sessions.close_all()
    print(f"held, skipped, step_s, ahead_s: alone {alone}, beside jobs {beside}; {made} jobs")
    assert made >= least
    assert beside[0] <= alone[0] + 2
    assert beside[1] <= alone[1]
    assert beside[2] <= 1.1 * alone[2]
    assert beside[3] == pytest.approx(alone[3], abs=0.08)


# Taking jobs.


async def test_the_same_command_is_the_same_job(folder, fake):
    async with house(folder, NoEngine()) as h:
        first = await h.submit("a", seed=1)
        again, new = await h.jobs.submit(h.command("a", seed=1))
        assert not new
        assert again.created_at == first.created_at
        # Also when what it refers to is no longer there: nothing is fetched again.
        (folder / "place" / "a.wav").unlink()
        fake.let_go.set()
        await h.ended("a")
        again, new = await h.jobs.submit(h.command("a", seed=1, priority="interactive"))
        assert (again.state, new) == ("completed", False)
        with pytest.raises(Refusal, match="another one of this id") as refused:
            await h.jobs.submit(h.command("a", seed=2))
        assert refused.value.reason == "conflict"


async def test_the_same_command_many_times_at_once_is_one_job(folder, fake):
    async with house(folder, NoEngine()) as h:
        fake.let_go.set()
        taken = await asyncio.gather(*(h.jobs.submit(h.command("a")) for _ in range(10)))
        assert [new for _, new in taken].count(True) == 1
        await h.ended("a")
        assert len(fake.requests) == 1


async def test_a_job_without_an_id_gets_one_of_its_own(folder, fake):
    async with house(folder, NoEngine()) as h:
        taken = [await h.jobs.submit(h.command(None)) for _ in range(2)]
        assert all(new for _, new in taken)
        assert len({job.id for job, _ in taken}) == 2


async def test_what_a_job_needs_is_in_the_spool_and_on_the_disk_when_it_is_taken(folder, fake):
    async with house(folder, NoEngine(), at_work=False) as h:
        job = await h.submit("a")
        shutil.rmtree(folder / "place")
        needed = await h.jobs.needed()
        assert needed == {folder / "state" / job.request[kind] for kind in ("image", "audio")}
        assert all(path.is_file() for path in needed)


async def test_a_job_without_a_picture_shows_the_presenter(folder, fake):
    async with house(folder, NoEngine(), at_work=False) as h:
        job = await h.submit("a", image=None)
        presenter = (HERE.parent / "examples" / "presenter.png").read_bytes()
        assert (folder / "state" / job.request["image"]).read_bytes() == presenter


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"audio": "/etc/passwd"}, "forbidden"),
        ({"audio": "nothing.wav"}, "invalid"),
        ({"name": "../elsewhere"}, "forbidden"),
        ({"name": "film.exe"}, "invalid"),
        ({"text": "hello"}, "unavailable"),
    ],
)
async def test_what_cannot_be_made_is_refused_and_nothing_is_kept(folder, fake, more, reason):
    async with house(folder, NoEngine(), at_work=False) as h:
        with pytest.raises(Refusal) as refused:
            await h.submit("a", **more)
        assert refused.value.reason == reason
        assert await h.jobs.list() == []


async def test_more_jobs_than_may_wait_are_refused_with_a_time(folder, fake):
    async with house(folder, NoEngine(), "jobs.queue=2", at_work=False) as h:
        for id in "ab":
            await h.submit(id)
        with pytest.raises(Refusal) as refused:
            await h.submit("c")
        assert refused.value.reason == "full"
        assert refused.value.retry_s
        # What was taken is still the same job.
        assert not (await h.jobs.submit(h.command("a")))[1]


async def test_settings_that_are_read_again_count_at_once(folder, fake):
    async with house(folder, NoEngine(), "jobs.queue=5", at_work=False) as h:
        await h.submit("a")
        h.jobs.use(settings_in(folder, "jobs.queue=1", "sessions.jobs_beside_live=wait"))
        assert h.turns.beside_live == "wait"
        with pytest.raises(Refusal):
            await h.submit("b")


async def test_a_name_belongs_to_one_job_and_no_file_is_ever_overwritten(folder, fake):
    async with house(folder, NoEngine()) as h:
        h.outputs.mkdir()
        (h.outputs / "mine.mp4").write_bytes(b"of somebody else")
        await h.submit("a", name="sub/film")
        for id, name in ("b", "sub/film.mp4"), ("c", "mine"), ("d", "./sub/film"):
            with pytest.raises(Refusal) as refused:
                await h.submit(id, name=name)
            assert refused.value.reason == "conflict"
        fake.let_go.set()
        await h.ended("a")
        with pytest.raises(Refusal):
            await h.submit("b", name="sub/film.mp4")
        assert (h.outputs / "mine.mp4").read_bytes() == b"of somebody else"


async def test_a_file_that_appears_while_a_job_waits_is_not_overwritten_either(folder):
    async with toy(folder) as engine, house(folder, engine, at_work=False) as h:
        await h.submit("a")
        h.outputs.mkdir()
        (h.outputs / "a.mp4").write_bytes(b"of somebody else")
        working = asyncio.create_task(h.jobs.run())
        job = await h.ended("a")
        assert job.state == "failed"
        assert job.error == "a.mp4: exists already; remove it or choose another name"
        await until_async(lambda: not (folder / "state" / "jobs" / "a").exists())
        assert (h.outputs / "a.mp4").read_bytes() == b"of somebody else"
        working.cancel()


async def test_a_file_that_appears_after_a_job_was_begun_is_not_overwritten_either(folder):
    async with toy(folder, "model.options.step_s=0.05") as engine:
        async with house(folder, engine) as h:
            await h.submit("show", audio=str(folder / "place" / "long.wav"))
            await until_async(lambda: len(h.left()) > 1)  # there is something to go on from
        (h.outputs / "show.mp4").write_bytes(b"somebody's recording")
        async with house(folder, engine) as h:
            job = await h.ended("show")
            assert (job.state, job.attempts) == ("failed", 2)
            assert job.error == "show.mp4: exists already; remove it or choose another name"
            await until_async(lambda: h.left() == ["out/show.mp4"])
            assert (h.outputs / "show.mp4").read_bytes() == b"somebody's recording"


@pytest.mark.parametrize("running", [True, False], ids=["is worked on", "waits again"])
async def test_a_file_that_is_not_a_jobs_own_stays_when_the_job_is_cancelled(folder, running):
    async with toy(folder, "model.options.step_s=0.05") as engine:
        async with house(folder, engine) as h:
            await h.submit("show", audio=str(folder / "place" / "long.wav"))
            await until_async(lambda: h.heard.progress("show"))
            if running:
                (h.outputs / "show.mp4").write_bytes(b"somebody's recording")
                await h.jobs.cancel("show")
                await until_async(lambda: not h.jobs._running and h.left() == ["out/show.mp4"])
                while await h.store.untidy():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        if not running:
            (h.outputs / "show.mp4").write_bytes(b"somebody's recording")
        async with house(folder, engine, at_work=False) as h:
            assert (await h.jobs.cancel("show")).state == "cancelled"
            assert h.left() == ["out/show.mp4"]
            assert (h.outputs / "show.mp4").read_bytes() == b"somebody's recording"


async def test_who_goes_away_while_a_job_is_being_kept_leaves_a_whole_one(folder, fake, monkeypatch):
    async with house(folder, NoEngine()) as h:
        submitting = asyncio.create_task(h.jobs.submit(h.command("a")))
        submit = h.store.submit

        async def cut_off(*arguments: Any, **named: Any) -> Any:
            submitting.cancel()
            return await submit(*arguments, **named)

        monkeypatch.setattr(h.store, "submit", cut_off)
        with pytest.raises(asyncio.CancelledError):
            await submitting
        fake.let_go.set()
        await until_async(lambda: h.heard.of("a") == ["queued", "running", "completed"])


# Cancelling and waiting.


async def test_a_job_that_waits_is_cancelled_at_once(folder, fake):
    async with house(folder, NoEngine()) as h:
        await h.submit("a")
        await until_async(lambda: fake.at_work)
        await h.submit("b")
        assert (await h.jobs.cancel("b")).state == "cancelled"
        # Its name is free again.
        await h.submit("c", name="b")
        fake.let_go.set()
        await h.ended("c")
        assert len(fake.requests) == 2


async def test_a_job_that_is_cancelled_before_anybody_could_see_it_run_does_not_run(folder, fake, monkeypatch):
    async with house(folder, NoEngine()) as h:
        claim = h.store.claim

        async def claim_and_cancel(priority: Any) -> Job | None:
            job = await claim(priority)
            if job is not None and job.id == "a":
                await h.jobs.cancel("a")
            return job

        monkeypatch.setattr(h.store, "claim", claim_and_cancel)
        fake.let_go.set()
        await h.submit("a")
        await h.submit("b")
        await h.ended("b")
        assert [request.target.name for request in fake.requests] == ["b.mp4"]
        assert (await h.jobs.get("a")).state == "cancelled"


async def test_a_film_that_is_finished_in_the_moment_it_is_cancelled_is_deleted(folder, fake, monkeypatch):
    async with house(folder, NoEngine()) as h:
        finish = h.store.finish

        async def late(id: str, state: Any, *more: Any, **named: Any) -> Any:
            if state == "completed":
                await h.jobs.cancel(id)
            return await finish(id, state, *more, **named)

        monkeypatch.setattr(h.store, "finish", late)
        fake.let_go.set()
        await h.submit("a")
        assert (await h.ended("a")).state == "cancelled"
        await until_async(lambda: fake.requests and h.left() == [])
        assert h.heard.of("a") == ["queued", "running", "cancelled"]


async def test_what_has_ended_is_not_cancelled_and_what_is_not_there_is_not_found(folder, fake):
    async with house(folder, NoEngine()) as h:
        fake.let_go.set()
        await h.submit("a")
        await h.ended("a")
        assert (await h.jobs.cancel("a")).state == "completed"
        await until_async(lambda: h.left() == ["out/a.mp4"])
        for ask in h.jobs.cancel("no"), h.jobs.get("no"), h.jobs.wait("no", 1):
            with pytest.raises(Refusal) as refused:
                await ask
            assert refused.value.reason == "not found"


async def test_a_wait_ends_when_the_job_is_there_comes_or_never_does(folder, fake):
    async with house(folder, NoEngine()) as h:
        await h.submit("a")
        assert (await h.jobs.wait("a", 0.05)).state in ("queued", "running")
        waiting = asyncio.create_task(h.jobs.wait("a", 10))
        await asyncio.sleep(0)
        fake.let_go.set()
        assert (await waiting).state == "completed"
        assert (await h.jobs.wait("a", 0.05)).state == "completed"


async def test_only_what_is_completed_has_a_result_and_it_lies_in_the_folder_of_results(folder, fake):
    async with house(folder, NoEngine()) as h:
        job = await h.submit("a")
        with pytest.raises(Refusal, match="has no result"):
            h.jobs.result_path(job)
        with pytest.raises(Refusal, match="leads out") as refused:
            h.jobs.result_path(replace(job, result={"path": "../place/face.png"}))
        assert refused.value.reason == "forbidden"


# Progress.


async def test_progress_is_told_at_most_twice_a_second_and_every_change_of_state(folder, monkeypatch):
    monkeypatch.setattr(jobs_module, "PROGRESS_EVERY_S", 0.15)
    async with toy(folder, "model.options.step_s=0.02") as engine, house(folder, engine) as h:
        began = time.monotonic()
        await h.submit("a", audio=str(folder / "place" / "long.wav"))
        await h.ended("a")
        took = time.monotonic() - began
        await until_async(lambda: h.heard.of("a") == ["queued", "running", "completed"])
        told = h.heard.progress("a")
        assert 1 <= len(told) <= took / 0.15 + 2
        frames = [item.body["frames"] for item in told]
        assert frames == sorted(set(frames))
        assert {item.body["total_frames"] for item in told} == {200}


# Texts.


async def test_a_text_is_spoken_once_and_kept_while_its_job_needs_it(folder, fake):
    voice = FakeVoice()
    async with house(folder, NoEngine(), voice=voice) as h:
        await h.submit("a", text="Good morning.", voice="alloy")
        await until_async(lambda: fake.at_work)
        spoken = fake.requests[0].audio
    assert voice.heard == [("Good morning.", "alloy")]
    import soundfile

    assert soundfile.info(spoken).duration == pytest.approx(1.3)
    content = spoken.read_bytes()
    async with house(folder, NoEngine(), voice=voice) as h:
        await until_async(lambda: fake.at_work)
        assert spoken.read_bytes() == content
        fake.let_go.set()
        assert (await h.ended("a")).state == "completed"
        await until_async(lambda: h.left() == ["out/a.mp4"])
    assert len(voice.heard) == 1


async def test_a_voice_that_fails_is_asked_again_and_not_for_ever(folder, fake):
    fake.let_go.set()
    async with house(folder, NoEngine(), voice=FakeVoice(failures=2)) as h:
        await h.submit("a", text="Good morning.")
        assert (await h.ended("a")).state == "completed"
    async with house(folder, NoEngine(), voice=FakeVoice(failures=99)) as h:
        await h.submit("b", text="Good morning.")
        job = await h.ended("b")
        assert (job.state, job.error) == ("failed", "voice.url: no answer in 20 s")
    voice = FakeVoice(failures=99, reason="invalid")
    async with house(folder, NoEngine(), voice=voice) as h:
        await h.submit("c", text="Good morning.")
        assert (await h.ended("c")).state == "failed"
    # That will not be otherwise the next time.
    assert len(voice.heard) == 1


async def test_a_text_that_is_too_long_is_refused(folder, fake):
    async with house(folder, NoEngine(), "voice.max_characters=10", voice=FakeVoice()) as h:
        with pytest.raises(Refusal) as refused:
            await h.submit("a", text="Good morning.")
        assert refused.value.reason == "too large"


async def test_a_text_of_which_nothing_can_be_spoken_fails(folder, fake):
    async with house(folder, NoEngine(), voice=FakeVoice(chunks=0)) as h:
        await h.submit("a", text="...")
        job = await h.ended("a")
        assert (job.state, job.error_type) == ("failed", "Refusal")
        assert "gave no sound" in job.error


async def test_a_disk_that_is_full_while_a_text_is_spoken_is_waited_for(folder, fake, monkeypatch):
    voice, write = FakeVoice(), FakeVoice.write

    async def full_once(self: FakeVoice, *arguments: Any) -> None:
        monkeypatch.setattr(FakeVoice, "write", write)
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(FakeVoice, "write", full_once)
    fake.let_go.set()
    async with house(folder, NoEngine(), voice=voice) as h:
        await h.submit("a", text="Good morning.")
        assert (await h.ended("a")).state == "completed"
        assert h.heard.intake()[0] == "intake paused"


# The disk.


async def test_with_too_little_room_no_job_is_taken_until_there_is_enough(folder, fake):
    free = {"bytes": 10**9}
    async with house(folder, NoEngine(), "jobs.min_free_gb=0.5", free=lambda _: free["bytes"]) as h:
        await h.submit("a")
        free["bytes"] = 4 * 10**8
        await until_async(lambda: h.jobs.paused)
        assert h.jobs.paused == "the disk of daemon.state has 0.40 GB free, and jobs.min_free_gb is 0.5"
        with pytest.raises(Refusal) as refused:
            await h.submit("b")
        assert refused.value.reason == "paused"
        assert refused.value.retry_s
        # What was taken is answered, worked on and finished.
        assert not (await h.jobs.submit(h.command("a")))[1]
        fake.let_go.set()
        assert (await h.ended("a")).state == "completed"
        free["bytes"] = 5.1 * 10**8
        await asyncio.sleep(0.1)
        assert h.jobs.paused
        free["bytes"] = 10**9
        await until_async(lambda: h.jobs.paused is None)
        await h.submit("b")
        assert h.heard.intake() == ["intake paused", "intake open"]


async def test_a_running_job_whose_disk_is_full_waits_and_goes_on(folder, fake):
    async with house(folder, NoEngine()) as h:
        full = DiskFull(f"{h.outputs / 'a.mp4'}: no space left on device; make room")
        fake.fails = [full, full]
        await h.submit("a")
        await until_async(lambda: h.jobs.paused)
        assert h.jobs.paused == "a.mp4: no space left on device; make room"
        assert (await h.jobs.get("a")).state == "running"
        fake.let_go.set()
        job = await h.ended("a")
        assert (job.state, job.attempts) == ("completed", 1)
        assert [request.overwrite for request in fake.requests] == [False, False, False]
        await until_async(lambda: h.jobs.paused is None)


async def test_a_job_that_waits_for_room_can_be_cancelled(folder, fake, monkeypatch):
    monkeypatch.setattr(jobs_module, "DISK_RETRY_S", 60)
    async with house(folder, NoEngine()) as h:
        fake.fails = [DiskFull("full")]
        await h.submit("a")
        await until_async(lambda: h.jobs.paused)
        await h.jobs.cancel("a")
        fake.let_go.set()
        await until_async(lambda: h.left() == [])


async def test_a_full_disk_under_the_database_pauses_intake_and_loses_no_result(folder, fake, monkeypatch):
    async with house(folder, NoEngine()) as h:
        await h.submit("a")
        await until_async(lambda: fake.at_work)
        full = True

        def when_full(change: Callable[..., Any]) -> Callable[..., Any]:
            async def changed(*arguments: Any, **named: Any) -> Any:
                if full:
                    raise StoreFull("jobs.sqlite: there is no room left on its disk")
                return await change(*arguments, **named)

            return changed

        for name in ("submit", "finish", "progress", "claim"):
            monkeypatch.setattr(h.store, name, when_full(getattr(h.store, name)))
        with pytest.raises(Refusal) as refused:
            await h.submit("b")
        assert refused.value.reason == "paused"
        fake.let_go.set()
        await until_async(lambda: (h.outputs / "a.mp4").exists())
        assert (await h.jobs.get("a")).state == "running"
        full = False
        assert (await h.ended("a")).state == "completed"


# The start and the end.


async def test_what_was_cut_off_is_begun_again_and_told(folder, fake):
    async with house(folder, NoEngine(), at_work=False) as h:
        await h.submit("a")
        await h.store.claim("interactive")
    async with house(folder, NoEngine()) as h:
        await until_async(lambda: h.heard.of("a") == ["queued", "running"])
        fake.let_go.set()
        job = await h.ended("a")
        assert (job.state, job.attempts) == ("completed", 2)


async def test_a_job_that_ended_the_daemon_as_often_as_it_may_is_given_up_at_the_start(folder, fake):
    async with house(folder, NoEngine(), at_work=False) as h:
        await h.submit("a")
        for _ in range(2):
            await h.store.claim("interactive")
            await h.store.recover(attempts=9)
        await h.store.claim("interactive")
    async with house(folder, NoEngine()) as h:
        job = await h.ended("a")
        assert (job.state, job.error_type) == ("failed", "Interrupted")
        assert job.error == "was begun 3 times and never got further than frame 0: the daemon was ended"
        await until_async(lambda: h.heard.of("a") == ["failed"])


async def test_what_is_left_of_jobs_that_have_ended_is_cleared_away_at_the_start(folder, fake):
    async with house(folder, NoEngine(), at_work=False) as h:
        await h.submit("a")
        await h.store.claim("interactive")
        await h.store.finish("a", "cancelled")
        work = folder / "state" / "jobs"
        for name in ("a/work", "unknown/work"):
            (work / name).mkdir(parents=True)
            (work / name / "video.packets").write_bytes(b"x")
        h.outputs.mkdir()
        note_film(work / "a" / "work")
        (h.outputs / "a.mp4").write_bytes(b"film")  # finished in the moment it was cancelled
    async with house(folder, NoEngine()) as h:
        await until_async(lambda: not list(work.iterdir()))
        await until_async(lambda: h.left() == [])
        await until_async(lambda: not h.jobs._running)
        assert await h.store.untidy() == []


async def test_old_jobs_go_with_their_files_and_what_the_spool_has_for_them(folder, fake, monkeypatch):
    monkeypatch.setattr(jobs_module, "KEEP_EVERY_S", 0.02)
    pruned = []
    monkeypatch.setattr(Inputs, "prune", lambda self, needed: _note(pruned, needed))
    async with house(folder, NoEngine(), "jobs.keep_days=0.000001") as h:
        fake.let_go.set()
        await h.submit("a")
        await until_async(lambda: h.heard.of("a") == ["queued", "running", "completed"])
        await until_async(lambda: h.left() == [])
        assert await h.jobs.list() == [] or await h.ended("a")
    assert pruned


async def _note(pruned: list[Any], needed: Any) -> int:
    pruned.append(await needed())
    return 0


# Killed.


def lives(folder: Path, count: int, kills: int, rng: random.Random, longest_s: float) -> list[list[str]]:
    """What each life of a daemon said that was killed so often, at random, and then left alone.

    Most are killed up to longest_s after they have begun to work, some as soon as they have said anything.
    """
    said: list[list[str]] = []
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(DAEMON), str(folder), str(count), "jobs.attempts=100", "model.options.step_s=0.02"]
    for life in range(kills + 1):
        sign = rng.choice(["", "running", "running", "running"])
        lines: list[str] = []
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        with child:
            if life < kills:
                for line in child.stdout:
                    lines.append(line)
                    if line.startswith(sign):
                        time.sleep(rng.uniform(0, longest_s))
                        child.kill()
                        break
            lines += child.stdout
            errors = child.stderr.read()
        assert life < kills or child.returncode == 0, errors
        assert "Traceback" not in errors, errors
        # What was cut off by the kill was not said.
        said.append([line.strip() for line in lines if line.endswith("\n")])
    return said


def check_lives(folder: Path, said: list[list[str]], count: int, films: dict[int, bytes]) -> None:
    told = [line for life in said for line in life]
    ids = [f"job-{number}" for number in range(count)]
    assert told[-1] == "done"
    # Nothing that was accepted is lost, and nothing is done twice.
    assert {line.removeprefix("completed ") for line in told if line.startswith("completed ")} <= set(ids)
    assert all(told.count(f"completed {id}") <= 1 for id in ids)
    assert not [line for line in told if line.startswith(("failed", "cancelled"))]
    for id in ids:
        if f"completed {id}" in told:
            after = told[told.index(f"completed {id}") :]
            assert f"running {id}" not in after
            assert f"queued {id}" not in after
    # And every film is what it is without all this.
    for number in range(count):
        film = folder / "out" / daemon_command(folder, number).name
        assert film.with_name(f"{film.name}.mp4").read_bytes() == films[number], number
    left = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert len(left) == count
    assert list((folder / "state" / "jobs").iterdir()) == []


def undisturbed(folder: Path, count: int) -> dict[int, bytes]:
    """The films of a daemon that nobody kills."""
    other = folder / "undisturbed"
    shutil.copytree(folder / "place", other / "place")
    lives(other, count, 0, random.Random(0), 0)
    films = {}
    for number in range(count):
        film = other / "out" / daemon_command(other, number).name
        films[number] = film.with_name(f"{film.name}.mp4").read_bytes()
    return films


@pytest.mark.parametrize(
    ("count", "kills"),
    [(3, 3), *(pytest.param(24, 25, marks=pytest.mark.slow, id=f"24-25-{n}") for n in range(4))],
)
def test_killed_at_any_moment_nothing_is_lost_and_nothing_is_done_twice(folder, count, kills):
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    films = undisturbed(folder, count)
    said = lives(folder, count, kills, random.Random(seed), longest_s=0.5)
    print(f"KILL_SEED={seed}: {sum('done' not in life for life in said)} of {kills} kills before the end of the work")
    check_lives(folder, said, count, films)
