"""The model in a process of its own, as awaitables: it may hang, run out of memory or die, and its caller goes on."""

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.model import FrameBlock, Reference, StreamSpec
from streaming.engine_child import HEAD, pack, slot_bytes

SLOTS = 4
"""Blocks of frames that the shared memory holds; a child with more to give waits until one is taken."""


class EngineError(AvatardError):
    """The model's process died, hung, or refused: one line that a user can act on."""


class ModelFailure(RuntimeError):
    """The model raised something that is a bug; the traceback of its process is in the notes."""


@dataclass(frozen=True)
class EngineSettings:
    """Which model, and how long to wait for it.

    model: a family's name, a folder of weights, or FILE.py:FUNCTION; size: width and height in pixels; steps: of
    denoising; options: the family's own; load_timeout_s, step_timeout_s: after which a silent child is killed.
    """

    model: str
    size: tuple[int, int] | None = None
    steps: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    load_timeout_s: float = 1800.0
    step_timeout_s: float = 300.0


class Engine:
    """One model process, spawned at once and loading while its caller does other things.

    `async with await Engine.launch(settings) as engine:` ends the process on every way out. It belongs to one loop.
    """

    @classmethod
    async def launch(cls, settings: EngineSettings) -> Self:
        """Spawn the process; it loads the model by itself. `ready` waits for that."""
        frames = _anonymous_file()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # -P: a folder called `audio` where the user happens to stand is not ours.
                *("-P", "-m", "streaming.engine_child", str(frames)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(frames,),
                env=_child_environment(),
                # Ctrl-C is for us: the model goes on until the part of the file is whole.
                start_new_session=True,
            )
        except BaseException:
            os.close(frames)
            raise
        engine = cls(settings, process, frames)
        engine._send(
            {
                "op": "load",
                "model": settings.model,
                "size": settings.size,
                "steps": settings.steps,
                "options": dict(settings.options),
                "slots": SLOTS,
            }
        )
        return engine

    def __init__(self, settings: EngineSettings, process: asyncio.subprocess.Process, descriptor: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._settings, self._process, self._descriptor = settings, process, descriptor
        self._input, self._output = process.stdin, process.stdout
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._ready: asyncio.Future[StreamSpec] = asyncio.get_running_loop().create_future()
        # The reader may fail it long before anybody asks.
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self._dead: Exception | None = None
        self._closed = False
        self.load_s = 0.0
        """Seconds the child took to load the model, once it is ready."""
        self._reader = asyncio.create_task(self._read(), name="engine reader")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> StreamSpec:
        """Wait until the model is loaded. Raises: AvatardError, as the model said it; EngineError; ModelFailure."""
        limit_s = self._settings.load_timeout_s
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), limit_s)
        except TimeoutError:
            raise self._hung(f"was not loaded in {limit_s:g} s") from None

    async def open(self, reference: Reference) -> EngineSession:
        """Start a session: the model encodes the picture and the prompt. Raises: as `ready`."""
        spec = await self.ready()
        session = EngineSession(self, f"s{next(self._numbers)}", spec)
        image = np.ascontiguousarray(reference.image)
        header = {"op": "open", "shape": image.shape, "prompt": reference.prompt, "seed": reference.seed}
        await self._ask(session, header, image.tobytes())
        return session

    async def close(self) -> None:
        """End the process: at once when it is idle, by force when it is not. The second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._input.close()
        if not self._ready.done():
            # It imports or loads, and would look at its input only after that.
            self.kill()
        try:
            await asyncio.wait_for(self._process.wait(), 0.5)
        except TimeoutError:
            # In the middle of a step. It keeps nothing that anyone needs.
            self.kill()
            await self._process.wait()
        self._fail_all(EngineError(f"model {self._settings.model}: its process was closed"))
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        os.close(self._descriptor)

    def kill(self) -> None:
        """End the process by force; whoever waits gets an EngineError."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _ask(self, session: EngineSession, header: dict[str, Any], body: bytes = b"") -> list[FrameBlock]:
        """Send one request and wait for its answer; adds the model's time to the session's."""
        if self._dead is not None:
            raise self._dead
        number = next(self._numbers)
        request = self._requests[number] = _Request(asyncio.get_running_loop().create_future())
        limit_s = self._settings.step_timeout_s if header["op"] != "open" else self._settings.load_timeout_s
        try:
            self._send({**header, "id": number, "session": session.id}, body)
            async with asyncio.timeout(limit_s):
                session.busy_s += await request.answer
        except TimeoutError:
            raise self._hung(f"gave no answer to {header['op']} in {limit_s:g} s") from None
        finally:
            self._requests.pop(number, None)
        return request.blocks

    def _send(self, header: dict[str, Any], body: bytes = b"") -> None:
        # No drain: a request waits for its answer, so never more than one for each session lies in the pipe.
        if not self._input.is_closing():
            self._input.write(pack(header, body))

    async def _read(self) -> None:
        """Hand every answer to who waits for it, until the child ends."""
        memory: NDArray[np.uint8] | None = None
        spec: StreamSpec | None = None
        while True:
            try:
                text_bytes, body_bytes = HEAD.unpack(await self._output.readexactly(HEAD.size))
                header = json.loads(await self._output.readexactly(text_bytes))
                body = await self._output.readexactly(body_bytes)
            except (asyncio.IncompleteReadError, ConnectionError):
                self._fail_all(EngineError(self._obituary(await self._process.wait())))
                return
            request = self._requests.get(header.get("id") or 0)
            match header["op"]:
                case "ready":
                    spec = StreamSpec(**header["spec"])
                    self.load_s = header["load_s"]
                    shared = mmap.mmap(self._descriptor, slot_bytes(header["spec"]) * SLOTS)
                    memory = np.frombuffer(shared, np.uint8).reshape(SLOTS, -1)
                    if not self._ready.done():
                        self._ready.set_result(spec)
                case "block":
                    assert memory is not None
                    assert spec is not None
                    shape = (header["frames"], spec.height, spec.width, 3)
                    # Copied out at once (a millisecond): the slot is free again, and the frames are the caller's.
                    frames = memory[header["slot"], : int(np.prod(shape))].reshape(shape).copy()
                    self._send({"op": "free", "slot": header["slot"]})
                    if request is not None:
                        request.blocks.append(FrameBlock(frames, np.frombuffer(body, np.float32), header["start"]))
                case "done":
                    if request is not None and not request.answer.done():
                        request.answer.set_result(header["seconds"])
                case "failed":
                    error = _failure(header)
                    if header["id"] is None:
                        self._fail_all(error)
                    elif request is not None and not request.answer.done():
                        request.answer.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        self._dead = self._dead or error
        if not self._ready.done():
            self._ready.set_exception(self._dead)
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(self._dead)

    def _hung(self, what: str) -> EngineError:
        self._dead = EngineError(f"model {self._settings.model}: {what}; its process was ended")
        self.kill()
        return self._dead

    def _obituary(self, status: int) -> str:
        if status == -signal.SIGKILL:
            why = "was killed; if nobody did it, the system ran out of memory (try a smaller --size)"
        elif status < 0:
            why = f"died of {signal.Signals(-status).name}"
        else:
            why = f"ended by itself with status {status}"
        return f"model {self._settings.model}: its process {why}"


