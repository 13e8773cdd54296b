"""The Wan 2.1 VAE: diffusers' AutoencoderKLWan, with its causal memory in the caller's hands.

Every 3x3x3 convolution looks two frames back. diffusers keeps those frames in the module and clears them with each
call; here they are an argument, so two streams can share one set of weights, and decoding in chunks gives what
decoding in one piece gives. One latent frame is 1 pixel frame at the start of a video and 4 afterwards.

diffusers' caches are private (`feat_cache`, `_cached_conv_counts`): the version is pinned to 0.42, and the tests
compare chunked with whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn

from avatar.stateful import state_bytes

LATENT_CHANNELS = 16
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4

# fmt: off
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclass
class VaeState:
    """What one direction of one stream remembers.

    cache: one slot for each causal convolution, the last frames it was given; None before the first frame, and the word
    "Rep" in an upsampler that has seen one frame only. started: whether the first frame has gone through.
    """

    cache: list[Any]
    started: bool = False

    @property
    def running(self) -> bool:
        """Whether every convolution of a decoder has a past, which it has from the third latent on."""
        return self.started and not any(isinstance(slot, str) for slot in self.cache)


class WanVae(nn.Module):
    """Pixels to latents and back, whole or as a stream.

    Args:
        model: an AutoencoderKLWan; its weights' dtype is the dtype of the convolutions and of the stored caches.
        bf16_constants: round latent mean and 1/std to bfloat16 as Live Avatar does, for parity of a bf16 run.

    `latents_per_call` says how many latent frames of a running stream go through the decoder at once. One keeps the
    activations small and is bit-equal to decoding whole; three fill a large GPU better.
    """

    latent_mean: Tensor
    latent_inverse_std: Tensor
    onward: Callable[..., tuple[Tensor, list[Tensor]]]
    layout: Callable[[Tensor], Tensor]
    """Of the memory, as `onward` wants it."""

    def __init__(self, model: AutoencoderKLWan, *, bf16_constants: bool = False) -> None:
        super().__init__()
        self.model = model
        self.latents_per_call = 1
        self.onward, self.layout = decode_onward, lambda frames: frames
        mean, std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
        inverse = 1 / std
        if bf16_constants:
            mean, inverse = mean.bfloat16(), 1 / std.bfloat16()
        self.register_buffer("latent_mean", mean.view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("latent_inverse_std", inverse.view(1, -1, 1, 1, 1), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.quant_conv.weight.dtype

    def init_encoder(self) -> VaeState:
        return VaeState([None] * self.model._cached_conv_counts["encoder"])

    def init_decoder(self) -> VaeState:
        return VaeState([None] * self.model._cached_conv_counts["decoder"])

    def encode(self, video: Tensor, state: VaeState | None = None) -> Tensor:
        """Normalised posterior means; no sampling.

        Args:
            video: [B, 3, T, H, W] in [-1, 1]; T = 1 + 4k at the start of a video, 4k afterwards.
            state: advanced in place; without one the video is whole.
        Returns: float32 [B, 16, T', H/8, W/8], T' = 1 + k at the start, k afterwards.
        Raises: ValueError: T is none of those numbers. (The reference drops such frames without a word.)
        """
        state = self.init_encoder() if state is None else state
        frames = video.shape[2]
        first = 0 if state.started else 1
        if frames < 1 or (frames - first) % TEMPORAL_FACTOR:
            raise ValueError(f"{frames} frames to encode: want {'4k' if state.started else '1 + 4k'} of them")
        video = video.to(self.dtype)
        starts = ([0] if first else []) + list(range(first, frames, TEMPORAL_FACTOR))
        parts = []
        for start, end in zip(starts, [*starts[1:], frames], strict=True):
            parts.append(self.model.encoder(video[:, :, start:end], feat_cache=state.cache, feat_idx=[0]))
            self._settle(state)
        mu = self.model.quant_conv(torch.cat(parts, 2)).chunk(2, 1)[0]
        return ((mu - self.latent_mean) * self.latent_inverse_std).float()

    def decode(self, latents: Tensor, state: VaeState | None = None) -> Tensor:
        """Pixels of some latent frames.

        Args:
            latents: normalised, [B, 16, T, h, w], T >= 1.
            state: advanced in place; without one the video is whole.
        Returns: float32 [B, 3, F, 8h, 8w] clamped to [-1, 1]; F = 4T - 3 at the start of a video, 4T afterwards.
        """
        return self.decode_unclamped(latents, state).clamp_(-1, 1)

    def decode_unclamped(self, latents: Tensor, state: VaeState | None = None) -> Tensor:
        """`decode` before the clamp; float32."""
        state = self.init_decoder() if state is None else state
        raw = (latents / self.latent_inverse_std + self.latent_mean).to(self.dtype)
        raw = self.model.post_quant_conv(raw)
        parts = []
        while raw.shape[2]:
            if state.running:
                some, raw = raw[:, :, : self.latents_per_call], raw[:, :, self.latents_per_call :]
                memory = [slot for slot in state.cache if slot is not None]
                part, state.cache[: len(memory)] = self.onward(self.model.decoder, some, memory)
            else:
                one, raw = raw[:, :, :1], raw[:, :, 1:]
                part = self.model.decoder(one, feat_cache=state.cache, feat_idx=[0], first_chunk=not state.started)
            parts.append(part)
            self._settle(state)
        return torch.cat(parts, 2).float()

    def _settle(self, state: VaeState) -> None:
        state.started = True
        # Under autocast the inputs of residual convolutions are float32, and the convolution rounds them anyway.
        for i, slot in enumerate(state.cache):
            if isinstance(slot, Tensor):
                state.cache[i] = self.layout(slot.to(self.dtype))


@torch.library.custom_op("avatard::last_frames", mutates_args=())
def last_frames(x: Tensor) -> Tensor:
    """A copy of the last two frames of x [B, C, T, H, W].

    A compiler that knew what it does would give a view of x, and x would live as long: at 704x384 the memory of a
    stream took 3.3 GiB in place of 1.2, and the decoder 3.8 to work in in place of 2.1.
    """
    return x[:, :, -2:].clone()


@last_frames.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x[:, :, -2:])


def decode_onward(decoder: nn.Module, latents: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The decoder in the middle of a stream, as a function of what it sees and remembers.

    Args:
        decoder: the `decoder` of an AutoencoderKLWan.
        latents: [B, 16, T, h, w], T >= 1.
        memory: the last two frames that each causal convolution was given, in the order of the calls.
    Returns: pixels [B, 3, 4 T, 8 h, 8 w], and the new memory.
    """
    past = iter(memory)
    kept: list[Tensor] = []

    def causal(conv: nn.Conv3d, x: Tensor) -> Tensor:
        x = torch.cat([next(past), x], dim=2)
        kept.append(last_frames(x))
        _, height, width = conv.kernel_size
        return F.conv3d(x, conv.weight, conv.bias, padding=(0, height // 2, width // 2))

    def residual(block: Any, x: Tensor) -> Tensor:
        h = causal(block.conv1, block.nonlinearity(block.norm1(x)))
        h = causal(block.conv2, block.nonlinearity(block.norm2(h)))
        return h + block.conv_shortcut(x)

    def upsample(layer: Any, x: Tensor) -> Tensor:
        if layer.mode == "upsample3d":
            x = rearrange(causal(layer.time_conv, x), "b (two c) t h w -> b c (t two) h w", two=2)
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = layer.resample[1](F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))

    x = residual(decoder.mid_block.resnets[0], causal(decoder.conv_in, latents))
    x = residual(decoder.mid_block.resnets[1], decoder.mid_block.attentions[0](x))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = residual(layer, x)
        for layer in block.upsamplers or ():
            x = upsample(layer, x)
    return causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x))), kept


