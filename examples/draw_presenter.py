"""Draw the presenters of the examples anew: `python -m examples.draw_presenter`, in the repository.

They are people of the drawn world (avatar/pocket/world.py) whose seeds training never uses, at rest: mouth closed, eyes
open, looking at you. `--seed N --to FILE` draws another one; there is one for every N.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from avatar.pocket.motion import DRIVE
from avatar.pocket.world import MOUTH, draw, sample_person

SIZE = 512
PRESENTERS = {"presenter.png": 50038, "presenter_2.png": 50003}
REST = {"width": 0.12, "pucker": 0.05}
"""The mouth in silence, as in avatar/pocket/visemes.py; all other numbers are zero."""


def portrait(seed: int, size: int = SIZE) -> Image.Image:
    """The person of that seed, looking at you."""
    person = sample_person(1, torch.Generator().manual_seed(seed))
    motion = {name: torch.full((1,), REST.get(name, 0.0)) for name in DRIVE + MOUTH}
    picture = draw(person, motion, size)[0].permute(1, 2, 0)
    return Image.fromarray((picture * 255).round().byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="draw this person only")
    parser.add_argument("--to", type=Path, default=Path("presenter.png"), help="where to, with --seed")
    given = parser.parse_args()
    if given.seed is not None:
        portrait(given.seed).save(given.to, optimize=True)
        return
    for name, seed in PRESENTERS.items():
        portrait(seed).save(Path(__file__).with_name(name), optimize=True)


if __name__ == "__main__":
    main()
