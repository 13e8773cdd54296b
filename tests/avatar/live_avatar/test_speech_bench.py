"""The measuring of the speech window measures what it says."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from published import speech_like

from avatar.live_avatar.speech_bench import BLOCK, distance, main, streamed, whole
from avatar.live_avatar.weights import load_speech_encoder


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint / "Wan2.2-S2V-14B" / "wav2vec2-large-xlsr-53-english"


@pytest.fixture(scope="module")
def sound():
    return speech_like(10 * BLOCK)


def test_skipping_to_the_measured_blocks_changes_nothing(folder, sound):
    model, _ = load_speech_encoder(folder, dtype=torch.float32)
    all_of_it = streamed(model, sound, 0.96, 80, range(9))
    torch.testing.assert_close(streamed(model, sound, 0.96, 80, range(6, 9)), all_of_it[..., 6 * 12 :], rtol=0, atol=0)


def test_a_longer_window_is_nearer_to_the_whole(folder, sound):
    model, _ = load_speech_encoder(folder, dtype=torch.float32)
    blocks, target = range(5, 8), whole(model, sound)[..., 5 * 12 : 8 * 12]
    short = distance(streamed(model, sound, 0.48, 0, blocks), target)
    long = distance(streamed(model, sound, 2.4, 480, blocks), target)
    assert long.all_layers < short.all_layers
    assert long.cosine > short.cosine
    assert distance(target, target).all_layers == 0


def test_the_program_prints_a_table(folder, tmp_path, sound, capsys):
    soundfile.write(tmp_path / "sound.wav", np.tile(sound, 2), 16_000)
    assert main([str(tmp_path / "sound.wav"), "--folder", str(folder), "--first", "2", "--blocks", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| past | R = 0 ms")
    assert len([line for line in lines if line.startswith("|")]) == 7
