"""A fused step as CUDA graphs: one start in place of 750, and to the bit what the step gives without.

A graph reads and writes where its recording did. So there is one for each place in the ring, of each denoising step of
each stream, and it is used while all that the step looks at lies where it lay: rings, conditioning, prompt. What
differs from block to block (latents, pose, sound, rotations) is copied to a fixed place first. It is put around the
fused step by `avatar.live_avatar.fast.replay_steps`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avatar.cache import Conditioning, KVCache, Turn
from avatar.live_avatar.audio_encoder import AudioTokens
from avatar.live_avatar.dit import Injection, TextKV
from avatar.live_avatar.fused import FusedStep
from avatar.sampling import Pass, in_lockstep

log = logging.getLogger(__name__)

KEPT = 32
"""Steps of streams whose graphs are kept; a stream has one to eight."""


@dataclass
class _Inputs:
    """Where graphs find what differs from block to block."""

    x: Tensor
    rope: Tensor
    reference: Tensor
    audio: list[Injection]
    pose: Tensor

    @classmethod
    def like(cls, x: Tensor, rope: Tensor, reference: Tensor, audio: Sequence[Injection]) -> _Inputs:
        # Not as tensors of inference mode: those could not be written outside of it.
        with torch.inference_mode(False):
            places = [Injection(*map(torch.empty_like, injection)) for injection in audio]
            there, turned, moved, pose = map(torch.empty_like, (x, rope, reference, x))
            return cls(there, turned, moved, places, pose)

    def take(self, x: Tensor, rope: Tensor, reference: Tensor, audio: Sequence[Injection], pose: Tensor | None) -> None:
        self.x.copy_(x)
        self.rope.copy_(rope)
        self.reference.copy_(reference)
        torch._foreach_copy_(list(chain.from_iterable(self.audio)), list(chain.from_iterable(audio)))
        if pose is not None:
            self.pose.copy_(pose)


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    velocity: Tensor


class ReplayedStep:
    """`CausalDiT.step_by_layer` of a network whose weights and rings are all on the device and stay where they are.

    A step is recorded when the one before it found everything in the same place, ring full; until then, and where
    sound is masked or not prepared, it is the fused step.
    """

    def __init__(self, step: FusedStep) -> None:
        self.step = step
        self._inputs: _Inputs | None = None
        self._kept: OrderedDict[tuple[int, ...], dict[tuple[int, bool], _Graph]] = OrderedDict()
        """Graphs by what they look at, and by place in the ring and whether there is a pose."""
        self._pool: Any = None

    def __call__(
        self,
        x: Tensor,
        time: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        text: TextKV,
        audio: list[Injection | AudioTokens],
        cache: KVCache,
        f0: int,
        reference_position: int,
        pose: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Pass:
        """See `CausalDiT.step_by_layer`."""
        dit, written = self.step.dit, self.step
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        start, tokens = f0 * rows * columns, frames * rows * columns
        heard = [injection for injection in audio if isinstance(injection, Injection)]
        graphs = None
        if mask is None and len(heard) == len(audio) and start + tokens >= cache.ring_tokens:
            graphs = self._graphs(cache, conditioning, text, time)
        if graphs is None:
            return written(x, time, conditioning, text, audio, cache, f0, reference_position, pose, mask)
        rope = dit.block_rope(f0, frames, rows, columns, x.device)
        reference = dit.reference_rope(conditioning, reference_position)
        self._inputs = self._inputs or _Inputs.like(x, rope, reference, heard)
        if self._inputs.x.shape != x.shape:
            return written(x, time, conditioning, text, audio, cache, f0, reference_position, pose, mask)

        def replay(inputs: _Inputs) -> Pass:
            yield Turn(0, cache, conditioning, None, start, tokens)
            inputs.take(x, rope, reference, heard, pose)
            place = start % cache.ring_tokens, pose is not None
            if place not in graphs:
                graphs[place] = self._record(time, conditioning, text, cache, start, inputs, pose is not None)
            graph = graphs[place]
            graph.graph.replay()
            cache.reference_position = reference_position
            # The next graph works in the same memory.
            return graph.velocity.clone()

        return replay(self._inputs)

    def forget(self) -> None:
        """Let go of all graphs and of the memory that they work in."""
        self._kept.clear()
        self._inputs = self._pool = None

    def _graphs(
        self, cache: KVCache, conditioning: Conditioning, text: TextKV, time: tuple[Tensor, Tensor]
    ) -> dict[tuple[int, bool], _Graph] | None:
        """Those for a step that looks at these; None where none has looked at them before."""
        prompt = ((part.k, part.v) for part in text)
        seen = chain(cache.keys, cache.values, conditioning.keys, time, chain.from_iterable(prompt))
        key = (text[0].k.shape[1] if text else 0, *(tensor.data_ptr() for tensor in seen))
        graphs = self._kept.get(key)
        if graphs is None:
            self._kept[key] = {}
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return graphs

    def _record(
        self,
        time: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        text: TextKV,
        cache: KVCache,
        start: int,
        inputs: _Inputs,
        posed: bool,
    ) -> _Graph:
        step, graph = self.step, torch.cuda.CUDAGraph()
        # Of the host's threads only this one records: others may be at work on the device.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step.move_reference(cache, conditioning, inputs.reference)
            pose = inputs.pose if posed else None
            audio: list[Injection | AudioTokens] = list(inputs.audio)
            layers = step.layers(inputs.x, time, conditioning, text, audio, cache, inputs.rope, start, pose, mask=None)
            (velocity,) = in_lockstep([layers])
        self._pool = graph.pool()
        return _Graph(graph, velocity)
