"""Log-mel: the common filters, the frames' places, and a stream that equals the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from librosa.filters import mel as librosa_mel

from audio.chunk import AudioBlock
from audio.mel import HOP, block_mel, init_state, log_mel, lookahead_samples, mel_filters

BLOCK = 7680


def noise(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(3).standard_normal(samples)).astype(np.float32)


def test_filters_are_librosas():
    theirs = librosa_mel(sr=16000, n_fft=512, n_mels=80, fmin=40, fmax=7800)
    np.testing.assert_allclose(mel_filters(), theirs.T, atol=1e-7)


def test_a_frame_covers_its_own_ten_milliseconds_and_120_samples_on_either_side():
    samples = noise(16000)
    ours = log_mel(torch.from_numpy(samples))
    assert ours.shape == (100, 80)
    window = samples[160 * 7 - 120 : 160 * 7 + 280] * np.hanning(401)[:-1]
    power = np.abs(np.fft.rfft(window, 512)) ** 2
    np.testing.assert_allclose(ours[7].numpy(), np.log10(power @ mel_filters()), atol=1e-4)


@pytest.mark.parametrize(("past", "ahead"), [(0, 0), (20, 8), (8, 8), (120, 3)])
def test_a_stream_of_blocks_equals_the_whole(past: int, ahead: int):
    blocks = 4
    samples = noise(blocks * BLOCK + lookahead_samples(ahead))
    whole = log_mel(torch.from_numpy(np.concatenate([np.zeros(past * HOP, np.float32), samples])))
    state = init_state()
    for i in range(blocks):
        end = (i + 1) * BLOCK
        block = AudioBlock(
            samples[end - BLOCK : end], end - BLOCK, BLOCK, samples[end : end + lookahead_samples(ahead)]
        )
        heard = block_mel(block, state, past, ahead)
        torch.testing.assert_close(heard, whole[i * 48 : i * 48 + past + 48 + ahead], rtol=0, atol=1e-6)


def test_eight_frames_ahead_take_1400_samples():
    assert lookahead_samples(8) == 1400


def test_a_click_is_loudest_in_the_frame_around_it():
    samples = torch.zeros(3200)
    samples[160 * 9 + 80] = 1.0
    assert log_mel(samples).sum(-1).argmax() == 9


def test_silence_is_the_floor():
    assert (log_mel(torch.zeros(2, 1600)) == -5.0).all()


def test_recordings_may_come_in_batches():
    samples = torch.from_numpy(noise(3200)).reshape(2, 1600)
    torch.testing.assert_close(log_mel(samples)[1], log_mel(samples[1]))


def test_too_little_sound_ahead_is_refused():
    with pytest.raises(ValueError, match="8 mel frames need 1400"):
        block_mel(AudioBlock(noise(BLOCK), 0, BLOCK, noise(1399)), init_state(), 20, 8)


def test_a_broken_block_is_refused():
    with pytest.raises(ValueError, match="multiple of 160"):
        block_mel(AudioBlock(noise(100), 0, 100, noise(1400)), init_state(), 20, 8)
