"""Lay frames of a video side by side: `python -m examples.filmstrip VIDEO --at 1.04 1.2 --to FILE`.

docs/images/demo.png is made in this way from what `make demo` makes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
from PIL import Image


def frames_at(video: Path, seconds: list[float]) -> list[Image.Image]:
    """The frames shown at those times, in their order; the last one for a time after the end."""
    wanted = sorted(seconds)
    found: list[Image.Image] = []
    frame = None
    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            while len(found) < len(wanted) and frame.time is not None and frame.time >= wanted[len(found)] - 0.02:
                found.append(frame.to_image())
            if len(found) == len(wanted):
                return found
    assert frame is not None, "a video without a frame"
    return found + [frame.to_image()] * (len(wanted) - len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--at", type=float, nargs="+", required=True, help="seconds")
    parser.add_argument("--to", type=Path, required=True)
    given = parser.parse_args()
    frames = frames_at(given.video, given.at)
    strip = Image.new("RGB", (sum(f.width for f in frames), frames[0].height))
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width
    strip.save(given.to, optimize=True)


if __name__ == "__main__":
    main()
