"""`avatard batch`: many sounds to many files, begun again at any time without doing anything twice."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from filelock import FileLock, Timeout

from audio.errors import AvatardError
from service.batch_plan import (
    OWN_FOLDER,
    WORK_FOLDER,
    BatchError,
    BatchRequest,
    Item,
    Step,
    find_items,
    folded,
    kept,
    plan,
    read_manifest,
    shown,
)
from service.manifest import Manifest, Record
from service.run import Stopped, engine_settings, or_stop, stopping_signals
from streaming.engine import Engine

if TYPE_CHECKING:
    from service.config import Settings
    from service.render import RenderRequest

log = logging.getLogger(__name__)

State = Literal["done", "failed", "waiting"]


@dataclass(frozen=True)
class Outcome:
    """What became of one item.

    how: made, copied or kept (it was there) when it is done; of what failed `error` is the line that says why, and
    trace the traceback of a bug. record: what a render that is done gave, as JSON.
    """

    item: Item
    state: State
    how: Literal["made", "copied", "kept", ""] = ""
    error: str = ""
    trace: str = ""
    record: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As the report and `--json` have it."""
        item = self.item
        told: dict[str, Any] = {"state": self.state, "name": item.name}
        told |= {"audio": str(item.audio), "image": str(item.image), "prompt": item.prompt, "seed": item.seed}
        optional = {"how": self.how, "error": self.error, "trace": self.trace}
        return told | {key: value for key, value in optional.items() if value} | self.record


@dataclass(frozen=True)
class BatchResult:
    """How a batch ended: outcomes in the order of its items; halted: why it ended before its end, where it did."""

    outcomes: list[Outcome]
    stopped: bool
    halted: str
    wall_s: float

    def count(self, state: State) -> int:
        return sum(outcome.state == state for outcome in self.outcomes)

    def counts(self) -> dict[str, int]:
        """Of what was made, copied, kept, of what failed, and of what still waits."""
        return dict(Counter(outcome.how or outcome.state for outcome in self.outcomes))


class BatchWatcher:
    """Who is told how a batch goes: nobody. Bars on a terminal, and lines of JSON, override these."""

    def looked(self, number: int, items: int) -> None:
        """The plan is at that item; called from a thread."""

    def planned(self, steps: Sequence[Step]) -> None:
        """What is to be done is known."""

    def began(self, slot: int, item: Item) -> None:
        """That place works on this item now."""

    def advanced(self, slot: int, frames: int, total: int | None) -> None:
        """So many of its frames are encoded; total is None when the sound does not say how long it is."""

    def ended(self, slot: int | None, outcome: Outcome) -> None:
        """An item has its outcome; slot is None where no place worked on it."""


class Halted(AvatardError):
    """Nothing more can be made: the disk is full, or the model's process ends again and again."""


