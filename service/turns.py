"""Who may have the model next: live sessions whenever they want it, jobs in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

log = logging.getLogger(__name__)

Priority = Literal["interactive", "batch"]

MARGIN = 1.2
"""By how much a step may take longer than the ones before it."""

UNKNOWN_S = 0.2
"""What a step is taken for of which nobody knows how long it takes."""

LOOK_S = 0.01
"""How soon to look again while a live session has the model. Where it does not have it, it says for how long."""

LOOK_AGAIN_S = 0.5
"""How soon to look again in any case: a session that was interrupted wants the model earlier than it said."""

RETURN_S = 0.01
"""How long the model is kept from batch jobs after a step of an interactive one, whose next step is about to come."""

STARVED_S = 10.0
"""Without a turn, until a person is told; and then again each TOLD_EVERY_S."""
TOLD_EVERY_S = 60.0


@dataclass(order=True)
class _Waiting:
    """A step of a job that wants the model: earlier in this order is served first."""

    rank: int
    number: int
    needs_s: float = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)


class Turns:
    """Lets one step of one job at a time use the model, and none that a live session would have to wait for.

    Live sessions take no turns: they say when they need the model next, and use it then. A step of a job begins only if
    it is over before that, as far as is known. Among jobs interactive ones come first, then whoever came first; a step
    that is too long for the moment lets shorter ones pass. Belongs to one event loop.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        beside_live: Literal["slack", "wait"] = "slack",
    ) -> None:
        """beside_live: "wait" gives no turn at all while there is a live session."""
        self._clock = clock
        self.beside_live = beside_live
        self._live: dict[object, Callable[[], float]] = {}
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._taken = False
        self._batch_not_before = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._held_up_since: float | None = None
        """When live sessions began to hold up whoever waits; None: they do not."""
        self._longest_s = 0.0
        """The longest pause of the live sessions since then."""
        self._told = float("-inf")

    @property
    def held_up_s(self) -> float:
        """For how long no job has had a turn, although one wants it, because of live sessions; 0: they do not wait."""
        return 0.0 if self._held_up_since is None else self._clock() - self._held_up_since

    @contextlib.contextmanager
    def live(self, quiet_s: Callable[[], float]) -> Iterator[None]:
        """While a live session is open.

        quiet_s: seconds until it needs the model next; 0 while it has it, or is late. Asked often.
        """
        session = object()
        self._live[session] = quiet_s
        try:
            yield
        finally:
            self._live.pop(session, None)
            self._give()

    @contextlib.asynccontextmanager
    async def turn(self, priority: Priority, expected_s: float) -> AsyncIterator[None]:
        """The model, for one step that takes about so many seconds; 0: not known.

        Waits as long as live sessions and other jobs need it. A wait may be cancelled at any time.
        """
        rank = 0 if priority == "interactive" else 1
        needs_s = MARGIN * (expected_s if expected_s > 0 else UNKNOWN_S)
        number = next(self._numbers)
        while True:
            waiting = _Waiting(rank, number, needs_s, asyncio.get_running_loop().create_future())
            await self._granted(waiting)
            # Some of the time may have gone by until we came to run: the loop has other things to do.
            if self._pause_s() >= needs_s:
                break
            self._taken = False
        self._held_up_since = None
        began, busy_s = self._clock(), 0.0
        try:
            yield
        except asyncio.CancelledError:
            # The model has not heard of it, and works on.
            busy_s = began + needs_s - self._clock()
            raise
        finally:
            if busy_s > 0:
                asyncio.get_running_loop().call_later(busy_s, self._back_from, priority)
            else:
                self._back_from(priority)

    def _back_from(self, priority: Priority) -> None:
        self._taken = False
        if priority == "interactive":
            self._batch_not_before = self._clock() + RETURN_S
        self._give()

    async def _granted(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._give()
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:
                self._taken = False
            self._give()
            raise

    def _give(self) -> None:
        """Give the model to the first for whom there is time; if there is none, look again in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._taken or not self._waiting:
            if not self._waiting:
                self._held_up_since = None
            return
        pause_s, kept_s = self._pause_s(), self._batch_not_before - self._clock()
        for waiting in sorted(self._waiting):
            if waiting.needs_s <= pause_s and (kept_s <= 0 or not waiting.rank):
                self._waiting.remove(waiting)
                self._taken = True
                waiting.granted.set_result(None)
                return
        if kept_s > 0:
            look_s = kept_s
        else:
            self._note_held_up(pause_s)
            # What does not fit now fits after the next step of the live session at the earliest.
            look_s = min(max(pause_s, LOOK_S), LOOK_AGAIN_S)
        self._timer = asyncio.get_running_loop().call_later(look_s, self._give)

    def _pause_s(self) -> float:
        """Seconds until a live session needs the model."""
        pause_s = float("inf")
        for session, quiet_s in list(self._live.items()):
            try:
                pause_s = min(pause_s, quiet_s())
            except Exception:
                log.exception("a live session does not say when it needs the model; jobs go on without regard to it")
                del self._live[session]
        return 0.0 if self._live and self.beside_live == "wait" else pause_s

    def _note_held_up(self, pause_s: float) -> None:
        """A person is to know when live sessions leave nothing to the jobs."""
        now = self._clock()
        if self._held_up_since is None:
            self._held_up_since, self._longest_s = now, 0.0
        self._longest_s = max(self._longest_s, pause_s)
        if now - self._held_up_since < STARVED_S or now - self._told < TOLD_EVERY_S:
            return
        self._told = now
        waited_s, needs_s = now - self._held_up_since, min(self._waiting).needs_s
        if self.beside_live == "wait":
            log.warning("jobs wait for %.0f s: a live session is open, and sessions.jobs_beside_live is wait", waited_s)
        else:
            log.warning(
                "jobs wait for %.0f s: %d live sessions leave the model alone for %.2f s at most, and a job needs it "
                "for %.2f s; are they late? A faster model, fewer sessions or fewer steps leave more",
                waited_s,
                len(self._live),
                self._longest_s,
                needs_s,
            )
