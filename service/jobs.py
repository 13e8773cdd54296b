"""Durable jobs: taken, made in their turn, kept for a while. docs/jobs.md describes them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from audio.errors import AvatardError
from service.bench import example
from service.commands import Refusal, SubmitJob
from service.log import bound
from service.render import FULL, DiskFull, RenderRequest, RenderResult, Stopped, discard, render, withdraw
from service.run import or_stop
from service.store import Job, JobStore, StoreFull
from service.turns import Priority, Turns
from streaming.engine import Engine, EngineError
from streaming.sink import SinkError

if TYPE_CHECKING:
    from service.config import Settings
    from service.hub import Hub
    from service.inputs import Inputs
    from service.voice import Voice

log = logging.getLogger(__name__)

R = TypeVar("R")

PROGRESS_EVERY_S = 0.5
"""From one word about a job's progress to the next."""

DISK_EVERY_S = 5.0
DISK_RETRY_S = 10.0
"""Until work that found the disk full is tried again."""
DISK_FULL_S = 30.0
"""How long no job is taken after that, at least."""
ROOM_AGAIN = 1.05
"""By how much more than jobs.min_free_gb has to be free before jobs are taken again."""
PAUSED_RETRY_S = 60.0

KEEP_EVERY_S = 600.0

VOICE_TRIES = 3
VOICE_WAIT_S = 2.0
"""After the first time that a voice failed; twice that after the second."""

NO_VOICE = "text: none can be spoken here; send audio, install espeak-ng or set voice.url"

Free = Callable[[Path], int]


