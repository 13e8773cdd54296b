"""Which picture size a source picture and a wanted area lead to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avatar.live_avatar.size import SizeError, fit_size


def test_sizes_are_those_of_the_reference(golden: Any) -> None:
    for case in golden.json("sizes.json"):
        source = case["height"], case["width"], case["area"]
        if 0 in case["result"]:
            with pytest.raises(SizeError):
                fit_size(*source)
        else:
            assert list(fit_size(*source)) == case["result"], source


@pytest.mark.parametrize(
    ("source", "area", "size"),
    [
        ((1080, 1920), 720 * 400, (384, 704)),
        ((1080, 1920), 704 * 384, (384, 704)),
        ((1920, 1080), 704 * 384, (704, 384)),
        ((1080, 1920), 688 * 368, (384, 640)),
        ((1000, 1000), 720 * 400, (512, 512)),
        ((1000, 1000), 688 * 368, (448, 448)),
    ],
)
def test_known_sizes(source: tuple[int, int], area: int, size: tuple[int, int]) -> None:
    assert fit_size(*source, area) == size


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(64 * 64, 1280 * 720))
def test_sides_are_multiples_of_64_within_the_area(height: int, width: int, area: int) -> None:
    try:
        h, w = fit_size(height, width, area)
    except SizeError:
        # So narrow that no multiple of 64 lies near its proportions.
        assert max(height, width) > 4 * min(height, width) or area < 4 * 64 * 64
        return
    assert h % 64 == w % 64 == 0
    assert 0 < h * w <= area


@pytest.mark.parametrize(("height", "width"), [(0, 10), (10, 0)])
def test_an_empty_picture_is_refused(height: int, width: int) -> None:
    with pytest.raises(SizeError, match="at least 1"):
        fit_size(height, width, 704 * 384)
