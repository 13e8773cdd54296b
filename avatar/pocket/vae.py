"""The embedded model's autoencoder: 4x in time, 16x in space, 32 channels; causal, with its memory in an argument.

Pictures are folded 4x4 into channels, so that the convolutions run at a quarter of the side and below. The encoder
takes frames in fours and remembers nothing between calls of whole clips; the decoder's temporal convolutions look two
steps back, and what they need is kept in the caller's state: decoding in chunks equals decoding whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DecoderState = dict[str, Tensor]
"""What one decode stream remembers: the last two steps before each temporal convolution, by its name."""


@dataclass(frozen=True)
class VaeConfig:
    """channels: of a latent; encoder, decoder: widths from fine to coarse and from coarse to fine."""

    channels: int = 32
    encoder: tuple[int, int, int] = (64, 96, 128)
    decoder: tuple[int, int, int] = (192, 128, 64)
    depth: tuple[int, int, int] = (2, 2, 2)

    frames_per_latent = 4
    pixels_per_latent = 16
    fold = 4


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps).permute(
            0, 3, 1, 2
        )


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), in space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class CausalTime(nn.Module):
    """x + a convolution over the last three time steps, pixel by pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv = nn.Conv2d(3 * width, width, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, steps: int, state: DecoderState | None = None, name: str = "") -> Tensor:
        """x: [B * steps, C, H, W]. In a state, `state[name]` is the two steps before; the last two replace it."""
        h = F.silu(self.norm(x)).unflatten(0, (-1, steps))
        before = None if state is None else state.get(name)
        if before is None:
            before = torch.zeros_like(h[:, :1]).expand(-1, 2, -1, -1, -1)
        h = torch.cat([before, h], dim=1)
        if state is not None:
            state[name] = h[:, -2:].clone()
        window = torch.cat([h[:, :-2], h[:, 1:-1], h[:, 2:]], dim=2).flatten(0, 1)
        return x + self.conv(_channels_last(window))


class Grow(nn.Module):
    """Twice the side and twice the steps: a 1x1 convolution, its channels dealt out over time and space."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out * 8, 1)
        self.width = width_out

    def forward(self, x: Tensor, steps: int = 2) -> Tensor:
        """steps: 1: of each two that it makes the first alone, for half of the work."""
        channels = steps * self.width * 4
        x = F.conv2d(x, self.conv.weight[:channels], self.conv.bias[:channels])
        n, _, h, w = x.shape
        x = x.permute(0, 2, 3, 1).reshape(n, h, w, steps, self.width, 2, 2)
        return x.permute(0, 3, 1, 5, 2, 6, 4).reshape(n * steps, h * 2, w * 2, self.width).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        a, b, c = config.encoder
        out = 2 * config.channels
        self.conv_in = nn.Conv2d(3 * config.fold**2, a, 3, padding=1)
        self.fine = Residual(a)
        self.down1 = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.pair1 = nn.Conv2d(2 * b, b, 1)
        self.middle, self.middle_time = Residual(b), CausalTime(b)
        self.down2 = nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.pair2 = nn.Conv2d(2 * c, c, 1)
        self.coarse1, self.coarse_time, self.coarse2 = Residual(c), CausalTime(c), Residual(c)
        self.norm = ChannelNorm(c)
        self.conv_out = nn.Conv2d(c, out, 3, padding=1)
        self.skip = nn.Conv2d(c, out, 1)
        self.fold = config.fold

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 4 T, 3, H, W] in -1..1 to mean and log variance, [B, T, channels, H / 16, W / 16] each."""
        batch, steps = frames.shape[:2]
        x = self.fine(self.conv_in(_channels_last(F.pixel_unshuffle(frames.flatten(0, 1), self.fold))))
        x = self.pair1(_channels_last(self.down1(x).unflatten(0, (-1, 2)).flatten(1, 2)))
        x = self.middle_time(self.middle(x), steps // 2)
        x = self.pair2(_channels_last(self.down2(x).unflatten(0, (-1, 2)).flatten(1, 2)))
        x = self.coarse2(self.coarse_time(self.coarse1(x), steps // 4))
        x = self.norm(x)  # both ways out start here: a way around the norm lets the latents grow without bound
        x = self.conv_out(F.silu(x)) + self.skip(x)
        mean, log_variance = x.unflatten(0, (batch, steps // 4)).chunk(2, dim=2)
        return mean, log_variance.clamp(-12, 4)


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        a, b, c = config.decoder
        self.conv_in = nn.Conv2d(config.channels, a, 3, padding=1)
        self.coarse = nn.ModuleList(Residual(a) for _ in range(config.depth[0]))
        self.coarse_time = nn.ModuleList(CausalTime(a) for _ in range(config.depth[0]))
        self.grow1 = Grow(a, b)
        self.early_time = CausalTime(b)
        self.middle = nn.ModuleList(Residual(b) for _ in range(config.depth[1]))
        self.middle_time = CausalTime(b)
        self.grow2 = Grow(b, c)
        self.fine = nn.ModuleList(Residual(c) for _ in range(config.depth[2]))
        self.norm = ChannelNorm(c)
        self.conv_out = nn.Conv2d(c, 3 * config.fold**2, 3, padding=1)
        self.skip = nn.Conv2d(c, 3 * config.fold**2, 1)
        self.fold = config.fold

    def forward(self, latents: Tensor, state: DecoderState | None = None, every: int = 1) -> Tensor:
        """[B, T, channels, h, w] to frames [B, 4 T / every, 3, 16 h, 16 w], about -1..1; `state` is advanced in place.

        every: 1, or 2 for each second frame, from the first on: nothing that is remembered depends on the others.
        """
        batch, steps = latents.shape[:2]
        x = self.conv_in(_channels_last(latents.flatten(0, 1)))
        for i, (space, time) in enumerate(zip(self.coarse, self.coarse_time, strict=True)):
            x = time(space(x), steps, state, f"coarse{i}")
        x = self.early_time(self.grow1(x), 2 * steps, state, "early")
        for space in self.middle:
            x = space(x)
        x = self.middle_time(x, 2 * steps, state, "middle")
        x = self.grow2(x, 2 // every)
        for space in self.fine:
            x = space(x)
        x = self.norm(x)
        x = self.conv_out(F.silu(x)) + self.skip(x)
        return F.pixel_shuffle(x, self.fold).unflatten(0, (batch, 4 * steps // every))


class PocketVae(nn.Module):
    """Encoder, decoder, and the statistics that give latents zero mean and unit variance for the transformer."""

    def __init__(self, config: VaeConfig | None = None) -> None:
        super().__init__()
        self.config = config or VaeConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.register_buffer("mean", torch.zeros(self.config.channels, 1, 1))
        self.register_buffer("std", torch.ones(self.config.channels, 1, 1))

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 4 T, 3, H, W] in -1..1 to latents [B, T, channels, H / 16, W / 16] of about unit variance."""
        mean, _ = self.encoder(frames)
        return (mean - self.mean.to(mean.dtype)) / self.std.to(mean.dtype)

    def init_state(self) -> DecoderState:
        """The memory of one decode stream, empty: as before the first frame."""
        return {}

    def decode(self, latents: Tensor, state: DecoderState | None = None, every: int = 1) -> Tensor:
        """Latents to frames in about -1..1; with a `state`, as the continuation of what it saw before (in place).

        every: as `Decoder` takes it.
        """
        return self.decoder(latents * self.std.to(latents.dtype) + self.mean.to(latents.dtype), state, every)
