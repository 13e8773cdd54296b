"""The engine's own process: one model, many sessions, answers on a pipe, frames through shared memory.

Started by `streaming.engine_process` as `python -m streaming.engine_child FRAMES SNAPSHOTS`, two descriptors. A message
is a JSON header and bytes:

    to the child                                          from the child
    load     model size steps options live slots          ready   spec, load_s
    open     id session history shape prompt seed + image done    id seconds bytes
    step     id session block start valid samples pieces  block   id slot frames start    + sound; before its `done`
             half_rate + sound
    replay   like step; its blocks are not sent           failed  id kind message trace; kind is user, bug or fault
    finish   id session
    rewind   id session block
    snapshot id session offset room
    restore  like open; and offset bytes
    close    session
    free     slot

A block's frames lie in `slot` of the shared memory until the parent frees it. A snapshot lies at `offset` of another
file, which outlives this process; one that needs more than `room` is not written, only measured. Requests are answered
in the order in which they come: with one step of each session under way, the sessions take turns. The end of the input
ends the process.
This is the only module of streaming that reaches a family of models, and only when it is asked to load one.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import mmap
import os
import re
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.model import AvatarModel, FrameBlock, HalfRate, Piecewise, Reference, Resumable, State

HEAD = struct.Struct("<II")
"""Lengths in bytes of the JSON header and of what follows it."""

Message = tuple[dict[str, Any], bytes]

MODEL_FILE = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")
"""A model of one's own: FILE.py:FUNCTION, called as function(size, steps, options)."""

OWN_MODULE = "own_model"
"""What that file is called as a module; classes of its states are found there."""


def pack(header: dict[str, Any], *parts: bytes | memoryview) -> bytes:
    """One message as bytes."""
    text = json.dumps(header).encode()
    body = b"".join(parts)
    return HEAD.pack(len(text), len(body)) + text + body


def slot_bytes(spec: dict[str, Any]) -> int:
    """Bytes of one slot of the shared memory: the frames of one block, uint8 RGB."""
    return int(spec["frames_per_block"] * spec["height"] * spec["width"] * 3)


def load(
    model: str, size: Sequence[int] | None, steps: int | None, options: dict[str, Any], live: bool = False
) -> AvatarModel:
    """The model by its name or folder (`avatar.load`), or from a Python file of the user's own (FILE.py:FUNCTION)."""
    pair = (size[0], size[1]) if size else None
    match = MODEL_FILE.fullmatch(model)
    if match is None:
        from avatar.load import load_model  # here, since it imports torch

        return load_model(model, size=pair, steps=steps, options=options, live=live)
    return _own(model, match["path"], match["function"], {"size": pair, "steps": steps, "options": options})


def _own(model: str, path: str, function: str, arguments: dict[str, Any]) -> AvatarModel:
    module_spec = importlib.util.spec_from_file_location(OWN_MODULE, path)
    if module_spec is None or module_spec.loader is None or not os.path.exists(path):
        raise AvatardError(f"model {model}: there is no file {path}")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[OWN_MODULE] = module
    try:
        module_spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise AvatardError(f"model {model}: there is no function {function} in {path}")
        loaded: AvatarModel = make(**arguments)
    except AvatardError:
        raise
    except Exception as error:
        if _is_fault(error):
            raise
        # Whoever wrote that file can mend it, and no second try does.
        raise AvatardError(f"model {model}: {type(error).__name__}: {error}{_line_of(error, path)}") from error
    if not hasattr(loaded, "spec"):
        raise AvatardError(
            f"model {model}: {function} gave a {type(loaded).__name__}, which is no model: no spec in it"
        )
    return loaded


def _line_of(error: Exception, path: str) -> str:
    """Where in a file an error rose, in words; empty where it did not, or says so itself."""
    if isinstance(error, SyntaxError):
        return ""
    there = os.path.abspath(path)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == there]
    return f" (line {lines[-1]} of {path})" if lines else ""


@dataclass
class Kept:
    """A session: its state, and what the state was before each of the last `depth` blocks, oldest first."""

    reference: Reference
    state: State
    depth: int
    history: deque[tuple[int, Any]] = field(default_factory=deque)


class Child:
    """Serves one request after the other; sessions share nothing but the weights."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO, frames: int, snapshots: int) -> None:
        self._requests, self._answers = requests, answers
        self._descriptor, self._snapshots = frames, snapshots
        self._inbox: deque[Message] = deque()
        self._free: deque[int] = deque()
        self._sessions: dict[str, Kept] = {}
        self._threads: Any = None
        """Of a model that computes here on the CPU; see `avatar.load.LiveThreads`."""

    def serve(self) -> None:
        """Load, then answer until the input ends."""
        request = self._next()
        if request is None or not self._load(request[0]):
            return
        while (request := self._next()) is not None:
            header, body = request
            began = time.monotonic()
            try:
                written = self._answer(header, body)
            except Exception as error:
                self._fail(header.get("id"), error)
            else:
                seconds = time.monotonic() - began
                measured = header["op"] == "step" and header["pieces"] and not header["half_rate"]
                if self._threads is not None and measured:
                    self._threads.took(seconds, self._model.spec.block_seconds)
                if "id" in header:
                    self._send({"op": "done", "id": header["id"], "seconds": seconds, "bytes": written})

    def _load(self, header: dict[str, Any]) -> bool:
        began = time.monotonic()
        try:
            self._model = load(header["model"], header["size"], header["steps"], header["options"], header["live"])
            spec = asdict(self._model.spec)
            os.ftruncate(self._descriptor, slot_bytes(spec) * header["slots"])
            self._frames = np.frombuffer(mmap.mmap(self._descriptor, 0), np.uint8).reshape(header["slots"], -1)
        except Exception as error:
            self._fail(None, error)
            return False
        if "avatar.load" in sys.modules:
            from avatar.load import LiveThreads

            self._threads = LiveThreads()
        self._free.extend(range(header["slots"]))
        # What is there now stays: a collection that walks through all of torch takes a third of a block.
        gc.freeze()
        self._send({"op": "ready", "spec": spec, "load_s": time.monotonic() - began})
        return True

    def _answer(self, header: dict[str, Any], body: bytes) -> int:
        """Do what is asked; the bytes of a snapshot, otherwise 0."""
        name = header.get("session", "")
        match header["op"]:
            case "open":
                reference = _reference(header, body)
                self._sessions[name] = Kept(reference, self._model.start(reference), header["history"])
            case "restore":
                reference = _reference(header, body)
                state = self._resume(reference, self._load_snapshot(header["offset"], header["bytes"]))
                self._sessions[name] = Kept(reference, state, header["history"])
            case "step":
                self._send_blocks(header["id"], self._step(self._sessions[name], header, body))
            case "replay":
                list(self._step(self._sessions[name], header, body))
            case "finish":
                self._send_blocks(header["id"], self._model.finish(self._sessions[name].state))
            case "rewind":
                self._rewind(self._sessions[name], header["block"])
            case "snapshot":
                return self._save_snapshot(self._sessions[name], header["offset"], header["room"])
            case "close":
                self._sessions.pop(name, None)
        return 0

    def _step(self, session: Kept, header: dict[str, Any], body: bytes) -> Iterable[FrameBlock]:
        if session.depth:
            self._remember(session, header["block"])
        if self._threads is not None:
            # Who asks for half of the pictures has no core to spare; so this is known also where a process died.
            self._threads.use(live=header["pieces"] and not header["half_rate"])
        sound = np.frombuffer(body, np.float32)
        samples, ahead = sound[: header["samples"]], sound[header["samples"] :]
        audio = AudioBlock(samples, header["start"], header["valid"], ahead)
        if header["half_rate"] and isinstance(self._model, HalfRate):
            return self._model.step_at_half_rate(session.state, audio)
        if header["pieces"] and isinstance(self._model, Piecewise):
            return self._model.step_in_pieces(session.state, audio)
        return self._model.step(session.state, audio)

    # What a session was, and what it can be again.

    def _remember(self, session: Kept, block: int) -> None:
        """Keep the state as it is before that block; after a rewind it is kept already."""
        from avatar.stateful import clone, restore

        history = session.history
        if history and history[-1][0] == block:
            return
        part = self._part(session.state)
        # Into the memory of the oldest one: on a CPU fresh memory takes five times as long to write.
        full = len(history) == session.depth
        history.append((block, restore(history.popleft()[1], part) if full else clone(part)))

    def _rewind(self, session: Kept, block: int) -> None:
        from avatar.stateful import clone, restore

        while session.history and session.history[-1][0] > block:
            session.history.pop()
        at, kept = session.history[-1]
        assert at == block, f"the state before block {block} is not kept, but that before {at}"
        if isinstance(self._model, Resumable):
            session.state = None  # first: there may be no room for two
            session.state = self._model.resume(session.reference, clone(kept))
        else:
            session.state = restore(session.state, kept)

    def _save_snapshot(self, session: Kept, offset: int, room: int) -> int:
        """Write the session's snapshot, where it fits, from the state's own memory; give its bytes."""
        from avatar.stateful import save

        parts = save(self._part(session.state), {OWN_MODULE})
        size = sum(map(len, parts))
        if size <= room:
            for part in parts:
                done = 0
                while done < len(part):
                    done += os.pwrite(self._snapshots, part[done:], offset + done)
                offset += len(part)
        return size

    def _load_snapshot(self, offset: int, size: int) -> Any:
        from avatar.stateful import load as load_state

        written = mmap.mmap(self._snapshots, size, offset=offset, access=mmap.ACCESS_READ)
        return load_state(memoryview(written), {OWN_MODULE})

    def _part(self, state: State) -> Any:
        """As much of a state as it takes to have it back."""
        return self._model.snapshot(state) if isinstance(self._model, Resumable) else state

    def _resume(self, reference: Reference, part: Any) -> State:
        return self._model.resume(reference, part) if isinstance(self._model, Resumable) else part

    # Messages.

    def _send_blocks(self, request: int, blocks: Iterable[FrameBlock]) -> None:
        for block in blocks:
            slot = self._take_slot()
            frames = np.ascontiguousarray(block.frames)
            self._frames[slot, : frames.size] = frames.reshape(-1)
            header = {"op": "block", "id": request, "slot": slot, "frames": len(frames), "start": block.start}
            self._send(header, np.ascontiguousarray(block.audio, np.float32).tobytes())

    def _take_slot(self) -> int:
        """A free slot, waiting for the parent to give one back; other requests wait in the inbox meanwhile."""
        while not self._free:
            message = self._read()
            if message is None:
                # The parent is gone: nobody is left to tell.
                os._exit(0)
            if message[0]["op"] == "free":
                self._free.append(message[0]["slot"])
            else:
                self._inbox.append(message)
        return self._free.popleft()

    def _next(self) -> Message | None:
        while True:
            message = self._inbox.popleft() if self._inbox else self._read()
            if message is None or message[0]["op"] != "free":
                return message
            self._free.append(message[0]["slot"])

    def _read(self) -> Message | None:
        head = self._requests.read(HEAD.size)
        if len(head) < HEAD.size:
            return None
        text, body = HEAD.unpack(head)
        return json.loads(self._requests.read(text)), self._requests.read(body)

    def _fail(self, request: int | None, error: Exception) -> None:
        kind = "user" if isinstance(error, AvatardError) else "fault" if _is_fault(error) else "bug"
        message = str(error) if kind == "user" else f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        self._send({"op": "failed", "id": request, "kind": kind, "message": message, "trace": trace})

    def _send(self, header: dict[str, Any], body: bytes = b"") -> None:
        try:
            self._answers.write(pack(header, body))
            self._answers.flush()
        except BrokenPipeError:
            os._exit(0)


def _is_fault(error: Exception) -> bool:
    """Whether the device has failed: nothing that this process asks of it will work any more."""
    return isinstance(error, getattr(sys.modules.get("torch"), "AcceleratorError", ()))


def _reference(header: dict[str, Any], body: bytes) -> Reference:
    return Reference(np.frombuffer(body, np.uint8).reshape(header["shape"]), header["prompt"], header["seed"])


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # A library that prints must not print into the protocol.
    os.dup2(2, 1)
    Child(sys.stdin.buffer, answers, int(sys.argv[1]), int(sys.argv[2])).serve()
    # Nothing here outlives the process, and tearing torch down would cost its user a third of a second.
    os._exit(0)


if __name__ == "__main__":
    main()
