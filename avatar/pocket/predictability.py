"""How well the mouth can be told from the sound alone: the ceiling of lip sync for any model that hears the same.

python -m avatar.pocket.predictability --data DIR trains the embedded model's ear for a few minutes on one CPU thread
and compares its guess with the truth on the test set. Whoever changes visemes.py runs this before training anything.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avatar.pocket.ear import MEL_PER_FRAME, Ear, normalise

NAMES = ("opening", "width", "pucker", "tongue")
MINUTE = 25 * 60
RATE = 1.5e-3
LAGS = range(-3, 4)


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Normalised log-mel [T, 80] and mouth [T, 4] of a stored set."""
    stored = np.load(path)
    arrays = []
    for name in ("mel", "mouth"):
        low, high = stored[f"{name}_range"].tolist()
        arrays.append(torch.from_numpy(stored[name]).float() / 255 * (high - low) + low)
    return normalise(arrays[0]), arrays[1]


def pictures_mouth(mouth: Tensor) -> Tensor:
    """The mouth in the middle of each picture: [4 V, 4] at 100 Hz to [V, 4]; between the second and third 10 ms."""
    return mouth.unflatten(0, (-1, MEL_PER_FRAME))[:, 1:3].mean(1)


def fit(mel: Tensor, mouth: Tensor, seconds: float, seed: int, frames: int = 16, batch: int = 24) -> Ear:
    """Train an ear for so many seconds on random clips."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    ear = Ear()
    c = ear.config
    optimiser = torch.optim.AdamW(ear.parameters(), lr=RATE, weight_decay=0.01)
    began = time.monotonic()
    while (spent := (time.monotonic() - began) / seconds) < 1:
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 50.0 * spent + 0.01, 2.0 * (1.0 - spent))
        room = len(mel) - MEL_PER_FRAME * frames - c.ahead
        starts = torch.randint(c.past, room, (batch,), generator=rng).tolist()
        heard = torch.stack([mel[s - c.past : s + MEL_PER_FRAME * frames + c.ahead] for s in starts])
        wanted = torch.stack([pictures_mouth(mouth[s : s + MEL_PER_FRAME * frames]) for s in starts])
        _, guess = ear(heard)
        loss = (guess - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ear.parameters(), 0.5)  # without it a run may end at a constant
        optimiser.step()
    return ear


@torch.no_grad()
def correlations(ear: Ear, mel: Tensor, mouth: Tensor) -> tuple[Tensor, list[int]]:
    """Correlation of guess and truth for each of the four, mean over minutes, and the lag in pictures that is best."""
    c = ear.config
    pictures = (len(mel) - c.past - c.ahead) // MEL_PER_FRAME
    truth = pictures_mouth(mouth[c.past :][: pictures * MEL_PER_FRAME])
    _, guess = ear(mel[: c.past + pictures * MEL_PER_FRAME + c.ahead][None])

    def by_minute(guess: Tensor, truth: Tensor) -> Tensor:
        minutes = max(1, len(truth) // MINUTE)
        pairs = zip(guess.chunk(minutes), truth.chunk(minutes), strict=True)
        rows = [[torch.corrcoef(torch.stack([g[:, i], t[:, i]]))[0, 1] for i in range(4)] for g, t in pairs]
        return torch.tensor(rows).mean(0)

    edge = max(LAGS)
    shifted = torch.stack([by_minute(guess[0].roll(-lag, 0)[edge:-edge], truth[edge:-edge]) for lag in LAGS])
    return by_minute(guess[0], truth), [LAGS[int(i)] for i in shifted.argmax(0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with speech_train.npz and speech_test.npz")
    parser.add_argument("--seconds", type=float, default=150.0, help="how long to train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ear = fit(*load(args.data / "speech_train.npz"), args.seconds, args.seed)
    measured, lags = correlations(ear, *load(args.data / "speech_test.npz"))
    for name, r, lag in zip(NAMES, measured.tolist(), lags, strict=True):
        print(f"{name:8s} correlation {r:.3f}, best lag {lag} pictures")


if __name__ == "__main__":
    main()
