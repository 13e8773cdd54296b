"""JobStore: what was taken is on the disk, and stays what it is."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service import store as store_module
from service.commands import Refusal
from service.store import Job, JobStore, StoreError, StoreFull

ROOT = Path(__file__).parent.parent.parent

RESULT = {
    "path": "a.mp4",
    "bytes": 100,
    "sha256": "0" * 64,
    "seconds": 1.0,
    "frames": 25,
    "width": 64,
    "height": 64,
    "fps": 25,
}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path, clock):
    store = await JobStore.open(tmp_path / "jobs.sqlite", clock)
    yield store
    await store.close()


async def submitted(store: JobStore, id: str, digest: str = "d", queue: int = 100, **fields: Any) -> Job:
    job, new = await store.submit(Job(id, **fields), digest, target=f"{id}.mp4", queue=queue)
    assert new
    return job


async def completed(store: JobStore, id: str, size: int = 100, priority: Any = "interactive") -> Job:
    await submitted(store, id, priority=priority)
    assert (await store.claim(priority)).id == id
    job, ended = await store.finish(id, "completed", {**RESULT, "path": f"{id}.mp4", "bytes": size})
    assert ended
    await store.tidied(id)
    return job


# Jobs.


async def test_a_job_is_kept_as_it_was_given(tmp_path, clock):
    store = await JobStore.open(tmp_path / "jobs.sqlite", clock)
    job = await submitted(
        store, "a", priority="batch", request={"text": "你好", "prompt": None}, seed=2**63 - 1, origin={"topic": "t"}
    )
    assert job == Job(
        "a",
        "queued",
        "batch",
        {"text": "你好", "prompt": None},
        seed=2**63 - 1,
        created_at=clock.now,
        origin={"topic": "t"},
    )
    await store.close()
    again = await JobStore.open(tmp_path / "jobs.sqlite", clock)
    assert await again.get("a") == job
    assert await again.get("b") is None
    await again.close()


async def test_the_same_command_is_the_same_job_and_another_one_a_conflict(store):
    first = await submitted(store, "a", "one")
    assert await store.submit(Job("a", seed=9), "one", target="a.mp4", queue=100) == (first, False)
    assert await store.known("a", "one") == first
    assert await store.known("b", "one") is None
    for conflict in store.submit(Job("a"), "two", target="b.mp4", queue=100), store.known("a", "two"):
        with pytest.raises(Refusal, match="job a: there is another one of this id") as refused:
            await conflict
        assert refused.value.reason == "conflict"


async def test_what_was_taken_is_still_the_same_job_when_it_is_over_and_the_queue_is_full(store):
    await completed(store, "a")
    await submitted(store, "b")
    job, new = await store.submit(Job("a"), "d", target="a.mp4", queue=1)
    assert (job.state, new) == ("completed", False)


async def test_more_jobs_than_may_wait_are_refused(store):
    await submitted(store, "a", queue=2)
    await submitted(store, "b", queue=2)
    with pytest.raises(Refusal, match="2 jobs wait, and no more than 2 may") as refused:
        await submitted(store, "c", queue=2)
    assert refused.value.reason == "full"
    assert refused.value.retry_s
    await store.claim("interactive")
    await submitted(store, "c", queue=2)


@pytest.mark.parametrize("state", ["queued", "running", "completed", "failed", "cancelled"])
async def test_a_target_is_one_jobs_alone_until_nothing_is_left_of_it(store, state):
    await submitted(store, "a")
    if state != "queued":
        await store.claim("interactive")
    if state not in ("queued", "running"):
        await store.finish("a", state, RESULT if state == "completed" else None)
    with pytest.raises(Refusal, match=r"name: a.mp4: is the file of job a") as refused:
        await store.submit(Job("b"), "d", target="a.mp4", queue=100)
    assert refused.value.reason == "conflict"
    if state in ("failed", "cancelled"):
        assert [job.id for job in await store.untidy()] == ["a"]
        await store.tidied("a")
        assert await store.untidy() == []
        await store.submit(Job("b"), "d", target="a.mp4", queue=100)


async def test_the_oldest_of_a_priority_is_claimed_first_and_only_once(store, clock):
    for id, priority in ("a", "batch"), ("b", "interactive"), ("c", "batch"):
        await submitted(store, id, priority=priority)
    clock.now += 5
    claimed = await asyncio.gather(*(store.claim("batch") for _ in range(3)))
    assert [job and job.id for job in claimed] == ["a", "c", None]
    assert claimed[0].state == "running"
    assert claimed[0].attempts == 1
    assert claimed[0].started_at == clock.now
    assert await store.waiting() == {"interactive": 1, "batch": 0}
    assert await store.counts() == {"queued": 1, "running": 2, "completed": 0, "failed": 0, "cancelled": 0}


async def test_a_job_that_waits_again_keeps_its_place_and_when_it_was_begun(store, clock):
    await submitted(store, "a")
    await submitted(store, "b")
    began = (await store.claim("interactive")).started_at
    clock.now += 9
    assert (await store.requeue("a")).state == "queued"
    again = await store.claim("interactive")
    assert (again.id, again.attempts, again.started_at) == ("a", 2, began)


async def test_progress_and_the_end_are_kept(store, clock):
    await submitted(store, "a")
    await store.claim("interactive")
    await store.progress("a", 12, 24)
    assert (await store.get("a")).frames == 12
    clock.now += 3
    job, ended = await store.finish("a", "completed", RESULT)
    assert ended
    assert (job.state, job.result, job.finished_at, job.frames) == ("completed", RESULT, clock.now, 25)
    assert job.total_frames == 25
    await store.progress("a", 3, 24)
    assert (await store.get("a")).frames == 25


async def test_a_job_ends_once(store):
    await submitted(store, "a")
    await store.claim("interactive")
    cancelled, ended = await store.finish("a", "cancelled")
    assert ended
    for late in ("completed", "failed", "cancelled"):
        assert await store.finish("a", late, RESULT if late == "completed" else None) == (cancelled, False)
    assert (await store.requeue("a")).state == "cancelled"
    assert await store.claim("interactive") is None


async def test_what_waits_can_be_cancelled_but_not_completed(store):
    await submitted(store, "a")
    assert (await store.finish("a", "completed", RESULT))[1] is False
    assert (await store.finish("a", "cancelled"))[1] is True


async def test_jobs_are_listed_newest_first_page_by_page(store):
    for n in range(5):
        await submitted(store, f"j{n}")
    await store.claim("interactive")
    assert [job.id for job in await store.list(limit=2)] == ["j4", "j3"]
    assert [job.id for job in await store.list(limit=9, after="j3")] == ["j2", "j1", "j0"]
    assert [job.id for job in await store.list(state="running")] == ["j0"]
    assert await store.list(after="none") == []


async def test_files_are_needed_by_jobs_that_are_not_over(store):
    await submitted(store, "a", request={"image": "spool/1", "audio": "spool/2"})
    await submitted(store, "b", request={"image": "spool/1", "text": "hello"})
    assert await store.needed() == {"spool/1", "spool/2"}
    await store.finish("a", "cancelled")
    assert await store.needed() == {"spool/1"}


async def test_a_call_that_is_cancelled_is_carried_out(store):
    await submitted(store, "a")
    claiming = asyncio.create_task(store.claim("interactive"))
    await asyncio.sleep(0)
    claiming.cancel()
    await asyncio.gather(claiming, return_exceptions=True)
    assert (await store.get("a")).state == "running"


# Attempts.


async def test_what_ran_when_the_process_ended_waits_again(store, tmp_path, clock):
    await submitted(store, "a")
    await submitted(store, "b")
    await store.claim("interactive")
    assert [(job.id, job.state) for job in await store.recover(attempts=3)] == [("a", "queued")]
    assert (await store.claim("interactive")).attempts == 2


async def test_a_job_that_never_gets_further_is_given_up(store):
    await submitted(store, "a")
    for _ in range(2):
        await store.claim("interactive")
        (job,) = await store.recover(attempts=3)
        assert job.state == "queued"
    await store.claim("interactive")
    (job,) = await store.recover(attempts=3)
    assert (job.state, job.error_type) == ("failed", "Interrupted")
    assert job.error == "was begun 3 times and never got further than frame 0: the daemon was ended"


async def test_a_job_that_gets_a_little_further_each_time_is_never_given_up(store):
    await submitted(store, "a")
    for n in range(1, 20):
        await store.claim("interactive")
        await store.progress("a", 12 * n, None)
        (job,) = await store.recover(attempts=3)
        assert job.state == "queued"
    # It goes on from before where it had been, and falls at the same place from now on.
    for n in range(3):
        await store.claim("interactive")
        await store.progress("a", 216, None)
        await store.progress("a", 228, None)
        job = await store.interrupted("a", "the model's process died", attempts=3)
        assert job.state == ("queued" if n < 2 else "failed")
    assert job.error == "was begun 3 times and never got further than frame 228: the model's process died"


async def test_what_was_begun_in_an_orderly_way_does_not_count(store):
    await submitted(store, "a")
    for _ in range(9):
        await store.claim("interactive")
        await store.requeue("a")
    await store.claim("interactive")
    assert (await store.recover(attempts=2))[0].state == "queued"


# Retention.


async def test_old_jobs_and_their_files_go(store, tmp_path, clock):
    for id in ("old", "new"):
        (tmp_path / f"{id}.mp4").write_bytes(b"x")
    await completed(store, "old")
    await submitted(store, "waits")
    clock.now += 100
    await completed(store, "new", priority="batch")
    assert await store.prune(50, 10**9, tmp_path) == ["old"]
    assert not (tmp_path / "old.mp4").exists()
    assert (tmp_path / "new.mp4").exists()
    assert await store.get("old") is None
    # Their names are free again.
    await submitted(store, "old")


async def test_of_too_many_bytes_the_oldest_go(store, tmp_path, clock):
    for n in range(5):
        clock.now += 1
        await completed(store, f"j{n}", size=100)
    assert await store.prune(1e9, 250, tmp_path) == ["j2", "j1", "j0"]


async def test_of_too_many_jobs_the_oldest_go(store, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(store_module, "MOST_ENDED", 2)
    for n in range(4):
        clock.now += 1
        await completed(store, f"j{n}")
    assert await store.prune(1e9, 10**9, tmp_path) == ["j1", "j0"]


async def test_folders_that_are_empty_without_a_result_go_too(store, tmp_path, clock):
    results = tmp_path / "out"
    (results / "a" / "b").mkdir(parents=True)
    (results / "a" / "b" / "x.mp4").write_bytes(b"x")
    (results / "a" / "other.mp4").write_bytes(b"x")
    await store.submit(Job("x"), "d", target="a/b/x.mp4", queue=9)
    await store.claim("interactive")
    await store.finish("x", "completed", RESULT)
    await store.tidied("x")
    clock.now += 10
    assert await store.prune(5, 10**9, results) == ["x"]
    assert [path.name for path in results.rglob("*")] == ["a", "other.mp4"]


async def test_what_is_not_tidy_stays_until_it_is(store, tmp_path, clock):
    await submitted(store, "a")
    await store.finish("a", "cancelled")
    clock.now += 100
    assert await store.prune(5, 10**9, tmp_path) == []
    await store.tidied("a")
    assert await store.prune(5, 10**9, tmp_path) == ["a"]


# The file.


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


async def refused(path: Path) -> str:
    before = content(path)
    with pytest.raises(StoreError) as error:
        await JobStore.open(path)
    assert content(path) == before
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


async def kept(path: Path) -> None:
    store = await JobStore.open(path)
    for n in range(50):
        await submitted(store, f"j{n}", request={"text": "x" * 500})
    await store.close()


@pytest.mark.parametrize("damage", ["empty", "text", "head", "middle", "short"])
async def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(tmp_path, damage):
    path = tmp_path / "jobs.sqlite"
    await kept(path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"no database at all, but long enough to be looked at" * 100,
            "head": bytes(100) + whole[100:],
            "middle": whole[:8192] + random.Random(1).randbytes(8192) + whole[16384:],
            "short": whole[: len(whole) // 2],
        }[damage]
    )
    assert "is damaged (" in await refused(path)


async def test_a_file_that_is_gone_while_its_log_is_there_is_not_begun_anew(tmp_path):
    path = tmp_path / "jobs.sqlite"
    (tmp_path / "jobs.sqlite-wal").write_bytes(b"what was written last")
    assert "is gone, and what was written to it last is still there" in await refused(path)


async def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()
    assert "is a database of another program" in await refused(path)


async def test_a_later_version_is_refused(tmp_path):
    path = tmp_path / "jobs.sqlite"
    await kept(path)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="was written by a later avatard"):
        await JobStore.open(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    tmp_path.chmod(0o500)
    try:
        await refused(tmp_path / "jobs.sqlite")
    finally:
        tmp_path.chmod(0o700)


async def test_a_folder_in_the_place_of_the_file_is_told(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.mkdir()
    with pytest.raises(StoreError, match=r"jobs\.sqlite: "):
        await JobStore.open(path)


async def test_two_processes_do_not_work_on_one_file(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_S", 0.1)
    with pytest.raises(StoreError, match="another process has it open"):
        await JobStore.open(tmp_path / "jobs.sqlite")
    await submitted(store, "a")


async def test_a_version_is_followed_by_the_next_and_jobs_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    await kept(path)
    further = (*store_module.MIGRATIONS, "ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT 'nobody'")
    monkeypatch.setattr(store_module, "MIGRATIONS", further)
    for _ in range(2):
        store = await JobStore.open(path)
        assert (await store.get("j7")).request == {"text": "x" * 500}
        assert await store._rows("SELECT owner FROM jobs WHERE id = 'j7'") == [("nobody",)]
        await store.close()


async def test_a_version_that_cannot_be_reached_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    await kept(path)
    broken = (*store_module.MIGRATIONS, "ALTER TABLE jobs ADD COLUMN owner TEXT; SELECT no_such_thing")
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", broken)
        with pytest.raises(sqlite3.OperationalError):
            await JobStore.open(path)
    store = await JobStore.open(path)
    assert len(await store.list()) == 50
    assert "owner" not in [row[1] for row in await store._rows("PRAGMA table_info(jobs)")]
    await store.close()


async def test_a_full_disk_is_told_as_such_and_costs_nothing(store):
    await submitted(store, "a")
    (pages,) = (await store._rows("PRAGMA page_count"))[0]
    await store._rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFull, match="no room left"):
        await submitted(store, "large", request={"text": "x" * 100_000})
    assert await store.get("large") is None
    assert (await store.get("a")).state == "queued"
    await store._rows("PRAGMA max_page_count = 100000")
    await submitted(store, "large", request={"text": "x" * 100_000})


WRITER = """
import asyncio, sys
from pathlib import Path
from service.store import Job, JobStore

