"""The model in a process of its own, as awaitables: it may hang, run out of memory or die, and its caller goes on."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import numpy as np

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.model import FrameBlock, Reference, StreamSpec
from streaming.engine_process import Answer, ModelFailure, ModelProcess, ProcessDied, anonymous_file

log = logging.getLogger(__name__)

T = TypeVar("T")

EngineState = Literal["loading", "ready", "restarting", "ended"]

REAP_S = 5.0
"""What a killed process gets to let go of its memory before the next one asks for it."""


class EngineError(AvatardError):
    """The model's process died, hung, or refused, and is not started again: one line that a user can act on."""


@dataclass(frozen=True)
class Restarts:
    """How a process that died is started again.

    deaths_per_block: so often in a row may it die at one and the same block of a session; then that block's step is an
    EngineError, so that no block can kill for ever. failed_loads: so often in a row may a new process fail to load
    before the engine gives up; None: never. The first new process comes at once, the others after backoff_s, twice
    that, and so on up to longest_s; a process that was healthy for healthy_s is followed at once again. When the very
    first process does not load, that is an error at once.
    """

    deaths_per_block: int = 3
    failed_loads: int | None = 3
    backoff_s: float = 1.0
    longest_s: float = 30.0
    healthy_s: float = 60.0


@dataclass(frozen=True)
class EngineSettings:
    """Which model, how long to wait for it, and what to do when it dies.

    model: a family's name, a folder of weights, or FILE.py:FUNCTION; size: width and height in pixels; steps: of
    denoising; options: the family's own; live: as `load_model` takes it. load_timeout_s, step_timeout_s: after which a
    silent process is killed.
    """

    model: str
    size: tuple[int, int] | None = None
    steps: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    live: bool = False
    load_timeout_s: float = 1800.0
    step_timeout_s: float = 300.0
    restarts: Restarts = field(default_factory=Restarts)


class Backoff:
    """How long to wait before the next process is started."""

    def __init__(self, restarts: Restarts) -> None:
        self._restarts = restarts
        self._wait_s = 0.0

    def next_s(self, lived_s: float) -> float:
        """After a process that was ready for `lived_s`."""
        if lived_s >= self._restarts.healthy_s:
            self._wait_s = 0.0
        wait_s = self._wait_s
        self._wait_s = min(max(2 * wait_s, self._restarts.backoff_s), self._restarts.longest_s)
        return wait_s


