"""From noise to latents: noise levels, Euler steps, and the policies of a causal stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from avatar.cache import Conditioning, KVCache, Turn

TRAIN_TIMESTEPS = 1000
MAX_STEPS = 8

PREFILL_POSITION = 30
"""Frame position of the reference while the conditioning is prefilled, and until the stream comes near it."""


def sigmas(steps: int, shift: float = 3.0, merge_last_step: bool = False) -> Tensor:
    """Noise levels of Live Avatar: float32 [steps + 1], falling from 1 to 0.

    The shift g(s) = shift * s / (1 + (shift - 1) * s) acts twice at the low end, on the grid and on the end of
    the grid, as in the reference; so the last of four steps runs at 0.009 and moves the latents by under 1 %.
    merge_last_step: go from the step before it straight to 0, which saves a forward pass and a ring.
    Raises: ValueError: steps is not 1..8, or there is no step to merge with.
    Source: diffusers, FlowMatchEulerDiscreteScheduler(shift=3).set_timesteps(steps).
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps: {steps}; must be 1 to {MAX_STEPS}")
    if merge_last_step and steps < 2:
        raise ValueError("merge_last_step: a single step has none before it to merge with; set steps to 2 or more")
    lowest = float(np.float32(_shifted(np.float32(1 / TRAIN_TIMESTEPS), shift)))
    levels = _shifted(np.linspace(1.0, lowest, steps), shift)
    if merge_last_step:
        levels = levels[:-1]
    return torch.from_numpy(np.append(levels, 0.0).astype(np.float32))


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """Evenly spaced levels, shifted once: float32 [steps + 1], from 1 to 0.

    Raises: ValueError: steps is not 1..8.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps: {steps}; must be 1 to {MAX_STEPS}")
    return torch.from_numpy(_shifted(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32))


def _shifted(levels: Any, shift: float) -> Any:
    return shift * levels / (1 + (shift - 1) * levels)


def timesteps(levels: Tensor) -> Tensor:
    """What the network is told of each level but the last: float32 [steps], 1000 * sigma."""
    return levels[:-1] * TRAIN_TIMESTEPS


def euler_step(x: Tensor, velocity: Tensor, dt: Tensor) -> Tensor:
    """x + dt * velocity in the type of x; dt: one number, float32, below zero.

    bfloat16 latents see dt, the product and the sum rounded, as in the reference; float32 latents see no rounding.
    """
    return x + velocity.to(x.dtype) * dt.to(x.dtype)


@dataclass(frozen=True)
class ReferenceDistance:
    """How many latent frames ahead of the block the reference frame is placed: an integer from low to high.

    Fixed where the two are equal, otherwise drawn anew for every forward pass, as the reference implementation does
    (4 to 30). The draws come from the session's generator, so one seed gives one video.
    """

    low: int = 4
    high: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= PREFILL_POSITION:
            raise ValueError(f"reference distance {self.low}..{self.high}: must lie within 0..{PREFILL_POSITION}")

    @classmethod
    def fixed(cls, distance: int) -> ReferenceDistance:
        return cls(distance, distance)

    def draw(self, generator: torch.Generator) -> int:
        """Advances `generator` (a CPU generator) by one draw, unless the distance is fixed."""
        if self.low == self.high:
            return self.low
        return int(torch.randint(self.low, self.high + 1, (), generator=generator))

    def positions(self, f0: int, steps: int, generator: torch.Generator) -> list[int]:
        """The reference's frame position for each step of the block that begins at latent frame f0."""
        return [reference_position(f0, self.draw(generator)) for _ in range(steps)]


def reference_position(f0: int, distance: int) -> int:
    """Where the reference frame is seen: it waits at 30 until the block at f0 is `distance` away, then goes along."""
    return PREFILL_POSITION + max(0, f0 - (PREFILL_POSITION - distance))


class Reanchor(StrEnum):
    """What the conditioning becomes after the first clip (four blocks)."""

    NONE = "none"
    REFERENCE = "reference"
    """The first generated latent frame takes the picture's place."""
    REFERENCE_MOTION = "reference+motion"
    """And the generated frames, encoded again, take the motion frames' place."""


Pass = Generator[Turn, None, Tensor]
"""One pass through a network's layers: tells where it is just before it enters each, and gives its result."""

Enter = Callable[[Sequence[Turn], int], None]
"""Told before pass n of these enters the layer that it stands before; and at the end, with n = how many there are."""


