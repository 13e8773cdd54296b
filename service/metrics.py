"""Figures for Prometheus: told by the triggers, heard from the hub, and read from the daemon when somebody asks.

Every label has few values, whoever sends what: no id, no address, no text of a user is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import platform
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.core import SummaryMetricFamily as Summary
from prometheus_client.registry import Collector

from service import VERSION

if TYPE_CHECKING:
    from service.app import App
    from service.hub import News

log = logging.getLogger(__name__)

# When each series began, as a series of its own beside it: twice as many, and the daemon's start says it too.
disable_created_metrics()

LOOK_EVERY_S = 1.0
"""How often sessions are looked at: what one does in its last second may be missing in the totals."""
FOLDERS_EVERY_S = 10.0

ENGINE_STATES = ("loading", "ready", "restarting", "ended")
JOB_STATES = ("queued", "running", "completed", "failed", "cancelled")
PRIORITIES = ("interactive", "batch")
OUTCOMES = ("completed", "failed", "cancelled")
SESSION_STATES = ("opening", "on air", "failed", "closed")
OUTPUT_KINDS = ("rtmp", "rtmps", "srt", "hls", "file", "null")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET")

MOST_ROUTES = 200
MOST_MESSAGES = 64
"""Different values of a label that others choose; further ones are counted as `other`."""

HTTP_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
JOB_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 10_800, 43_200)
LAG_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2, 5, 10)
AHEAD_S = (-1, -0.5, -0.2, -0.1, 0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)


class Metrics:
    """All figures of one daemon, in a registry of its own.

    `request`, `message` and `loop_lag` are told to it; the rest is read from the app that `run` is given.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.registry = registry = CollectorRegistry()
        self._app: App | None = None
        self._counts: Mapping[Any, int] = {}
        self._waiting: Mapping[Any, int] = {}
        self._free: Mapping[str, int] = {}
        self._seen: dict[str, _Seen] = {}
        self._encode_s, self._encoded_blocks = 0.0, 0
        self._routes: set[str] = set()
        self._messages: set[tuple[str, str]] = set()

        self._requests = Counter(
            "avatard_http_requests_total",
            "Requests over HTTP, by the template of their address.",
            ("route", "method", "code"),
            registry=registry,
        )
        self._request_s = Histogram(
            "avatard_http_request_duration_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ("route",),
            registry=registry,
            buckets=HTTP_S,
        )
        self._messages_total = Counter(
            "avatard_mqtt_messages_total",
            "Messages over MQTT, by what they were about and what became of them.",
            ("kind", "outcome"),
            registry=registry,
        )
        self._loop_lag = Histogram(
            "avatard_event_loop_lag_seconds",
            "By how much the event loop was late, measured all the time.",
            registry=registry,
            buckets=LAG_S,
        )
        self._jobs = Counter("avatard_jobs_total", "Jobs that ended.", ("outcome",), registry=registry)
        self._job_s = Histogram(
            "avatard_job_duration_seconds",
            "Seconds from a job's first block of work to its end.",
            ("outcome", "priority"),
            registry=registry,
            buckets=JOB_S,
        )
        self._job_video_s = Counter(
            "avatard_job_video_seconds_total", "Seconds of video in the files of jobs.", registry=registry
        )
        self._news = Counter(
            "avatard_trigger_failures_total", "Parts that ended by a bug and were started again.", registry=registry
        )
        self._missed = Counter(
            "avatard_news_missed_total", "News that these figures were too slow for.", registry=registry
        )
        self._live = {
            name: Counter(f"avatard_live_{name}_total", said, registry=registry)
            for name, said in (
                ("frames", "Frames sent by live sessions."),
                ("held_frames", "Frames of them that were shown again, since there was no newer one."),
                ("repeated_frames", "Frames of them shown a second time, since every other picture was made."),
                ("skipped_blocks", "Blocks that were never made, since they would have come too late."),
                ("interruptions", "Times a session was interrupted."),
                ("slips", "Times a session's clock began anew after the process stood still."),
            )
        }
        self._dropped = Counter(
            "avatard_output_dropped_frames_total", "Frames an output did not take.", ("kind",), registry=registry
        )
        self._reconnects = Counter(
            "avatard_output_reconnects_total", "Connections after the first one.", ("kind",), registry=registry
        )
        self._ahead = Histogram(
            "avatard_live_ahead_seconds",
            "From the last frame sent to the last one ready, each second of each session on air.",
            registry=registry,
            buckets=AHEAD_S,
        )
        for outcome in OUTCOMES:
            self._jobs.labels(outcome)
        self._started = Gauge("avatard_start_time_seconds", "When the daemon began, since 1970.", registry=registry)
        self._started.set_to_current_time()
        ProcessCollector(namespace="avatard", registry=registry)
        ProcessCollector(namespace="avatard_engine", pid=self._engine_pid, registry=registry)
        registry.register(_Sampled(self._sampled))

    # Told

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """One request is over. route: its template, such as /v1/jobs/{id}."""
        route = _bounded(route, self._routes, MOST_ROUTES)
        method = method if method in METHODS else "other"
        self._requests.labels(route, method, str(status) if 100 <= status < 600 else "none").inc()
        # How long somebody listened says nothing about how soon they were answered.
        if method != "WEBSOCKET":
            self._request_s.labels(route).observe(seconds)

    def message(self, kind: str, outcome: str) -> None:
        """One message came, or went."""
        labels = _bounded((kind, outcome), self._messages, MOST_MESSAGES)
        self._messages_total.labels(*(labels if isinstance(labels, tuple) else (labels, labels))).inc()

    def loop_lag(self, seconds: float) -> None:
        """The event loop came so much later than it was to."""
        self._loop_lag.observe(max(seconds, 0.0))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        self._look_at_sessions()
        return generate_latest(self.registry)

    # Read

    async def run(self, app: App) -> None:
        """Listen and look until cancelled. Without it, there is what was told and nothing else."""
        self._app = app
        with app.hub.listen(4096) as news:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._hear(news), name="metrics news")
                tasks.create_task(self._look(), name="metrics look")

    async def _hear(self, news: Any) -> None:
        async for item in news:
            if item.missed:
                self._missed.inc(item.missed)
            if item.kind == "job" and item.what in OUTCOMES:
                await self._count_job(item)
            elif item.kind == "session" and item.what in ("closed", "failed"):
                # What it did since it was last looked at, as far as its end tells.
                self._count_session(item.id, item.body)
                self._seen.pop(item.id, None)
            elif item.kind == "daemon" and item.what == "started again":
                self._news.inc()

    async def _count_job(self, item: News) -> None:
        assert self._app is not None
        self._jobs.labels(item.what).inc()
        from service.commands import Refusal

        try:
            job = await self._app.jobs.get(item.id)
        except Refusal:
            return
        if job.started_at is not None and job.finished_at is not None:
            priority = job.priority if job.priority in PRIORITIES else "other"
            self._job_s.labels(item.what, priority).observe(max(job.finished_at - job.started_at, 0.0))
        if item.what == "completed" and (spec := self._app.engine.spec) is not None:
            self._encode_s += _number(item.body.get("encode_s"))
            self._encoded_blocks += math.ceil(_number(item.body.get("encoded_frames")) / spec.frames_per_block)
        if item.what == "completed" and job.result:
            self._job_video_s.inc(max(float(job.result.get("seconds", 0.0)), 0.0))

    async def _look(self) -> None:
        """What costs a thread or a query is looked at now and then, and shown as it was."""
        assert self._app is not None
        jobs, daemon = self._app.jobs, self._app.settings.daemon
        folders = {"state": daemon.state, "outputs": daemon.outputs}
        folders_at = -FOLDERS_EVERY_S
        while True:
            try:
                self._counts = dict(await jobs.counts())
                self._waiting = dict(await jobs.waiting())
                if self._clock() - folders_at >= FOLDERS_EVERY_S:
                    folders_at = self._clock()
                    self._free = await asyncio.to_thread(_free_bytes, folders)
            except OSError as error:
                log.warning("metrics: %s", error)
            self._look_at_sessions()
            for status in self._on_air():
                self._ahead.observe(float(status.get("ahead_s", 0.0)))
            await asyncio.sleep(LOOK_EVERY_S)

    def _look_at_sessions(self) -> None:
        if self._app is None:
            return
        for session in self._app.sessions.list():
            self._count_session(session.id, session.status())

    def _count_session(self, id: str, status: Mapping[str, Any]) -> None:
        """Add what a session did since it was last looked at: its own figures end with it, ours do not."""
        if "frames" not in status:
            return
        seen = self._seen.setdefault(id, _Seen())
        for name, key in (
            ("frames", "frames"),
            ("held_frames", "held"),
            ("repeated_frames", "repeated"),
            ("skipped_blocks", "skipped"),
            ("interruptions", "interruptions"),
            ("slips", "slips"),
        ):
            self._live[name].inc(seen.more(name, status.get(key, 0)))
        for output in status.get("outputs", ()):
            name, kind = output["name"], output_kind(output["name"])
            self._dropped.labels(kind).inc(seen.more(f"dropped {name}", output.get("dropped_frames", 0)))
            self._reconnects.labels(kind).inc(seen.more(f"reconnects {name}", output.get("reconnects", 0)))
        seen.rate(self._clock(), status)

    def _on_air(self) -> list[Mapping[str, Any]]:
        assert self._app is not None
        return [status for session in self._app.sessions.list() if (status := session.status()).get("on_air")]

    def _engine_pid(self) -> int | str:
        # 0 is nobody: a folder that /proc does not have.
        return self._app.engine.pid if self._app is not None else 0

    def _sampled(self) -> Iterator[Metric]:
        app = self._app
        if app is None:
            return
        yield InfoMetricFamily(
            "avatard_build",
            "What runs here.",
            {
                "version": VERSION,
                "python": platform.python_version(),
                # Of a folder of one's own no more than the last name.
                "model": Path(app.settings.model.name.rpartition(":")[0] or app.settings.model.name).name,
            },
        )
        engine = app.engine
        yield _gauge("avatard_engine_state", "1 for the state the model's process is in.", "state", {
            state: float(engine.state == state) for state in ENGINE_STATES
        })  # fmt: skip
        yield _counter("avatard_engine_restarts", "Processes that were started after the first one.", engine.restarts)
        if engine.state == "ready":
            yield _plain("avatard_engine_load_seconds", "Seconds the model took to load.", engine.load_s)
        stage = Summary(
            "avatard_stage_seconds", "Seconds that blocks spend in a stage; encode: those of jobs.", labels=("stage",)
        )
        stage.add_metric(("model",), count_value=engine.steps, sum_value=engine.step_s)
        stage.add_metric(("encode",), count_value=self._encoded_blocks, sum_value=self._encode_s)
        yield stage
        yield from self._job_figures(app)
        yield from self._session_figures(app)
        yield _gauge("avatard_disk_free_bytes", "Bytes free where the daemon writes.", "folder", self._free)
        yield _plain("avatard_spool_bytes", "Bytes of what was brought from outside.", app.inputs.spool_bytes)
        if (available := _memory_available()) is not None:
            yield _plain("avatard_host_memory_available_bytes", "Bytes that the machine could still give.", available)

    def _job_figures(self, app: App) -> Iterator[Metric]:
        counts = {state: self._counts.get(state, 0) for state in JOB_STATES}
        yield _gauge("avatard_jobs", "Jobs that are kept, by state.", "state", counts)
        waiting = {priority: self._waiting.get(priority, 0) for priority in PRIORITIES}
        yield _gauge("avatard_jobs_waiting", "Jobs that wait for their turn.", "priority", waiting)
        yield _plain("avatard_jobs_intake_paused", "1 while no job is taken.", float(app.jobs.paused is not None))

    def _session_figures(self, app: App) -> Iterator[Metric]:
        statuses = {session.id: session.status() for session in app.sessions.list()}
        states = Tally(_known(status.get("state", ""), SESSION_STATES) for status in statuses.values())
        yield _gauge("avatard_sessions", "Live sessions, by state.", "state", {
            state: states.get(state, 0) for state in (*SESSION_STATES, "other")
        })  # fmt: skip
        viewers = sum(_number(status.get("viewers", 0)) for status in statuses.values())
        yield _plain("avatard_viewers", "Who watches a session.", viewers)
        outputs = Tally(
            (output_kind(output["name"]), str(output.get("state", "")))
            for status in statuses.values()
            for output in status.get("outputs", ())
        )
        family = GaugeMetricFamily("avatard_outputs", "Outputs of live sessions.", labels=("kind", "state"))
        for labels, count in outputs.items():
            family.add_metric(labels, count)
        yield family
        on_air = {id: status for id, status in statuses.items() if status.get("on_air")}
        if not on_air:
            return
        worst = [
            ("ahead_seconds", "The least by which a session is ahead.", min, "ahead_s"),
            ("load_ratio", "The largest share of its time that a session's blocks take.", max, "load"),
            ("skew_seconds", "The largest distance of picture and sound, either way.", max, "skew_s"),
            ("step_seconds", "The most a session's block takes (median of its last ones).", max, "step_s"),
            ("waiting_seconds", "The most sound that waits to be spoken.", max, "waiting_s"),
        ]
        for name, said, choose, key in worst:
            values = [_number(status.get(key, 0.0)) for status in on_air.values()]
            found = choose(map(abs, values) if key == "skew_s" else values)
            yield _plain(f"avatard_live_worst_{name}", f"{said} Of those on air.", found)
        rates = [seen.fps for id in on_air if (seen := self._seen.get(id)) is not None and seen.fps is not None]
        if rates:
            yield _plain(
                "avatard_live_worst_new_frames_per_second",
                "The fewest new pictures a session shows each second. Of those on air.",
                min(rates),
            )


