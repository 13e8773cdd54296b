"""The picture of the person: any file Pillow opens, to plain RGB of the size the model draws."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from audio.errors import AvatardError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 80_000_000  # 240 MB as RGB; Pillow itself warns from 89 million
LEAST_SIDE = 16
MOST_ASPECT = 5.0
WORK_SIDE = 4096  # no model draws more: what is larger is halved while it is read
BAND_ROWS = 256
BACKGROUND = (128, 128, 128)
REFUSED_FORMATS = {"EPS"}  # Pillow would start Ghostscript on it


class PictureError(AvatardError):
    """The picture cannot be used; the line says why and what to do."""


def read_picture(
    path: str | os.PathLike[str],
    background: tuple[int, int, int] = BACKGROUND,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Read a picture as it is meant to be seen: uint8 [H, W, 3], sRGB.

    Turned upright by its EXIF orientation; colours brought to sRGB by its ICC profile; transparency laid on
    `background`, a middle grey, which suits light and dark people alike; of an animation the first frame; 16 bits
    scaled to 8, floats from [0, 1] (brighter than 1: so that the brightest fits). A picture with a side of over
    WORK_SIDE comes out reduced by a whole number.

    Raises: PictureError: missing, a folder, unreadable, empty, no picture, damaged or cut off, under LEAST_SIDE
    pixels a side, longer than MOST_ASPECT to one, or more than max_pixels (looked up before anything is decoded).
    """
    path = Path(path)
    with _open(path) as file:
        head = file.read(512)
        if not head:
            raise PictureError(f"{path}: is empty (0 bytes); save the picture again")
        file.seek(0)
        with warnings.catch_warnings():
            # Pillow's own warning about size: max_pixels decides. Its others are about metadata nobody reads.
            warnings.simplefilter("ignore")
            try:
                image: Image.Image = Image.open(file, formats=_formats())
            except Image.DecompressionBombError as error:
                raise PictureError(f"{path}: over {max_pixels / 1e6:g} million pixels; scale it down") from error
            except Exception as error:  # decoders raise whatever a damaged file leads them to
                raise PictureError(f"{path}: {_what_it_is(head)}; save it as JPEG or PNG") from error
            with image:
                _check_size(image, path, max_pixels)
                try:
                    return _upright_rgb(image, background)
                except Exception as error:  # as above
                    reason = " ".join(str(error).split())
                    raise PictureError(
                        f"{path}: the picture ({image.format}) is damaged or cut off ({reason}); "
                        "copy or export it again"
                    ) from error


def cover(image: Pixels, width: int, height: int, top: float = 0.35) -> Pixels:
    """Scale and crop a picture to fill width x height, never padded, never stretched: uint8 [height, width, 3].

    What is too wide loses the same on both sides. What is too high loses the share `top` of the surplus above and the
    rest below (0.5 would be the centre): in a portrait the face is above the centre. Lanczos, also when it shrinks.
    """
    have_height, have_width = image.shape[:2]
    scale = max(width / have_width, height / have_height)
    crop_width, crop_height = min(width / scale, have_width), min(height / scale, have_height)
    left, upper = (have_width - crop_width) / 2, (have_height - crop_height) * top
    box = (left, upper, min(left + crop_width, have_width), min(upper + crop_height, have_height))
    if (crop_width, crop_height) == (width, height):
        box = tuple(float(round(edge)) for edge in box)  # type: ignore[assignment]  # pixels stay what they are
    # reducing_gap: a large picture is averaged by whole numbers first, to three times the size: as good, much faster
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.array(resized, np.uint8)


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise PictureError(f"{path}: is a folder; name one picture in it")
        if not path.exists():
            raise PictureError(f"{path}: no such file; check the path of the picture")
        if not path.is_file():
            raise PictureError(f"{path}: is a pipe or a device; save the picture to a file first")
        return path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"{path}: cannot be read ({reason.lower()}); check the path and its permissions") from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in REFUSED_FORMATS)


def _what_it_is(head: bytes) -> str:
    """What a file that Pillow cannot open is, as far as its first bytes tell."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"heim", b"hevc"):
        return "is a HEIC picture, which cannot be read here"
    if head[4:8] == b"ftyp" or head[:4] in (b"\x1aE\xdf\xa3", b"RIFF"):
        return "is a video or sound, not a picture"
    if head.lstrip().startswith((b"<svg", b"<?xml")):
        return "is a vector drawing (SVG), not a picture of pixels"
    if head.startswith((b"%PDF", b"%!PS")):
        return "is a document, not a picture"
    return "is not a picture that can be read"


def _check_size(image: Image.Image, path: Path, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(
            f"{path}: {width}x{height} is {width * height / 1e6:.0f} million pixels, "
            f"over {max_pixels / 1e6:g} million; scale it down"
        )
    if min(width, height) < LEAST_SIDE:
        raise PictureError(
            f"{path}: {width}x{height} is too small, under {LEAST_SIDE} pixels a side; "
            "use a larger picture of the person"
        )
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise PictureError(
            f"{path}: {width}x{height} is longer than {MOST_ASPECT:g} to 1; crop it to the person's head and shoulders"
        )


def _upright_rgb(image: Image.Image, background: tuple[int, int, int]) -> Pixels:
    profile: bytes | None = image.info.get("icc_profile")
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (WORK_SIDE, WORK_SIDE))  # JPEG can decode to a half or a quarter, in that share of the time
    image.load()
    _turn_upright(image)
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if (reduction := max(image.size) // WORK_SIDE) > 1:
        image = image.reduce(reduction)

    alpha = None
    if image.mode in ("LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    image = _srgb(image, profile)
    if alpha is not None:
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=alpha)
        image = canvas
    return np.array(image, np.uint8)


def _turn_upright(image: Image.Image) -> None:
    """In place: most pictures stand upright, and would be copied for nothing."""
    with contextlib.suppress(Exception):  # broken EXIF is no reason to refuse the picture
        ImageOps.exif_transpose(image, in_place=True)


def _eight_bit(image: Image.Image) -> Image.Image:
    """One channel of 16 or 32 bits, or of floats, to mode L; in bands, since numbers to count with are wide."""
    whole = np.asarray(image)
    bands = [slice(top, top + BAND_ROWS) for top in range(0, len(whole), BAND_ROWS)]

    def values(band: slice) -> NDArray[np.float64]:
        return np.nan_to_num(whole[band].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)

    brightest = max((float(values(band).max(initial=0.0)) for band in bands), default=0.0)
    if image.mode == "F":
        full = max(brightest, 1.0)
    elif image.mode.startswith("I;16"):
        full = 65535.0
    else:
        full = next((limit for limit in (255.0, 65535.0) if brightest <= limit), brightest)
    eight = np.empty(whole.shape, np.uint8)
    for band in bands:
        eight[band] = np.clip(values(band) * (255.0 / full) + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(eight)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture in sRGB; by its ICC profile, if it has one that fits, else by Pillow's own conversion."""
    source: Any = None
    if image.mode == "LAB":
        source = ImageCms.createProfile("LAB")
    elif profile and image.mode in ("L", "RGB", "CMYK"):
        source = io.BytesIO(profile)
    if source is not None:
        try:
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or one of another kind of picture
            if image.mode == "LAB":
                raise
    return image.convert("RGB")