async def main():
    store = await JobStore.open(Path(sys.argv[1]))
    n = (await store.list(limit=1) or [Job("j0")])[0].id.removeprefix("j")
    for number in range(int(n) + 1, 10**6):
        await store.submit(Job(f"j{number}"), "d", target=f"{number}.mp4", queue=10**6)
        print(number, flush=True)

asyncio.run(main())
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_taken(tmp_path):
    path = tmp_path / "jobs.sqlite"
    for wait in (1, 9, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        with process:
            lines = [process.stdout.readline() for _ in range(wait)]
            process.kill()
            told = [int(line) for line in [*lines, *process.stdout] if line.endswith("\n")][-1]

    async def found() -> tuple[int, int]:
        store = await JobStore.open(path)
        (newest,) = await store.list(limit=1)
        counts = await store.counts()
        await store.close()
        return int(newest.id.removeprefix("j")), sum(counts.values())

    newest, count = asyncio.run(found())
    assert newest == count
    assert told <= newest <= told + 1


async def test_jobs_are_not_for_others_to_read(store, tmp_path):
    assert (tmp_path / "jobs.sqlite").stat().st_mode & 0o077 == 0
    await submitted(store, "a")
    assert all(file.stat().st_mode & 0o077 == 0 for file in tmp_path.glob("jobs.sqlite*"))


def test_a_job_can_be_changed_in_a_copy_only():
    assert replace(Job("a"), state="failed").ended
    assert not Job("a").ended
