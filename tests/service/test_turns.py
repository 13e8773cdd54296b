"""Turns: who may have the model next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from virtual_loop import run_virtual

from service.turns import MARGIN, STARVED_S, TOLD_EVERY_S, UNKNOWN_S, Turns


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Broadcast:
    """A live session that has the model for step_s of every period_s, from its first moment on; ends at `until`."""

    period_s: float = 0.48
    step_s: float = 0.2
    until: float = float("inf")
    began: float = field(default_factory=now)

    def quiet_s(self) -> float:
        if now() >= self.until:
            return float("inf")
        into_s = (now() - self.began) % self.period_s
        return 0.0 if into_s < self.step_s else self.period_s - into_s


class Diary:
    """Jobs that note who had the model when: (name, from, to)."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.steps: list[tuple[str, float, float]] = []

    async def job(
        self, name: str, priority: str, expected_s: float, steps: int = 1, takes_s: float | None = None
    ) -> None:
        for _ in range(steps):
            async with self.turns.turn(priority, expected_s):  # type: ignore[arg-type]
                began = now()
                await asyncio.sleep(expected_s if takes_s is None else takes_s)
                self.steps.append((name, began, now()))

    @property
    def names(self) -> str:
        return "".join(name for name, _, _ in self.steps)


def virtual(test: Callable[..., object]) -> Callable[..., None]:
    """A test in an event loop whose time passes by itself; it is given turns on that time."""

    def run() -> None:
        async def main() -> None:
            await test(Turns(lambda: now()))  # type: ignore[misc]

        run_virtual(main())

    run.__name__ = test.__name__
    return run


@contextlib.contextmanager
def all_live(turns: Turns, *sessions: Broadcast) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for session in sessions:
            stack.enter_context(turns.live(session.quiet_s))
        yield


# Among jobs.


@virtual
async def test_without_live_sessions_a_turn_comes_at_once(turns):
    began = now()
    async with turns.turn("batch", 100.0):
        assert now() == began


@virtual
async def test_one_job_at_a_time(turns):
    diary = Diary(turns)
    await asyncio.gather(*(diary.job(str(n), "batch", 0.1, steps=3) for n in range(4)))
    ends = [0.0, *(end for _, _, end in diary.steps)]
    assert all(began >= end for (_, began, _), end in zip(diary.steps, ends))


@virtual
async def test_interactive_jobs_come_first_and_among_equals_who_came_first(turns):
    diary = Diary(turns)
    async with asyncio.TaskGroup() as tasks:
        for name, priority in ("a", "batch"), ("b", "batch"), ("C", "interactive"), ("D", "interactive"):
            tasks.create_task(diary.job(name, priority, 0.1))
            await asyncio.sleep(0)
    assert diary.names == "aCDb"


@virtual
async def test_a_batch_job_gives_way_at_a_blocks_border_and_goes_on_afterwards(turns):
    diary = Diary(turns)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(diary.job("a", "batch", 0.1, steps=5))
        await asyncio.sleep(0.15)
        tasks.create_task(diary.job("C", "interactive", 0.1, steps=3))
    assert diary.names == "aaCCCaaa"


