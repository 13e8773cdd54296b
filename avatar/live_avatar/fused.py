"""A denoising step in few kernels: the numbers of `CausalDiT.step_by_layer` up to rounding, in the same order.

What the plain step does in a pass over memory for each operation, it does in one for each stretch between two matrix
products (`avatar.kernels`). Queries, keys and values come from one product, and keys and values go straight into the
ring. It is put in the plain step's place by `avatar.live_avatar.fast.fuse`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar.attention import attention
from avatar.cache import Conditioning, KVCache
from avatar.kernels import Norm, Rounded, attend_few, gelu, residual_norm, rotate, split_heads
from avatar.live_avatar.audio_encoder import AudioTokens
from avatar.live_avatar.dit import Attention, Block, CausalDiT, Injection, Text, TextKV
from avatar.quantize import Float8Linear
from avatar.sampling import Pass


class FusedStep:
    """`CausalDiT.step_by_layer` of that network, joined (`dit.joined`), whose weights may be 8-bit or not; batch 1."""

    def __init__(self, dit: CausalDiT) -> None:
        self.dit = dit
        self.float8 = isinstance(dit.blocks[0].ffn[0], Float8Linear)
        self.qkv = dit.joined
        # A layer that is brought in is gone again when the next but one is there: hence the copies.
        self.modulations = torch.cat([block.modulation.data.float().clone() for block in dit.blocks])

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
        dit = self.dit
        if len(x) != 1:
            raise ValueError(f"a batch of {len(x)}: the fused step takes one session")
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        rope = dit.block_rope(f0, frames, rows, columns, x.device)
        if cache.reference_position != reference_position:
            self.move_reference(cache, conditioning, dit.reference_rope(conditioning, reference_position))
            cache.reference_position = reference_position
        start = f0 * rows * columns
        return self.layers(x, time, conditioning, text, audio, cache, rope, start, pose, mask)

    def layers(
        self,
        x: Tensor,
        time: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        text: TextKV,
        audio: list[Injection | AudioTokens],
        cache: KVCache,
        rope: Tensor,
        start: int,
        pose: Tensor | None,
        mask: Tensor | None,
    ) -> Pass:
        """The step itself: what it does on the host depends on where the block lies in the ring, and nothing else.

        rope: the rotations of the block's tokens; start: index of its first token. The reference is where it should be.
        """
        dit, (e, e0) = self.dit, time
        rows, columns = x.shape[3] // 2, x.shape[4] // 2
        modulations = (self.modulations + e0)[:, :, None]
        x = dit.embed(x, pose)[0]
        _, h = residual_norm(x, norm=self.first_norm(0, modulations), float8=self.float8)
        turn = dit.turn(cache, conditioning, start, len(x))
        for i in range(len(dit.blocks)):
            turn.layer = i
            yield turn
            block = dit.blocks[i]
            following = self.first_norm(i + 1, modulations)
            rounds = self.float8 and following is not None
            r, y, gate = self.block(i, block, x, h, modulations[i], rope, cache, start, text[i] if text else None)
            if i not in dit.injector_of_block:
                x, h = residual_norm(r, y, gate, x.dtype, following, rounds)
                continue
            j = dit.injector_of_block[i]
            heard = dit.injection(audio, j)
            if mask is None:
                norm = Norm(heard.scale[0, :, 0], heard.shift[0, :, 0], 1e-5, unit=False)
                x, h = residual_norm(r, y, gate, x.dtype, norm, self.float8)
                y = self.cross(dit.audio_injector.injector[j], h, heard.k, heard.v)
                x, h = residual_norm(x, y, None, x.dtype, following, rounds)
            else:
                x, _ = residual_norm(r, y, gate, x.dtype)
                x = dit.add_audio(j, x[None], heard, mask)[0]
                _, h = residual_norm(x, norm=following, float8=rounds)
        return dit.head(x[None], e, rows, columns)

    def first_norm(self, i: int, modulations: Tensor) -> Norm | None:
        """What block i begins with; None: there is no such block."""
        if i == len(self.dit.blocks):
            return None
        return Norm(modulations[i, 1], modulations[i, 0], self.dit.config.eps, unit=True)

    def block(
        self,
        i: int,
        block: Block,
        x: Tensor,
        h: Tensor | Rounded,
        modulation: Tensor,
        rope: Tensor,
        cache: KVCache,
        start: int,
        text: Text | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [N, D] as it came in; h: x normed; modulation: [6, 1, D].

        Returns: r, y, gate: the block's result is r + gate * y; the sum is made together with the norm that follows.
        """
        _, _, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation
        own, eps, tokens = block.self_attn, block.eps, len(x)
        k, v = cache.slots(i, start, tokens)
        q = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        split_heads(
            product(self.qkv[i], h), rope, own.norm_q.weight, own.norm_k.weight, own.norm_q.eps, q[0], k[0], v[0]
        )
        y = product(own.o, self.rounded(attention(q, *cache.window(i, start, tokens))))

        norm = Norm(scale_ffn, shift_ffn, eps, unit=True)
        if text is None:
            r, h = residual_norm(x, y, gate_sa, torch.float32, norm, self.float8)
        else:
            text_norm = Norm(block.norm3.weight[None], block.norm3.bias[None], eps, unit=False)
            r, h = residual_norm(x, y, gate_sa, torch.float32, text_norm, self.float8)
            r, h = residual_norm(r, self.cross(block.cross_attn, h, *text), None, torch.float32, norm, self.float8)
        return r, product(block.ffn[2], product_gelu(block.ffn[0], h)), gate_ffn

    def cross(self, layer: Attention, h: Tensor | Rounded, k: Tensor, v: Tensor, repeats: int = 1) -> Tensor:
        """h: the normed rows [batch * N, D]; k, v: [batch, M, heads, dim]; repeats: how often the last of M counts."""
        q = rotate(product(layer.q, h), None, layer.norm_q.weight, layer.norm_q.eps)
        attended = attend_few(q.view(len(k), -1, *k.shape[2:]), k, v, repeats)
        return product(layer.o, self.rounded(attended))

    def rounded(self, attended: Tensor) -> Tensor | Rounded:
        """attended: [batch, N, heads, dim] -> rows, ready for a product."""
        rows = attended.flatten(2).flatten(0, 1)
        return residual_norm(rows, float8=True)[1] if self.float8 else rows

    def move_reference(self, cache: KVCache, conditioning: Conditioning, table: Tensor) -> None:
        """Rotate the reference frame's keys by that table, in place; as `KVCache.move_reference`."""
        for layer, k in enumerate(conditioning.keys):
            if layer in cache.away:
                continue
            # Rounded as rings are that come from the host: to the type of the stream first.
            rotate(k[0].flatten(1), table, out=cache.keys[layer][0, : k.shape[1]])


def product(layer: nn.Module, x: Tensor | Rounded) -> Tensor:
    """A linear layer of rows, 8-bit or not."""
    return layer.product(*x) if isinstance(x, Rounded) else F.linear(x, layer.weight, layer.bias)


def product_gelu(layer: nn.Module, x: Tensor | Rounded) -> Tensor | Rounded:
    """GELU (tanh approximation) of a linear layer of rows; rounded to 8 bits, if those are."""
    if isinstance(x, Rounded):
        return gelu(layer.product(*x))
    return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
