"""The embedded model's sizes: the networks of live_avatar at pocket size, and what they are told about a block.

What differs from Live Avatar: no prompt, no motion tokens, one layer of speech features, exact GELU (tanh costs a CPU
five times as much), and the pose path carries the drive and the mouth as planes of constant value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avatar.live_avatar.dit import CausalDiT, DiTConfig
from avatar.pocket.ear import EarConfig
from avatar.pocket.motion import DRIVE, scaled
from avatar.pocket.vae import VaeConfig
from avatar.sampling import ReferenceDistance

SIZE = 256
"""Side of a picture in pixels."""

FRAMES_PER_LATENT = VaeConfig.frames_per_latent
LATENTS_PER_BLOCK = 3
RING_BLOCKS = 4
"""Blocks that attention sees, the current one included: 1.92 s."""

REFERENCE_DISTANCE = ReferenceDistance.fixed(30)
SHIFT = 3.0
"""Of the noise levels, applied once: 4 steps run at 1, 0.9, 0.75, 0.5; 2 steps at 1, 0.75."""

TRAINED_STEPS = (1, 2, 4)
"""Numbers of steps whose noise levels the network has seen."""

MOUTH_NUMBERS = 4
CONTROLS = len(DRIVE) + MOUTH_NUMBERS


def dit_config() -> DiTConfig:
    latent = VaeConfig().channels
    return DiTConfig(
        dim=256,
        ffn_dim=896,
        in_dim=latent,
        out_dim=latent,
        num_heads=4,
        num_layers=6,
        text_dim=0,
        cond_dim=CONTROLS * FRAMES_PER_LATENT,
        audio_dim=EarConfig().features + CONTROLS,
        audio_layers=1,
        audio_inject_layers=(0, 2, 4),
        enable_framepack=False,
    )


def build_dit() -> CausalDiT:
    """The transformer with no weights to speak of."""
    dit = CausalDiT(dit_config())
    for block in dit.blocks:
        block.ffn[1] = nn.GELU()
    return dit


def conditions(features: Tensor, mouth: Tensor, drive: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """What the network is told about V video frames.

    Args:
        features, mouth: from the ear, [B, V, features] and [B, V, 4]; drive: [B, V, 11], picture units.
        side: of the latent, in cells.
    Returns: speech features [B, 1, channels, V], and the pose latents [B, controls * 4, V / 4, side, side].
    """
    controls = torch.cat([scaled(drive), 2 * mouth], dim=-1)
    heard = torch.cat([features, controls.to(features.dtype)], dim=-1).mT[:, None]
    planes = controls.unflatten(1, (-1, FRAMES_PER_LATENT)).flatten(2).mT
    return heard, planes[..., None, None].expand(-1, -1, -1, side, side)