@virtual
async def test_who_is_cancelled_while_waiting_leaves_the_queue(turns):
    diary = Diary(turns)
    first = asyncio.create_task(diary.job("a", "batch", 0.1))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(diary.job("b", "batch", 0.1))
    third = asyncio.create_task(diary.job("c", "batch", 0.1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(first, third)
    assert diary.names == "ac"


@virtual
async def test_who_is_cancelled_in_the_moment_of_its_turn_gives_it_on(turns):
    diary = Diary(turns)
    first = asyncio.create_task(diary.job("a", "batch", 0.1))
    await asyncio.sleep(0)
    second, third = (asyncio.create_task(diary.job(name, "batch", 0.1)) for name in "bc")
    await asyncio.sleep(0)
    # Behind the end of the first, before the second comes to run.
    first.add_done_callback(lambda _: second.cancel())
    await asyncio.gather(first, third)
    assert diary.names == "ac"


@virtual
async def test_a_step_that_fails_or_is_cancelled_gives_the_model_back(turns):
    with pytest.raises(ZeroDivisionError):
        async with turns.turn("batch", 0.1):
            raise ZeroDivisionError
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), turns.turn("batch", 0.1):
            await asyncio.sleep(5)
    async with asyncio.timeout(1), turns.turn("batch", 0.1):
        pass


@virtual
async def test_after_a_step_that_was_cancelled_the_model_is_given_on_when_it_is_free(turns):
    diary = Diary(turns)
    cancelled = asyncio.create_task(diary.job("a", "batch", 0.1))
    await asyncio.sleep(0.03)
    cancelled.cancel()
    began = now()
    await diary.job("b", "batch", 0.1)
    assert diary.steps[0][1] - began == pytest.approx(0.1 * MARGIN - 0.03, abs=1e-6)


# Beside live sessions.


@virtual
async def test_jobs_work_in_the_pauses_of_a_live_session(turns):
    session, diary = Broadcast(0.48, 0.2), Diary(turns)
    with all_live(turns, session):
        await diary.job("a", "batch", 0.1, steps=20)
    for _, began, end in diary.steps:
        assert (began - session.began) % 0.48 >= 0.2
        assert (end - session.began) // 0.48 == (began - session.began) // 0.48
    # Two of them fit into 0.28 s.
    assert now() - session.began < 11 * 0.48


@virtual
async def test_a_step_that_takes_longer_than_expected_within_reason_is_still_over_in_time(turns):
    session, diary = Broadcast(0.48, 0.2), Diary(turns)
    with all_live(turns, session):
        await diary.job("a", "batch", 0.1, steps=20, takes_s=0.119)
    assert all((end - session.began) // 0.48 == (began - session.began) // 0.48 for _, began, end in diary.steps)


@virtual
async def test_a_step_of_unknown_length_begins_only_in_a_pause_of_some_length(turns):
    session = Broadcast(0.48, 0.2)
    with all_live(turns, session):
        await asyncio.sleep(0.3)
        async with turns.turn("batch", 0.0):
            assert session.quiet_s() >= MARGIN * UNKNOWN_S


@virtual
async def test_a_long_step_lets_shorter_ones_pass_and_gets_its_turn_when_the_session_ends(turns):
    session = Broadcast(0.48, 0.2, until=now() + 5)
    diary = Diary(turns)
    with all_live(turns, session):
        long = asyncio.create_task(diary.job("L", "interactive", 2.0))
        await asyncio.sleep(0)
        await diary.job("s", "batch", 0.1, steps=4)
        assert diary.names == "ssss"
        await asyncio.wait_for(long, 10)


@virtual
async def test_who_waits_goes_on_at_once_when_the_last_live_session_closes(turns):
    diary = Diary(turns)
    with all_live(turns, Broadcast(step_s=0.48)):
        waiting = asyncio.create_task(diary.job("a", "batch", 0.1))
        await asyncio.sleep(3)
        assert not diary.steps
        closed = now()
    await waiting
    assert diary.steps[0][1] == pytest.approx(closed, abs=1e-6)


@virtual
async def test_all_live_sessions_are_regarded(turns):
    one, other = Broadcast(0.48, 0.1), Broadcast(0.48, 0.1, began=now() + 0.24)
    diary = Diary(turns)
    with all_live(turns, one, other):
        await diary.job("a", "batch", 0.1, steps=10)
    for _, began, _ in diary.steps:
        assert (began - one.began) % 0.24 >= 0.1 - 1e-6


@virtual
async def test_jobs_can_be_told_to_wait_while_anybody_is_live(turns):
    turns.beside_live = "wait"
    diary = Diary(turns)
    with all_live(turns, Broadcast(step_s=0.0)):
        waiting = asyncio.create_task(diary.job("a", "batch", 0.01))
        await asyncio.sleep(5)
        assert not diary.steps
    await waiting


def test_a_live_session_that_leaves_nothing_is_told_about_now_and_then(caplog):
    async def main() -> None:
        turns = Turns(now)
        diary = Diary(turns)
        with all_live(turns, Broadcast(0.48, 0.45)):
            waiting = asyncio.create_task(diary.job("a", "batch", 0.1))
            await asyncio.sleep(STARVED_S - 1)
            assert not caplog.records
            assert turns.held_up_s == pytest.approx(STARVED_S - 1, abs=0.1)
            await asyncio.sleep(2)
            assert len(caplog.records) == 1
            await asyncio.sleep(TOLD_EVERY_S + 1)
            assert len(caplog.records) == 2
        await waiting
        assert turns.held_up_s == 0

    with caplog.at_level(logging.WARNING):
        run_virtual(main())
    assert "1 live sessions leave the model alone for 0.02 s at most, and a job needs it for 0.12 s" in caplog.text


def test_a_live_session_that_cannot_be_asked_any_more_stops_nobody(caplog):
    async def main() -> None:
        turns = Turns(now)

        def broken() -> float:
            raise KeyError("gone")

        with turns.live(broken):
            await asyncio.wait_for(Diary(turns).job("a", "batch", 0.1, steps=2), 5)

    run_virtual(main())
    assert caplog.text.count("does not say when") == 1


# Whatever comes.

SESSIONS = some.lists(
    some.tuples(some.sampled_from([0.48, 0.96]), some.floats(0, 1.0), some.floats(0, 0.5)), min_size=0, max_size=3
)
"""Period, the share of it that the model works, and when the session begins."""

JOBS = some.lists(
    some.tuples(
        some.sampled_from(["interactive", "batch"]),
        some.floats(0.01, 0.3),  # expected
        some.floats(0.3, MARGIN - 0.01),  # what it takes, as part of that
        some.integers(1, 4),  # steps
        some.floats(0, 2),  # comes after
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(SESSIONS, JOBS)
def test_no_step_begins_that_does_not_fit_and_nobody_starves_where_there_is_room(sessions, jobs):
    async def main() -> None:
        turns, end = Turns(now), now() + 60
        live = [Broadcast(period, share * period, end, now() + begins) for period, share, begins in sessions]
        at_work = 0
        late: list[float] = []

        async def job(priority: str, expected_s: float, part: float, steps: int, after_s: float) -> None:
            nonlocal at_work
            await asyncio.sleep(after_s)
            for _ in range(steps):
                async with turns.turn(priority, expected_s):  # type: ignore[arg-type]
                    at_work += 1
                    assert at_work == 1
                    assert all(session.quiet_s() >= MARGIN * expected_s for session in live)
                    await asyncio.sleep(part * expected_s)
                    at_work -= 1
                late.append(now())

        with all_live(turns, *live):
            async with asyncio.TaskGroup() as tasks:
                for each in jobs:
                    tasks.create_task(job(*each))
        room_s = min((session.period_s - session.step_s for session in live), default=float("inf"))
        if len(live) <= 1 and all(room_s >= MARGIN * expected_s + 0.02 for _, expected_s, _, _, _ in jobs):
            # Each step needs one pause at most, and comes when the ones before it have had theirs.
            assert max(late) <= end - 60 + 2 + 0.5 + sum(steps for _, _, _, steps, _ in jobs) * 0.98
        # And whoever found no room had the model when the sessions were over.
        assert max(late) <= end + 0.5 + sum(steps * expected for _, expected, _, steps, _ in jobs) * MARGIN

    run_virtual(main())


@settings(max_examples=50, deadline=None)
@given(some.lists(some.tuples(some.sampled_from("ib"), some.floats(0, 1)), min_size=2, max_size=10))
def test_a_batch_step_never_begins_while_an_interactive_one_waits(jobs):
    async def main() -> None:
        turns = Turns(now)
        waiting = 0

        async def job(kind: str, after_s: float) -> None:
            nonlocal waiting
            await asyncio.sleep(after_s)
            waiting += kind == "i"
            async with turns.turn("interactive" if kind == "i" else "batch", 0.1):
                waiting -= kind == "i"
                began_beside = waiting
                if kind == "b":
                    assert not began_beside
                await asyncio.sleep(0.1)

        await asyncio.gather(*(job(*each) for each in jobs))

    run_virtual(main())
