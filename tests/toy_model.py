"""A model of a speaking person in a few lines of numpy: what streaming and service are tested with.

It flashes white in every frame whose sound clicks, so that a test can find picture and sound in a finished file.
Loaded by path (`tests/toy_model.py:load`) in the engine's process, so it imports nothing of the tests.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audio.chunk import AudioBlock
from audio.errors import AvatardError
from avatar.model import AvatarModel, FrameBlock, HalfRate, Part, Piecewise, Reference, StreamSpec

CLICK = 0.5
"""A frame is white when its sound reaches this."""

OPTIONS = ("delay", "step_s", "fail_at", "how", "deaths", "diary")


@dataclass
class ToyState:
    colour: np.ndarray
    rng: np.random.Generator
    loudness: float = 0.0
    blocks: int = 0
    waiting: list[FrameBlock] = field(default_factory=list)


def flash(frame: np.ndarray, sound: np.ndarray, samples_per_frame: int) -> None:
    """Turn a frame [height, width, 3] white, in place, if its sound clicks.

    A band across its middle stays black on the left, as far as the part of the frame's time that had passed: so a
    reader tells the moment of a click from the picture to a millisecond, and not to the length of a frame.
    """
    clicked = np.flatnonzero(np.abs(sound) >= CLICK)
    if len(clicked):
        height, width = frame.shape[:2]
        frame[:] = 255
        frame[3 * height // 8 : 5 * height // 8, : round(width * clicked[0] / samples_per_frame)] = 0


class ToyModel:
    """Dark pictures in the reference's colour, brighter with the sound so far, white at a click.

    delay: blocks that stay in flight, as in a wavefront; step_s: seconds a step takes; at block `fail_at` it fails
    `how`: "user" (AvatardError), "bug" (an exception), "kill" (SIGKILL), "hang".
    """

    def __init__(
        self, size: tuple[int, int], delay: int = 0, step_s: float = 0.0, fail_at: int = -1, how: str = "bug"
    ) -> None:
        self.spec = StreamSpec(width=size[0], height=size[1], lookahead_samples=1280, half_rate=True)
        self.delay, self.step_s, self.fail_at, self.how = delay, step_s, fail_at, how

    def parts(self) -> list[Part]:
        return [Part("toy", 0)]

    def start(self, reference: Reference) -> ToyState:
        colour = reference.image.reshape(-1, 3).mean(0) * 0.25
        return ToyState(colour=colour, rng=np.random.default_rng(reference.seed))

    def step(self, state: ToyState, audio: AudioBlock) -> list[FrameBlock]:
        if state.blocks == self.fail_at:
            self._fail()
        if self.step_s:
            time.sleep(self.step_s)
        spec = self.spec
        assert audio.samples.shape == (spec.samples_per_block,)
        assert audio.ahead.shape == (spec.lookahead_samples,)
        assert audio.start == state.blocks * spec.samples_per_block
        count = math.ceil(audio.valid / spec.samples_per_frame)
        frames = np.empty((count, spec.height, spec.width, 3), np.uint8)
        for index in range(count):
            sound = audio.samples[index * spec.samples_per_frame : (index + 1) * spec.samples_per_frame]
            peak = float(np.abs(sound).max())
            state.loudness = 0.9 * state.loudness + 0.1 * peak
            noise = state.rng.integers(0, 8, (spec.height, spec.width, 3))
            frames[index] = np.clip(state.colour + 40 * state.loudness + noise, 0, 120)
            flash(frames[index], sound, spec.samples_per_frame)
        state.waiting.append(FrameBlock(frames, audio.samples[: audio.valid].copy(), audio.start // 640))
        state.blocks += 1
        return [state.waiting.pop(0)] if len(state.waiting) > self.delay else []

    def step_at_half_rate(self, state: ToyState, audio: AudioBlock) -> list[FrameBlock]:
        blocks = self.step(state, audio)
        for block in blocks:
            block.frames[1::2] = block.frames[:-1:2]
        return blocks

    def finish(self, state: ToyState) -> list[FrameBlock]:
        ready, state.waiting = state.waiting, []
        return ready

    def _fail(self) -> None:
        if self.how == "user":
            raise AvatardError("toy: this block is not to my taste; give me another")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(600)
        raise RuntimeError("the toy broke")


def _death(deaths: list[int | str], diary: str) -> int | str:
    """At which block this life of the engine's process ends. Lives count themselves in the file `diary`."""
    with open(diary, "ab") as book:
        life = book.tell()
        book.write(b".")
    return deaths[life] if life < len(deaths) else -1


def load(size: tuple[int, int] | None, steps: int | None, options: dict[str, Any]) -> ToyModel:
    """What `avatar.load.load_model` is for real models.

    Options beside the toy's own: `deaths`, the `fail_at` of each life of the engine's process, or "load"; `diary`.
    """
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise AvatardError(f"model.options.{min(unknown)}: unknown setting of the toy; it has {', '.join(OPTIONS)}")
    if "deaths" in options:
        options = {"how": "kill", **options}
        options["fail_at"] = _death(options.pop("deaths"), options.pop("diary"))
        if options["fail_at"] == "load":
            os.kill(os.getpid(), signal.SIGKILL)
    return ToyModel(size or (64, 64), **options)


def load_flashing(size: tuple[int, int] | None, steps: int | None, options: dict[str, Any]) -> AvatarModel:
    """A real model (`options["model"]`, or pocket) whose pictures flash at clicks as the toy's do."""
    from avatar.load import load_model  # here, since it imports torch

    own = dict(options)
    model = load_model(own.pop("model", "pocket"), size, steps, own)
    step, finish, length = model.step, model.finish, model.spec.samples_per_frame

    def flashing(blocks: Iterable[FrameBlock]) -> Iterator[FrameBlock]:
        for block in blocks:
            for index, frame in enumerate(block.frames):
                flash(frame, block.audio[index * length : (index + 1) * length], length)
            yield block

    model.step = lambda state, audio: list(flashing(step(state, audio)))
    model.finish = lambda state: list(flashing(finish(state)))
    if isinstance(model, Piecewise):
        in_pieces = model.step_in_pieces
        model.step_in_pieces = lambda state, audio: flashing(in_pieces(state, audio))
    if isinstance(model, HalfRate):
        at_half_rate = model.step_at_half_rate
        model.step_at_half_rate = lambda state, audio: list(flashing(at_half_rate(state, audio)))
    return model
