"""The figures: what they count, how they are named, and that their labels stay few whoever sends what."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from waiting import until_async

from service.commands import Refusal
from service.config import Settings
from service.hub import Hub
from service.metrics import MOST_MESSAGES, MOST_ROUTES, Metrics, output_kind

UNITS = ("seconds", "bytes", "ratio", "total", "info", "per_second")
COUNTED = (
    "avatard_jobs",
    "avatard_jobs_waiting",
    "avatard_sessions",
    "avatard_outputs",
    "avatard_viewers",
    "avatard_process_open_fds",
    "avatard_process_max_fds",
    "avatard_engine_process_open_fds",
    "avatard_engine_process_max_fds",
)
"""Gauges whose unit is what they are called."""
FLAGS = ("avatard_jobs_intake_paused", "avatard_engine_state")

NOT_FOR_LABELS = re.compile(r"://|\s|^[0-9a-f-]{12,}$|\?")


@dataclass(frozen=True)
class FakeJob:
    priority: str = "batch"
    started_at: float | None = 100.0
    finished_at: float | None = 107.5
    result: dict[str, Any] | None = field(default_factory=lambda: {"seconds": 4.8})


class FakeJobs:
    paused: str | None = None

    def __init__(self) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.by_state = {"queued": 3, "running": 1}
        self.by_priority = {"interactive": 1, "batch": 2}

    async def get(self, id: str) -> FakeJob:
        if id not in self.jobs:
            raise Refusal("not found", "gone")
        return self.jobs[id]

    async def counts(self) -> dict[str, int]:
        return self.by_state

    async def waiting(self) -> dict[str, int]:
        return self.by_priority


@dataclass
class FakeSession:
    id: str
    told: dict[str, Any]

    def status(self) -> dict[str, Any]:
        return self.told


def on_air(**differently: Any) -> dict[str, Any]:
    output = {"name": "rtmp://a.example/live/***", "state": "sending", "dropped_frames": 0, "reconnects": 0}
    status = {"state": "on air", "on_air": True, "frames": 100, "held": 2, "skipped": 1, "ahead_s": 0.2}
    status |= {"step_s": 0.2, "load": 0.42, "skew_s": -0.01, "waiting_s": 1.5, "slips": 0, "interruptions": 1}
    return status | {"outputs": [output], "viewers": 2} | differently


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """Metrics over an app of which each part is what the test says."""

    metrics: Metrics
    app: Any
    clock: Clock

    def read(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample by its name and labels."""
        families = text_string_to_metric_families(self.metrics.text().decode())
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def value(self, name: str, **labels: str) -> float | None:
        return self.read().get((f"avatard_{name}", frozenset(labels.items())))


@pytest.fixture
async def bench(tmp_path):
    settings = Settings().model_copy(
        update={"daemon": Settings().daemon.model_copy(update={"state": tmp_path, "outputs": tmp_path})}
    )
    clock = Clock()
    app = SimpleNamespace(
        settings=settings,
        hub=Hub(),
        jobs=FakeJobs(),
        sessions=SimpleNamespace(open=[], list=lambda: app.sessions.open),
        engine=SimpleNamespace(
            state="ready",
            restarts=2,
            load_s=3.5,
            steps=10,
            step_s=1.25,
            pid=os.getpid(),
            spec=SimpleNamespace(frames_per_block=12),
        ),
        inputs=SimpleNamespace(spool_bytes=4096),
    )
    metrics = Metrics(clock)
    running = asyncio.create_task(metrics.run(app))
    await until_async(lambda: metrics._free, 5, "the first look")
    yield Bench(metrics, app, clock)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_before_there_is_a_daemon_there_are_figures_of_the_process_only():
    names = {family.name for family in text_string_to_metric_families(Metrics().text().decode())}
    assert "avatard_process_resident_memory_bytes" in names
    assert "avatard_sessions" not in names


async def test_the_state_of_the_engine_is_a_one_among_zeros(bench):
    told = {state: bench.value("engine_state", state=state) for state in ("loading", "ready", "restarting", "ended")}
    assert told == {"loading": 0, "ready": 1, "restarting": 0, "ended": 0}
    assert bench.value("engine_restarts_total") == 2
    assert bench.value("engine_load_seconds") == 3.5
    assert bench.value("engine_process_resident_memory_bytes") > 1e6


async def test_blocks_of_the_model_are_a_count_and_a_sum_of_seconds(bench):
    assert bench.value("stage_seconds_count", stage="model") == 10
    assert bench.value("stage_seconds_sum", stage="model") == 1.25


async def test_jobs_are_counted_by_state_by_priority_and_by_their_end(bench):
    assert bench.value("jobs", state="queued") == 3
    assert bench.value("jobs_waiting", priority="batch") == 2
    assert bench.value("jobs_total", outcome="failed") == 0
    bench.app.jobs.jobs["a"] = FakeJob()
    for what in ("queued", "running", "progress"):
        bench.app.hub.tell("job", "a", what)
    bench.app.hub.tell("job", "a", "completed", encode_s=0.5, encoded_frames=25)
    bench.app.hub.tell("job", "pruned meanwhile", "failed")
    await until_async(lambda: bench.value("jobs_total", outcome="failed"))
    assert bench.value("jobs_total", outcome="completed") == 1
    assert bench.value("job_duration_seconds_sum", outcome="completed", priority="batch") == 7.5
    assert bench.value("job_video_seconds_total") == 4.8
    assert bench.value("stage_seconds_count", stage="encode") == 3
    assert bench.value("stage_seconds_sum", stage="encode") == 0.5


async def test_a_closed_intake_is_seen(bench):
    assert bench.value("jobs_intake_paused") == 0
    bench.app.jobs.paused = "the disk is full"
    assert bench.value("jobs_intake_paused") == 1


