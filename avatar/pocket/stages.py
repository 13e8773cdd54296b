"""What one block costs, stage by stage: `python -m avatar.pocket.stages` prints medians in milliseconds as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from audio.chunk import AudioBlock
from avatar.model import Reference
from avatar.pocket.generator import DEFAULT_STEPS, Options, PocketModel, load_pocket, to_uint8

T = TypeVar("T")

WARM_UP = 5


def stage_ms(model: PocketModel, blocks: int) -> dict[str, float]:
    """Median milliseconds of the ear and the drive, the transformer's steps, the decoder, and the way to bytes.

    On noise, since the time depends on no value; the first few blocks are not counted.
    """
    spec = model.spec
    rng = np.random.default_rng(0)
    state = model.start(Reference(rng.integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8)))
    spent: dict[str, list[float]] = {}

    def timed(stage: str, work: Callable[..., T], *arguments: object) -> T:
        began = time.perf_counter()
        result = work(*arguments)
        spent.setdefault(stage, []).append(1000 * (time.perf_counter() - began))
        return result

    for number in range(WARM_UP + blocks):
        samples = rng.normal(0, 0.1, spec.samples_per_block + spec.lookahead_samples).astype(np.float32)
        sound, ahead = samples[: spec.samples_per_block], samples[spec.samples_per_block :]
        block = AudioBlock(sound, number * spec.samples_per_block, spec.samples_per_block, ahead)
        with torch.no_grad():
            heard, pose = timed("ear and drive", model.listen, state, block)
            latents = timed("transformer", model.denoise, state, heard, pose)
            frames = timed("decoder", model.decode, state, latents)
            timed("to bytes", to_uint8, frames)
    return {stage: round(statistics.median(times[WARM_UP:]), 2) for stage, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of denoising")
    given = parser.parse_args()
    print(json.dumps(stage_ms(load_pocket(options=Options(steps=given.steps)), given.blocks)))


if __name__ == "__main__":
    main()
