"""What moves in a latent, read without decoding it: the second measure of the transformer's training.

Where a head is moves few of a latent's 8,192 numbers, and moves them little; beside the drawing of hair and cloth a
plain squared error hardly sees it. The reader sees nothing else. It is not the meter, which judges the result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avatar.pocket.meter import MOVES
from avatar.pocket.vae import VaeConfig

WIDTHS = (64, 96, 128)


class Reader(nn.Module):
    """Three convolutions, two of them halving, then two layers; every latent by itself, since it is four frames whole.

    side: of the latents, in cells.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.body = nn.Sequential(
            *(nn.Conv2d(VaeConfig.channels, a, 3, padding=1), nn.GroupNorm(8, a), nn.SiLU()),
            *(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()),
            *(nn.Conv2d(b, c, 3, stride=2, padding=1), nn.GroupNorm(8, c), nn.SiLU()),
        )
        quarter = -(-side // 4)
        frames = VaeConfig.frames_per_latent
        self.read = nn.Sequential(
            nn.Flatten(), nn.Linear(c * quarter**2, 256), nn.SiLU(), nn.Linear(256, frames * len(MOVES))
        )
        self.register_buffer("mean", torch.zeros(len(MOVES)))
        self.register_buffer("std", torch.ones(len(MOVES)))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, c, F, h, w] to readings in the order of MOVES, of zero mean and unit variance, [B, 4 F, moves]."""
        each = self.read(self.body(latents.transpose(1, 2).flatten(0, 1)))
        return each.unflatten(0, (len(latents), -1)).unflatten(2, (-1, len(MOVES))).flatten(1, 2)