class EngineSession:
    """One person speaking: a state in the engine's process, addressed by `id`.

    busy_s: seconds the model has worked for this session.
    """

    def __init__(self, engine: Engine, identity: str, spec: StreamSpec) -> None:
        self._engine = engine
        self.id = identity
        self.spec = spec
        self.busy_s = 0.0

    async def step(self, audio: AudioBlock) -> list[FrameBlock]:
        """Advance by one block of sound. Raises: AvatardError, as the model said it; EngineError; ModelFailure."""
        sound = np.concatenate([audio.samples, audio.ahead]).astype(np.float32, copy=False)
        header = {"op": "step", "start": audio.start, "valid": audio.valid, "samples": len(audio.samples)}
        return await self._engine._ask(self, header, sound.tobytes())

    async def finish(self) -> list[FrameBlock]:
        """The blocks still in flight. Raises: as `step`."""
        return await self._engine._ask(self, {"op": "finish"})

    async def close(self) -> None:
        """Let the engine forget the state."""
        self._engine._send({"op": "close", "session": self.id})


@dataclass
class _Request:
    answer: asyncio.Future[float]
    blocks: list[FrameBlock] = field(default_factory=list)


def _failure(header: dict[str, Any]) -> Exception:
    if header["kind"] == "user":
        return AvatardError(header["message"])
    failure = ModelFailure(header["message"])
    failure.add_note("In the model's process:\n" + header["trace"])
    return failure


OMP_SPINS = "1000"
"""How often an idle OpenMP thread looks for work before it sleeps; set before torch loads, unless the user did.

A block of pocket on 2 cores took 176 ms with threads that sleep at once, 108 ms with 1,000 looks, 100 ms with the
library's own 300,000; beside a process that takes a whole core 183, 233 and 300 ms.
"""


def _child_environment() -> dict[str, str]:
    """The child's environment: our packages, and OpenMP threads that spin a little between layers, then sleep."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    spins = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": OMP_SPINS}
    return {**spins, **os.environ, "PYTHONPATH": path}


def _anonymous_file() -> int:
    """A descriptor of memory without a name, so that nothing is left behind however either process ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("avatard-frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
