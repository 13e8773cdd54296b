"""Which picture size a source picture and a wanted area lead to."""

from __future__ import annotations

import math

from audio.errors import AvatardError

MULTIPLE = 64
"""Both sides: 8 for the VAE, 2 for the patches, 4 for the coarsest motion tokens."""


class SizeError(AvatardError):
    """No picture size fits."""


def fit_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Height and width in multiples of 64, of about the picture's proportions, at most `area` pixels together.

    A small picture may grow to the next multiple.
    Args: height, width: of the source picture, in pixels; area: in pixels, such as 704 * 384.
    Raises: SizeError: the area holds no 64 x 64 square of these proportions.
    """
    if height < 1 or width < 1:
        raise SizeError(f"picture of {width}x{height} pixels: both sides must be at least 1")
    pixels = height * width
    if pixels <= area:
        largest, smallest = 1.0, 0.1
    else:
        # At the smallest scale even rounding both sides up keeps within the area.
        largest = math.sqrt(area / pixels)
        b = (MULTIPLE - 1) * (height + width)
        c = (MULTIPLE - 1) ** 2 - area
        smallest = (-b + math.sqrt(b * b - 4 * pixels * c)) / (2 * pixels)
    for i in range(100):
        scale = largest - (largest - smallest) * i / 100
        h, w = (math.ceil(int(side * scale) / MULTIPLE) * MULTIPLE for side in (height, width))
        if 0 < h * w <= area:
            return h, w
    h = int(math.sqrt(area * height / width)) // MULTIPLE * MULTIPLE
    w = int(math.sqrt(area * width / height)) // MULTIPLE * MULTIPLE
    if h >= height or w >= width:
        h, w = height // MULTIPLE * MULTIPLE, width // MULTIPLE * MULTIPLE
    if h * w == 0:
        raise SizeError(f"an area of {area} pixels is too small for a picture of {width}x{height}; 4096 is the least")
    return h, w
