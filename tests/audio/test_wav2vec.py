"""Speech features against the reference's, whole; and the stream against the whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from audio.chunk import AudioBlock
from audio.wav2vec import (
    HOP,
    Loudness,
    SpeechStream,
    hidden_states,
    normalise,
    offline_features,
    to_grid,
    video_index,
)
from avatar.stateful import clone

BLOCK = 7_680


@pytest.fixture(scope="module")
def golden_folder(golden, tmp_path_factory):
    """A wav2vec2 folder as published: config, preprocessor, and weights in their old names."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("wav2vec2")
    config = golden.json("wav2vec2.config.json")
    (folder / "preprocessor_config.json").write_text(json.dumps(config.pop("preprocessor")))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(golden.tensors("wav2vec2.weights.safetensors"), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def golden_model(golden_folder):
    from avatar.live_avatar.weights import load_speech_encoder

    model, normalised = load_speech_encoder(golden_folder, dtype=torch.float32)
    assert normalised
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random one, for what needs no reference."""
    from published import write_speech

    from avatar.live_avatar.weights import load_speech_encoder

    folder = tmp_path_factory.mktemp("random")
    write_speech(folder)
    return load_speech_encoder(folder, dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def cases(golden):
    return golden.tensors("audio_cases.safetensors")


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - theirs).pow(2).mean().sqrt() <= 2e-5 * theirs.pow(2).mean().sqrt()


def test_sound_is_normalised_as_by_the_feature_extractor(cases):
    close(normalise(cases["waveform"])[:2000], cases["input_values.head"])


def test_hidden_states_are_the_references_with_the_last_one_normed(golden_model, cases):
    states = hidden_states(golden_model, normalise(cases["waveform"]))
    assert states.shape == (25, 314, 32)
    close(states[[0, 1, 12, 23, 24]], cases["hidden_states.layers_0_1_12_23_24"])


def test_the_30_hz_grid_is_the_references(golden_model, cases):
    close(to_grid(hidden_states(golden_model, normalise(cases["waveform"]))), cases["features_30fps"])


@pytest.mark.parametrize("clip", [48, 24])
def test_features_of_video_frames_are_the_references(golden_model, cases, clip):
    ours = offline_features(golden_model, cases["waveform"].numpy(), frames_per_clip=clip)
    assert ours.shape[-1] == clip * int(cases[f"num_clips.bucket{clip}"])
    frames = ours[0].permute(2, 0, 1)
    close(frames, cases["bucket48"]) if clip == 48 else close(frames[-30:], cases["bucket24.tail"])


def test_video_frames_take_the_grid_frames_the_reference_takes(golden):
    for case in golden.json("audio_index.json"):
        index = video_index(case["frames_30fps"], case["batch_frames"], case["fps"])
        assert index.tolist() == case["index"]
        assert len(index) == case["num_clips"] * case["batch_frames"]


def test_the_length_of_the_grid_follows_the_references_floating_point():
    assert {frames: to_grid(torch.zeros(1, frames, 1)).shape[1] for frames in (205, 314, 410)} == {
        frames: int((frames / 50.0) * 30) for frames in (205, 314, 410)
    }


def test_sound_too_short_for_a_frame_is_refused(model):
    with pytest.raises(ValueError, match="too few"):
        offline_features(model, np.zeros(500, np.float32))


def test_the_old_bin_file_loads_the_same(golden, golden_folder, golden_model, tmp_path):
    from avatar.live_avatar.weights import load_speech_encoder

    (tmp_path / "config.json").write_text((golden_folder / "config.json").read_text())
    torch.save(golden.tensors("wav2vec2.weights.safetensors"), tmp_path / "pytorch_model.bin")
    other, _ = load_speech_encoder(tmp_path, dtype=torch.float32)
    sound = torch.linspace(-1, 1, 4000)
    torch.testing.assert_close(hidden_states(other, sound), hidden_states(golden_model, sound), rtol=0, atol=0)


# The stream.


def blocks(sound, lookahead):
    padded = np.concatenate([sound, np.zeros(-len(sound) % BLOCK + lookahead, np.float32)])
    for start in range(0, len(sound), BLOCK):
        end = start + BLOCK
        yield AudioBlock(padded[start:end], start, min(BLOCK, len(sound) - start), padded[end : end + lookahead])


def run(stream, sound):
    state = stream.init_state()
    return torch.cat([stream.features(state, b) for b in blocks(sound, stream.lookahead_samples)], -1)


@pytest.fixture(scope="module")
def sound():
    from published import speech_like

    return speech_like(9 * BLOCK)


def whole(model, sound):
    """Features of the whole on the absolute grid, from one window that holds everything."""
    stream = SpeechStream(model, normalised=False, past_samples=0, lookahead_samples=0)
    return stream.features(stream.init_state(), AudioBlock(sound, 0, len(sound)))


def test_with_all_the_past_and_all_the_future_the_stream_is_the_whole(model, sound):
    stream = SpeechStream(model, normalised=False, past_samples=9 * BLOCK, lookahead_samples=9 * BLOCK)
    state = stream.init_state()
    padded = np.concatenate([sound, np.zeros(80, np.float32)])
    parts = [
        stream.features(state, AudioBlock(sound[i : i + BLOCK], i, BLOCK, padded[i + BLOCK :]))
        for i in range(0, len(sound), BLOCK)
    ]
    torch.testing.assert_close(torch.cat(parts, -1), whole(model, sound), rtol=0, atol=2e-5)


def test_the_absolute_grid_is_within_a_frame_of_the_aligned_corners(model, sound):
    offline = to_grid(hidden_states(model, torch.from_numpy(sound)))
    index = torch.from_numpy(video_index(offline.shape[1]))[: 9 * 12]
    stretched = offline[:, index.clamp(min=0)].transpose(1, 2)[None]
    ours = whole(model, sound)[..., : int((index >= 0).sum())]
    error = (ours - stretched[..., : ours.shape[-1]]).pow(2).mean().sqrt() / ours.pow(2).mean().sqrt()
    assert error < 0.5


def test_more_look_ahead_brings_the_stream_nearer_to_the_whole(model, sound):
    reference = whole(model, sound)[..., : 8 * 12]
    errors = []
    for lookahead in (0, 3_200, 7_680):
        ours = run(SpeechStream(model, normalised=False, past_samples=8 * BLOCK, lookahead_samples=lookahead), sound)
        errors.append(float((ours[..., : 8 * 12] - reference).pow(2).mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("lookahead", [0, 80, 1_280, 7_680])
def test_a_block_gives_twelve_frames_whatever_the_look_ahead(model, sound, lookahead):
    stream = SpeechStream(model, past_samples=4 * BLOCK, lookahead_samples=lookahead)
    assert run(stream, sound).shape == (1, 25, 32, 9 * 12)


def test_features_of_a_block_do_not_depend_on_what_lies_beyond_the_past(model, sound):
    stream = SpeechStream(model, normalised=False, past_samples=2 * BLOCK, lookahead_samples=1_280)
    other = sound.copy()
    other[: 3 * BLOCK] = 0
    torch.testing.assert_close(run(stream, sound)[..., 5 * 12 :], run(stream, other)[..., 5 * 12 :], rtol=0, atol=0)


def test_memory_is_flat_and_a_copy_of_the_state_goes_its_own_way(model, sound):
    stream = SpeechStream(model, past_samples=2 * BLOCK, lookahead_samples=0)
    state = stream.init_state()
    stream_blocks = list(blocks(sound, 0))
    for block in stream_blocks[:5]:
        stream.features(state, block)
    assert len(state.past) == 2 * BLOCK
    twin = clone(state)
    first = stream.features(state, stream_blocks[5])
    assert state.position == 6 * BLOCK
    torch.testing.assert_close(stream.features(twin, stream_blocks[5]), first, rtol=0, atol=0)


def test_blocks_must_follow_one_another(model):
    stream = SpeechStream(model)
    with pytest.raises(ValueError, match="want whole video frames at 0"):
        stream.features(stream.init_state(), AudioBlock(np.zeros(BLOCK, np.float32), BLOCK, BLOCK))
    with pytest.raises(ValueError, match="not a multiple"):
        SpeechStream(model, past_samples=HOP + 1)


def test_running_loudness_comes_to_that_of_the_whole():
    sound = (0.05 + 0.2 * np.random.default_rng(0).standard_normal(20 * BLOCK)).astype(np.float32)
    loudness = Loudness()
    for i in range(0, len(sound), BLOCK):
        loudness = loudness.heard(sound[i : i + BLOCK])
    expected = normalise(torch.from_numpy(sound)).numpy()
    np.testing.assert_allclose(loudness.apply(sound), expected, atol=1e-3)


def test_an_hour_of_silence_does_not_make_the_next_word_loud():
    rng = np.random.default_rng(0)
    loudness = Loudness().heard((0.1 * rng.standard_normal(4 * BLOCK)).astype(np.float32))
    for _ in range(100):
        loudness = loudness.heard((1e-4 * rng.standard_normal(BLOCK)).astype(np.float32))
    assert 0.9 < loudness.apply(np.full(1, 0.1, np.float32))[0] < 1.1


def test_noise_before_the_first_word_is_not_blown_up():
    hiss = (5e-4 * np.random.default_rng(0).standard_normal(BLOCK)).astype(np.float32)
    assert np.abs(Loudness().heard(hiss).apply(hiss)).max() < 0.5
