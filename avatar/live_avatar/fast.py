"""What makes the full-size networks fast, applied from outside to networks that stay as they are written.

Each function changes a network in place, keeps its calls and its numbers up to rounding, and may be left out. Figures
are in docs/performance.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from avatar.compile import compile_methods, replay, uncompiled
from avatar.live_avatar.dit import Block, CausalDiT
from avatar.live_avatar.generator import LATENTS_PER_BLOCK, LiveAvatar
from avatar.live_avatar.vae import WanVae, decode_onward
from avatar.quantize import join, quantize_linears

if TYPE_CHECKING:  # it takes Triton, which is where there is a GPU
    from avatar.live_avatar.replayed import ReplayedStep

log = logging.getLogger(__name__)

Made = TypeVar("Made")


def use_float8(dit: CausalDiT) -> int:
    """8-bit weights and products in all blocks and injectors: 15.9 of the 16.3 G weights at full size.

    Embeddings, audio encoder and head keep their type; they are small, and computed in float32.
    Returns: the number of layers.
    """
    return quantize_linears(dit.blocks) + quantize_linears(dit.audio_injector)


def use_float8_attention(dit: CausalDiT) -> None:
    """8-bit rings, and attention over them in 8 bits: half the memory of a session, and two thirds of the time."""
    dit.float8_cache = True


def joined(block: Block) -> nn.Module:
    """A layer that gives queries, keys and values at once; the separate ones become views of it."""
    return join([block.self_attn.q, block.self_attn.k, block.self_attn.v])


def fuse(dit: CausalDiT) -> None:
    """Few kernels instead of many: `avatar.live_avatar.fused`. After `use_float8`, if that is wanted.

    Joins the weights of queries, keys and values of each block, unless that was done (`dit.joined`).
    """
    from avatar.live_avatar.fused import FusedStep

    dit.joined = dit.joined or [joined(block) for block in dit.blocks]
    dit.step_by_layer = FusedStep(dit)  # type: ignore[method-assign]


def replay_steps(dit: CausalDiT) -> ReplayedStep:
    """The kernels of a step as CUDA graphs: `avatar.live_avatar.replayed`. After `fuse`, where all of it stays on the
    device; when something is about to leave, put the `step` of what this gives back in its place."""
    from avatar.live_avatar.replayed import ReplayedStep

    replayed = ReplayedStep(dit.step_by_layer)  # type: ignore[arg-type]
    dit.step_by_layer = replayed  # type: ignore[method-assign]
    return replayed


def compile_transformer(dit: CausalDiT) -> None:
    """One graph for what a block does before its attention, one for what it does after, one for an injector, one head.

    Norms, modulation, rotation, gates and rounding to 8 bits then need a pass over memory together, not one each.
    """
    compile_methods(dit.blocks, "before_attention", "after_attention")
    compile_methods([dit.audio_injector], "listen")
    compile_methods([dit.head], "forward")
    dit.prefill = uncompiled(dit.prefill)  # type: ignore[method-assign]


def compile_vae(
    vae: WanVae, latents_per_call: int = LATENTS_PER_BLOCK, room: Callable[[int], int] | None = None
) -> None:
    """Channels last, norms and activations fused; a block's latents through the decoder at once, or one of them.

    room: bytes for so many latents at once; without it cuDNN takes whatever makes it a little faster.
    """
    tried: set[tuple[int, ...]] = set()
    channels_last(vae.model)
    vae.latents_per_call = latents_per_call
    compiled = torch.compile(decode_onward, fullgraph=True, dynamic=False)

    def onward(decoder: nn.Module, latents: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if latents.shape[2] not in (1, LATENTS_PER_BLOCK):
            return decode_onward(decoder, latents, memory)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
            # One layout from the first call on, or there would be a second graph.
            inputs = _channels_last_view(latents), [_channels_last_view(x) for x in memory]
            if room is None or latents.shape in tried:
                return compiled(decoder, *inputs)
            made = _in_little_room(partial(compiled, decoder, *inputs), room(latents.shape[2]), latents.device)
            tried.add(tuple(latents.shape))
            return made

    vae.onward, vae.layout = onward, _channels_last_view


def _in_little_room(call: Callable[[], Made], bytes_: int, device: torch.device) -> Made:
    """Do it with no more than that beside what is in use; a quarter more each time that this is too little.

    cuDNN tries its kernels at their first call, with all it can get: one that wants 10 GiB is a few per cent faster
    than one that wants two.
    Raises: torch.OutOfMemoryError: all that the process may have is too little.
    """
    before = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    while True:
        torch.cuda.empty_cache()
        limit = (torch.cuda.memory_reserved(device) + bytes_) / total
        torch.cuda.set_per_process_memory_fraction(min(before, limit), device)
        try:
            return call()
        except torch.OutOfMemoryError:
            if limit >= before:
                raise
            log.info("decoding: %.1f GiB are too little to work in; tries with more", bytes_ / 2**30)
            bytes_ = bytes_ * 5 // 4
        finally:
            torch.cuda.set_per_process_memory_fraction(before, device)


def _channels_last_view(x: Tensor) -> Tensor:
    """x [B, C, T, H, W] in memory as [B, T, H, W, C]; strides as they should be also where a side is 1 long."""
    _, channels, frames, height, width = x.shape
    strides = (frames * height * width * channels, 1, height * width * channels, width * channels, channels)
    return x.contiguous(memory_format=torch.channels_last_3d).as_strided(x.shape, strides)


class GroupedProduct(nn.Module):
    """A Conv1d with few wide groups as one matrix product for each: cuDNN runs such groups one after the other."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.groups, (self.kernel,), (self.padding,) = conv.groups, conv.kernel_size, conv.padding
        self.weight = nn.Parameter(conv.weight.detach().view(conv.groups, -1, conv.weight[0].numel()), False)
        self.bias = nn.Parameter(conv.bias.detach().view(conv.groups, 1, -1), False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        windows = F.pad(x, (self.padding, self.padding)).unflatten(1, (self.groups, -1)).unfold(3, self.kernel, 1)
        rows = rearrange(windows, "b g c t k -> g (b t) (c k)")
        return rearrange(torch.baddbmm(self.bias, rows, self.weight.mT), "g (b t) c -> b (g c) t", b=len(x))


def regroup(speech: nn.Module) -> None:
    """The position convolution of a transformers Wav2Vec2Model, which has 16 groups, as products."""
    position: Any = speech.get_submodule("encoder.pos_conv_embed")
    position.conv = GroupedProduct(position.conv)


def replay_audio(model: LiveAvatar) -> None:
    """The hundreds of small kernels of speech and audio encoder as two graphs, the first once its window is full."""
    regroup(model.speech.model)
    replay(model.speech.model, "forward")
    replay(model.dit, "hear")


def channels_last(module: nn.Module) -> None:
    """Store the weights of convolutions with channels last, in place; what they compute then comes in this layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