class Engine:
    """One model and its sessions, in a process that is started again when it dies.

    `async with await Engine.launch(settings) as engine:` ends the process on every way out. It belongs to one loop.
    """

    @classmethod
    async def launch(
        cls, settings: EngineSettings, *, on_change: Callable[[EngineState, str], None] = lambda state, why: None
    ) -> Self:
        """Spawn the process; it loads the model by itself. `ready` waits for that.

        on_change: called with each new `state`, and why.
        """
        engine = cls(settings, on_change)
        try:
            process = await engine._spawn()
        except BaseException:
            os.close(engine._snapshots)
            raise
        engine._supervisor = asyncio.create_task(engine._supervise(process), name="engine supervisor")
        engine._supervisor.add_done_callback(engine._supervised)
        return engine

    def __init__(self, settings: EngineSettings, on_change: Callable[[EngineState, str], None]) -> None:
        self.settings = settings
        self._on_change = on_change
        self._snapshots = anonymous_file("snapshots")
        self.shelves = _Shelves()
        self._numbers = itertools.count(1)
        self._spec: StreamSpec | None = None
        self._turn: asyncio.Future[ModelProcess] = _expected()
        """The process at work, once it is ready; another future as soon as it has died."""
        self._ended = asyncio.Event()
        self._end: Exception | None = None
        self._closed = False
        self._process: ModelProcess
        self._supervisor: asyncio.Task[None]
        self.state: EngineState = "loading"
        self.restarts = 0
        """Processes that were started after the first one."""
        self.steps = 0
        """Blocks that were made, for whichever session; those made again after a death count."""
        self.step_s = 0.0
        """Seconds the model has worked for them."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pid(self) -> int:
        """Of the present process, or of the last one while there is none."""
        return self._process.pid

    @property
    def load_s(self) -> float:
        """Seconds the present process took to load the model, once it is ready."""
        return self._process.load_s

    @property
    def spec(self) -> StreamSpec | None:
        """What the model makes, once it was loaded for the first time."""
        return self._spec

    async def ready(self) -> StreamSpec:
        """Wait until the model is loaded for the first time.

        Raises: AvatardError, as the model said it; EngineError; ModelFailure.
        """
        if self._spec is None or self._end is not None:
            await self.process()
        assert self._spec is not None
        return self._spec

    async def open(
        self,
        reference: Reference,
        *,
        rewind_blocks: int = 0,
        snapshot_every_s: float = 2.0,
        resume: tuple[int, bytes] | None = None,
    ) -> EngineSession:
        """Start a session: the model encodes the picture and the prompt.

        Args:
            rewind_blocks: how far back `EngineSession.rewind` can go; each of them costs the memory of one state.
            snapshot_every_s: of media, from one snapshot to the next; what was made since the last one is made again
                when the process dies.
            resume: go on before that block from what `EngineSession.snapshot` gave there, in whichever process of the
                same model; the reference is that of then.
        Raises: as `ready`; AvatardError: the snapshot is damaged, or of another model.
        """
        session = EngineSession(
            self, f"s{next(self._numbers)}", await self.ready(), reference, rewind_blocks, snapshot_every_s
        )
        await session.begin(resume)
        return session

    async def close(self) -> None:
        """End the process: at once when it is idle, by force when it is not. The second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._give_up(EngineError(f"model {self.settings.model}: its process was closed"))
        self._supervisor.cancel()
        await asyncio.wait([self._supervisor])
        await self._process.close()
        os.close(self._snapshots)

    def kill(self) -> None:
        """End the process by force, for good; whoever waits gets an EngineError."""
        self._give_up(EngineError(f"model {self.settings.model}: its process was killed"))
        self._supervisor.cancel()
        self._process.kill()

    # For the sessions.

    async def read(self, shelf: _Shelf, size: int) -> bytes:
        """A snapshot out of the file of snapshots."""
        return await asyncio.to_thread(_read_all, self._snapshots, size, shelf.offset)

    async def write(self, snapshot: bytes) -> _Shelf:
        """Put a snapshot into the file of snapshots."""
        self.shelves.bytes = max(self.shelves.bytes, len(snapshot))
        shelf = self.shelves.take()
        writing = asyncio.ensure_future(asyncio.to_thread(_write_all, self._snapshots, snapshot, shelf.offset))
        try:
            await asyncio.shield(writing)
        except BaseException:
            writing.add_done_callback(lambda _: self.shelves.give_back(shelf))
            raise
        return shelf

    def forget(self, session: str) -> None:
        """The state of that session is no longer needed."""
        self._process.tell({"op": "close", "session": session})

    async def process(self) -> ModelProcess:
        """The process, when it is ready, as long as that takes. Raises: as `ready`."""
        if self._end is not None:
            raise self._end
        return await asyncio.shield(self._turn)

    # One process after the other.

    async def _spawn(self) -> ModelProcess:
        settings = self.settings
        load = {"model": settings.model, "size": settings.size, "steps": settings.steps, "live": settings.live}
        self._ended.clear()
        self._process = await ModelProcess.spawn(
            {**load, "options": dict(settings.options)}, settings.load_timeout_s, self._snapshots, self._on_end
        )
        return self._process

    def _on_end(self) -> None:
        if self._turn.done():
            self._turn = _expected()
        self._ended.set()

    async def _supervise(self, process: ModelProcess | None) -> None:
        """Wait for the end of each process, and start the next."""
        policy, backoff, failures = self.settings.restarts, Backoff(self.settings.restarts), 0
        loop = asyncio.get_running_loop()
        while self._end is None:
            lived_s = 0.0
            try:
                if process is None:
                    process = await self._spawn()
                self._accept(process, await process.ready())
            except (OSError, ProcessDied, AvatardError, ModelFailure) as error:
                reason = f"its process {error}" if isinstance(error, ProcessDied) else str(error)
                if self._spec is None:
                    died = isinstance(error, ProcessDied | OSError)
                    self._give_up(EngineError(f"model {self.settings.model}: {reason}") if died else error)
                    return
                failures += 1
                if failures == policy.failed_loads:
                    times = f"{failures} times in a row" if failures > 1 else "once"
                    self._give_up(
                        EngineError(f"model {self.settings.model}: {reason}; starting it again failed {times}")
                    )
                    return
            else:
                ready_at, failures = loop.time(), 0
                await self._ended.wait()
                lived_s = loop.time() - ready_at
                reason = f"its process {process.death}"
            wait_s = backoff.next_s(lived_s)
            when = f"in {wait_s:g} s" if wait_s else "at once"
            why = f"model {self.settings.model}: {reason}; it is started again {when}"
            log.info("%s", why)
            self._change("restarting", why)
            if process is not None:
                process.kill()
                await process.gone(REAP_S)
            await asyncio.sleep(wait_s)
            process = None
            self.restarts += 1

    def _supervised(self, supervisor: asyncio.Task[None]) -> None:
        """Whoever waits must not wait for ever when that has a bug."""
        if not supervisor.cancelled() and isinstance(error := supervisor.exception(), Exception):
            self._give_up(error)

    def _accept(self, process: ModelProcess, spec: StreamSpec) -> None:
        if self._spec is not None and spec != self._spec:
            raise EngineError(f"the model has changed its shape from {self._spec} to {spec}")
        if process.death is not None:
            raise process.death
        self._spec = spec
        self._turn.set_result(process)
        self._change("ready", f"model {self.settings.model}: loaded in {process.load_s:.1f} s")

    def _give_up(self, error: Exception) -> None:
        """There will be no process any more."""
        if self._end is not None:
            return
        self._end = error
        if self._turn.done():
            self._turn = _expected()
        self._turn.set_exception(error)
        self._change("ended", str(error))

    def _change(self, state: EngineState, why: str) -> None:
        self.state = state
        self._on_change(state, why)


