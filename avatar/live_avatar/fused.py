"""A denoising step in few kernels: the same numbers as `CausalDiT.step` up to rounding, in the same order.

What the plain step does in a pass over memory for each operation, it does in one for each stretch between two matrix
products (`avatar.kernels`). Queries, keys and values come from one product, and keys and values go straight into the
ring. It is put in the plain step's place by `avatar.live_avatar.fast.fuse`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar.attention import attention
from avatar.cache import Conditioning, KVCache
from avatar.kernels import Norm, Rounded, gelu, residual_norm, rotate, store_values
from avatar.live_avatar.dit import Attention, Block, CausalDiT, Injection, TextKV
from avatar.quantize import Float8Linear


class FusedStep:
    """`CausalDiT.step` of that network, whose weights may be 8-bit or not; batch 1.

    Joins the weights of queries, keys and values of each block; the separate ones become views of the joined, so both
    can be used and nothing is held twice.
    """

    def __init__(self, dit: CausalDiT) -> None:
        self.dit = dit
        self.float8 = isinstance(dit.blocks[0].ffn[0], Float8Linear)
        self.qkv = [join([block.self_attn.q, block.self_attn.k, block.self_attn.v]) for block in dit.blocks]
        self.modulations = torch.cat([block.modulation.data for block in dit.blocks]).float()

    def __call__(
        self,
        x: Tensor,
        time: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        text: TextKV,
        audio: list[Injection],
        cache: KVCache,
        f0: int,
        reference_position: int,
        pose: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `CausalDiT.step`."""
        dit = self.dit
        if len(x) != 1:
            raise ValueError(f"a batch of {len(x)}: the fused step takes one session")
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        e, e0 = time
        rope = dit.block_rope(f0, frames, rows, columns, x.device)
        if cache.reference_position != reference_position:
            self.move_reference(cache, conditioning, reference_position)
        modulations = (self.modulations + e0)[:, :, None]
        stream = dit.embed(x, pose)[0]
        start = f0 * rows * columns
        for i, block in enumerate(dit.blocks):
            stream = self.block(i, block, stream, modulations[i], rope, cache, start, text[i] if text else None)
            if i in dit.injector_of_block:
                j = dit.injector_of_block[i]
                if mask is None:
                    stream = self.inject(dit.audio_injector.injector[j], stream, audio[j])
                else:
                    stream = dit.add_audio(j, stream[None], audio[j], mask)[0]
        return dit.head(stream[None], e, rows, columns)

    def block(
        self,
        i: int,
        block: Block,
        x: Tensor,
        modulation: Tensor,
        rope: Tensor,
        cache: KVCache,
        start: int,
        text: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """x: [N, D] -> [N, D]; modulation: [6, 1, D]."""
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation
        own, eps = block.self_attn, block.eps
        tokens, dim = x.shape

        _, h = residual_norm(x, norm=Norm(scale_sa, shift_sa, eps, unit=True), float8=self.float8)
        q, k, v = product(self.qkv[i], h).split(dim, dim=1)
        key_slot, value_slot = cache.slots(i, start, tokens)
        q = rotate(
            q, rope, own.norm_q.weight, eps, torch.empty_like(key_slot[0], memory_format=torch.contiguous_format)
        )
        rotate(k, rope, own.norm_k.weight, eps, key_slot[0])
        lay(v, value_slot[0])
        attended = attention(q[None], *cache.window(i, start, tokens))
        y = product(own.o, self.rounded(attended))

        if text is None:
            norm = Norm(scale_ffn, shift_ffn, eps, unit=True)
            r, h = residual_norm(x, y, gate_sa, torch.float32, norm, self.float8)
        else:
            norm = Norm(block.norm3.weight[None], block.norm3.bias[None], eps, unit=False)
            r, c = residual_norm(x, y, gate_sa, torch.float32, norm, self.float8)
            y = self.cross(block.cross_attn, c, *text)
            r, h = residual_norm(r, y, None, torch.float32, Norm(scale_ffn, shift_ffn, eps, unit=True), self.float8)
        y = product(block.ffn[2], gelu(product(block.ffn[0], h), self.float8))
        return residual_norm(r, y, gate_ffn, x.dtype)[0]

    def cross(self, layer: Attention, h: Tensor | Rounded, k: Tensor, v: Tensor) -> Tensor:
        """h: the normed rows [batch * N, D]; k, v: [batch, M, heads, dim]."""
        q = rotate(product(layer.q, h), None, layer.norm_q.weight, layer.norm_q.eps)
        attended = attention(q.view(len(k), -1, *k.shape[2:]), k, v)
        return product(layer.o, self.rounded(attended))

    def inject(self, layer: Attention, x: Tensor, injection: Injection) -> Tensor:
        """x with one actor's audio. injection: of all frames."""
        norm = Norm(injection.scale[0, :, 0], injection.shift[0, :, 0], 1e-5, unit=False)
        _, h = residual_norm(x, norm=norm, float8=self.float8)
        return residual_norm(x, self.cross(layer, h, injection.k, injection.v), None, x.dtype)[0]

    def rounded(self, attended: Tensor) -> Tensor | Rounded:
        """attended: [batch, N, heads, dim] -> rows, ready for a product."""
        rows = attended.flatten(2).flatten(0, 1)
        return residual_norm(rows, float8=True)[1] if self.float8 else rows

    def move_reference(self, cache: KVCache, conditioning: Conditioning, position: int) -> None:
        """As `KVCache.move_reference`."""
        tokens = conditioning.tokens_per_frame
        keys = conditioning.keys
        table = self.dit.block_rope(position, 1, conditioning.rows, conditioning.columns, keys[0].device)
        for layer, k in enumerate(keys):
            rotate(k[0, :tokens].flatten(1), table, out=cache.keys[layer][0, :tokens])
        cache.reference_position = position


def product(layer: nn.Module, x: Tensor | Rounded) -> Tensor:
    """A linear layer of rows, 8-bit or not."""
    return layer.product(*x) if isinstance(x, Rounded) else F.linear(x, layer.weight, layer.bias)


def lay(v: Tensor, slot: Tensor) -> None:
    """Values [N, D] into their place in a ring, [N, heads, dim] with channels or with tokens side by side."""
    if slot.stride(2) == 1:
        rotate(v, None, out=slot)
    else:
        store_values(v, slot)


def join(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer whose outputs are those of all these, side by side. Their weights become views of its own."""
    names = [name for name in ("weight", "bias", "scale") if getattr(layers[0], name, None) is not None]
    whole = {name: torch.cat([getattr(layer, name).data for layer in layers]) for name in names}
    for name, tensor in whole.items():
        sizes = [len(getattr(layer, name)) for layer in layers]
        for layer, part in zip(layers, tensor.split(sizes)):
            getattr(layer, name).data = part
    if "scale" in whole:
        return Float8Linear(whole["weight"], whole["scale"], whole.get("bias"))
    with torch.device("meta"):
        joined = nn.Linear(*reversed(whole["weight"].shape))
    joined.weight = nn.Parameter(whole["weight"], requires_grad=False)
    joined.bias = nn.Parameter(whole["bias"], requires_grad=False)
    return joined
