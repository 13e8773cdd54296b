"""The media clock: when each frame is due."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from fractions import Fraction

SLIP_S = 1.0
"""Behind by more than this (the machine slept, the process was stopped) the clock starts anew where it stands:
a second's worth of frames in one burst would help nobody."""


class Pacer:
    """Frame n is due at start + n / fps on a monotonic clock.

    Args:
        clock: seconds, monotonic; that of the event loop that sleeps.
    """

    def __init__(self, fps: int, clock: Callable[[], float]) -> None:
        self._frame_s = Fraction(1, fps)
        self._clock = clock
        self._start = clock()
        self.slips = 0
        """How often the clock started anew."""

    def begin(self, in_s: float) -> None:
        """Frame 0 is due in so many seconds from now."""
        self._start = self._clock() + in_s

    def due(self, frame: int) -> float:
        """On the clock, in seconds."""
        return self._start + float(frame * self._frame_s)

    def late_s(self, frame: int) -> float:
        """How long ago the frame was due; negative: how long until it is."""
        return self._clock() - self.due(frame)

    async def wait(self, frame: int) -> None:
        """Return when the frame is due. What was due long ago is due now, and all that follows with it."""
        late = self.late_s(frame)
        if late > SLIP_S:
            self._start += late
            self.slips += 1
            return
        while late < 0:
            await asyncio.sleep(-late)
            late = self.late_s(frame)
