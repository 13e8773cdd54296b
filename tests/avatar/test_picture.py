"""Pictures as people bring them, to plain RGB that fills the frame."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from avatar.picture import BACKGROUND, PictureError, cover, read_picture


def gradient(width: int = 64, height: int = 48) -> np.ndarray:
    """Red grows to the right, green downwards, blue is steady."""
    pixels = np.zeros((height, width, 3))
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = 90
    return pixels.astype(np.uint8)


def grey(width: int = 64, height: int = 48) -> np.ndarray:
    return np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, axis=0)


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def close(picture: np.ndarray, expected: np.ndarray, mean_error: float = 1.0) -> bool:
    return picture.shape == expected.shape and float(np.abs(picture.astype(int) - expected).mean()) <= mean_error


# Kinds of files and of pixels


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "ppm", "avif", "jp2", "tga", "pcx", "sgi", "dds", "qoi"]
)
def test_every_format_gives_the_same_picture(tmp_path, suffix):
    picture = read_picture(save(tmp_path / f"a.{suffix}", Image.fromarray(gradient())))
    assert picture.dtype == np.uint8
    assert close(picture, gradient(), mean_error=10 if suffix == "gif" else 3)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGBA", "png"),
        ("P", "png"),
        ("PA", "tiff"),
        ("RGBX", "tiff"),
        ("CMYK", "jpg"),
        ("CMYK", "tiff"),
        ("YCbCr", "jpg"),
        ("LAB", "tiff"),
    ],
)
def test_every_colour_mode_gives_the_same_picture(tmp_path, mode, suffix):
    image = Image.fromarray(gradient())
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode in ("P", "PA"):
        image = image.convert("P", palette=Image.Palette.ADAPTIVE).convert(mode)
    else:
        image = image.convert(mode)
    assert close(read_picture(save(tmp_path / f"a.{suffix}", image)), gradient(), mean_error=12 if "P" in mode else 3)


GREYS = {
    "L": Image.fromarray(grey()),
    "LA": Image.fromarray(grey()).convert("LA"),
    "I;16": Image.fromarray(grey().astype(np.uint16) * 257),
    "I": Image.fromarray(grey().astype(np.int32) * 257),
    "I of 24 bits": Image.fromarray(grey().astype(np.int32) * 65_793),
    "F": Image.fromarray(grey().astype(np.float32) / 255),
    "F, brighter than 1": Image.fromarray(grey().astype(np.float32) / 25.5),
}


@pytest.mark.parametrize("mode", GREYS)
def test_every_depth_of_grey_gives_the_same_picture(tmp_path, mode):
    picture = read_picture(save(tmp_path / "a.tiff", GREYS[mode]))
    assert close(picture, grey()[..., None].repeat(3, axis=2))


def test_sixteen_bits_big_endian_are_scaled(tmp_path):
    raw = (grey().astype(">u2") * 257).tobytes()
    path = save(tmp_path / "a.tiff", Image.frombytes("I;16B", (64, 48), raw))
    assert close(read_picture(path), grey()[..., None].repeat(3, axis=2))


def test_sixteen_bit_colour_is_scaled(tmp_path):
    rows = b"".join(b"\0" + row.tobytes() for row in gradient().astype(">u2") * 257)

    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (64).to_bytes(4, "big") + (48).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert close(read_picture(tmp_path / "a.png"), gradient())


def test_one_bit_is_black_and_white(tmp_path):
    picture = read_picture(save(tmp_path / "a.png", Image.fromarray(grey() > 127)))
    assert set(np.unique(picture)) == {0, 255}


def test_floats_that_are_not_numbers_are_black(tmp_path):
    values = np.full((20, 20), 0.5, np.float32)
    values[0] = np.nan
    picture = read_picture(save(tmp_path / "a.tiff", Image.fromarray(values)))
    assert not picture[0].any()
    assert (picture[1:] == 128).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], duration=100)
    assert close(read_picture(path), np.full((32, 32, 3), (255, 0, 0)), mean_error=3)


# As it is meant to be seen


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(tmp_path, suffix, orientation):
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(gradient())
    if orientation in turn:
        stored = stored.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", stored, exif=exif)
    assert close(read_picture(path), gradient(), mean_error=3)


def test_broken_exif_does_not_matter(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(gradient()), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert close(read_picture(path), gradient(), mean_error=3)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_transparency_shows_the_background(tmp_path, suffix):
    pixels = np.dstack([gradient(), np.full((48, 64), 255, np.uint8)])
    pixels[:, :32, 3] = 0
    pixels[:, :32, :3] = 0
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(pixels), **({"lossless": True} if suffix == "webp" else {}))
    picture = read_picture(path)
    assert (picture[:, :32] == BACKGROUND).all()
    assert close(picture[:, 32:], gradient()[:, 32:])
    assert (read_picture(path, background=(0, 255, 0))[:, :32] == (0, 255, 0)).all()


def test_half_transparency_is_half_the_background(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGBA", (20, 20), (255, 0, 128, 128)))
    np.testing.assert_allclose(read_picture(path)[5, 5], (192, 64, 128), atol=1)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_declared_transparent_shows_the_background(tmp_path, mode):
    image = Image.new("RGB", (20, 20), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 20))
    image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2) if mode == "P" else image.convert(mode)
    transparent = image.getpixel((0, 0))
    picture = read_picture(save(tmp_path / "a.png", image, transparency=transparent))
    assert (picture[:, :10] == BACKGROUND).all()
    assert (picture[:, 10:] == 255).all()


def test_a_colour_profile_is_applied(tmp_path):
    # a profile whose red and blue are exchanged, as made from sRGB's own
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = int.from_bytes(profile[128:132], "big")
    tags = {profile[132 + 12 * i : 136 + 12 * i]: 132 + 12 * i for i in range(count)}
    swapped = bytearray(profile)
    swapped[tags[b"rXYZ"] : tags[b"rXYZ"] + 4], swapped[tags[b"bXYZ"] : tags[b"bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    path = save(tmp_path / "a.png", Image.new("RGB", (20, 20), (255, 0, 0)), icc_profile=bytes(swapped))
    red, _, blue = read_picture(path)[5, 5]
    assert blue > 240
    assert red < 15


def test_a_broken_colour_profile_does_not_matter(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(gradient()), icc_profile=b"nothing of the kind" * 20)
    assert close(read_picture(path), gradient())


def test_a_very_large_picture_is_reduced_while_it_is_read(tmp_path):
    image = Image.fromarray(gradient(50, 10)).resize((8400, 1680), Image.Resampling.NEAREST)
    for name in ("a.jpg", "a.png"):
        picture = read_picture(save(tmp_path / name, image))
        assert picture.shape == (840, 4200, 3)
        assert close(picture[42::84, 42::84], gradient(50, 10), mean_error=2)


# What cannot be used


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def noise(folder: Path, suffix: str, cut: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return written(folder / f"a.{suffix}", whole.getvalue()[:cut])


BAD = {
    "missing": (lambda folder: folder / "none.png", "no such file; check the path"),
    "folder": (lambda folder: folder, "is a folder; name one picture"),
    "device": (lambda folder: Path("/dev/null"), "is a pipe or a device; save the picture"),
    "long name": (lambda folder: folder / ("x" * 300), "cannot be read .*; check the path"),
    "empty": (lambda folder: written(folder / "a.png", b""), r"is empty \(0 bytes\); save the picture again"),
    "text": (lambda folder: written(folder / "a.png", b"hello " * 99), "is not a picture that can be read; save it"),
    "film": (lambda folder: written(folder / "a.mp4", b"\0\0\0 ftypisom" + bytes(99)), "is a video or sound, not"),
    "sound": (
        lambda folder: written(folder / "a.wav", b"RIFF\0\0\0\0WAVEfmt " + bytes(99)),
        "is a video or sound, not",
    ),
    "HEIC": (lambda folder: written(folder / "a.heic", b"\0\0\0 ftypheic" + bytes(99)), "HEIC.*save it as JPEG or PNG"),
    "SVG": (lambda folder: written(folder / "a.svg", b"<svg xmlns='x'/>"), "vector drawing.*save it as JPEG or PNG"),
    "PostScript": (lambda folder: written(folder / "a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "is a document"),
    "cut JPEG": (
        lambda folder: noise(folder, "jpg", 5000),
        r"\(JPEG\) is damaged or cut off.*; copy or export it again",
    ),
    "cut PNG": (lambda folder: noise(folder, "png", 5000), r"\(PNG\) is damaged or cut off.*; copy or export it again"),
    "cut WebP": (lambda folder: noise(folder, "webp", 2000), "(damaged or cut off|is not a picture|is a video).*; "),
    "one pixel": (lambda folder: save(folder / "a.png", Image.new("RGB", (1, 1))), "1x1 is too small.*use a larger"),
    "narrow": (
        lambda folder: save(folder / "a.png", Image.new("RGB", (15, 40))),
        "15x40 is too small, under 16 pixels",
    ),
    "banner": (
        lambda folder: save(folder / "a.png", Image.new("RGB", (900, 100))),
        "900x100 is longer than 5 to 1; crop",
    ),
    "bomb": (
        lambda folder: save(folder / "a.png", Image.new("1", (10_000, 9000))),
        "10000x9000 is 90 million pixels, over 80 million; scale it down",
    ),
    "larger bomb": (
        lambda folder: save(folder / "a.png", Image.new("1", (20_000, 20_000))),
        "over 80 million pixels; scale it down",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used_is_told_in_one_line_with_its_name_and_a_remedy(tmp_path, kind, recwarn):
    make, says = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(PictureError, match=says) as caught:
        read_picture(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not recwarn.list


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "a.png", Image.new("RGB", (32, 32)))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        PictureError, match=r"a\.png: cannot be read \(permission denied\); check the path and its perm"
    ):
        read_picture(path)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("RGB", (400, 300)))
    Image.init()  # loads a picture of its own
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(PictureError, match=r"over 0\.1 million"):
        read_picture(path, max_pixels=100_000)


# Filling the frame


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (64, 64), (200, 50), (50, 200), (256, 256), (333, 777)])
@pytest.mark.parametrize("target", [(256, 256), (704, 384), (384, 704), (31, 17)])
def test_a_picture_fills_any_frame_without_a_border(size, target):
    width, height = size
    picture = cover(np.full((height, width, 3), (200, 30, 90), np.uint8), *target)
    assert picture.shape == (target[1], target[0], 3)
    assert picture.dtype == np.uint8
    assert (picture == (200, 30, 90)).all()


def test_what_is_too_wide_loses_the_same_on_both_sides():
    picture = cover(gradient(192, 64), 64, 64)
    np.testing.assert_array_equal(picture, gradient(192, 64)[:, 64:128])


def test_what_is_too_high_loses_more_below_than_above():
    tall = gradient(64, 164)
    np.testing.assert_array_equal(cover(tall, 64, 64), tall[35:99])
    np.testing.assert_array_equal(cover(tall, 64, 64, top=0.5), tall[50:114])
    np.testing.assert_array_equal(cover(tall, 64, 64, top=0.0), tall[:64])


def test_a_picture_of_the_right_size_is_not_changed():
    np.testing.assert_array_equal(cover(gradient(), 64, 48), gradient())


def test_fine_stripes_shrink_to_grey_without_a_moire():
    stripes = np.zeros((1000, 1000, 3), np.uint8)
    stripes[:, ::2] = 255
    small = cover(stripes, 128, 128)
    assert np.abs(small[8:-8, 8:-8].astype(int) - 127).max() <= 6


def test_a_circle_stays_round():
    y, x = np.mgrid[:300, :500]
    disc = (((x - 250) ** 2 + (y - 150) ** 2) < 100**2).astype(np.uint8)[..., None].repeat(3, axis=2) * 255
    rows, columns = np.nonzero(cover(disc, 256, 256)[..., 0] > 127)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