@dataclass(frozen=True)
class _Snapshot:
    """What the state was before that block: on which shelf, and how many bytes."""

    block: int
    shelf: _Shelf
    bytes: int


class EngineSession:
    """One person speaking: a state in the engine's process, addressed by `id`, that outlives the process.

    When the process dies, the next one is given the last snapshot, hears again what was said since then, and goes on. A
    step that was under way then takes longer, and that is all its caller sees of it.

    busy_s: seconds the model has worked for this session; blocks: how many were made, so the number of the next one.
    """

    def __init__(
        self,
        engine: Engine,
        identity: str,
        spec: StreamSpec,
        reference: Reference,
        rewind_blocks: int,
        snapshot_every_s: float,
    ) -> None:
        self._engine, self._reference = engine, reference
        self.id = identity
        self.spec = spec
        self.busy_s = 0.0
        self.blocks = 0
        self._begin = 0
        """The block that it began with: 0, unless it was resumed."""
        self._rewind_blocks = rewind_blocks
        self._snapshot_every = max(1, round(snapshot_every_s / spec.block_seconds))
        self._furthest = 0
        self._sound: dict[int, _Sound] = {}
        """What was said since the oldest snapshot that may be needed."""
        self._snapshots: list[_Snapshot] = []
        self._saving: asyncio.Future[Answer] | None = None
        """The snapshot under way, of before `_saving_block`."""
        self._saving_block = 0
        self._next_save = self._snapshot_every
        self._unsaveable: BaseException | None = None
        self._there: _Place | None = None
        self._under_way: asyncio.Future[Answer] | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def begin(self, resume: tuple[int, bytes] | None) -> None:
        """Have the model encode picture and prompt, or restore a snapshot."""
        try:
            if resume is not None:
                block, saved = resume
                if not saved:
                    raise AvatardError("saved state: is empty")
                self.blocks = self._begin = self._furthest = block
                self._snapshots = [_Snapshot(block, await self._engine.write(saved), len(saved))]
                self._next_save = block + self._snapshot_every
            await self._surely(self.blocks, lambda process: _nothing())
        except BaseException:
            await self.close()
            raise

    async def step(
        self, audio: AudioBlock, on_frames: Callable[[FrameBlock], None] | None = None, half_rate: bool = False
    ) -> list[FrameBlock]:
        """Advance by one block of sound; a step that is cancelled counts, and its frames are lost.

        on_frames: called with each part of the block as soon as it is there, where the model makes it in parts; with
            what came before again, when the process dies on the way. half_rate: see `avatar.model.HalfRate`.
        Raises: AvatardError, as the model said it, or ModelFailure: the session is where it was before the step;
        EngineError: the process died too often at this block, or will not be started again.
        """
        async with self._turn:
            number = self.blocks
            self._sound[number] = _Sound.of(audio)
            self.blocks = number + 1
            self._furthest = max(self._furthest, self.blocks)
            try:
                blocks = await self._surely(
                    number, lambda process: self._advance(process, "step", number, on_frames, half_rate)
                )
            except Exception:
                self._sound.pop(number, None)
                self.blocks = number
                self._there = None
                raise
            self._save()
            return blocks

    async def finish(self) -> list[FrameBlock]:
        """The blocks still in flight. Raises: as `step`."""
        async with self._turn:
            return await self._surely(self.blocks, self._finish)

    async def snapshot(self) -> bytes:
        """The state before the next block, for `Engine.open` in this process or in another one of the same model.

        It takes the place of the snapshot for when the model's process dies. Only tensors and plain values are in it,
        and nothing in it is run when it is read.
        Raises: as `step`; ModelFailure: the model has a state that cannot be saved.
        """
        async with self._turn:
            block = self.blocks
            made = await self._surely(block, self._snapshot)
            self._keep([*(kept for kept in self._snapshots if kept.block < block), made])
            self._next_save = block + self._snapshot_every
            return await self._engine.read(made.shelf, made.bytes)

    async def rewind(self, block: int) -> None:
        """Go back to before that block was made; the next step makes it again.

        Raises: ValueError: it is not made yet, or more than `rewind_blocks` before the furthest block ever made.
        """
        async with self._turn:
            if not self._first_needed <= block <= self.blocks:
                raise ValueError(f"block {block} is not within {self._first_needed}..{self.blocks}")
            self.blocks = block
            for number in [n for n in self._sound if n >= block]:
                del self._sound[number]
            if self._saving_block > block:
                self._saving = None  # what it saves is not going to have happened
            self._keep([snapshot for snapshot in self._snapshots if snapshot.block <= block])
            last = self._snapshots[-1].block if self._snapshots else 0
            self._next_save = min(self._next_save, last + self._snapshot_every)

    async def close(self) -> None:
        """Let the engine forget the state."""
        if self._closed:
            return
        self._closed = True
        self._engine.forget(self.id)
        self._saving = None
        self._keep([])
        self._sound.clear()

    # A state that is there when it is needed.

    async def _surely(self, block: int, work: Callable[[ModelProcess], Awaitable[T]]) -> T:
        """Do `work` in a process that holds the state as it was before that block, however many processes it takes."""
        if self._under_way is not None:
            # Of a call that was cancelled; how it ends decides where the state is.
            await asyncio.wait([self._under_way])
        deaths, limit = 0, self._engine.settings.restarts.deaths_per_block
        while True:
            process = await self._engine.process()
            try:
                await self._bring(process, block)
                return await work(process)
            except ProcessDied as death:
                if death.culprit != self.id:
                    continue
                deaths += 1
                if deaths == limit:
                    times = f"{deaths} times in a row" if deaths > 1 else "that was"
                    raise EngineError(
                        f"model {self._engine.settings.model}: its process {death}; {times} at block {block} "
                        f"({block * self.spec.block_seconds:.2f} s)"
                    ) from None

    async def _bring(self, process: ModelProcess, block: int) -> None:
        """Have that process hold the state as it was before that block."""
        if self._there is None or self._there.process is not process or block < self._there.since:
            await self._restore(process)
        assert self._there is not None
        if block < self._there.block:
            self._there.block = block
            await self._ask(process, {"op": "rewind", "block": block})
        for number in range(self._there.block, block):
            if number not in self._sound:
                raise EngineError(
                    f"model {self._engine.settings.model}: the session is lost, since its state was never saved: "
                    f"{self._unsaveable}"
                )
            await self._advance(process, "replay", number)

    async def _restore(self, process: ModelProcess) -> None:
        """Have that process hold the last snapshot, or begin with the reference where there is none."""
        image = np.ascontiguousarray(self._reference.image)
        header: dict[str, Any] = {"op": "open", "shape": image.shape, "history": self._rewind_blocks}
        header |= {"prompt": self._reference.prompt, "seed": self._reference.seed}
        start = 0
        if self._snapshots:
            last = self._snapshots[-1]
            header |= {"op": "restore", "offset": last.shelf.offset, "bytes": last.bytes}
            start = last.block
        self._there = _Place(process, start, start)
        await self._ask(process, header, image.tobytes(), self._engine.settings.load_timeout_s)

    async def _advance(
        self,
        process: ModelProcess,
        op: str,
        number: int,
        on_frames: Callable[[FrameBlock], None] | None = None,
        half_rate: bool = False,
    ) -> list[FrameBlock]:
        """Make that block: "step" gives its frames, "replay" none."""
        assert self._there is not None
        sound = self._sound[number]
        self._there.block = number + 1
        how = {"pieces": on_frames is not None, "half_rate": half_rate}
        header = {"op": op, "block": number, **how, **sound.header}
        made = await self._ask(process, header, sound.samples, on_frames=on_frames)
        self._engine.steps += 1
        self._engine.step_s += made.seconds
        return made.blocks

    async def _finish(self, process: ModelProcess) -> list[FrameBlock]:
        return (await self._ask(process, {"op": "finish"})).blocks

    async def _ask(
        self,
        process: ModelProcess,
        header: dict[str, Any],
        body: bytes = b"",
        limit_s: float | None = None,
        on_frames: Callable[[FrameBlock], None] | None = None,
    ) -> Answer:
        limit_s = self._engine.settings.step_timeout_s if limit_s is None else limit_s
        answer = process.send(header, body, session=self.id, limit_s=limit_s, on_frames=on_frames)
        answer.add_done_callback(self._note_failure)
        self._under_way = answer
        made = await asyncio.shield(answer)
        self.busy_s += made.seconds
        return made

    def _note_failure(self, answer: asyncio.Future[Answer]) -> None:
        """A request that failed leaves a state that nobody knows, also when nobody waits for it any more."""
        if answer.exception() is not None:
            self._there = None

    # Snapshots.

    async def _snapshot(self, process: ModelProcess) -> _Snapshot:
        """One of the state as it is now, on a shelf that is nobody else's yet."""
        shelves = self._engine.shelves
        while True:
            shelf = shelves.take()
            size = await self._write_snapshot(process, shelf)
            if size <= shelf.room:
                return _Snapshot(self.blocks, shelf, size)
            shelves.give_back(shelf)
            shelves.bytes = max(shelves.bytes, size)

    async def _write_snapshot(self, process: ModelProcess, shelf: _Shelf) -> int:
        """Its bytes; it is not written where there is no room for them."""
        header = {"op": "snapshot", "offset": shelf.offset, "room": shelf.room}
        answer = process.send(header, session=self.id, limit_s=self._engine.settings.step_timeout_s)
        try:
            return (await asyncio.shield(answer)).bytes
        except BaseException:
            # Of a call that was cancelled it may yet be written to.
            answer.add_done_callback(lambda _: self._engine.shelves.give_back(shelf))
            raise

    @property
    def _first_needed(self) -> int:
        """The first block that a rewind may ask for."""
        return max(self._begin, self._furthest - self._rewind_blocks)

    def _save(self) -> None:
        """Ask for a snapshot when it is time for one; nobody waits for it."""
        if self._unsaveable is not None:
            self._sound.clear()
            return
        if self.blocks < self._next_save or self._saving is not None or self._there is None:
            return
        block, shelf = self.blocks, self._engine.shelves.take()
        self._next_save = block + self._snapshot_every
        self._saving_block = block
        header = {"op": "snapshot", "offset": shelf.offset, "room": shelf.room}
        limit_s = self._engine.settings.step_timeout_s
        self._saving = self._there.process.send(header, session=self.id, limit_s=limit_s)
        self._saving.add_done_callback(lambda answer: self._saved(answer, block, shelf))

    def _saved(self, answer: asyncio.Future[Answer], block: int, shelf: _Shelf) -> None:
        wanted = self._saving is answer
        if wanted:
            self._saving = None
        failure = answer.exception()
        size = 0 if failure else answer.result().bytes
        if wanted and 0 < size <= shelf.room:
            self._keep([*self._snapshots, _Snapshot(block, shelf, size)])
            return
        shelves = self._engine.shelves
        shelves.give_back(shelf)
        if size > shelf.room:  # the first one; after the next block there is a place for it
            shelves.bytes = max(shelves.bytes, size)
            self._next_save = block
        if failure is not None and not isinstance(failure, ProcessDied):
            self._unsaveable = failure  # what was said is forgotten after the next step, which may need it still
            log.warning(
                "model %s: a session cannot be saved, so it does not outlive the model's process: %s",
                self._engine.settings.model,
                failure,
            )

    def _keep(self, snapshots: list[_Snapshot]) -> None:
        """Keep these, but for those that are older than any rewind needs; and the sound since the oldest of them."""
        old = [snapshot for snapshot in snapshots if snapshot.block <= self._first_needed]
        needed = [snapshot for snapshot in snapshots if snapshot.block > self._first_needed]
        needed = old[-1:] + needed
        for snapshot in self._snapshots:
            if snapshot not in needed:
                self._engine.shelves.give_back(snapshot.shelf)
        self._snapshots = needed
        if old:
            for number in [n for n in self._sound if n < old[-1].block]:
                del self._sound[number]