async def test_of_sessions_the_worst_is_shown_and_all_are_summed(bench):
    bench.app.sessions.open = [FakeSession("a", on_air()), FakeSession("b", on_air(ahead_s=-0.3, skew_s=0.002))]
    assert bench.value("sessions", state="on air") == 2
    assert bench.value("live_frames_total") == 200
    assert bench.value("live_worst_ahead_seconds") == -0.3
    assert bench.value("live_worst_skew_seconds") == 0.01
    assert bench.value("live_worst_load_ratio") == 0.42
    assert bench.value("viewers") == 4
    assert bench.value("outputs", kind="rtmp", state="sending") == 2


async def test_totals_grow_by_what_is_new_and_stay_when_a_session_is_gone(bench):
    session = FakeSession("a", on_air())
    bench.app.sessions.open = [session]
    assert bench.value("live_frames_total") == 100
    output = session.told["outputs"][0]
    session.told = on_air(frames=150, outputs=[output | {"reconnects": 3, "dropped_frames": 7}])
    assert bench.value("live_frames_total") == 150
    assert bench.value("output_reconnects_total", kind="rtmp") == 3
    bench.app.sessions.open = []
    bench.app.hub.tell("session", "a", "closed", **on_air(frames=160))
    await until_async(lambda: bench.value("live_frames_total") == 160)
    # Another one of that name begins at nothing.
    bench.app.sessions.open = [FakeSession("a", on_air(frames=5))]
    assert bench.value("live_frames_total") == 165


async def test_new_frames_a_second_are_those_that_were_not_shown_again(bench):
    session = FakeSession("a", on_air(frames=0, held=0))
    bench.app.sessions.open = [session]
    bench.metrics.text()
    bench.clock.now += 2.0
    session.told = on_air(frames=50, held=10)
    assert bench.value("live_worst_new_frames_per_second") == 20.0


async def test_what_listened_too_slowly_is_said(bench):
    for _ in range(5000):
        bench.app.hub.tell("daemon", "x", "listening")
    await until_async(lambda: bench.value("news_missed_total"))
    assert bench.value("news_missed_total") == 5000 - 4096


async def test_requests_are_told_by_template_method_and_code(bench):
    bench.metrics.request("/v1/jobs/{id}", "GET", 200, 0.01)
    bench.metrics.request("/v1/jobs/{id}", "GET", 404, 0.02)
    bench.metrics.request("/v1/sessions/{id}/audio", "WEBSOCKET", 101, 3600.0)
    assert bench.value("http_requests_total", route="/v1/jobs/{id}", method="GET", code="404") == 1
    assert bench.value("http_request_duration_seconds_count", route="/v1/jobs/{id}") == 2
    assert bench.value("http_request_duration_seconds_count", route="/v1/sessions/{id}/audio") is None


async def test_labels_that_others_choose_stay_few(bench):
    for n in range(3 * MOST_ROUTES):
        bench.metrics.request(f"/{n}", f"METHOD{n}", n, 0.0)
        bench.metrics.message(f"kind{n}", "ok")
    told = bench.read()
    routes = {dict(labels).get("route") for _, labels in told} - {None}
    kinds = {dict(labels).get("kind") for name, labels in told if "mqtt" in name} - {None}
    assert len(routes) == MOST_ROUTES + 1
    assert len(kinds) == MOST_MESSAGES + 1
    assert {dict(labels)["method"] for name, labels in told if name == "avatard_http_requests_total"} == {"other"}


async def test_no_label_holds_an_id_an_address_or_a_text(bench):
    session = FakeSession("9f0c1d2e3f4a5b6c", on_air(state="sunny <b>", outputs=[{"name": "ftp://x/y", "state": "z"}]))
    bench.app.sessions.open = [session]
    bench.app.jobs.jobs["9f0c1d2e3f4a5b6c"] = dataclasses.replace(FakeJob(), priority="mine ://")
    bench.app.hub.tell("job", "9f0c1d2e3f4a5b6c", "completed")
    await until_async(lambda: bench.value("jobs_total", outcome="completed"))
    for _, labels in bench.read():
        for name, value in labels:
            assert not NOT_FOR_LABELS.search(value.replace("on air", "on_air")), (name, value)


async def test_every_name_is_ours_says_its_unit_and_what_it_is(bench):
    bench.app.sessions.open = [FakeSession("a", on_air())]
    bench.metrics.request("/", "GET", 200, 0.1)
    bench.metrics.message("submit", "accepted")
    bench.metrics.text()
    bench.clock.now += 2
    for family in text_string_to_metric_families(bench.metrics.text().decode()):
        assert re.fullmatch(r"avatard_[a-z0-9_]+[a-z0-9]", family.name)
        assert family.documentation.endswith("."), family.name
        if family.type == "counter":
            assert all(s.name.endswith(("_total", "_created")) for s in family.samples), family.name
        elif family.name not in (*COUNTED, *FLAGS):
            assert family.name.endswith(UNITS) or family.name == "avatard_build", family.name
        assert not re.search(r"_(ms|milliseconds|mb|percent|minutes)\b", family.name)


async def test_a_disk_and_the_memory_of_the_machine_are_told_in_bytes(bench):
    assert bench.value("disk_free_bytes", folder="state") > 0
    assert bench.value("host_memory_available_bytes") > 0
    assert bench.value("spool_bytes") == 4096


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rtmp://a.example/live/***", "rtmp"),
        ("srt://a.example:9000", "srt"),
        ("/srv/out/show.mp4", "file"),
        ("show/index.m3u8", "hls"),
        ("hls:main", "hls"),
        ("gopher://a.example", "other"),
    ],
)
def test_an_output_is_known_by_its_kind(name, kind):
    assert output_kind(name) == kind