class Denoiser(Protocol):
    """What sampling needs of a network; see `CausalDiT`."""

    enter: Enter | None

    def modulation(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def condition(self, cache: KVCache, conditioning: Conditioning) -> None: ...

    def step_by_layer(
        self,
        x: Tensor,
        time: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        text: Any,
        audio: Any,
        cache: KVCache,
        f0: int,
        reference_position: int,
        pose: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Pass: ...


def step_modulations(dit: Denoiser, levels: Tensor, device: torch.device | None = None) -> list[tuple[Tensor, Tensor]]:
    """The time modulation of each step, for all blocks of all sessions with these noise levels."""
    return [dit.modulation(t[None].to(device)) for t in timesteps(levels)]


def denoise_block(
    dit: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    caches: Sequence[KVCache],
    levels: Tensor,
    times: Sequence[tuple[Tensor, Tensor]],
    text: Any,
    audio: Any,
    f0: int,
    reference_positions: Sequence[int],
    pose: Tensor | None = None,
    mask: Tensor | None = None,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """Turn noise into one block of clean latents, one Euler step for each noise level but the last.

    Step s attends to what step s remembers of the blocks before: to the past at its own noise level.

    Args:
        noise: [B, c, F, h, w], unit variance; its type is the type of the latents between the steps.
        conditioning: from `prefill`, loaded into all caches.
        caches: one for each step; each takes up the block's keys and values, in place.
        levels: [steps + 1], falling from 1 to 0; times: their modulations, from `step_modulations`.
        text, audio: the prompt's and the block's audio's keys and values, as the network makes them.
        f0: index of the block's first latent frame since the stream began.
        reference_positions: one for each step, from `ReferenceDistance.positions`.
        pose, mask: as `CausalDiT.step` takes them.
        trace: gets the latents after each step, the clean ones last.
    Returns: latents, shaped and typed like `noise`.
    Source: Live Avatar (arXiv 2512.04677).
    """
    flight = Flight(noise, conditioning, audio, f0, reference_positions, pose, [] if trace is None else trace)
    while not advance(dit, [flight], caches, levels, times, text, mask):
        pass
    return flight.x


@dataclass
class Flight:
    """A block on its way from noise to clean latents.

    x: latents [B, c, F, h, w] as they are now; conditioning, audio, f0, reference_positions, pose: as `denoise_block`
    takes them; trace: the latents after each step that was made.
    """

    x: Tensor
    conditioning: Conditioning
    audio: Any
    f0: int
    reference_positions: Sequence[int]
    pose: Tensor | None = None
    trace: list[Tensor] = field(default_factory=list)


def advance(
    dit: Denoiser,
    flights: Sequence[Flight],
    caches: Sequence[KVCache],
    levels: Tensor,
    times: Sequence[tuple[Tensor, Tensor]],
    text: Any,
    mask: Tensor | None = None,
) -> bool:
    """One step of each of these blocks, in place; layer by layer together.

    Step s of a block needs step s - 1 of it, and what step s remembers of the block before: so blocks that follow each
    other may be in flight at once, each a step behind the one before.

    Args:
        flights: the oldest first, no two at the same step; the rest as `denoise_block` takes it.
    Returns: whether the oldest is clean now.
    """
    passes = []
    for flight in flights:
        s = len(flight.trace)
        if caches[s].version != flight.conditioning.version:
            # The block before was the last to be made on the old conditioning at this step.
            dit.condition(caches[s], flight.conditioning)
        passes.append(
            dit.step_by_layer(
                flight.x,
                times[s],
                flight.conditioning,
                text,
                flight.audio,
                caches[s],
                flight.f0,
                flight.reference_positions[s],
                pose=flight.pose,
                mask=mask,
            )
        )
    falls = levels.diff()
    for flight, velocity in zip(flights, in_lockstep(passes, dit.enter), strict=True):
        flight.x = euler_step(flight.x, velocity, falls[len(flight.trace)])
        flight.trace.append(flight.x)
    return len(flights[0].trace) == len(falls)


def in_lockstep(passes: Sequence[Pass], enter: Enter | None = None) -> list[Tensor]:
    """The results of passes over the same layers: all are through a layer before any enters the next.

    One that takes all its layers at once is through before the others.
    """
    results: dict[int, Tensor] = {}
    turns = [next(running) for running in passes]
    while len(results) < len(passes):
        for number, running in enumerate(passes):
            if number in results:
                continue
            if enter is not None:
                enter(turns, number)
            try:
                turns[number] = next(running)
            except StopIteration as end:
                results[number] = end.value
    if enter is not None:
        enter(turns, len(passes))
    return [results[number] for number in range(len(passes))]