@dataclass
class _Place:
    """Where a session's state is: in that process, as before `block`; and it can go back there as far as `since`."""

    process: ModelProcess
    since: int
    block: int


@dataclass(frozen=True)
class _Sound:
    """One block of sound as it is sent."""

    header: dict[str, Any]
    samples: bytes

    @classmethod
    def of(cls, audio: AudioBlock) -> Self:
        sound = np.concatenate([audio.samples, audio.ahead]).astype(np.float32, copy=False)
        header = {"start": audio.start, "valid": audio.valid, "samples": len(audio.samples)}
        return cls(header, sound.tobytes())


@dataclass(frozen=True, order=True)
class _Shelf:
    """A place in the file of snapshots: its offset and its length, in bytes."""

    offset: int
    room: int


class _Shelves:
    """The places in the file of snapshots; those that are given back are used again.

    bytes: of the largest snapshot so far.
    """

    SMALLEST = 1 << 16
    """A multiple of what a mapping's offset has to be a multiple of."""

    def __init__(self) -> None:
        self.bytes = 0
        self._end = 0
        self._free: dict[int, list[_Shelf]] = {}

    def take(self) -> _Shelf:
        """A place for the largest snapshot so far."""
        room = max(self.SMALLEST, 1 << (self.bytes - 1).bit_length())
        if free := self._free.get(room):
            return heapq.heappop(free)
        self._end += room
        return _Shelf(self._end - room, room)

    def give_back(self, shelf: _Shelf) -> None:
        heapq.heappush(self._free.setdefault(shelf.room, []), shelf)


async def _nothing() -> None:
    pass


def _read_all(descriptor: int, size: int, offset: int) -> bytes:
    parts = []
    while size:
        parts.append(os.pread(descriptor, size, offset))
        size, offset = size - len(parts[-1]), offset + len(parts[-1])
    return b"".join(parts)


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        done = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[done:], offset + done


def _expected() -> asyncio.Future[ModelProcess]:
    """A process to come; it may fail to without anybody having asked."""
    future: asyncio.Future[ModelProcess] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
