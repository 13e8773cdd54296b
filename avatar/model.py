"""The words of the house: what a model of a speaking person is to everyone who is not inside it.

Nothing here imports torch, so that the daemon and its command line start at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from audio.chunk import AudioBlock

State = Any
"""All that one session remembers (rings, conditioning, VAE memory, audio context, random generators, position).

Each family has its own class for it. It is passed as an argument and kept by nobody else, so it can be copied,
saved and rolled back (`avatar.stateful`).
"""


@dataclass(frozen=True)
class StreamSpec:
    """The shape of the stream a model makes.

    lookahead_samples is how much sound after a block's end the model wants to hear before it makes the block; it
    arrives in `AudioBlock.ahead`. Frame i of the stream is shown at i / fps seconds of sound, whatever the lookahead.
    After the first settled_after blocks, which fill windows and caches, each takes as long as any later one.
    half_rate: the model is `HalfRate`.
    """

    width: int
    height: int
    fps: int = 25
    frames_per_block: int = 12
    sample_rate: int = 16_000
    lookahead_samples: int = 0
    settled_after: int = 2
    half_rate: bool = False

    def __post_init__(self) -> None:
        if self.sample_rate % self.fps:
            raise ValueError(f"sample_rate {self.sample_rate} is not a multiple of fps {self.fps}")

    @property
    def samples_per_frame(self) -> int:
        return self.sample_rate // self.fps

    @property
    def samples_per_block(self) -> int:
        return self.samples_per_frame * self.frames_per_block

    @property
    def block_seconds(self) -> float:
        return self.frames_per_block / self.fps


@dataclass(frozen=True)
class Reference:
    """Who speaks: image uint8 [H, W, 3] RGB of any size, the prompt, and the seed of all randomness of the session."""

    image: NDArray[np.uint8]
    prompt: str = ""
    seed: int = 0


@dataclass(frozen=True)
class FrameBlock:
    """Frames and the sound that goes with them.

    frames: uint8 [F, height, width, 3] RGB; audio: float32 [F * samples_per_frame], shorter only at the stream's end;
    start: index of the first frame, so the pts of frame i is start + i with a time base of 1 / fps.
    """

    frames: NDArray[np.uint8]
    audio: NDArray[np.float32]
    start: int


@dataclass(frozen=True)
class Part:
    """One thing that has to live somewhere: its weights, and what a session adds to it.

    weight_bytes: parameters and buffers as stored; session_bytes: what one session's State holds for this part;
    touches_per_block: how often its weights are read for one block (0: only at `start`).
    """

    name: str
    weight_bytes: int
    session_bytes: int = 0
    touches_per_block: float = 1.0


class AvatarModel(Protocol):
    """A family of networks behind four calls. Blocking, and free of clocks, threads and sockets."""

    spec: StreamSpec

    def parts(self) -> list[Part]:
        """What there is to place, in bytes. Works on the meta device."""
        ...

    def start(self, reference: Reference) -> State:
        """Encode picture and prompt, fill the conditioning caches, prime the VAE."""
        ...

    def step(self, state: State, audio: AudioBlock) -> list[FrameBlock]:
        """Advance `state` in place by one block of sound; give the blocks that became ready.

        One when sequential; none or one while a wavefront fills. A block has `frames_per_block` frames; the last of a
        stream has ceil(valid / samples_per_frame).
        """
        ...

    def finish(self, state: State) -> list[FrameBlock]:
        """The blocks still in flight."""
        ...


@runtime_checkable
class Piecewise(Protocol):
    """What a model has beside its four calls when a block's first frames are ready well before its last."""

    def step_in_pieces(self, state: State, audio: AudioBlock) -> Iterator[FrameBlock]:
        """As `step`, each part of the block as soon as it is there; together they are what `step` gives.

        `state` is advanced, in place, once the last part was taken: the iterator has to be exhausted.
        """
        ...


@runtime_checkable
class HalfRate(Protocol):
    """What a model has beside its four calls when half of the pictures are much less work."""

    def step_at_half_rate(self, state: State, audio: AudioBlock) -> list[FrameBlock]:
        """As `step`, but of the pictures the first, the third, and so on, each of them twice; `state` is the same."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """What a model has beside its four calls when its states are too large to be copied or saved whole."""

    def snapshot(self, state: State) -> Any:
        """The small part of `state` from which `resume` makes it again; it may share tensors with `state`.

        Like a state it is a tree that `avatar.stateful` can clone and save.
        """
        ...

    def resume(self, reference: Reference, saved: Any) -> State:
        """A state that goes on where `snapshot` was taken, as nearly as the family promises; takes over `saved`."""
        ...