def prime(vae: WanVae, latents: Tensor) -> VaeState:
    """A decoder that has seen these latents [B, 16, T, h, w], so that each later one is 4 pixel frames."""
    state = vae.init_decoder()
    for frame in latents.split(1, dim=2):
        vae.decode(frame, state)
    return state


def to_uint8(video: Tensor) -> Tensor:
    """[3, F, H, W] in [-1, 1] to uint8 [F, H, W, 3], truncating as the reference does."""
    return ((video.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def to_host(frames: Tensor) -> Tensor:
    """The frames in the memory of the host, once all that makes them has run."""
    if not frames.is_cuda:
        return frames.cpu()
    # Into pinned memory a copy runs at the rate of the link; into ordinary memory, at a tenth of it.
    host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
    host.copy_(frames, non_blocking=True)
    torch.cuda.current_stream(frames.device).synchronize()
    return host


def from_uint8(image: Tensor) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return image.permute(2, 0, 1).float() / 255 * 2 - 1


def build_vae(base_dim: int = 96) -> AutoencoderKLWan:
    """The network without weights (meta device); everything but its width is Wan 2.1's."""
    with torch.device("meta"):
        return AutoencoderKLWan(base_dim=base_dim, z_dim=LATENT_CHANNELS).eval().requires_grad_(False)


def decoder_state_bytes(vae: WanVae, height: int, width: int) -> int:
    """Bytes of a primed decoder's state for pictures of that size, worked out on the meta device."""
    with torch.no_grad(), torch.device("meta"):
        # diffusers' own `to` warns about parts to be kept in float32, of which this model has none.
        shadow = WanVae(nn.Module.to(build_vae(vae.model.config.base_dim), vae.dtype))
        latents = torch.empty(1, LATENT_CHANNELS, 4, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
        return state_bytes(prime(shadow, latents))


_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}


def diffusers_name(name: str) -> str:
    """The diffusers name of a tensor of `Wan2.1_VAE.pth` (spec 6.3); a name that fits no rule comes back unchanged."""
    top = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    head, _, rest = name.partition(".")
    if head in top:
        return f"{top[head]}.{rest}"
    rest = re.sub(r"^conv1\.", "conv_in.", rest)
    rest = re.sub(r"^head\.0\.", "norm_out.", rest)
    rest = re.sub(r"^head\.2\.", "conv_out.", rest)
    rest = re.sub(r"^middle\.0\.", "mid_block.resnets.0.", rest)
    rest = re.sub(r"^middle\.1\.", "mid_block.attentions.0.", rest)
    rest = re.sub(r"^middle\.2\.", "mid_block.resnets.1.", rest)
    rest = re.sub(r"^downsamples\.", "down_blocks.", rest)
    if match := re.match(r"^upsamples\.(\d+)\.(.*)", rest):
        # Four stages of three residual blocks; an upsampler stands after each of the first three.
        stage, place = divmod(int(match[1]), 4)
        module = f"resnets.{place}" if place < 3 else "upsamplers.0"
        rest = f"up_blocks.{stage}.{module}.{match[2]}"
    rest = re.sub(r"residual\.([0236])\.", lambda match: f"{_RESIDUAL[match[1]]}.", rest)
    return f"{head}.{rest.replace('shortcut.', 'conv_shortcut.')}"
