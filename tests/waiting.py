"""Waiting for what other processes do: with an end, and an error that says what did not happen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOOK_EVERY_S = 0.01


def until(condition: Callable[[], T], limit_s: float = 10.0, what: str = "") -> T:
    """The first value of `condition()` that is true. Raises: TimeoutError: there was none in that time."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what or 'what was waited for'}: not in {limit_s:g} s, still {value!r}")
        time.sleep(LOOK_EVERY_S)
    return value


async def until_async(condition: Callable[[], T], limit_s: float = 10.0, what: str = "") -> T:
    """`until`, for a test that shares its event loop with what it waits for."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what or 'what was waited for'}: not in {limit_s:g} s, still {value!r}")
        await asyncio.sleep(LOOK_EVERY_S)
    return value
