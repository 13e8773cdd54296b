"""Decoding: every kind of file and byte stream to mono samples, and a line to mend by for what cannot be used."""

from __future__ import annotations

import struct
import tracemalloc
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.decode import (
    AudioError,
    PcmDecoder,
    PcmFormat,
    SoundFile,
    mix_matrix,
    open_sound,
)

RATE = 16_000
FRAME = RATE // 25


def voice(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """float32 [n, channels]: a tone that swells and falls, so that a shift in time is seen."""
    t = np.arange(round(seconds * rate)) / rate
    tone = (
        0.5 * np.sin(2 * np.pi * 300 * t + 20 * np.sin(2 * np.pi * 0.7 * t)) * (0.6 + 0.4 * np.sin(2 * np.pi * 2 * t))
    )
    return np.repeat(tone[:, None], channels, axis=1).astype(np.float32)


def encode(path: Path, samples: np.ndarray, rate: int, codec: str, layout: str, pictures: bool = False) -> Path:
    """Write samples [n, channels] with any encoder of FFmpeg, with a picture track beside it if wanted."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, width=64, height=64, pix_fmt="yuv420p") if pictures else None
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if video is not None:
            for _ in range(round(len(samples) / rate * 25)):
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
            container.mux(video.encode(None))
        frame_size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, frame_size=frame_size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for part in resampler.resample(frame) + resampler.resample(None):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def decoded(sound: SoundFile, rate: int = RATE) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32)] + [chunk.samples for chunk in sound.chunks(rate)])


def lag(samples: np.ndarray, truth: np.ndarray, reach: int = 1500) -> int:
    """By how many samples `samples` comes late."""
    middle = slice(reach, min(len(samples), len(truth)) - reach)
    shifts = range(-reach, reach)
    return max(shifts, key=lambda d: float(np.dot(truth[middle], samples[middle.start + d : middle.stop + d])))


# Files in good order

CODECS = [  # (file, encoder, rate, layout, channels)
    ("a.mp3", "libmp3lame", 44_100, "stereo", 2),
    ("b.mp3", "libmp3lame", 22_050, "mono", 1),
    ("a.opus", "libopus", 48_000, "stereo", 2),
    ("a.ogg", "libopus", 48_000, "mono", 1),
    ("a.m4a", "aac", 44_100, "mono", 1),
    ("b.m4a", "alac", 48_000, "stereo", 2),
    ("a.mp4", "aac", 48_000, "5.1", 6),
    ("b.mp4", "aac", 48_000, "7.1", 8),
    ("c.mkv", "flac", 48_000, "7.1", 8),
    ("d.mkv", "libopus", 48_000, "7.1", 8),
    ("a.mov", "pcm_s16be", 48_000, "stereo", 2),
    ("a.mkv", "libopus", 48_000, "mono", 1),
    ("b.mkv", "aac", 44_100, "stereo", 2),
    ("a.webm", "libopus", 48_000, "stereo", 2),
    ("a.flac", "flac", 96_000, "stereo", 2),
    ("b.flac", "flac", 8_000, "mono", 1),
    ("a.wav", "pcm_alaw", 8_000, "mono", 1),
    ("b.wav", "pcm_mulaw", 8_000, "mono", 1),
    ("c.wav", "pcm_s64le", 48_000, "mono", 1),
    ("a.au", "pcm_s16be", 44_100, "mono", 1),
]


@pytest.mark.parametrize(("name", "codec", "rate", "layout", "channels"), CODECS, ids=[case[0] for case in CODECS])
def test_every_codec_gives_the_sound_at_its_time_and_length(tmp_path, name, codec, rate, layout, channels):
    sound = open_sound(encode(tmp_path / name, voice(3.3, rate, channels), rate, codec, layout))
    samples = decoded(sound)
    truth = voice(3.3, RATE)[:, 0]
    assert (sound.sample_rate, sound.channels) == (rate, channels)
    assert sound.declared_s == pytest.approx(3.3, abs=0.04)
    assert abs(len(samples) - len(truth)) < FRAME
    assert lag(samples, truth) == 0
    assert np.quantile(np.abs(samples[: len(truth)] - truth[: len(samples)]), 0.95) < 0.1
    assert sound.report.warnings() == []


@pytest.mark.parametrize(("name", "codec"), [("a.aac", "aac"), ("a.ts", "aac"), ("a.flv", "aac"), ("a.ac3", "ac3")])
def test_a_stream_that_does_not_tell_its_encoder_delay_is_within_two_frames(tmp_path, name, codec):
    samples = decoded(open_sound(encode(tmp_path / name, voice(3.3, 48_000, 2), 48_000, codec, "stereo")))
    truth = voice(3.3, RATE)[:, 0]
    assert abs(len(samples) - len(truth)) < 2 * FRAME
    assert 0 <= lag(samples, truth) < 2 * FRAME


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.mov"])
def test_the_sound_of_a_film_is_read(tmp_path, name):
    sound = open_sound(encode(tmp_path / name, voice(2, 48_000, 2), 48_000, "aac", "stereo", pictures=True))
    assert abs(len(decoded(sound)) - 2 * RATE) < FRAME


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_every_sample_format_of_a_wav_is_scaled_alike(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", voice(1, RATE), RATE, subtype=subtype)
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(decoded(open_sound(tmp_path / "a.wav")), expected, atol=1e-6)


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64"])
def test_files_that_other_libraries_wrote_have_their_length(tmp_path, form):
    soundfile.write(tmp_path / "a", voice(1, 44_100, 2), 44_100, format=form)
    assert abs(len(decoded(open_sound(tmp_path / "a"))) - RATE) < 50


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000])
def test_every_rate_has_its_exact_length_and_no_noise(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", voice(1.2345, rate), rate, subtype="FLOAT")
    samples = decoded(open_sound(tmp_path / "a.wav"))
    assert abs(len(samples) - round(1.2345 * RATE)) <= 1
    truth = voice(1.2345, RATE)[: len(samples), 0]
    assert np.abs(samples[: len(truth)] - truth)[500:-500].max() < 1e-3


@pytest.mark.parametrize("channels", range(1, 9))
def test_one_to_eight_channels_are_mixed_without_a_change_of_level(tmp_path, channels):
    soundfile.write(tmp_path / "a.wav", voice(1, RATE, channels), RATE, subtype="FLOAT")
    np.testing.assert_allclose(decoded(open_sound(tmp_path / "a.wav")), voice(1, RATE)[:, 0], atol=1e-6)


def test_decoding_in_chunks_equals_resampling_the_whole(tmp_path):
    whole = np.random.default_rng(0).uniform(-0.2, 0.2, 3 * 44_100).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", whole, 44_100, subtype="FLOAT")
    chunks = list(open_sound(tmp_path / "a.wav").chunks(RATE))
    assert len(chunks) > 10
    np.testing.assert_array_equal(
        np.concatenate([chunk.samples for chunk in chunks]), soxr.resample(whole, 44_100, RATE)
    )


def test_memory_does_not_grow_with_the_length(tmp_path):
    for seconds in (5, 60):
        soundfile.write(tmp_path / f"{seconds}.wav", voice(seconds, 48_000, 2), 48_000)

    def peak(seconds: int) -> int:
        tracemalloc.start()
        for _ in open_sound(tmp_path / f"{seconds}.wav").chunks(RATE):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(5)
    assert peak(60) < 1.2 * peak(5) < 4e6


def test_a_change_of_rate_and_channels_in_mid_file_goes_on(tmp_path):
    parts = [encode(tmp_path / "1.mp3", voice(2, 44_100, 2), 44_100, "libmp3lame", "stereo")]
    parts.append(encode(tmp_path / "2.mp3", voice(2, 22_050), 22_050, "libmp3lame", "mono"))
    both = tmp_path / "both.mp3"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    samples = decoded(open_sound(both))
    assert len(samples) == pytest.approx(4 * RATE, abs=3 * FRAME)
    assert np.abs(samples[-RATE:]).max() > 0.3
    assert len(open_sound(both).original().read(10**9)) == pytest.approx(3 * len(samples), abs=3)


# The mix


def test_stereo_to_mono_is_the_average():
    np.testing.assert_allclose(mix_matrix(("FL", "FR"), 1), [[0.5], [0.5]])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "layout", ["stereo", "2.1", "3.0", "4.0", "5.1", "5.1(side)", "6.1", "7.1", "7.1(wide)", "hexagonal"]
)
def test_full_scale_everywhere_is_full_scale_in_the_mix(layout, channels):
    names = tuple(channel.name for channel in av.AudioLayout(layout).channels)
    matrix = mix_matrix(names, channels)
    assert matrix.shape == (len(names), channels)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=1e-6)


def test_left_stays_left_and_the_centre_is_on_both_sides():
    left, right, centre, lfe, *_ = mix_matrix(("FL", "FR", "FC", "LFE", "BL", "BR"), 2)
    assert left[0] > 0 == left[1]
    assert right[1] > 0 == right[0]
    assert centre[0] == centre[1] > 0
    assert not lfe.any()


def test_channels_without_a_known_place_are_averaged():
    np.testing.assert_allclose(mix_matrix(("AMBI0", "AMBI1", "AMBI2", "AMBI3"), 1), np.full((4, 1), 0.25))


# The original sound, for the listener


def test_the_original_is_aligned_to_what_the_model_hears(tmp_path):
    sound = open_sound(encode(tmp_path / "a.mp3", voice(2.5, 44_100, 2), 44_100, "libmp3lame", "stereo"))
    reader = sound.original()
    original = reader.read(10**9)
    heard = decoded(sound)
    assert (reader.sample_rate, reader.channels) == (48_000, 2)
    assert abs(len(original) - 3 * len(heard)) <= 3
    np.testing.assert_allclose(original[::3].mean(axis=1)[: len(heard)], heard[: len(original[::3])], atol=0.05)


def test_the_original_keeps_left_and_right(tmp_path):
    samples = np.stack([voice(1, 48_000)[:, 0], np.zeros(48_000, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 48_000, subtype="FLOAT")
    np.testing.assert_array_equal(open_sound(tmp_path / "a.wav").original().read(48_000), samples)


def test_a_mono_file_has_a_mono_original(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(1, 48_000), 48_000)
    assert open_sound(tmp_path / "a.wav").original().read(100).shape == (100, 1)


def test_the_reader_gives_what_is_asked_for_then_the_rest_then_nothing(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(1, 48_000), 48_000, subtype="FLOAT")
    reader = open_sound(tmp_path / "a.wav").original()
    parts = [reader.read(23_040) for _ in range(4)]
    assert [len(part) for part in parts] == [23_040, 23_040, 1920, 0]
    np.testing.assert_array_equal(np.concatenate(parts), voice(1, 48_000))


def test_a_closed_reader_gives_no_more(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(9, 48_000), 48_000)
    reader = open_sound(tmp_path / "a.wav").original()
    reader.read(10)
    reader.close()
    assert len(reader.read(10**9)) < 48_000


# Files with something wrong, that can be used all the same


def test_what_is_not_a_number_becomes_silence_and_is_counted(tmp_path):
    samples = voice(1, RATE)[:, 0]
    samples[1000:1010] = np.nan
    samples[2000] = -np.inf
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    sound = open_sound(tmp_path / "a.wav")
    got = decoded(sound)
    assert not got[1000:1010].any()
    assert got[2000] == 0
    assert sound.report.not_numbers == 11
    assert sound.report.warnings() == ["11 samples were NaN or infinite; they are silence now"]


def test_what_is_beyond_full_scale_is_clamped_and_counted(tmp_path):
    samples = voice(1, RATE)[:, 0]
    samples[5:8] = [1.5, -3, 2]
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    sound = open_sound(tmp_path / "a.wav")
    assert decoded(sound)[5:8].tolist() == [1, -1, 1]
    assert sound.report.warnings() == ["3 samples beyond full scale (peak 3) clamped to it"]


def test_integers_stored_as_floats_are_told(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(1, RATE) * 32768, RATE, subtype="FLOAT")
    sound = open_sound(tmp_path / "a.wav")
    decoded(sound)
    assert "divide them by 32768" in sound.report.warnings()[0]


def test_silence_is_used_and_told(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    sound = open_sound(tmp_path / "a.wav")
    assert len(decoded(sound)) == RATE
    assert sound.report.warnings() == ["all silence"]


NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, (10 * 44_100, 1)).astype(np.float32)
DAMAGED = [("a.mp3", "libmp3lame"), ("a.flac", "flac"), ("a.mkv", "aac"), ("a.aac", "aac"), ("a.wav", "pcm_s16le")]


@pytest.mark.parametrize(("name", "codec"), DAMAGED)
def test_of_a_file_that_is_cut_off_the_rest_is_used(tmp_path, name, codec):
    path = encode(tmp_path / name, NOISE, 44_100, codec, "mono")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    sound = open_sound(path)
    assert 5.5 * RATE < len(decoded(sound)) < 6.5 * RATE
    if name != "a.aac":  # says nowhere how long it was to be
        assert any("shorter than the file announces" in line for line in sound.report.warnings())


@pytest.mark.parametrize(("name", "codec"), [*DAMAGED[:2], ("a.m4a", "aac"), ("a.opus", "libopus")])
def test_damage_in_the_middle_is_skipped_and_what_follows_stays_near_its_time(tmp_path, name, codec):
    rate = 48_000 if codec == "libopus" else 44_100
    path = encode(tmp_path / name, voice(10, rate), rate, codec, "mono")
    whole = decoded(open_sound(path))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1500] = np.random.default_rng(1).bytes(1500)
    path.write_bytes(data)
    sound = open_sound(path)
    samples = decoded(sound)
    assert len(samples) == pytest.approx(len(whole), abs=RATE // 2)
    end = min(len(samples), len(whole))
    # an MP3 in pieces has no timestamps of its own: of 1500 bytes, three or four frames, one is told to be lost
    assert lag(samples[end - 2 * RATE : end], whole[end - 2 * RATE : end]) == pytest.approx(0, abs=3 * FRAME)
    assert sound.report.skipped_packets or sound.report.filled_s


@pytest.mark.parametrize("claim", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_from_a_pipe_that_claims_to_be_endless_is_read_to_its_end(tmp_path, claim):
    path = tmp_path / "a.wav"
    soundfile.write(path, voice(1, RATE), RATE)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", claim)
    path.write_bytes(data)
    sound = open_sound(path)
    assert len(decoded(sound)) == RATE
    assert sound.report.warnings() == []


# Files that cannot be used


def picture(path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(path)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def no_samples(path: Path) -> Path:
    soundfile.write(path, np.zeros(0), RATE)
    return path


def without_index(path: Path) -> Path:
    encode(path, voice(1, 48_000), 48_000, "aac", "mono")
    return written(path, path.read_bytes()[:-3000])


BAD = {
    "missing": (lambda folder: folder / "none.wav", "no such file; check the path"),
    "folder": (lambda folder: folder, "is a folder; name one sound file"),
    "device": (lambda folder: Path("/dev/null"), "is a pipe or a device; save the sound"),
    "empty": (lambda folder: written(folder / "a.wav", b""), r"is empty \(0 bytes\); record"),
    "no samples": (lambda folder: no_samples(folder / "a.wav"), r"the audio track is empty \(0 samples\); record"),
    "text": (
        lambda folder: written(folder / "a.wav", b"hello\n" * 999),
        "is not a sound or video file.*save it as WAV",
    ),
    "zeros": (lambda folder: written(folder / "a.mp3", bytes(99_999)), "no sound in it could be decoded.*save it anew"),
    "noise": (
        lambda folder: written(folder / "a.mp3", np.random.default_rng(0).bytes(99_999)),
        "(no sound in it could be decoded|is not a sound or video file).*save it",
    ),
    "picture": (lambda folder: picture(folder / "a.png"), r"there is no sound in it \(only video\); choose a file"),
    "mp4 without its index": (lambda folder: without_index(folder / "a.mp4"), "or it was cut off; save it"),
    "long name": (lambda folder: folder / ("x" * 300), "cannot be read .*; check the path"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used_is_told_in_one_line_with_its_name_and_a_remedy(tmp_path, kind):
    make, says = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(AudioError, match=says) as caught:
        open_sound(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path / "a.wav", b"RIFF")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AudioError, match=r"a\.wav: cannot be read \(permission denied\); check its permissions"):
        open_sound(path)


def test_a_film_without_sound_is_told(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=25, width=64, height=64, pix_fmt="yuv420p")
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(video.encode(None))
    with pytest.raises(AudioError, match=r"a\.mp4: there is no sound in it \(only video\)"):
        open_sound(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\n{path}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
    ],
)
def test_a_playlist_cannot_open_other_files(tmp_path, playlist):
    other = encode(tmp_path / "secret.ts", voice(3, 48_000, 2), 48_000, "aac", "stereo")
    for name in ("list.m3u8", "list.wav"):
        (tmp_path / name).write_text(playlist.format(path=other))
        with pytest.raises(AudioError):
            decoded(open_sound(tmp_path / name))


def test_a_file_over_the_limit_is_refused_before_any_work(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(3, RATE), RATE)
    with pytest.raises(AudioError, match=r"a\.wav: 3 s long, the limit is 2 s; cut it into parts or raise the limit"):
        open_sound(tmp_path / "a.wav", max_duration_s=2)


def test_a_file_that_hides_its_length_is_stopped_at_the_limit(tmp_path):
    path = encode(tmp_path / "a.flac", voice(9, RATE), RATE, "flac", "mono")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO: 36 bits of total samples, zero for unknown
    data[22:26] = bytes(4)
    path.write_bytes(data)
    sound = open_sound(path, max_duration_s=5)
    heard = 0
    with pytest.raises(AudioError, match="more than 5 s long, the limit is 5 s"):  # noqa: PT012
        for chunk in sound.chunks(RATE):
            heard += chunk.samples.size
    assert 4 * RATE < heard <= 5.5 * RATE


def test_a_file_that_vanishes_between_two_passes_is_told(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(1, RATE), RATE)
    sound = open_sound(tmp_path / "a.wav")
    sound.path.unlink()
    with pytest.raises(AudioError, match="no such file"):
        next(sound.chunks(RATE))


# Bytes of PCM

WAV_CODECS = {
    "s16le": "pcm_s16le",
    "s24le": "pcm_s24le",
    "s32le": "pcm_s32le",
    "f32le": "pcm_f32le",
    "u8": "pcm_u8",
    "mulaw": "pcm_mulaw",
    "alaw": "pcm_alaw",
}


def pcm_of(path: Path) -> bytes:
    data = path.read_bytes()
    at = data.index(b"data")
    return data[at + 8 : at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("encoding", WAV_CODECS)
def test_pcm_bytes_give_what_a_wav_of_them_gives(tmp_path, encoding, channels):
    layout = {1: "mono", 2: "stereo"}[channels]
    path = encode(tmp_path / "a.wav", voice(0.5, RATE, channels), RATE, WAV_CODECS[encoding], layout)
    chunk = PcmDecoder(PcmFormat(encoding, RATE, channels), RATE).feed(pcm_of(path))
    assert chunk.sample_rate == RATE
    np.testing.assert_allclose(chunk.samples, decoded(open_sound(path)), atol=1e-7)


@pytest.mark.parametrize(("encoding", "codec"), [("mulaw", "pcm_mulaw"), ("alaw", "pcm_alaw")])
def test_all_256_codes_of_g711_are_those_of_ffmpeg(encoding, codec):
    codes = bytes(range(256))
    context = av.CodecContext.create(codec, "r")
    context.sample_rate, context.layout = RATE, "mono"
    (frame,) = context.decode(av.Packet(codes))
    expected = frame.to_ndarray()[0].astype(np.float32) / 32768
    np.testing.assert_array_equal(PcmDecoder(PcmFormat(encoding, RATE), RATE).feed(codes).samples, expected)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 4800), max_size=20), encoding=st.sampled_from(list(WAV_CODECS)))
def test_bytes_cut_anywhere_give_the_same_samples(cuts, encoding):
    data = np.random.default_rng(0).integers(0, 60, 4800, dtype=np.uint8).tobytes()
    pcm = PcmFormat(encoding, 8000, 2)

    def decode(pieces: list[bytes]) -> np.ndarray:
        decoder = PcmDecoder(pcm, RATE)
        chunks = [decoder.feed(piece) for piece in pieces] + [decoder.flush()]
        return np.concatenate([chunk.samples for chunk in chunks])

    edges = [0, *sorted(cuts), len(data)]
    whole = decode([data])
    np.testing.assert_array_equal(decode([data[a:b] for a, b in pairwise(edges)]), whole)
    assert len(whole) == len(data) // pcm.bytes_per_frame * 2


def test_pcm_floats_that_are_not_numbers_become_silence():
    data = np.array([np.nan, np.inf, 2.0, 0.25], "<f4").tobytes()
    decoder = PcmDecoder(PcmFormat("f32le", RATE), RATE)
    assert decoder.feed(data).samples.tolist() == [0, 0, 1, 0.25]
    assert (decoder.report.not_numbers, decoder.report.clamped) == (2, 1)


def test_a_decoder_serves_a_second_utterance_after_flush():
    decoder = PcmDecoder(PcmFormat("s16le", 8000), RATE)
    for _ in range(2):
        got = [decoder.feed(bytes(1601)), decoder.flush()]
        assert sum(chunk.samples.size for chunk in got) == 1600


@pytest.mark.parametrize(("rate", "held_s"), [(8000, 0.0021), (16_000, 0.0011), (44_100, 0.00037), (48_000, 0.0)])
def test_a_live_decoder_holds_little_back_and_always_as_much(rate, held_s):
    decoder = PcmDecoder(PcmFormat("s16le", rate), 48_000, live=True)
    came = given = 0.0
    for number in range(200):
        given += decoder.feed(bytes(rate // 50 * 2)).samples.size / 48_000
        came += rate // 50 / rate
        assert came - given <= held_s
        assert number < 10 or came - given >= 0.9 * held_s
    given += decoder.flush().samples.size / 48_000
    assert given == pytest.approx(came, abs=0.001)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 96_000, 192_000])
@pytest.mark.parametrize("samples", [1, 16, 31, 100])
def test_a_live_decoder_gives_all_of_a_short_sound(rate, samples):
    decoder = PcmDecoder(PcmFormat("s16le", rate), 48_000, live=True)
    got = decoder.feed(bytes(2 * samples)).samples.size + decoder.flush().samples.size
    assert got == pytest.approx(samples * 48_000 / rate, abs=0.5)
    assert decoder.flush().samples.size == 0


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 96_000])
def test_a_live_decoder_gives_the_same_sound(rate):
    truth = voice(2.0, rate)[:, 0]
    data = (truth * 2**15).astype("<i2").tobytes()
    usual, live = (PcmDecoder(PcmFormat("s16le", rate), 48_000, live=live) for live in (False, True))
    expected = np.concatenate([usual.feed(data).samples, usual.flush().samples])
    chunks = [live.feed(data[i : i + 777]).samples for i in range(0, len(data), 777)]
    got = np.concatenate([*chunks, live.flush().samples])
    assert len(got) == pytest.approx(len(expected), abs=2)
    middle = slice(2000, len(expected) - 2000)
    assert np.abs(got[middle] - expected[middle]).max() < 0.05  # they differ by up to 0.04 ms in time


def test_in_a_pause_what_was_held_back_comes_out_and_half_a_sample_still_waits():
    decoder = PcmDecoder(PcmFormat("s16le", 16_000), 48_000, live=True)
    samples = decoder.feed(bytes(3201)).samples.size + decoder.pause().samples.size
    assert samples == 4800
    loud = np.full(1600, 2**14, "<i2").tobytes()
    after = np.concatenate([decoder.feed(loud[1:]).samples, decoder.flush().samples])
    assert after[300:4000] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("s16le:16000:1", PcmFormat("s16le", 16_000, 1)),
        ("S24LE:48000:2", PcmFormat("s24le", 48_000, 2)),
        ("mulaw:8000", PcmFormat("mulaw", 8000, 1)),
        ("f32le", PcmFormat("f32le", 16_000, 1)),
    ],
)
def test_a_pcm_format_is_read_from_text(text, parsed):
    assert PcmFormat.parse(text) == parsed
    assert PcmFormat.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s16be:16000:1", r"PCM format 's16be': unknown; did you mean 's16le'\? There are s16le, s24le"),
        ("pcm_f32:16000", r"did you mean 'f32le'\?"),
        ("wav", "PCM format 'wav': unknown; use one of s16le, s24le"),
        ("s16le:fast", "PCM format 's16le:fast': not encoding:rate:channels, such as s16le:16000:1"),
        ("s16le:16000:1:2", "not encoding:rate:channels"),
        ("s16le:0", "PCM sample rate 0: not within 1000 and 768000 Hz"),
        ("s16le:16000:0", "PCM channels 0: not within 1 and 64"),
        ("", "PCM format '': unknown"),
    ],
)
def test_a_wrong_pcm_format_is_told_in_one_line(text, says):
    with pytest.raises(AudioError, match=says):
        PcmFormat.parse(text)
