"""Encoder and Muxer: what a block of frames and its sound become, read back from the file."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from mp4 import boxes, read_mp4

from avatar.model import FrameBlock
from streaming.encoder import Encoder, EncoderSettings
from streaming.muxer import Muxer, rewrite_for_players

SILENCE = np.zeros(0, np.float32)
TAGS = {"title": "A title", "comment": "AI-generated", "encoding_tool": "avatard 0"}


def block(start: int, frames: int = 12) -> FrameBlock:
    picture = np.random.default_rng(0).integers(90, 110, (1, 64, 64, 3)).repeat(frames, 0)
    return FrameBlock((picture + start % 24).astype(np.uint8), SILENCE, start)


def tone(samples: int, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / 48_000)
    return np.repeat(wave[:, None], channels, 1).astype(np.float32)


def encode(path: Path, seconds: float, channels: int = 1, settings: EncoderSettings | None = None) -> Path:
    """A fragmented file of that many seconds."""
    encoder = Encoder(64, 64, 25, channels, settings or EncoderSettings())
    muxer = Muxer(path, encoder.streams, TAGS)
    sound = tone(round(seconds * 48_000), channels)
    total = -(-len(sound) // 1920)
    for start in range(0, total, 12):
        frames = min(12, total - start)
        muxer.mux(encoder.encode(block(start, frames), sound[start * 1920 : (start + frames) * 1920]))
    muxer.mux(encoder.flush())
    muxer.close()
    encoder.close()
    return path


@pytest.mark.parametrize("seconds", [0.02, 0.5, 3.0, 3.013])
@pytest.mark.parametrize("channels", [1, 2])
def test_frames_lie_at_i_over_25_and_the_sound_is_as_long_as_it_was(tmp_path, seconds, channels):
    whole = tmp_path / "whole.mp4"
    rewrite_for_players(encode(tmp_path / "part.mp4", seconds, channels), whole, TAGS)
    for path in (whole, tmp_path / "part.mp4"):
        file = read_mp4(path)
        assert file.times == pytest.approx([i / 25 for i in range(-(-round(seconds * 48_000) // 1920))])
        assert file.sound.shape[1] == channels
        assert file.sound_start == 0
        # Counted in AAC frames of 1024 samples, of which the decoder gives the last one whole.
        assert 0 <= file.sound_s - seconds < 1024 / 48_000
    assert abs(read_mp4(whole).duration_s - seconds) <= 1 / 25


def test_the_file_is_h264_yuv420p_bt709_and_aac(tmp_path):
    file = read_mp4(encode(tmp_path / "a.mp4", 1))
    assert file.codecs == ("h264", "aac")
    assert file.pix_fmt == "yuv420p"
    assert file.colours == (1, 1, 1, 1)  # matrix, primaries, transfer of BT.709; limited range


def test_colours_come_back_as_they_went_in(tmp_path):
    encoder = Encoder(64, 64, 25, 1, EncoderSettings())
    muxer = Muxer(tmp_path / "a.mp4", encoder.streams, TAGS)
    colour = np.uint8([200, 60, 30])
    frames = np.broadcast_to(colour, (12, 64, 64, 3)).copy()
    muxer.mux(encoder.encode(FrameBlock(frames, SILENCE, 0), tone(12 * 1920)) + encoder.flush())
    muxer.close()
    with av.open(str(tmp_path / "a.mp4")) as container:
        back = next(container.decode(video=0)).to_ndarray(format="rgb24", src_colorspace="ITU709")
    np.testing.assert_allclose(back.mean((0, 1)), colour, atol=3)


def test_the_sound_comes_back_in_time_and_level(tmp_path):
    file = read_mp4(encode(tmp_path / "a.mp4", 2))
    middle = file.sound[9600:86400, 0]
    np.testing.assert_allclose(middle, tone(96_000)[9600:86400, 0], atol=0.05)


def test_sound_beyond_full_scale_is_clipped_not_refused(tmp_path):
    encoder = Encoder(64, 64, 25, 1, EncoderSettings())
    assert encoder.encode(block(0), 9 * tone(12 * 1920))
    encoder.close()


def test_keyframes_come_as_often_as_asked(tmp_path):
    encode(tmp_path / "a.mp4", 3, settings=EncoderSettings(keyframe_interval_s=1))
    with av.open(str(tmp_path / "a.mp4")) as container:
        keys = [packet.pts * packet.time_base for packet in container.demux(video=0) if packet.is_keyframe]
    assert [float(key) for key in keys[:3]] == [0, 1, 2]


def test_packets_are_not_changed_by_a_muxer(tmp_path):
    encoder = Encoder(64, 64, 25, 1, EncoderSettings())
    first, second = (Muxer(tmp_path / name, encoder.streams, TAGS) for name in ("a.mp4", "b.mp4"))
    packets = encoder.encode(block(0, 24), tone(24 * 1920)) + encoder.flush()
    for muxer in (first, second):
        muxer.mux(packets)
        muxer.close()
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_finished_file_has_its_index_first_and_its_tags(tmp_path):
    part, whole = encode(tmp_path / "part.mp4", 2), tmp_path / "whole.mp4"
    rewrite_for_players(part, whole, TAGS)
    names = boxes(whole)
    assert names.index("moov") < names.index("mdat")
    assert "moof" not in names
    metadata = read_mp4(whole).metadata
    assert (metadata["title"], metadata["comment"], metadata["encoder"]) == ("A title", "AI-generated", "avatard 0")


def test_a_part_cut_off_anywhere_plays_up_to_there(tmp_path):
    part = encode(tmp_path / "part.mp4", 6)
    data = part.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) * 2 // 3])
    file = read_mp4(cut, cut_off=True)
    assert 70 <= file.frames <= 150
    assert file.times == pytest.approx([i / 25 for i in range(file.frames)])


def test_the_encoder_keeps_nothing_of_what_it_gave_away():
    encoder = Encoder(64, 64, 25, 1, EncoderSettings())
    given = 0
    for start in range(0, 1200, 12):
        given += sum(1 for packet in encoder.encode(block(start), tone(12 * 1920)) if packet.stream.type == "video")
        assert start + 12 - given <= 12  # what x264 looks ahead at, however long the stream
    encoder.close()
