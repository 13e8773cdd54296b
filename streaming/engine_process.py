"""One life of the model's process: spawned, asked, watched, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import mmap
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from audio.errors import AvatardError
from avatar.model import FrameBlock, StreamSpec
from streaming.engine_child import HEAD, pack, slot_bytes

SLOTS = 4
"""Blocks of frames that the shared memory holds; a child with more to give waits until one is taken."""

CLOSE_S = 0.5
"""What an idle process gets to end by itself."""


class ModelFailure(RuntimeError):
    """The model raised something that is a bug; the traceback of its process is in the notes."""


class ProcessDied(Exception):
    """The process ended before it answered; in words that follow "its process".

    culprit: the session whose request it was working on; None when there was none.
    """

    def __init__(self, what: str, culprit: str | None) -> None:
        super().__init__(what)
        self.culprit = culprit


@dataclass
class Answer:
    """blocks: what the request made; seconds: the model worked for it; bytes: of a snapshot."""

    blocks: list[FrameBlock] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0


class ModelProcess:
    """The process, from its start to its end. It belongs to one loop.

    It answers one request after the other. The one it is at has its own time; when that is over, the process is killed.
    """

    @classmethod
    async def spawn(
        cls, load: Mapping[str, Any], load_timeout_s: float, snapshots: int, on_end: Callable[[], None]
    ) -> Self:
        """Start the process; it loads the model by itself. `ready` waits for that.

        Args:
            load: model, size, steps, options and live, as `engine_child.load` takes them.
            snapshots: descriptor of the file that snapshots are kept in.
            on_end: called when the process has ended or is given up, before anybody who waits is told.
        Raises: OSError.
        """
        frames = anonymous_file("frames")
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # -P: a folder called `audio` where the user happens to stand is not ours.
                *("-P", "-m", "streaming.engine_child", str(frames), str(snapshots)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(frames, snapshots),
                env=child_environment(),
                # Ctrl-C is for us: the model goes on until the part of the file is whole.
                start_new_session=True,
            )
        except BaseException:
            os.close(frames)
            raise
        made = cls(process, frames, on_end)
        made.tell({"op": "load", **load, "slots": SLOTS})
        made._loading = asyncio.get_running_loop().call_later(
            load_timeout_s, made._hung, f"was not loaded in {load_timeout_s:g} s", None
        )
        return made

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int, on_end: Callable[[], None]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._descriptor, self._on_end = process, descriptor, on_end
        self._input, self._output = process.stdin, process.stdout
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        """Those without an answer, in the order in which the process takes them."""
        self._ready: asyncio.Future[StreamSpec] = _future()
        self._loading: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.death: ProcessDied | None = None
        self.load_s = 0.0
        """Seconds it took to load the model, once it is ready."""
        self._reader = asyncio.create_task(self._read(), name="engine reader")

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> StreamSpec:
        """Wait until the model is loaded. Raises: AvatardError, as the model said it; ModelFailure; ProcessDied."""
        return await asyncio.shield(self._ready)

    def send(
        self,
        header: dict[str, Any],
        body: bytes = b"",
        *,
        session: str,
        limit_s: float,
        on_frames: Callable[[FrameBlock], None] | None = None,
    ) -> asyncio.Future[Answer]:
        """Send one request; its answer, or AvatardError, ModelFailure or ProcessDied.

        Who no longer waits for the answer leaves the request where it is: `asyncio.shield` the future.
        limit_s: from when the process begins with it; on_frames: called with each block, or piece of one, as it comes.
        """
        answer: asyncio.Future[Answer] = _future()
        if self.death is not None:
            answer.set_exception(ProcessDied(str(self.death), None))
            return answer
        number = next(self._numbers)
        self._requests[number] = _Request(answer, session, header["op"], limit_s, on_frames)
        self.tell({**header, "id": number, "session": session}, body)
        if len(self._requests) == 1:
            self._watch_first()
        return answer

    def tell(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send what has no answer."""
        # No drain: a request waits for its answer, so never more than two for each session lie in the pipe.
        if self.death is None and not self._input.is_closing():
            self._input.write(pack(header, body))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """End it: at once when it is idle, by force when it is not."""
        self._input.close()
        if not self._ready.done():
            # It imports or loads, and would look at its input only after that.
            self.kill()
        try:
            await asyncio.wait_for(self._process.wait(), CLOSE_S)
        except TimeoutError:
            # In the middle of a step. It keeps nothing that anyone needs.
            self.kill()
            await self._process.wait()
        self._end("was closed")
        await self.gone(CLOSE_S)
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def gone(self, patience_s: float) -> None:
        """Wait until there is nothing left of the process; one that is killed may take its time to let memory go."""
        await asyncio.wait([self._reader], timeout=patience_s)

    async def _read(self) -> None:
        """Hand every answer to who waits for it, until the process ends."""
        memory: NDArray[np.uint8] | None = None
        spec: StreamSpec | None = None
        try:
            while True:
                text_bytes, body_bytes = HEAD.unpack(await self._output.readexactly(HEAD.size))
                header = json.loads(await self._output.readexactly(text_bytes))
                body = await self._output.readexactly(body_bytes)
                if self.death is not None:
                    continue  # given up, and not gone yet
                match header["op"]:
                    case "ready":
                        spec = StreamSpec(**header["spec"])
                        self.load_s = header["load_s"]
                        shared = mmap.mmap(self._descriptor, slot_bytes(header["spec"]) * SLOTS)
                        memory = np.frombuffer(shared, np.uint8).reshape(SLOTS, -1)
                        self._loaded(spec)
                    case "block":
                        assert memory is not None
                        assert spec is not None
                        shape = (header["frames"], spec.height, spec.width, 3)
                        # Copied out at once (a millisecond): the slot is free again, and the frames are the caller's.
                        frames = memory[header["slot"], : int(np.prod(shape))].reshape(shape).copy()
                        self.tell({"op": "free", "slot": header["slot"]})
                        block = FrameBlock(frames, np.frombuffer(body, np.float32), header["start"])
                        request = self._requests[header["id"]]
                        request.made.blocks.append(block)
                        if request.on_frames is not None:
                            request.on_frames(block)
                    case "done":
                        made = self._requests[header["id"]].made
                        made.seconds, made.bytes = header["seconds"], header["bytes"]
                        self._settle(header["id"], made)
                    case "failed" if header["kind"] == "fault":
                        self.kill()
                        self._end(f"lost its device ({header['message'].splitlines()[0]})")
                    case "failed" if header["id"] is None:
                        self._loaded(_failure(header))
                    case "failed":
                        self._settle(header["id"], _failure(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._end(_obituary(await self._process.wait()))
        except Exception as error:
            self.kill()
            self._end(f"gave an answer that makes no sense ({error!r})")
            raise
        finally:
            os.close(self._descriptor)

    def _loaded(self, outcome: StreamSpec | Exception) -> None:
        if self._loading is not None:
            self._loading.cancel()
        _set(self._ready, outcome)

    def _settle(self, number: int, outcome: Answer | Exception) -> None:
        request = self._requests.pop(number)
        _set(request.answer, outcome)
        self._watch_first()

    def _watch_first(self) -> None:
        """Give the request that the process is at its time."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._requests:
            first = next(iter(self._requests.values()))
            what = f"gave no answer to {first.op} in {first.limit_s:g} s"
            loop = asyncio.get_running_loop()
            self._watch = loop.call_later(first.limit_s, self._hung, what, first.session)

    def _hung(self, what: str, culprit: str | None) -> None:
        # The one who waits has waited enough: whether it can be reaped at once is not his affair.
        self.kill()
        self._end(f"{what}, and was ended")

    def _end(self, what: str) -> None:
        if self.death is not None:
            return
        first = next(iter(self._requests.values()), None)
        self.death = ProcessDied(what, first.session if first else None)
        for timer in (self._loading, self._watch):
            if timer is not None:
                timer.cancel()
        self._on_end()
        _set(self._ready, self.death)
        for request in self._requests.values():
            _set(request.answer, self.death)
        self._requests.clear()


@dataclass
class _Request:
    answer: asyncio.Future[Answer]
    session: str
    op: str
    limit_s: float
    on_frames: Callable[[FrameBlock], None] | None
    made: Answer = field(default_factory=Answer)


def _future() -> asyncio.Future[Any]:
    """A future that may fail without anybody having asked."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _set(future: asyncio.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _failure(header: dict[str, Any]) -> Exception:
    if header["kind"] == "user":
        return AvatardError(header["message"])
    failure = ModelFailure(header["message"])
    failure.add_note("In the model's process:\n" + header["trace"])
    return failure


def _obituary(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed; if nobody did it, the system ran out of memory (try a smaller --size)"
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"ended by itself with status {status}"


OMP_SPINS = "1000"
"""How often an idle OpenMP thread looks for work before it sleeps; set before torch loads, unless the user did.

A block of pocket on 2 cores took 176 ms with threads that sleep at once, 108 ms with 1,000 looks, 100 ms with the
library's own 300,000; beside a process that takes a whole core 183, 233 and 300 ms.
"""

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""Memory that was freed stays for the next block, where glibc would give it back and fault it in anew. The first
number is the largest that all versions take.

A block of pocket faulted in 27,000 pages, a tenth to a seventh of its time on two cores (412 to 430 ms, 370 without).
"""


def child_environment() -> dict[str, str]:
    """The child's environment: our packages, memory that is kept, and OpenMP threads that spin a little, then sleep."""
    spins = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": OMP_SPINS}
    return {**spins, **KEPT_MEMORY, **os.environ, "PYTHONPATH": import_path()}


def import_path() -> str:
    """PYTHONPATH for a process that is to find our packages, wherever it begins and however we were found."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def anonymous_file(name: str) -> int:
    """A descriptor of memory that no path leads to, so that nothing is left behind however its users end."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"avatard-{name}")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
