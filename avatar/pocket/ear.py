"""What the embedded model hears: a small convolutional network from log-mel to features and visemes, per video frame.

It is trained to name the mouth's four numbers; the transformer gets both its features and its opinion of the mouth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEL_PER_FRAME = 4
"""100 mel frames a second, 25 pictures a second."""


@dataclass(frozen=True)
class EarConfig:
    """past, ahead: mel frames (10 ms) heard before and after a picture's own four."""

    mel_bins: int = 80
    width: int = 160
    features: int = 112
    past: int = 20
    ahead: int = 8


def normalise(mel: Tensor) -> Tensor:
    """log10 mel, about -5..2, to about unit variance."""
    return (mel + 2.2) / 1.5


class Ear(nn.Module):
    """Five convolutions without padding; its window is exactly past + 4 + ahead mel frames for each picture."""

    def __init__(self, config: EarConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or EarConfig()
        self.conv1 = nn.Conv1d(c.mel_bins, c.width, 5)
        self.conv2 = nn.Conv1d(c.width, c.width, 4, stride=2)
        self.conv3 = nn.Conv1d(c.width, c.width, 4, stride=2)
        rest = (c.past + MEL_PER_FRAME + c.ahead - 5 - 3 - 6) // 4 + 1
        self.conv4 = nn.Conv1d(c.width, c.width, rest)
        self.hidden = nn.Linear(c.width, c.features)
        self.mouth = nn.Linear(c.features, 4)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised mel [B, past + 4 V + ahead, 80] to features [B, V, features] and mouth [B, V, 4], about 0..1."""
        x = mel.mT
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))
        x = F.gelu(self.conv3(x))
        x = F.gelu(self.conv4(x))
        features = torch.tanh(self.hidden(x.mT))
        return features, self.mouth(features)
