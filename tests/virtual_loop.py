"""An event loop whose time passes only when nothing is left to do: hours of waiting in a moment, and never a race.

Work that the loop gave to a thread (`run_in_executor`) takes no time at all on this clock: time stands still until it
is done.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

STEP_S = 0.02
"""Real seconds to look for news from threads before looking again."""


class _Selector(selectors.DefaultSelector):
    """Waits by moving the loop's clock, unless threads are at work."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.loop.at_work or timeout is None:
            return super().select(STEP_S)
        self.loop.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`loop.time()` begins at 1000 s and is what `asyncio.sleep` and its timeouts go by."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = 1000.0
        self.at_work = 0
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        self.at_work += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(lambda _: self._done())
        return future

    def _done(self) -> None:
        self.at_work -= 1


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
