"""Encoder and Muxer: what a block of frames and its sound become, read back from the file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from mp4 import boxes, clicks_at, read_mp4

from avatar.model import FrameBlock
from streaming.encoder import Encoder, EncoderSettings
from streaming.muxer import FLV, ByteBuffer, Muxer, rewrite_for_players

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


LIVE = EncoderSettings(live=True, preset="ultrafast", bitrate_kbps=500)


def frame_by_frame(
    encoder: Encoder, frames: int, size: tuple[int, int] = (64, 64), wanted: tuple[int, ...] = ()
) -> list:
    """The packets of a noisy picture that comes frame by frame: a list for each frame, and one for the end."""
    rng = np.random.default_rng(0)
    given = []
    for number in range(frames):
        if number in wanted:
            encoder.want_keyframe()
        picture = rng.integers(60, 140, (1, *size, 3), np.uint8)
        packets = encoder.encode(FrameBlock(picture, SILENCE, number), tone(1920))
        given.append([packet for packet in packets if packet.stream.type == "video"])
    return [*given, [packet for packet in encoder.flush() if packet.stream.type == "video"]]


def test_a_live_frame_leaves_as_soon_as_it_came():
    given = frame_by_frame(Encoder(64, 64, 25, 1, LIVE), 100)
    assert [len(packets) for packets in given] == [1] * 100 + [0]
    assert [packets[0].pts for packets in given[:100]] == list(range(100))


def test_keyframes_come_every_two_seconds_and_when_they_are_asked_for():
    given = frame_by_frame(Encoder(64, 64, 25, 1, LIVE), 160, wanted=(30, 31))
    assert [n for n, packets in enumerate(given) if packets and packets[0].is_keyframe] == [0, 30, 31, 81, 131]


def test_a_keyframe_that_is_asked_for_is_one_a_decoder_can_begin_with(tmp_path):
    encoder = Encoder(64, 64, 25, 1, LIVE)
    muxer = Muxer(tmp_path / "a.mp4", encoder.streams, TAGS)
    packets = [packet for packets in frame_by_frame(encoder, 60, wanted=(20,)) for packet in packets]
    muxer.mux([packet for packet in packets if packet.pts >= 20])
    muxer.close()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for frame in container.decode(video=0)) == 40


def test_a_bit_rate_is_kept_over_every_second_however_busy_the_picture():
    sizes = [8 * packets[0].size for packets in frame_by_frame(Encoder(256, 256, 25, 1, LIVE), 250, (256, 256))[:-1]]
    seconds = np.convolve(sizes, np.ones(25), "valid")
    # A second of its rate, and what it had saved up.
    assert seconds.max() < 2 * 500_000
    assert sum(sizes) / 10 == pytest.approx(500_000, rel=0.15)


@pytest.mark.parametrize(
    ("wanted", "size", "seen"),
    [
        ({"width": 96}, (96, 48), (128, 64)),
        ({"height": 32}, (64, 32), (128, 64)),
        ({"width": 64, "height": 64}, (64, 64), (64, 64)),
        ({"width": 128, "height": 36}, (128, 36), (128, 36)),
        ({"width": 75, "height": 37}, (76, 36), (128, 61)),
    ],
)
def test_a_rendition_is_scaled_and_cropped_evenly_and_never_stretched(wanted, size, seen):
    encoder = Encoder(128, 64, 25, 1, EncoderSettings(crf=1, **wanted))
    assert (encoder.width, encoder.height) == size
    # A circle stays one, of the size that the part of the picture that is seen says.
    y, x = np.mgrid[0:64, 0:128]
    picture = np.where(((x - 63.5) ** 2 + (y - 31.5) ** 2 < 15**2)[..., None], 240, 20).astype(np.uint8)
    picture = np.repeat(picture, 3, 2)
    packets = encoder.encode(FrameBlock(picture[None], SILENCE, 0), tone(1920)) + encoder.flush()
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata = encoder.streams[0].codec_context.extradata
    video = [packet for packet in packets if packet.stream.type == "video"]
    frames = [frame for packet in [*video, None] for frame in decoder.decode(packet)]
    bright = frames[0].to_ndarray(format="gray") > 120
    assert bright.shape == (size[1], size[0])
    width, height = bright.any(0).sum(), bright.any(1).sum()
    assert width == pytest.approx(30 * size[0] / seen[0], abs=1.5)
    assert height == pytest.approx(30 * size[1] / seen[1], abs=1.5)
    assert np.argwhere(bright).mean(0) == pytest.approx(np.subtract(bright.shape, 1) / 2, abs=1)


@pytest.mark.parametrize("fps", [10, 24, 25, 30, 50, 60])
def test_at_another_frame_rate_each_frame_is_the_newest_of_its_time(fps):
    encoder = Encoder(64, 64, 25, 1, EncoderSettings(live=True, crf=10, fps=fps))
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata = encoder.streams[0].codec_context.extradata
    shown = []
    for number in range(50):
        picture = np.full((1, 64, 64, 3), 20 + 4 * number, np.uint8)
        for packet in encoder.encode(FrameBlock(picture, SILENCE, number), tone(1920)):
            if packet.stream.type == "video":
                assert packet.pts == len(shown)
                assert packet.time_base == Fraction(1, fps)
                shown += [round((float(f.to_ndarray(format="rgb24").mean()) - 20) / 4) for f in decoder.decode(packet)]
    shown += [round((float(f.to_ndarray(format="rgb24").mean()) - 20) / 4) for f in decoder.decode(None)]
    assert len(shown) == 2 * fps
    assert shown == pytest.approx([i * 25 // fps for i in range(2 * fps)], abs=1)


def test_one_voice_may_be_sent_as_two_equal_channels(tmp_path):
    file = read_mp4(encode(tmp_path / "a.mp4", 1, settings=EncoderSettings(channels=2)))
    assert file.sound.shape[1] == 2
    np.testing.assert_allclose(file.sound[4800:43_200, 0], file.sound[4800:43_200, 1], atol=0.02)
    np.testing.assert_allclose(file.sound[4800:43_200, 1], tone(48_000)[4800:43_200, 0], atol=0.05)


def test_two_channels_may_be_sent_as_one(tmp_path):
    file = read_mp4(encode(tmp_path / "a.mp4", 1, channels=2, settings=EncoderSettings(channels=1)))
    assert file.sound.shape[1] == 1
    np.testing.assert_allclose(file.sound[4800:43_200, 0], tone(48_000)[4800:43_200, 0], atol=0.05)


def test_a_codec_that_the_machine_does_not_have_is_replaced_and_that_is_told(monkeypatch, caplog):
    import streaming.encoder as module

    module._opens.cache_clear()
    monkeypatch.setattr(module.av, "open", broken_open := BrokenOpen(module.av.open))
    encoder = Encoder(64, 64, 25, 1, EncoderSettings(codec="h264_nvenc", live=True))
    monkeypatch.undo()
    module._opens.cache_clear()
    assert broken_open.asked
    assert encoder.codec == "libx264"
    assert "h264_nvenc does not encode on this machine" in caplog.text
    assert frame_by_frame(encoder, 3)[0]


class BrokenOpen:
    """`av.open` on a machine without the chip: the first container, which tries it, fails."""

    def __init__(self, real) -> None:
        self.real, self.asked = real, 0

    def __call__(self, *arguments, **options):
        self.asked += 1
        if self.asked == 1:
            raise av.error.PermissionError(1, "Operation not permitted")
        return self.real(*arguments, **options)


@pytest.mark.parametrize("container", ["mp4", "flv"])
def test_what_begins_in_mid_stream_begins_at_zero_with_sound_and_picture_as_far_apart_as_they_were(tmp_path, container):
    encoder = Encoder(64, 64, 25, 1, LIVE)
    times = [4.6, 5.4, 6.2, 7.0]
    sound = clicks_at(times, 8, 48_000)[:, None]
    path, late = tmp_path / f"a.{container}", False
    buffer = ByteBuffer()
    muxer = (
        Muxer(buffer, encoder.streams, TAGS, "flv", FLV) if container == "flv" else Muxer(path, encoder.streams, TAGS)
    )
    packets = []
    for number in range(200):
        bright = any(abs(number / 25 - time) < 0.01 for time in times)
        picture = np.full((1, 64, 64, 3), 250 if bright else 60, np.uint8)
        packets += encoder.encode(FrameBlock(picture, SILENCE, number), sound[number * 1920 : (number + 1) * 1920])
    for packet in packets + encoder.flush():
        late = late or (packet.stream.type == "video" and packet.pts == 100)
        if late:
            muxer.mux([packet])
    muxer.close()
    if container == "flv":
        path.write_bytes(buffer.take())
    file = read_mp4(path)
    assert file.times == pytest.approx([n / 25 for n in range(100)], abs=0.001)
    assert file.flashes() == pytest.approx([time - 4 for time in times], abs=0.001)
    assert file.clicks() == pytest.approx(file.flashes(), abs=0.0015)
