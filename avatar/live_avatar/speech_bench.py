"""How far the features of a sliding window are from those of the whole file: the table in docs/speech_features.md.

    python -m avatar.live_avatar.speech_bench SOUND [--folder WAV2VEC2_FOLDER] [--layers N] [--threads N]

Without a folder the model is a random one of the full width: the arithmetic and the reach of the layers are those of
the real model, what it attends to is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audio.chunk import AudioBlock
from audio.wav2vec import SAMPLE_RATE, SpeechStream, hidden_states, normalise, offline_features, video_index

BLOCK = 7_680
LOOKAHEADS_MS = (0, 80, 200, 480)
PASTS_S = (0.48, 0.96, 1.92, 3.84, 7.68)


@dataclass(frozen=True)
class Distance:
    """Of some features from others: RMS of the difference over the RMS, of all layers together and of the last; and
    the mean cosine over frames and layers."""

    all_layers: float
    last_layer: float
    cosine: float


def distance(ours: Tensor, theirs: Tensor) -> Distance:
    """Both [1, layers, C, frames]."""
    ours, theirs = ours.double(), theirs.double()
    error = (ours - theirs).pow(2).mean(dim=(0, 2, 3)).sqrt() / theirs.pow(2).mean(dim=(0, 2, 3)).sqrt()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=2).mean()
    return Distance(float(error.mean()), float(error[-1]), float(cosine))


def whole(model: Any, sound: NDArray[np.float32]) -> Tensor:
    """Features of the whole sound, normalised as a whole, on the absolute grid."""
    stream = SpeechStream(model, normalised=False, past_samples=0, lookahead_samples=0)
    loud = normalise(torch.from_numpy(sound)).numpy()
    return stream.features(stream.init_state(), AudioBlock(loud, 0, len(loud)))


def streamed(
    model: Any, sound: NDArray[np.float32], past_s: float, lookahead_ms: int, blocks: range, running: bool = False
) -> Tensor:
    """Features of those blocks from a window; the sound normalised as a whole, or by running values."""
    lookahead = lookahead_ms * SAMPLE_RATE // 1000
    stream = SpeechStream(
        model, normalised=running, past_samples=round(past_s * SAMPLE_RATE), lookahead_samples=lookahead
    )
    loud = sound if running else normalise(torch.from_numpy(sound)).numpy()
    state = stream.init_state()
    first = 0 if running else max(0, blocks.start - round(past_s * SAMPLE_RATE) // BLOCK - 1)
    state.position = first * BLOCK
    parts = []
    for i in range(first, blocks.stop):
        start, end = i * BLOCK, (i + 1) * BLOCK
        block = AudioBlock(loud[start:end], start, BLOCK, loud[end : end + lookahead])
        if i < blocks.start and not running:
            # Only the past matters here; the features of these blocks are not wanted.
            kept = np.concatenate([state.past, block.samples])
            state.past, state.position = kept[max(0, len(kept) - stream.past_samples) :], end
        else:
            parts.append(stream.features(state, block))
    return torch.cat(parts[-len(blocks) :], -1)


def table(model: Any, sound: NDArray[np.float32], blocks: range) -> list[str]:
    """Markdown: rows are pasts, columns look-aheads; all layers / last layer / cosine."""
    target = whole(model, sound)[..., blocks.start * 12 : blocks.stop * 12]
    lines = ["| past | " + " | ".join(f"R = {ms} ms" for ms in LOOKAHEADS_MS) + " |", "|---" * 5 + "|"]
    for past_s in PASTS_S:
        cells = []
        for ms in LOOKAHEADS_MS:
            d = distance(streamed(model, sound, past_s, ms, blocks), target)
            cells.append(f"{d.all_layers:.3f} / {d.last_layer:.3f} / {d.cosine:.4f}")
        lines.append(f"| {past_s:g} s | " + " | ".join(cells) + " |")
    return lines


def stretch(model: Any, sound: NDArray[np.float32]) -> Distance:
    """What aligned corners do to the features, against the absolute grid, both of the whole file."""
    states = hidden_states(model, normalise(torch.from_numpy(sound)))
    count = int((video_index(int((states.shape[1] / 50.0) * 30)) >= 0).sum())
    ours = whole(model, sound)
    count = min(count, ours.shape[-1])
    return distance(ours[..., :count], offline_features(model, sound)[..., :count])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m avatar.live_avatar.speech_bench")
    parser.add_argument("sound", type=Path)
    parser.add_argument("--folder", type=Path, help="a published wav2vec2 folder; without it random weights")
    parser.add_argument("--layers", type=int, default=6, help="of the random model (the real one has 24)")
    parser.add_argument("--first", type=int, default=16, help="first block that is measured")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    import soundfile
    import soxr

    samples, rate = soundfile.read(options.sound, dtype="float32", always_2d=True)
    sound = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE).astype(np.float32)
    sound = sound[: (options.first + options.blocks + 2) * BLOCK // BLOCK * BLOCK]
    sound = sound[: len(sound) // BLOCK * BLOCK]
    if options.folder:
        from avatar.live_avatar.weights import load_speech_encoder

        model, _ = load_speech_encoder(options.folder, dtype=torch.float32)
    else:
        model = random_model(options.layers)
    blocks = range(options.first, options.first + options.blocks)
    print("\n".join(table(model, sound, blocks)))
    running = distance(
        streamed(model, sound, 7.68, 200, blocks, running=True), streamed(model, sound, 7.68, 200, blocks)
    )
    print(f"\nrunning against whole normalisation, past 7.68 s, R = 200 ms: {running}")
    print(f"absolute grid against aligned corners, {len(sound) / SAMPLE_RATE:.2f} s: {stretch(model, sound)}")
    return 0


def random_model(layers: int) -> Any:
    """wav2vec2-large in all but its depth, with random weights of unit gain."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from avatar.live_avatar.weights import FromGenerator

    config = Wav2Vec2Config(
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
        mask_time_prob=0.0,
    )
    with torch.device("meta"):
        model = Wav2Vec2Model(config).eval().requires_grad_(False)
    FromGenerator(model, seed=1, dtype=torch.float32).give()
    return model


if __name__ == "__main__":
    sys.exit(main())
