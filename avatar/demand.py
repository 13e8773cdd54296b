"""What a model asks of a machine, in numbers: bytes to hold, bytes to move, operations to do.

Families make these numbers from shapes (`avatar.live_avatar.size`), `avatar.placement` decides with them. Nothing here
or there imports torch or numpy, so that a plan is there at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class When(IntEnum):
    """How often a network works."""

    START = 0
    """When a stream begins, and seldom afterwards."""
    BLOCK = 1
    """Once for each block of frames."""
    STEP = 2
    """Once for each denoising step of each block."""


class Schedule(StrEnum):
    """In which order the steps of successive blocks are made. The results are the same."""

    SEQUENTIAL = "sequential"
    """All of a block before any of the next: the least delay."""
    WAVEFRONT = "wavefront"
    """One of each block in flight, layer by layer together: a layer's weights are needed once for all of them. A block
    comes out as many calls later as it has steps, less one."""


@dataclass(frozen=True)
class Work:
    """One pass of a network over one block.

    matrices, attention, convolutions: operations, a multiply-add being two; traffic: bytes which norms, gates and
    roundings read and write between them, fused as far as a compiler does; launches: kernels that are started.
    """

    matrices: float = 0.0
    attention: float = 0.0
    convolutions: float = 0.0
    traffic: float = 0.0
    launches: int = 0


@dataclass(frozen=True)
class Network:
    """Weights that work together, and what they need around them.

    Args:
        weight_bytes: as stored, 16 bits a weight; float8_bytes: with 8-bit weights, 0 where that is not done.
        layers: bytes of each layer that can be brought in by itself, in the order of use; float8_layers: with 8-bit
            weights. What is not in a layer stays with the network.
        work: of one pass.
        workspace_bytes: what one pass needs while it runs; least_workspace_bytes: done in smaller pieces, 0: it cannot;
            waiting_bytes: what a pass keeps while others are in the same layer.
        session_bytes: what a stream keeps for it.
    """

    name: str
    when: When
    weight_bytes: int
    float8_bytes: int = 0
    layers: tuple[int, ...] = ()
    float8_layers: tuple[int, ...] = ()
    work: Work = Work()
    workspace_bytes: int = 0
    least_workspace_bytes: int = 0
    waiting_bytes: int = 0
    session_bytes: int = 0


@dataclass(frozen=True)
class Rings:
    """Keys and values that the network of the steps attends to: a ring for each step and layer, 16 bits a number.

    Args:
        layers: of that network; steps: denoising steps; blocks: that a ring holds, the one being made included, so
            each block replaces 1 / blocks of it and looks at all.
        ring_bytes: keys and values of one ring; conditioning_bytes: of what stands in front of each, and is kept once
            more for each layer; reference_bytes: the part of the latter that stays in 16 bits, as it was before
            rotation. New conditioning is made while the old one is still in use.
    """

    layers: int
    steps: int
    blocks: int
    ring_bytes: int
    conditioning_bytes: int
    reference_bytes: int
    name: str = "rings"


Demand = tuple[Network | Rings, ...]
"""All parts of a model for one shape of the stream; at most one `Rings`, and one network that works at each step."""