def free_bytes(folder: Path) -> int:
    """On the disk of a folder, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass
class _Run:
    """A job that is being worked on. frames, total: of its video, so far and in all; stop: it is cancelled."""

    job: Job
    frames: int = 0
    total: int | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    advanced: asyncio.Event = field(default_factory=asyncio.Event)

    def advance(self, frames: int, total: int | None) -> None:
        self.frames, self.total = frames, total
        self.advanced.set()


class Jobs:
    """Takes jobs, makes them one after the other in two lanes, and keeps what they made.

    The lane of interactive jobs and that of batch jobs share the model block by block (`turns`), so that nobody who
    waits for an answer waits for the end of somebody's film. All that has to outlive the process is in `store`, in the
    spool, and in the folders of the renders.
    """

    def __init__(
        self,
        store: JobStore,
        inputs: Inputs,
        engine: Engine,
        turns: Turns,
        hub: Hub,
        settings: Settings,
        voice: Voice | None = None,
        *,
        free: Free = free_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """voice: speaks texts; None: none are taken. free: bytes on the disk of a folder."""
        self._store, self._inputs, self._engine, self._turns, self._hub = store, inputs, engine, turns, hub
        self._settings, self._voice, self._free, self._clock = settings, voice, free, clock
        self._state = Path(os.path.expanduser(settings.daemon.state)).absolute()
        self._outputs = Path(os.path.expanduser(settings.daemon.outputs)).absolute()
        self._wake: dict[Priority, asyncio.Event] = {"interactive": asyncio.Event(), "batch": asyncio.Event()}
        self._running: dict[str, _Run] = {}
        self._carried_out: set[asyncio.Task[Any]] = set()
        self._full_until = float("-inf")
        self.paused: str | None = None
        """Why no job is taken now; None: they are."""

    def use(self, settings: Settings) -> None:
        """Go on with these, as far as they can change while a daemon runs."""
        self._settings = settings
        self._turns.beside_live = settings.sessions.jobs_beside_live

    # What can be asked

    async def submit(self, command: SubmitJob, origin: dict[str, Any] | None = None) -> tuple[Job, bool]:
        """Take a job; when this returns it is on the disk, with all that it needs. False: it was there already.

        origin: what the trigger wants to remember.
        Raises: Refusal: what the command refers to cannot be had; conflict (another command has its id, or another
        file its name); full; paused; unavailable (no voice for its text).
        """
        digest = await asyncio.to_thread(_digest, command)
        id = command.id or uuid.uuid4().hex
        path = self._inputs.allowed_output(command.name or f"{id}.mp4")
        target = str((path.parent.resolve() / path.name).relative_to(self._outputs.resolve()))
        # Before it is looked whether the job is known: then it is not its own file that lies there.
        taken = path.exists()
        if (known := await self._store.known(id, digest)) is not None:
            return known, False
        if taken:
            raise Refusal("conflict", f"name: {target}: there is such a file already; choose another one")
        if self.paused is not None:
            raise Refusal("paused", f"no job is taken now: {self.paused}; try again later", PAUSED_RETRY_S)
        self._check_text(command)
        if (waiting := sum((await self._store.waiting()).values())) >= self._settings.jobs.queue:
            # The store asks again; this is to bring nothing into the spool for nothing.
            raise Refusal("full", f"{waiting} jobs wait, and no more than that may; try again later", 10.0)
        request = {
            "image": self._named(await self._image(command)),
            "audio": self._named(await self._inputs.fetch(command.audio, "audio")) if command.audio else None,
            "text": command.text,
            "voice": command.voice,
            "prompt": command.prompt or self._settings.model.prompt or None,
            "name": target,
        }
        seed = command.seed if command.seed is not None else self._settings.model.seed
        job = Job(id, "queued", command.priority, request, seed=seed, origin=origin or {})
        return await self._surely(self._keep(job, digest, target))

    async def get(self, id: str) -> Job:
        """Raises: Refusal: not found."""
        if (job := await self._store.get(id)) is None:
            raise Refusal("not found", f"job {id}: there is none, or no more")
        return job

    async def list(self, *, state: Any = None, limit: int = 100, after: str | None = None) -> list[Job]:
        """Newest first; after: those that are older than the job of that id."""
        return await self._store.list(state=state, limit=limit, after=after)

    async def counts(self) -> dict[Any, int]:
        """How many jobs there are in each state."""
        return await self._store.counts()

    async def waiting(self) -> dict[Priority, int]:
        """How many jobs wait for their turn."""
        return await self._store.waiting()

    async def cancel(self, id: str) -> Job:
        """End a job for good, and have what was made of it deleted; one that has ended stays as it is.

        Work on it ends at the next border of a block. Raises: Refusal: not found.
        """
        await self.get(id)
        return await self._surely(self._cancel(id))

    async def wait(self, id: str, timeout_s: float) -> Job:
        """A job when it has ended, or as it stands after that time. Raises: Refusal: not found."""
        with self._hub.listen() as news, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if (job := await self.get(id)).ended:
                    return job
                async for item in news:
                    about = item.kind == "job" and item.id == id and item.what != "progress"
                    if (about or item.missed) and (job := await self.get(id)).ended:
                        return job
        return await self.get(id)

    def result_path(self, job: Job) -> Path:
        """The file that a job has made. Raises: Refusal: conflict (it has none), forbidden (it leads elsewhere)."""
        if job.result is None:
            raise Refusal("conflict", f"job {job.id}: is {job.state}, and has no result")
        path = (self._outputs / job.result["path"]).resolve()
        if not path.is_relative_to(self._outputs.resolve()):
            raise Refusal("forbidden", f"job {job.id}: its file leads out of the folder of results")
        return path

    async def needed(self) -> set[Path]:
        """The files in the spool that jobs still need."""
        return {self._state / name for name in await self._store.needed()}

    # The work

    async def run(self) -> None:
        """Make the jobs, until cancelled; those under way then are gone on with next time.

        Raises: ExceptionGroup, of EngineError: there is no model any more, and all jobs wait; or of a StoreError.
        """
        await self._recover()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_disk(), name="disk")
            tasks.create_task(self._keep_for_a_while(), name="retention")
            tasks.create_task(self._lane("interactive"), name="interactive jobs")
            tasks.create_task(self._lane("batch"), name="batch jobs")

    async def _recover(self) -> None:
        """Find out what became of the jobs when the last process ended, and put things in order."""
        for job in await self._store.recover(attempts=self._settings.jobs.attempts):
            log.info("job %s: was cut off, is %s", job.id, job.state)
            self._tell(job)
        for job in await self._store.untidy():
            await self._tidy(job)
        folders = self._state / "jobs"
        for name in await asyncio.to_thread(_names_in, folders):
            if await self._store.get(name) is None:
                await asyncio.to_thread(shutil.rmtree, folders / name, ignore_errors=True)

    async def _lane(self, priority: Priority) -> None:
        wake = self._wake[priority]
        while True:
            wake.clear()
            # A job that is begun before there is a model would count a kill in vain.
            await self._engine.ready()
            claiming = asyncio.ensure_future(self._patiently(lambda: self._store.claim(priority)))
            try:
                job = await asyncio.shield(claiming)
            except asyncio.CancelledError:
                if (job := await claiming) is not None:
                    await self._store.requeue(job.id)
                raise
            if job is None:
                await wake.wait()
            else:
                await self._do(job)

    async def _do(self, job: Job) -> None:
        """Work on a job that was claimed, until it has ended, or waits again."""
        run = self._running[job.id] = _Run(job)
        try:
            # It may have been cancelled before anybody could see that it runs.
            job = await self.get(job.id)
            if not job.ended:
                self._tell(job)
                with bound(job=job.id):
                    job = await self._work(run)
        except asyncio.CancelledError:
            with contextlib.suppress(StoreFull):
                await self._let_go(job)
            raise
        finally:
            del self._running[job.id]
        if job.ended:
            await self._tidy(job)

    async def _let_go(self, job: Job) -> None:
        """Have a job wait again, unless it ended just now. Raises: StoreFull: the next start does it."""
        self._tell_again(await self._store.requeue(job.id))

    async def _work(self, run: _Run) -> Job:
        """The job as it stands after that. Raises: EngineError: there is no model any more, and it waits again."""
        job, store = run.job, self._store
        request = self._request(job)
        try:
            async with self._reporting(run):
                made = await self._make(run, request)
        except Stopped:
            return await self.get(job.id)
        except EngineError as error:
            if self._engine.state == "ended":
                await self._patiently(lambda: self._let_go(job))
                raise
            why, attempts = str(error), self._settings.jobs.attempts
            log.warning("job %s: %s", job.id, error)
            # Not only what was noted last: it decides whether the job got any further.
            await self._patiently(lambda: store.progress(job.id, run.frames, run.total))
            again = await self._patiently(lambda: store.interrupted(job.id, why, attempts=attempts))
            self._tell_again(again)
            return again
        except AvatardError as error:
            return await self._end(job, "failed", error=_plainly(error, request), error_type=type(error).__name__)
        except Exception as error:
            log.exception("job %s: failed by a bug", job.id)
            return await self._end(
                job, "failed", error="failed by a bug in avatard; its log says more", error_type=type(error).__name__
            )
        told = {"encode_s": made.encode_s, "encoded_frames": made.frames - made.resumed_from}
        return await self._end(job, "completed", told, result=_result(made, job.request["name"]))

    async def _make(self, run: _Run, request: RenderRequest) -> RenderResult:
        """The file, however long its disk is full. Raises: as `render`, but for DiskFull."""
        job, told = run.job, False
        while True:
            try:
                if job.request["text"] is not None:
                    await or_stop(run.stop, self._speak(job, request.audio))
                return await render(
                    request,
                    self._engine,
                    self._settings,
                    turn=lambda expected_s: self._turns.turn(job.priority, expected_s),
                    on_progress=run.advance,
                    stop=run.stop,
                    segment_s=self._settings.jobs.segment_s,
                )
            except DiskFull as error:
                if not told:
                    log.warning("job %s: waits for room: %s", job.id, error)
                told = True
                self._pause(_plainly(error, request))
                await or_stop(run.stop, asyncio.sleep(DISK_RETRY_S))

    def _request(self, job: Job) -> RenderRequest:
        asked, folder = job.request, self._folder(job)
        return RenderRequest(
            image=self._state / asked["image"],
            audio=folder / "speech.wav" if asked["audio"] is None else self._state / asked["audio"],
            target=self._outputs / asked["name"],
            folder=folder / "work",
            prompt=asked["prompt"] or "",
            seed=job.seed,
            # It knows what it has made itself, in whatever attempt.
            overwrite=False,
        )

    async def _speak(self, job: Job, target: Path) -> None:
        """Have the job's text spoken into a file, once: a voice may read it otherwise the next time.

        Raises: Refusal: the voice cannot, or fails again and again; DiskFull.
        """
        if await asyncio.to_thread(target.exists):
            return
        if self._voice is None:
            raise Refusal("unavailable", NO_VOICE)
        for left in reversed(range(VOICE_TRIES)):
            try:
                await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
                return await self._voice.write(job.request["text"], job.request["voice"], target)
            except Refusal as error:
                if error.reason != "unavailable" or not left:
                    raise
                log.warning("job %s: %s; tried again", job.id, error)
                await asyncio.sleep(VOICE_WAIT_S * (VOICE_TRIES - left))
            except OSError as error:
                if error.errno in FULL:
                    raise DiskFull(f"{target}: there is no room for it") from error
                raise

    @contextlib.asynccontextmanager
    async def _reporting(self, run: _Run) -> AsyncIterator[None]:
        """Meanwhile progress is noted and told, now and then."""

        async def report() -> None:
            while not run.stop.is_set():
                await run.advanced.wait()
                run.advanced.clear()
                with contextlib.suppress(StoreFull):
                    await self._store.progress(run.job.id, run.frames, run.total)
                if not run.stop.is_set():
                    self._hub.tell("job", run.job.id, "progress", frames=run.frames, total_frames=run.total)
                await asyncio.sleep(PROGRESS_EVERY_S)

        reporting = asyncio.create_task(report(), name=f"progress of {run.job.id}")
        try:
            yield
        finally:
            reporting.cancel()
            await asyncio.wait([reporting])
            if not reporting.cancelled() and (error := reporting.exception()) is not None:
                log.error("job %s: its progress could not be told", run.job.id, exc_info=error)

    # Changes

    async def _keep(self, job: Job, digest: str, target: str) -> tuple[Job, bool]:
        try:
            kept, new = await self._store.submit(job, digest, target=target, queue=self._settings.jobs.queue)
        except StoreFull as error:
            self._pause(str(error))
            raise Refusal("paused", f"no job is taken now: {error}; try again later", PAUSED_RETRY_S) from error
        if new:
            self._tell(kept)
            self._wake[kept.priority].set()
        return kept, new

    async def _cancel(self, id: str) -> Job:
        try:
            job, ended = await self._store.finish(id, "cancelled")
        except StoreFull as error:
            raise Refusal("paused", f"job {id}: cannot be cancelled now: {error}", PAUSED_RETRY_S) from error
        if ended:
            self._tell(job)
            if (run := self._running.get(id)) is not None:
                # Who works on it tidies up.
                run.stop.set()
            else:
                await self._tidy(job)
        return job

    async def _end(self, job: Job, state: Any, told: Mapping[str, Any] | None = None, **how: Any) -> Job:
        """Completed or failed, unless it was cancelled in the last moment. told: of it, beside how it stands."""
        job, ended = await self._patiently(lambda: self._store.finish(job.id, state, **how))
        if ended:
            self._tell(job, **(told or {}))
            log.info("job %s: %s%s", job.id, job.state, f": {job.error}" if job.error else "")
        return job

    async def _tidy(self, job: Job) -> None:
        """Leave nothing of a job that has ended but its result."""
        request, folder = self._request(job), self._folder(job)

        def tidy() -> None:
            if job.state != "completed":
                # It may have been finished in the moment in which it was cancelled.
                withdraw(request)
            discard(request)
            shutil.rmtree(folder, ignore_errors=True)

        try:
            await asyncio.to_thread(tidy)
        except (OSError, SinkError) as error:
            # It stays untidy, and is looked at again at the next start.
            log.warning("job %s: what is left of it cannot be deleted: %s", job.id, error)
            return
        await self._patiently(lambda: self._store.tidied(job.id))

    async def _surely(self, work: Coroutine[Any, Any, R]) -> R:
        """Carry it out to its end, also when whoever waits for it is cancelled."""
        task = asyncio.ensure_future(work)
        self._carried_out.add(task)
        task.add_done_callback(self._carried_out.discard)
        return await asyncio.shield(task)

    async def _patiently(self, change: Callable[[], Awaitable[R]]) -> R:
        """A change of the store, as soon as there is room for it."""
        while True:
            try:
                return await change()
            except StoreFull as error:
                self._pause(str(error))
                await asyncio.sleep(DISK_RETRY_S)

    def _tell(self, job: Job, **more: Any) -> None:
        more |= {"error": job.error, "error_type": job.error_type} if job.error else {}
        self._hub.tell("job", job.id, job.state, frames=job.frames, total_frames=job.total_frames, **more)

    def _tell_again(self, job: Job) -> None:
        """As `_tell`, of a job that was not to end; if it was cancelled meanwhile, who did so has told."""
        if job.state != "cancelled":
            self._tell(job)

    # Inputs

    async def _image(self, command: SubmitJob) -> Path:
        if command.image is not None:
            return await self._inputs.fetch(command.image, "image")
        return await self._inputs.adopt(self._settings.daemon.image or example("presenter.png"), "image")

    def _check_text(self, command: SubmitJob) -> None:
        most = self._settings.voice.max_characters
        if command.text is None:
            return
        if self._voice is None:
            raise Refusal("unavailable", NO_VOICE)
        if len(command.text) > most:
            raise Refusal(
                "too large", f"text: has {len(command.text)} characters, and {most} are the limit; shorten it"
            )

    def _named(self, path: Path) -> str:
        """A file as a request names it: the folder of the daemon's state may be moved."""
        path = path.absolute()
        return str(path.relative_to(self._state) if path.is_relative_to(self._state) else path)

    def _folder(self, job: Job) -> Path:
        return self._state / "jobs" / job.id

    # The disk

    async def _watch_disk(self) -> None:
        while True:
            low = await asyncio.to_thread(self._low)
            if low is not None:
                self._pause(low, low=True)
            elif self.paused is not None and self._clock() >= self._full_until:
                log.info("there is room again; jobs are taken")
                self.paused = None
                self._hub.tell("daemon", "", "intake open")
            await asyncio.sleep(DISK_EVERY_S)

    def _low(self) -> str | None:
        """Why there is too little room on a disk, if so."""
        least = self._settings.jobs.min_free_gb * 1e9 * (1.0 if self.paused is None else ROOM_AGAIN)
        for name, folder in (("state", self._state), ("outputs", self._outputs)):
            try:
                free = self._free(folder)
            except OSError as error:
                return f"the disk of daemon.{name} does not answer ({(error.strerror or str(error)).lower()})"
            if free < least:
                return (
                    f"the disk of daemon.{name} has {free / 1e9:.2f} GB free, "
                    f"and jobs.min_free_gb is {self._settings.jobs.min_free_gb:g}"
                )
        return None

    def _pause(self, why: str, *, low: bool = False) -> None:
        """Take no jobs. low: as long as that is so; else something found the disk full, whatever it says of itself."""
        if not low:
            self._full_until = self._clock() + DISK_FULL_S
        if self.paused is None:
            log.warning("no job is taken for now: %s", why)
            self._hub.tell("daemon", "", "intake paused", why=why)
        self.paused = why

    async def _keep_for_a_while(self) -> None:
        while True:
            jobs = self._settings.jobs
            try:
                gone = await self._store.prune(jobs.keep_days * 86_400, round(jobs.keep_gb * 1e9), self._outputs)
                if gone:
                    log.info("%d jobs that ended long ago, and their files, are deleted", len(gone))
                await self._inputs.prune(self.needed)
            except (StoreFull, OSError) as error:
                log.warning("what is old could not be deleted: %s", error)
            await asyncio.sleep(KEEP_EVERY_S)


def _digest(command: SubmitJob) -> str:
    """What a command asks for, whatever the id; a field that is not given counts as its default."""
    said = command.model_dump(mode="json", exclude={"id"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _result(made: RenderResult, name: str) -> dict[str, Any]:
    return {
        "path": name,
        "bytes": made.bytes,
        "sha256": made.sha256,
        "seconds": made.seconds,
        "frames": made.frames,
        "width": made.width,
        "height": made.height,
        "fps": made.fps,
    }


def _plainly(error: AvatardError, request: RenderRequest) -> str:
    """An error in one line, for somebody who knows the files by other names."""
    text = str(error)
    for path, name in (
        (request.image, "the picture"),
        (request.audio, "the sound"),
        (request.target, request.target.name),
        (request.folder, "work in progress"),
    ):
        text = text.replace(str(path), name)
    return " ".join(text.split())


def _names_in(folder: Path) -> Iterable[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []
