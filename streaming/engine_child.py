"""The engine's own process: one model, many sessions, answers on a pipe, frames through shared memory.

Started by `streaming.engine` as `python -m streaming.engine_child DESCRIPTOR`. A message is a JSON header and bytes:

    to the child                                          from the child
    load   model size steps options slots                 ready   spec, load_s
    open   id session shape prompt seed      + image      done    id seconds
    step   id session start valid samples    + sound      block   id slot frames start    + sound; before its `done`
    finish id session                                     failed  id kind message trace
    close  session
    free   slot

A block's frames lie in `slot` of the shared memory until the parent frees it. The end of the input ends the process.
This is the only module of streaming that reaches a family of models, and only when it is asked to load one.
"""

from __future__ import annotations

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
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.model import AvatarModel, FrameBlock, Reference, State

HEAD = struct.Struct("<II")
"""Lengths in bytes of the JSON header and of what follows it."""

Message = tuple[dict[str, Any], bytes]

MODEL_FILE = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")
"""A model of one's own: FILE.py:FUNCTION, called as function(size, steps, options)."""


def pack(header: dict[str, Any], *parts: bytes | memoryview) -> bytes:
    """One message as bytes."""
    text = json.dumps(header).encode()
    body = b"".join(parts)
    return HEAD.pack(len(text), len(body)) + text + body


def slot_bytes(spec: dict[str, Any]) -> int:
    """Bytes of one slot of the shared memory: the frames of one block, uint8 RGB."""
    return int(spec["frames_per_block"] * spec["height"] * spec["width"] * 3)


def load(model: str, size: Sequence[int] | None, steps: int | None, options: dict[str, Any]) -> AvatarModel:
    """The model by its name or folder (`avatar.load`), or from a Python file of the user's own (FILE.py:FUNCTION)."""
    pair = (size[0], size[1]) if size else None
    match = MODEL_FILE.fullmatch(model)
    if match is None:
        from avatar.load import load_model  # here, since it imports torch

        return load_model(model, size=pair, steps=steps, options=options)
    module_spec = importlib.util.spec_from_file_location("own_model", match["path"])
    if module_spec is None or module_spec.loader is None or not os.path.exists(match["path"]):
        raise AvatardError(f"model {model}: there is no file {match['path']}")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["own_model"] = module
    module_spec.loader.exec_module(module)
    loaded: AvatarModel = getattr(module, match["function"])(size=pair, steps=steps, options=options)
    return loaded


class Child:
    """Serves one request after the other; sessions share nothing but the weights."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO, descriptor: int) -> None:
        self._requests, self._answers, self._descriptor = requests, answers, descriptor
        self._inbox: deque[Message] = deque()
        self._free: deque[int] = deque()
        self._states: dict[str, State] = {}

    def serve(self) -> None:
        """Load, then answer until the input ends."""
        request = self._next()
        if request is None or not self._load(request[0]):
            return
        while (request := self._next()) is not None:
            header, body = request
            began = time.monotonic()
            try:
                self._answer(header, body)
            except Exception as error:
                self._fail(header.get("id"), error)
            else:
                if "id" in header:
                    self._send({"op": "done", "id": header["id"], "seconds": time.monotonic() - began})

    def _load(self, header: dict[str, Any]) -> bool:
        began = time.monotonic()
        try:
            self._model = load(header["model"], header["size"], header["steps"], header["options"])
            spec = asdict(self._model.spec)
            os.ftruncate(self._descriptor, slot_bytes(spec) * header["slots"])
            self._frames = np.frombuffer(mmap.mmap(self._descriptor, 0), np.uint8).reshape(header["slots"], -1)
        except Exception as error:
            self._fail(None, error)
            return False
        self._free.extend(range(header["slots"]))
        self._send({"op": "ready", "spec": spec, "load_s": time.monotonic() - began})
        return True

    def _answer(self, header: dict[str, Any], body: bytes) -> None:
        session = header.get("session", "")
        match header["op"]:
            case "open":
                image = np.frombuffer(body, np.uint8).reshape(header["shape"])
                self._states[session] = self._model.start(Reference(image, header["prompt"], header["seed"]))
            case "step":
                sound = np.frombuffer(body, np.float32)
                samples, ahead = sound[: header["samples"]], sound[header["samples"] :]
                block = AudioBlock(samples, header["start"], header["valid"], ahead)
                self._send_blocks(header["id"], self._model.step(self._states[session], block))
            case "finish":
                self._send_blocks(header["id"], self._model.finish(self._states[session]))
            case "close":
                self._states.pop(session, None)

    def _send_blocks(self, request: int, blocks: Sequence[FrameBlock]) -> None:
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
        kind = "user" if isinstance(error, AvatardError) else "bug"
        message = str(error) if kind == "user" else f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        self._send({"op": "failed", "id": request, "kind": kind, "message": message, "trace": trace})

    def _send(self, header: dict[str, Any], body: bytes = b"") -> None:
        try:
            self._answers.write(pack(header, body))
            self._answers.flush()
        except BrokenPipeError:
            os._exit(0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # A library that prints must not print into the protocol.
    os.dup2(2, 1)
    Child(sys.stdin.buffer, answers, int(sys.argv[1])).serve()
    # Nothing here outlives the process, and tearing torch down would cost its user a third of a second.
    os._exit(0)


if __name__ == "__main__":
    main()
