"""`avatard serve`: everything brought up in its order, kept up, told again what changed, and put away.

The order is: settings as a whole, the lock on the state folder, logs, keys, the model's process (which loads while the
rest goes on), the store and its jobs, the triggers. Jobs are taken at once; ready is when the model is warm.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio.errors import AvatardError
from service import log as operators_log
from service.app import App
from service.config import ConfigError, Settings, reloaded
from service.hub import Hub
from service.metrics import Metrics
from service.run import engine_settings, unswept
from service.secrets import check_certificate
from streaming.engine import Engine, EngineError, EngineSettings, EngineState, Restarts

if TYPE_CHECKING:
    from service.auth import Keys

log = logging.getLogger(__name__)

LAG_EVERY_S = 0.1
LAG_WORTH_A_LINE_S = 0.5
STARTING_S = 2.0
LINE_EVERY_S = 60.0
"""Between two lines about the same thing."""

AGAIN_S = (1.0, 60.0)
"""Before a part that failed is started again: the first time, and the most. It doubles until a life lasts that long."""
SETTLED_S = 10.0
"""Within which a part that has just been started complains of its settings: then the daemon does not start."""

LEAVING_S = 2.5
"""Of daemon.shutdown_s, what is kept for saying goodbye to the broker."""
GRACE_S = 1.5
"""After daemon.shutdown_s, until the process ends whatever it does."""


def serve(load: Callable[[], Settings]) -> int:
    """Run the daemon until a signal asks it to end; its exit status.

    load: reads the settings, now and at each SIGHUP.
    Raises: AvatardError: it cannot start, or not with these settings.
    """
    settings = load()
    if settings.http.enabled and settings.http.tls_cert is not None:
        check_certificate(settings.http.tls_cert, settings.http.tls_key)
    systemd = ServiceManager(os.environ)
    with _sole_owner(settings):
        operators_log.set_up_daemon(settings.logging)
        status = asyncio.run(_Daemon(load, settings, systemd).run())
    log.info("ended")
    return status


class ServiceManager:
    """systemd, told what goes on by datagrams (sd_notify); nobody, where it did not start us.

    watchdog_s: within which it wants to hear `watchdog`, again and again; None: it does not.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        # Taken away: what we start must not speak for us.
        address = environment.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        asked = bool(self._address) and microseconds.isdecimal() and pid in ("", str(os.getpid()))
        self.watchdog_s = int(microseconds) / 1e6 if asked else None

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={status}")

    def loading(self, status: str, seconds: float) -> None:
        """It takes longer: do not give up for so many seconds."""
        self._tell(f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def reloading(self) -> None:
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._tell("STOPPING=1", "STATUS=ending")

    def watchdog(self) -> None:
        self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            try:
                sender.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                log.warning("systemd was not told %s: %s", lines[0], error.strerror)


@contextlib.contextmanager
def _sole_owner(settings: Settings) -> Iterator[None]:
    """Make the folders, and let nobody else work in the state's. Raises: AvatardError."""
    state, outputs = _folder(settings.daemon.state), _folder(settings.daemon.outputs)
    for name, folder, mode in (("state", state, 0o700), ("outputs", outputs, 0o777)):
        try:
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"daemon.{name}: {folder}: cannot be made ({_reason(error)})") from error
    file = state / "lock"
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"daemon.state: {file}: cannot be written ({_reason(error)})") from error
    try:
        try:
            # Goes with the process, however it ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip()
            raise AvatardError(
                f"daemon.state: {state}: another avatard serve works there (process {pid or 'unknown'}); "
                "end it, or give this one a folder of its own"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


class _Daemon:
    def __init__(
        self,
        load: Callable[[], Settings],
        settings: Settings,
        systemd: ServiceManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load, self._settings, self._systemd, self._clock = load, settings, systemd, clock
        self._hub, self._metrics = Hub(), Metrics()
        self._stop, self._hangup = asyncio.Event(), asyncio.Event()
        self._engine: Engine | None = None
        self._engine_ended = asyncio.Event()
        self._not_ready_since: float | None = clock()
        self._insisting: threading.Timer | None = None

    async def run(self) -> int:
        """Raises: AvatardError: it could not start; EngineError is a status."""
        from service.auth import Keys

        with self._signals():
            keys = Keys.load(self._settings)
            async with await Engine.launch(self._engine_settings(), on_change=self._on_engine) as self._engine:
                try:
                    async with self._assembled(self._engine, keys) as app:
                        await self._keep_up_all(app)
                except Exception as error:
                    told = _first(error)
                    if isinstance(told, EngineError):
                        # Nothing that a person has to mend first: whoever started us may do so again.
                        log.error("%s", told)
                        return 1
                    raise told from None
        return 0

    def _engine_settings(self) -> EngineSettings:
        """A step that hangs is seen soon, and there is no end to starting again."""
        return dataclasses.replace(
            engine_settings(self._settings),
            live=True,
            step_timeout_s=self._settings.live.step_timeout_s,
            restarts=Restarts(failed_loads=None),
        )

    @contextlib.asynccontextmanager
    async def _assembled(self, engine: Engine, keys: Keys) -> AsyncIterator[App]:
        """All that the triggers share."""
        # After the launch: these imports take as long as the child takes to import its own.
        from service import isolated
        from service.inputs import Inputs
        from service.jobs import Jobs
        from service.sessions import Sessions
        from service.store import JobStore
        from service.turns import Turns
        from service.voice import Voice

        isolated.start()
        settings, hub = self._settings, self._hub
        voice = await asyncio.to_thread(Voice.make, settings)
        inputs = await asyncio.to_thread(Inputs, settings)
        turns = Turns(beside_live=settings.sessions.jobs_beside_live)
        store = await JobStore.open(_folder(settings.daemon.state) / "jobs.sqlite")
        try:
            jobs = Jobs(store, inputs, engine, turns, hub, settings, voice)
            sessions = Sessions(settings, engine, inputs, turns, hub, voice)
            yield App(settings, hub, self._metrics, inputs, engine, turns, jobs, sessions, voice, keys)
        finally:
            await store.close()

    # Everything at work

    async def _keep_up_all(self, app: App) -> None:
        """Until asked to end. Raises: ExceptionGroup: what cannot be gone on without has failed."""
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._watch_engine(app), name="engine"),
                tasks.create_task(self._watch_loop(), name="loop"),
                tasks.create_task(self._take_hangups(app), name="hangups"),
                tasks.create_task(self._keep_up("metrics", lambda: app.metrics.run(app)), name="metrics"),
            ]
            jobs = tasks.create_task(self._keep_up("jobs", app.jobs.run), name="jobs")
            triggers = {
                name: tasks.create_task(self._keep_up(name, work), name=name) for name, work in _triggers(app).items()
            }
            try:
                await self._stop.wait()
            finally:
                self._insist()
                await self._put_away(app, jobs, triggers)
                for task in background:
                    task.cancel()

    async def _put_away(self, app: App, jobs: asyncio.Task[None], triggers: dict[str, asyncio.Task[None]]) -> None:
        """Sessions with their trailers, jobs at a block's border; then a word to the broker."""
        self._systemd.stopping()
        self._hub.tell("daemon", "", "stopping")
        end_s = self._clock() + self._settings.daemon.shutdown_s
        # Last: it tells what becomes of the others.
        mqtt = triggers.pop("mqtt", None)
        for task in (jobs, *triggers.values()):
            task.cancel()
        sessions = asyncio.create_task(_all_closed(app), name="live sessions")
        ending = [sessions, jobs, *triggers.values()]
        await asyncio.wait(ending, timeout=max(end_s - LEAVING_S - self._clock(), 0.0))
        if mqtt is not None:
            mqtt.cancel()
            ending.append(mqtt)
        _, late = await asyncio.wait(ending, timeout=max(end_s - self._clock(), 0.0))
        for task in late:
            log.warning("%s: did not end in %g s and is cut off", task.get_name(), self._settings.daemon.shutdown_s)
            task.cancel()

    async def _keep_up(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` until cancelled; when it ends by a bug, again, ever later. Raises: AvatardError: at its start."""
        wait_s, lives = 0.0, 0
        while True:
            began = self._clock()
            try:
                await work()
                why = "ended, which it never should"
                log.error("%s: %s", name, why)
            except Exception as error:
                told = _first(error)
                if isinstance(told, AvatardError):
                    if not lives and self._clock() - began < SETTLED_S:
                        raise told from None
                    log.error("%s: %s", name, told)
                else:
                    log.error("%s: failed by a bug", name, exc_info=error)
                why = type(told).__name__
            lives += 1
            lived_s = self._clock() - began
            wait_s = AGAIN_S[0] if lived_s >= AGAIN_S[1] or not wait_s else min(2 * wait_s, AGAIN_S[1])
            log.warning("%s: started again in %g s", name, wait_s)
            self._hub.tell("daemon", name, "started again", why=why, wait_s=wait_s)
            await asyncio.sleep(wait_s)

    # The model

    def _on_engine(self, state: EngineState, why: str) -> None:
        if state == "ready":
            self._not_ready_since = None
            log.info("%s", why)
        elif self._not_ready_since is None:
            self._not_ready_since = self._clock()
        if state == "ended":
            self._engine_ended.set()
        self._hub.tell("engine", "", state, why=why)

    async def _watch_engine(self, app: App) -> None:
        """Tell when the model is warm. Raises: what kept it from loading; EngineError: there will be none any more."""
        telling = asyncio.create_task(self._tell_loading(), name="loading")
        try:
            await app.engine.ready()
        finally:
            telling.cancel()
        log.info("ready")
        self._systemd.ready("ready")
        with unswept():
            await self._engine_ended.wait()
        # Says why.
        await app.engine.ready()

    async def _tell_loading(self) -> None:
        while True:
            self._systemd.loading("loading the model", 60.0)
            await asyncio.sleep(20.0)

    def _engine_answers(self) -> bool:
        """It is ready, or has not been away for longer than a load may take."""
        since = self._not_ready_since
        return since is None or self._clock() - since < self._settings.model.load_timeout_s

    # The loop

    async def _watch_loop(self) -> None:
        """Measure by how much the loop is late; while it turns and the model answers, the watchdog is fed."""
        feed_s = self._systemd.watchdog_s / 3 if self._systemd.watchdog_s else None
        fed = told = -LINE_EVERY_S
        # What is imported and built until then holds the loop up, and nobody.
        measured_from = self._clock() + STARTING_S
        while True:
            due = self._clock() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            now = self._clock()
            late_s = now - due if due > measured_from else 0.0
            self._metrics.loop_lag(late_s)
            if late_s > LAG_WORTH_A_LINE_S and now - told > LINE_EVERY_S:
                told = now
                log.warning("the event loop stood still for %.1f s; is the machine overloaded?", late_s)
            if feed_s is not None and now - fed >= feed_s and self._engine_answers():
                fed = now
                self._systemd.watchdog()

    # Settings, again

    async def _take_hangups(self, app: App) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            self._systemd.reloading()
            try:
                await self._reload(app)
            except AvatardError as error:
                log.error("nothing is changed: %s", error)
                self._hub.tell("daemon", "", "settings kept")
            finally:
                self._systemd.ready("ready" if app.engine.state == "ready" else "loading the model")

    async def _reload(self, app: App) -> None:
        """Take what can be taken now. Raises: AvatardError: then all is as it was."""
        from service.auth import Keys

        wanted = await asyncio.to_thread(self._load)
        settings, waiting = reloaded(self._settings, wanted)
        keys = await asyncio.to_thread(Keys.load, settings)
        self._settings = settings
        operators_log.set_up_daemon(settings.logging)
        app.use(settings, keys)
        later = f"; after the next start: {', '.join(waiting)}" if waiting else ""
        log.info("settings are read again%s", later)
        self._hub.tell("daemon", "", "settings changed", waiting=waiting)

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks, the second insists; SIGHUP reads the settings again."""
        loop = asyncio.get_running_loop()

        def on_end(number: int) -> None:
            if self._stop.is_set():
                self._end_now(128 + number)
            log.info("asked to end by %s", signal.Signals(number).name)
            self._stop.set()
            self._insist()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_end, number)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
                # On the way out, with all put away: nothing to be asked for.
                signal.signal(number, signal.SIG_IGN)

    def _insist(self) -> None:
        """From now on the process ends in time, even if a thread of it hangs."""
        if self._insisting is None:
            limit_s = self._settings.daemon.shutdown_s + GRACE_S
            self._insisting = threading.Timer(limit_s, self._cut_off)
            self._insisting.daemon = True
            self._insisting.start()

    def _cut_off(self) -> None:
        log.warning("some of it did not end in %g s and is cut off", self._settings.daemon.shutdown_s)
        self._end_now(0)

    def _end_now(self, status: int) -> None:
        """What is not finished is found by the next start, as after a power cut."""
        if self._engine is not None:
            self._engine.kill()
        sys.stderr.flush()
        os._exit(status)


def _triggers(app: App) -> dict[str, Callable[[], Coroutine[Any, Any, None]]]:
    """What the settings want, each by its name."""
    wanted: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {}
    if app.settings.http.enabled:
        from service.http import serve_http

        wanted["http"] = lambda: serve_http(app)
    if app.settings.mqtt.enabled:
        from service.mqtt import serve_mqtt

        wanted["mqtt"] = lambda: serve_mqtt(app)
    return wanted


async def _all_closed(app: App) -> None:
    try:
        await app.sessions.close_all()
    except Exception:
        log.exception("the live sessions did not end well")


def _first(error: BaseException) -> BaseException:
    """What ended a group of tasks: its first failure, since all others are cancelled then."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _folder(path: Path) -> Path:
    return Path(os.path.expanduser(path)).absolute()


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
