"""What the causal transformer remembers: the keys and values of the conditioning and of the last blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avatar.attention import apply_rope
from avatar.float8 import FLOAT8, LARGEST


@dataclass
class Conditioning:
    """Keys and values of the conditioning tokens, one pair per layer, made once by `prefill` and shared by all steps.

    Of the C tokens the first n = rows * columns are the reference frame, which moves along with the stream; the others
    (packed motion) stay where they are.

    keys: [B, n, heads, dim] each, of the reference frame, not rotated; motion_keys: [B, C - n, heads, dim] each,
    rotated for good; values: [B, C, heads, dim] each; the latter two in the type of the caches they are for. rows,
    columns: the token grid of a latent frame. version: how many there were before it in this stream, so that a cache
    knows whose it holds.
    """

    keys: list[Tensor]
    motion_keys: list[Tensor]
    values: list[Tensor]
    rows: int
    columns: int
    version: int = 0

    @property
    def tokens(self) -> int:
        """C."""
        return self.values[0].shape[1]

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.columns


@dataclass
class KVCache:
    """The memory of one denoising step: [conditioning | ring of the last blocks] in one buffer per layer.

    Attention reads the buffers in place: softmax does not mind the order of keys, so a full ring needs no copy.

    keys, values: [B, C + ring, heads, dim] each, one pair per layer, keys rotated; conditioning_tokens: C;
    reference_position: the frame position the reference's keys are rotated for at present; version: that of the
    conditioning it holds. away: of layers whose rings live on the host, keys and values there (`avatar.offload`); in
    `keys` and `values` those layers are empty but for their turn.
    """

    keys: list[Tensor]
    values: list[Tensor]
    conditioning_tokens: int
    ring_tokens: int = 0
    reference_position: int | None = None
    version: int = 0
    away: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, conditioning: Conditioning, ring_frames: int, float8: bool = False, away: Collection[int] = ()
    ) -> KVCache:
        """A cache of zeros for that conditioning and a ring of `ring_frames` latent frames; then `condition()` it.

        float8: e4m3, half the bytes. Values then have their tokens side by side, which products of 8-bit matrices ask
        for, and there is room up to a multiple of 128 tokens.
        """
        ring = ring_frames * conditioning.tokens_per_frame
        sizes = [0 if layer in away else conditioning.tokens + ring for layer in range(len(conditioning.keys))]
        keys = [empty_keys(k, size, float8) for k, size in zip(conditioning.keys, sizes)]
        values = [empty_values(v, size, float8) for v, size in zip(conditioning.values, sizes)]
        return cls(keys, values, conditioning.tokens, ring)

    def condition(self, conditioning: Conditioning, table: Tensor, reference_position: int) -> None:
        """Overwrite the conditioning part, in place; the ring stays. table: as `turn_reference` takes it."""
        tokens = self.conditioning_tokens
        if conditioning.tokens != tokens:
            raise ValueError(f"cache made for {tokens} conditioning tokens, got {conditioning.tokens}")
        for layer in range(len(conditioning.keys)):
            if layer not in self.away:
                self.condition_layer(layer, conditioning, table)
        self.reference_position, self.version = reference_position, conditioning.version

    def condition_layer(self, layer: int, conditioning: Conditioning, table: Tensor) -> None:
        """Of one layer whose buffer is here."""
        tokens = self.conditioning_tokens
        self.turn_reference(layer, conditioning, table)
        store(conditioning.motion_keys[layer], self.keys[layer][:, conditioning.tokens_per_frame : tokens])
        store(conditioning.values[layer], self.values[layer][:, :tokens])

    def move_reference(self, conditioning: Conditioning, table: Tensor, position: int) -> None:
        """Rotate the reference frame's keys for another position, in place. table: as `turn_reference` takes it."""
        for layer in range(len(conditioning.keys)):
            if layer not in self.away:
                self.turn_reference(layer, conditioning, table)
        self.reference_position = position

    def turn_reference(self, layer: int, conditioning: Conditioning, table: Tensor) -> None:
        """Of one layer whose buffer is here. table: rotations [n, dim / 2, 2] of the reference's tokens."""
        store(apply_rope(conditioning.keys[layer], table), self.keys[layer][:, : conditioning.tokens_per_frame])

    def append(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write a block into the ring, in place, and give all keys and values it may look at.

        Args:
            k, v: [B, N, heads, dim], k rotated; the ring holds a whole number of blocks of N tokens.
            start: index of the block's first token since the stream began. The place depends on nothing else, so a
                block that is computed again takes its old place.
        Returns: views [B, C + written, heads, dim] of the buffers; written grows until the ring is full.
        """
        for block, slot in zip((k, v), self.slots(layer, start, k.shape[1])):
            store(block, slot)
        return self.window(layer, start, k.shape[1])

    def slots(self, layer: int, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Where a block of so many tokens is to be written: views [B, N, heads, dim] of keys and values."""
        place = start % self.ring_tokens
        if place + tokens > self.ring_tokens:
            raise ValueError(f"a block of {tokens} tokens at {start} does not fit a ring of {self.ring_tokens}")
        first = self.conditioning_tokens + place
        return self.keys[layer][:, first : first + tokens], self.values[layer][:, first : first + tokens]

    def window(self, layer: int, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """What that block may look at once it is written."""
        end = self.conditioning_tokens + min(start + tokens, self.ring_tokens)
        return self.keys[layer][:, :end], self.values[layer][:, :end]


@dataclass
class Turn:
    """A pass through the layers of a network, as far as its memory is concerned.

    layer: which it is about to enter; table: rotations [n, dim / 2, 2] of the reference for this pass, where layers of
    the cache are away; start, tokens: the block, as `KVCache.slots` takes it.
    """

    layer: int
    cache: KVCache
    conditioning: Conditioning
    table: Tensor | None
    start: int
    tokens: int


def empty_keys(like: Tensor, tokens: int, float8: bool) -> Tensor:
    """Zeros [B, tokens, heads, dim] for the keys of a layer whose conditioning is `like`."""
    batch, _, heads, dim = like.shape
    # A head's tokens lie together in memory: matrix products then read it without a copy, whatever the batch.
    if not float8:
        return like.new_zeros(batch, heads, tokens, dim).transpose(1, 2)
    return like.new_zeros(batch, heads, room(tokens), dim, dtype=FLOAT8)[:, :, :tokens].transpose(1, 2)


def empty_values(like: Tensor, tokens: int, float8: bool) -> Tensor:
    """The same for its values."""
    if not float8:
        return empty_keys(like, tokens, float8)
    batch, _, heads, dim = like.shape
    return like.new_zeros(batch, heads, dim, room(tokens), dtype=FLOAT8)[..., :tokens].permute(0, 3, 1, 2)


def room(tokens: int) -> int:
    """Tokens that a buffer of 8-bit numbers has room for."""
    return -(-tokens // 128) * 128


def store(x: Tensor, into: Tensor) -> None:
    """Copy x, in place; what is too large for e4m3 becomes its largest number."""
    into.copy_(x.clamp(-LARGEST, LARGEST) if into.dtype == FLOAT8 and x.dtype != FLOAT8 else x)


def stored(x: Tensor, float8: bool) -> Tensor:
    """A copy of x as a cache would hold it."""
    copy = torch.empty_like(x, dtype=FLOAT8 if float8 else x.dtype, memory_format=torch.contiguous_format)
    store(x, copy)
    return copy