class Workers(Protocol):
    """Places where renders are made side by side, numbered from 0."""

    slots: int

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises: AvatardError: it cannot be."""
        ...

    async def make(
        self, slot: int, request: RenderRequest, on_progress: Callable[[int, int | None], None], stop: asyncio.Event
    ) -> dict[str, Any]:
        """What `attempt` gives. Raises: Stopped; Halted."""
        ...


def batch(
    request: BatchRequest,
    settings: Settings,
    watcher: BatchWatcher,
    workers: Callable[[Settings], AbstractAsyncContextManager[Workers]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> BatchResult:
    """Make what is not made yet; the first SIGINT or SIGTERM ends it so that it can be gone on with.

    Raises: BatchError: it cannot be begun as it was asked for; AvatardError: the model cannot be loaded.
    """
    return asyncio.run(_Batch(request, settings, watcher, clock).run(workers))


def dry_run(request: BatchRequest, settings: Settings) -> list[Step]:
    """What `batch` would do. Nothing is written, and no model is loaded. Raises: BatchError."""
    return plan(find_items(request, settings), request, settings, read_manifest(request))


async def attempt(
    request: RenderRequest,
    engine: Engine,
    settings: Settings,
    on_progress: Callable[[int, int | None], None],
    stop: asyncio.Event,
) -> dict[str, Any]:
    """One render, with its result or its failure as JSON. Raises: Stopped; Halted."""
    from service.render import DiskFull, render

    began = time.monotonic()
    try:
        result = await render(
            request, engine, settings, on_progress=on_progress, stop=stop, segment_s=settings.jobs.segment_s
        )
    except DiskFull as error:
        raise Halted(str(error)) from error
    except Stopped:
        raise
    except Exception as error:
        if engine.state == "ended":
            raise Halted(str(error)) from error
        if isinstance(error, AvatardError):
            return {"state": "failed", "error": " ".join(str(error).split())}
        # A bug, perhaps of one file only: the others shall not wait for who mends it.
        trace = "".join(traceback.format_exception(error))
        return {"state": "failed", "error": f"{type(error).__name__}: {error}", "trace": trace}
    return {
        "state": "done",
        **{key: value for key, value in vars(result).items() if key != "path"},
        "warnings": list(result.warnings),
        "wall_s": round(time.monotonic() - began, 3),
    }


@dataclass
class _OneEngine:
    """All renders one after the other, on one engine of this machine."""

    engine: Engine
    settings: Settings
    slots: int = 1

    async def ready(self) -> None:
        await self.engine.ready()

    async def make(
        self, slot: int, request: RenderRequest, on_progress: Callable[[int, int | None], None], stop: asyncio.Event
    ) -> dict[str, Any]:
        return await attempt(request, self.engine, self.settings, on_progress, stop)


class _Batch:
    def __init__(
        self, request: BatchRequest, settings: Settings, watcher: BatchWatcher, clock: Callable[[], float]
    ) -> None:
        self._request, self._settings, self._watcher, self._clock = request, settings, watcher, clock
        self._began, self._began_at = clock(), time.time()
        self._stop = asyncio.Event()
        self._halted = ""
        self._engine: Engine | None = None
        self._items: list[Item] = []
        self._outcomes: dict[int, Outcome] = {}
        """By the number of the item; those that are missing wait."""
        self._copies: dict[str, list[int]] = {}
        """Numbers of the items that are copies of what is made under that name."""
        self._manifest: Manifest

    async def run(self, workers: Callable[[Settings], AbstractAsyncContextManager[Workers]] | None) -> BatchResult:
        self._items = await asyncio.to_thread(find_items, self._request, self._settings)
        with stopping_signals(self._stop, lambda: self._engine), _own_folder(self._request):
            self._manifest = read_manifest(self._request)
            with contextlib.suppress(Stopped):
                # The model loads while the sounds are looked at.
                async with (workers or self._local)(self._settings) as places:
                    await self._make_all(places)
            outcomes = [self._outcomes.get(number, Outcome(item, "waiting")) for number, item in enumerate(self._items)]
            wall_s = round(self._clock() - self._began, 3)
            result = BatchResult(outcomes, self._stop.is_set(), self._halted, wall_s)
            await asyncio.to_thread(self._write_report, result)
            if not result.count("waiting"):
                shutil.rmtree(_work(self._request), ignore_errors=True)
        return result

    @contextlib.asynccontextmanager
    async def _local(self, settings: Settings) -> AsyncIterator[Workers]:
        async with await Engine.launch(engine_settings(settings)) as engine:
            self._engine = engine
            yield _OneEngine(engine, settings)

    def _look(self, number: int) -> None:
        if self._stop.is_set():
            raise Stopped
        self._watcher.looked(number, len(self._items))

    async def _make_all(self, places: Workers) -> None:
        """Raises: Stopped: before anything could be made; AvatardError: the model cannot be loaded."""
        steps = await asyncio.to_thread(plan, self._items, self._request, self._settings, self._manifest, self._look)
        self._items = [step.item for step in steps]
        self._watcher.planned(steps)
        waiting: deque[int] = deque()
        for number, step in enumerate(steps):
            match step.do:
                case "make":
                    waiting.append(number)
                case "copy" if not step.earlier:
                    self._copies.setdefault(step.source, []).append(number)
                case "done":
                    record = self._manifest.made(step.item.name)
                    self._end(None, number, Outcome(step.item, "done", "kept", record=_of_the_video(record)))
                case "failed":
                    self._end(None, number, Outcome(step.item, "failed", error=step.why))
        if waiting:
            await or_stop(self._stop, places.ready())
        await self._copy_earlier(steps)
        async with asyncio.TaskGroup() as tasks:
            for slot in range(min(places.slots, len(waiting))):
                tasks.create_task(self._work(places, slot, waiting), name=f"place {slot}")

    async def _work(self, places: Workers, slot: int, waiting: deque[int]) -> None:
        """One place: one item after the other, until there are none or nothing can be made any more."""
        while waiting and not self._stop.is_set() and not self._halted:
            number = waiting.popleft()
            item = self._items[number]
            self._watcher.began(slot, item)

            def on_progress(frames: int, total: int | None) -> None:
                self._watcher.advanced(slot, frames, total)

            try:
                request = self._render_request(item)
                await asyncio.to_thread(self._note, {**_described(item), "state": "begun"})
                made = await places.make(slot, request, on_progress, self._stop)
                outcome = _outcome(item, made)
                await asyncio.to_thread(self._note, {**outcome.told(), **_described(item)})
            except Stopped:
                return
            except Halted as error:
                self._halted = self._halted or str(error)
                return
            # Only what is written down may be forgotten.
            await asyncio.to_thread(shutil.rmtree, request.folder, ignore_errors=True)
            self._end(slot, number, outcome)
            await self._copy(item.name)

    def _render_request(self, item: Item) -> RenderRequest:
        from service.render import RenderRequest

        manifest, name = self._manifest, item.name
        return RenderRequest(
            image=item.image.absolute(),
            audio=item.audio.absolute(),
            target=(self._request.out / name).absolute(),
            folder=(_work(self._request) / item.key).absolute(),
            prompt=item.prompt,
            seed=item.seed,
            title=shown(Path(name).stem),
            overwrite=self._request.overwrite or manifest.made(name) is not None or manifest.begun(name),
        )

    async def _copy_earlier(self, steps: Sequence[Step]) -> None:
        """Copy what is there from earlier runs, before anything is made that might get the name of a source."""
        copies = {number: step for number, step in enumerate(steps) if step.do == "copy" and step.earlier}
        records = {
            number: self._manifest.made(step.source) or self._manifest.last(step.item.key)
            for number, step in copies.items()
        }
        # After sounds were renamed, one copy may get the name of which the next is to be made.
        replaced = {folded(step.item.name) for step in copies.values()}
        losing = {number: step for number, step in copies.items() if folded(step.source) in replaced}
        try:
            await asyncio.to_thread(self._keep, {step.item.key: step.source for step in losing.values()})
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            self._halted = f"{_work(self._request)}: {reason}; make room and start it again"
        for number, step in copies.items():
            source = kept(step.item.key) if number in losing else step.source
            if not self._halted:
                await self._copy_item(number, source, records[number])

    def _keep(self, losing: Mapping[str, str]) -> None:
        """Lay the videos with these names, by keys, where they stay until the batch is done. Raises: OSError."""
        for key, name in losing.items():
            source, target = self._request.out / name, self._request.out / kept(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(os.path.realpath(source), target)
            except OSError:  # the file system knows no links, or the result is one to another disk
                _copy_file(source, target)

    async def _copy(self, name: str) -> None:
        """Whatever is the same video as the one that was made under this name."""
        for number in self._copies.pop(name, ()):
            if not self._halted:
                await self._copy_item(number, name, self._manifest.made(name))

    async def _copy_item(self, number: int, source: str, record: Record | None) -> None:
        """source: below `out`; record: what the manifest says of the video there."""
        item = self._items[number]
        last = self._manifest.last(item.key)
        if last is None or last["state"] != "done" or record is None or record["key"] != item.key:
            failure = last.get("error") if last else None
            why = f"is the same as {shown(source)}, which failed" + (f": {failure}" if failure else "")
            self._end(None, number, Outcome(item, "failed", error=why))
            return
        try:
            # Noted first: a kill may come when the file has its name and the manifest does not say so yet.
            await asyncio.to_thread(self._note, {**_described(item), "state": "begun"})
            await asyncio.to_thread(_copy_file, self._request.out / source, self._request.out / item.name)
            outcome = Outcome(item, "done", "copied", record=_of_the_video(record))
            await asyncio.to_thread(self._note, {**outcome.told(), **_described(item)})
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            outcome = Outcome(item, "failed", error=f"{shown(self._request.out / item.name)}: {reason}")
        except Halted as error:
            self._halted = self._halted or str(error)
            return
        self._end(None, number, outcome)

    def _note(self, record: dict[str, Any]) -> None:
        try:
            self._manifest.add({"at": round(time.time(), 3), **record})
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise Halted(f"{self._manifest.path}: {reason}; make room and start it again") from error

    def _end(self, slot: int | None, number: int, outcome: Outcome) -> None:
        self._outcomes[number] = outcome
        self._watcher.ended(slot, outcome)

    def _write_report(self, result: BatchResult) -> None:
        from service.render import write_whole

        out = self._request.out
        report = {
            "began_at": round(self._began_at, 3),
            "wall_s": result.wall_s,
            "stopped": result.stopped,
            "halted": result.halted,
            "counts": result.counts(),
            "model": self._settings.model.model_dump(mode="json"),
            "items": [outcome.told() for outcome in result.outcomes],
        }
        try:
            write_whole(out / "report.json", json.dumps(report, indent=1).encode() + b"\n")
            write_whole(out / "report.txt", "".join(f"{line}\n" for line in table(result.outcomes)).encode())
        except OSError as error:
            log.warning("%s: the report could not be written: %s", out, (error.strerror or str(error)).lower())


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """What became of each item, for people: one line for each, under a line of titles."""
    rows = [("", "seconds", "result", "sound", "")]
    for outcome in outcomes:
        seconds = outcome.record.get("seconds")
        rows.append(
            (
                outcome.how or outcome.state,
                "" if seconds is None else f"{seconds:.2f}",
                shown(outcome.item.name),
                shown(outcome.item.audio),
                " ".join([outcome.error, *outcome.record.get("warnings", ())]).strip(),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    state, seconds, result, sound = widths
    return [
        f"{row[0]:{state}}  {row[1]:>{seconds}}  {row[2]:{result}}  {row[3]:{sound}}  {row[4]}".rstrip() for row in rows
    ]


OF_THE_VIDEO = ("frames", "seconds", "width", "height", "fps", "bytes", "sha256", "warnings")
"""What is as true of a copy as of the file it was made of."""


def _of_the_video(record: Record | None) -> dict[str, Any]:
    return {name: record[name] for name in OF_THE_VIDEO if name in record} if record else {}


def _described(item: Item) -> dict[str, Any]:
    """An item as the manifest has it."""
    return {
        "key": item.key,
        "name": item.name,
        "audio": str(item.audio.absolute()),
        "image": str(item.image.absolute()),
        "inputs": item.inputs,
    }


def _outcome(item: Item, made: dict[str, Any]) -> Outcome:
    rest = {name: value for name, value in made.items() if name not in ("state", "error", "trace")}
    if made["state"] == "done":
        return Outcome(item, "done", "made", record=rest)
    return Outcome(item, "failed", error=made["error"], trace=made.get("trace", ""), record=rest)


def _work(request: BatchRequest) -> Path:
    return request.out / WORK_FOLDER


@contextlib.contextmanager
def _own_folder(request: BatchRequest) -> Iterator[None]:
    """The folder of results, with nobody else at work in it."""
    out, lock = request.out, FileLock(request.out / OWN_FOLDER / "lock")
    try:
        _work(request).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BatchError(
            f"--out {shown(out)}: another avatard batch is at work there; let it end, or name another folder"
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BatchError(f"--out {shown(out)}: cannot be a folder of results ({reason}); name another") from error
    try:
        yield
    finally:
        lock.release()


def _copy_file(source: Path, target: Path) -> None:
    """A copy that has its name when it is whole."""
    from streaming.muxer import flush_to_disk

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".avatard-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}.part")
    try:
        shutil.copyfile(source, part)
        flush_to_disk(part)
        os.replace(part, target)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    flush_to_disk(target.parent)