@dataclass
class _Seen:
    """A session as it was when it was last looked at. fps: new pictures each second since the time before."""

    figures: dict[str, float] = field(default_factory=dict)
    at_s: float | None = None
    new_frames: float = 0.0
    fps: float | None = None

    def more(self, name: str, value: object) -> float:
        """By how much a figure has grown; an output that was removed and added again begins at nothing."""
        now, before = _number(value), self.figures.get(name, 0.0)
        self.figures[name] = now
        return now - before if now >= before else now

    def rate(self, now_s: float, status: Mapping[str, Any]) -> None:
        new = _number(status.get("frames", 0)) - _number(status.get("held", 0)) - _number(status.get("repeated", 0))
        if self.at_s is not None and now_s - self.at_s < LOOK_EVERY_S / 2:
            return
        if self.at_s is not None:
            self.fps = (new - self.new_frames) / (now_s - self.at_s)
        self.at_s, self.new_frames = now_s, new


class _Sampled(Collector):
    """What is read when somebody asks."""

    def __init__(self, sample: Callable[[], Iterable[Metric]]) -> None:
        self._sample = sample

    def collect(self) -> Iterable[Metric]:
        return self._sample()


def output_kind(name: str) -> str:
    """Of an output's name, which is its target without secrets."""
    scheme, separator, _ = name.partition("://")
    if not separator:
        scheme = "hls" if name.startswith("hls:") or name.endswith(".m3u8") else "file"
    return _known(scheme, OUTPUT_KINDS)


def _known(value: str, values: tuple[str, ...]) -> str:
    return value if value in values else "other"


def _bounded(value: Any, seen: set[Any], most: int) -> Any:
    """The value, or `other` when there were too many different ones."""
    if value not in seen:
        if len(seen) >= most:
            return "other"
        seen.add(value)
    return value


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float(len(value)) if isinstance(value, list) else 0.0


def _plain(name: str, said: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, said, value=value)


def _counter(name: str, said: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, said, value=value)


def _gauge(name: str, said: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, said, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _free_bytes(folders: Mapping[str, Path]) -> dict[str, int]:
    found = {}
    for name, folder in folders.items():
        with contextlib.suppress(OSError):
            stat = os.statvfs(os.path.expanduser(folder))
            found[name] = stat.f_bavail * stat.f_frsize
    return found


def _memory_available() -> int | None:
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
