"""The instrument: a small network that reads mouth, blink, pose and traits off a picture of the drawn world.

It is trained on drawn pictures and on decoded ones, and never sees what the transformer makes, so it can judge it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar.pocket.world import HAIR_STYLES, SIZE, Motion, Person, mouth_opening_pixels

MOVES = ("opening", "width", "pucker", "blink", "head_x", "head_y", "roll", "yaw", "pitch", "brow", "gaze_x", "gaze_y")
"""What moves: opening and (half) width of the mouth and the head's place in pixels, the rest in the world's units."""

TRAITS = (
    "skin", "hair", "cloth", "wall_top", "wall_bottom", "face_w", "face_h", "jaw", "eye_x", "eye_y", "eye_r",
    "head_scale", "mouth_y", "mouth_w", "glasses", "beard", "shoulders", "chest_y", "brow_y", "lip_thick", "smile",
)  # fmt: skip
"""What stays: the person. Colours count three numbers each; hair styles follow as one number each."""


def truth(person: Person, motion: Motion) -> Tensor:
    """What a perfect meter would read: [N, moves + traits + styles]."""
    opening, half = mouth_opening_pixels(person, motion)
    centre = SIZE / 2
    moves = [
        opening, half, motion["pucker"], motion["blink"],
        (person["head_x"] + motion["tx"]) * centre, (person["head_y"] + motion["ty"]) * centre,
        *(motion[name] for name in MOVES[6:]),
    ]  # fmt: skip
    traits = [person[name] if person[name].ndim == 2 else person[name][:, None] for name in TRAITS]
    styles = F.one_hot(person["style"].long(), len(HAIR_STYLES)).float()
    return torch.cat([torch.stack(moves, 1), *traits, styles], 1)


class Meter(nn.Module):
    """Six halvings of the picture, then two layers; outputs in units of the world through stored mean and deviation."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 96, 128)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
            layers += [nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.read = nn.Sequential(nn.Flatten(), nn.Linear(128 * 16, 192), nn.SiLU(), nn.Linear(192, outputs))
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("std", torch.ones(outputs))

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, 256, 256] in 0..1 to readings of zero mean and unit variance, [N, outputs]."""
        return self.read(self.body(pictures - 0.5))

    def measure(self, pictures: Tensor) -> Tensor:
        """[N, 3, 256, 256] in 0..1 to readings in the world's units, as `truth` gives them."""
        return self.forward(pictures).float() * self.std + self.mean
