"""Durable jobs in a SQLite database: what was taken is on the disk before anybody is told so."""

# sqlite3 itself and not SQLAlchemy with aiosqlite: one table, one writer, a dozen statements. A mapper would add a
# second set of words for them, and its pool would take away the one thing that matters here, which is to know when a
# transaction is on the disk.

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from audio.errors import AvatardError
from service.commands import Refusal
from service.turns import Priority
from streaming.muxer import flush_to_disk

R = TypeVar("R")

State = Literal["queued", "running", "completed", "failed", "cancelled"]

APPLICATION = 0x61767464
"""Marks the file as ours ("avtd"), so that no other program's database is taken for one."""

OPEN_S = 5.0
"""How long a predecessor that is about to end may still hold the file."""

MOST_ENDED = 100_000
"""Jobs that have ended and are kept, whatever their age."""

FULL_RETRY_S = 30.0

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        n INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        digest TEXT NOT NULL,
        state TEXT NOT NULL,
        priority TEXT NOT NULL,
        request TEXT NOT NULL,
        origin TEXT NOT NULL,
        target TEXT NOT NULL,
        seed INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        fruitless INTEGER NOT NULL DEFAULT 0,
        furthest INTEGER NOT NULL DEFAULT 0,
        frames INTEGER NOT NULL DEFAULT 0,
        total_frames INTEGER,
        created_at REAL NOT NULL,
        started_at REAL,
        finished_at REAL,
        result TEXT,
        bytes INTEGER NOT NULL DEFAULT 0,
        error TEXT,
        error_type TEXT,
        tidy INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX jobs_by_turn ON jobs (state, priority, n);
    CREATE UNIQUE INDEX jobs_by_target ON jobs (target) WHERE state = 'completed' OR NOT tidy;
    CREATE INDEX untidy_jobs ON jobs (n) WHERE NOT tidy;
    """,
)
"""From each version of the schema to the next; the file's user_version says how many it has been through.

fruitless: how often the job was begun in a row without getting any further; furthest: the most frames it ever had;
tidy: nothing is left of the work on it but its result, so that its target is another job's to take.
"""

COLUMNS = (
    "id, state, priority, request, attempts, frames, total_frames, seed, created_at, started_at, finished_at, result, "
    "error, error_type, origin"
)


class StoreError(AvatardError):
    """The database of jobs cannot be used, or not now: which file, and what to do."""


class StoreFull(StoreError):
    """There is no room on the disk for a change; nothing was changed."""


@dataclass(frozen=True)
class Job:
    """A job as it stood when it was asked for.

    request: the command, its sources resolved to files; seed: of the model's random numbers; attempts: how often it
    was begun; frames: encoded so far; times in seconds since 1970; result: path (below the folder of results), bytes,
    sha256, seconds, frames, width, height, fps; error: one line; error_type: the error's class; origin: what the
    trigger wants to remember.
    """

    id: str
    state: State = "queued"
    priority: Priority = "interactive"
    request: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0
    frames: int = 0
    total_frames: int | None = None
    seed: int = 0
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    error_type: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state not in ("queued", "running")


# JobStore.list hides the word.
Jobs = list[Job]
Rows = list[Any]
Ids = list[str]


class JobStore:
    """The jobs, in one file, by one connection, in one thread of its own.

    A change is on the disk when its call returns, but for progress, which is there soon after. A call that is
    cancelled is carried out nevertheless. Raises, everywhere: StoreFull; StoreError: the disk or the file fails.
    """

    @classmethod
    async def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Self:
        """The jobs in that file, which is made with its folder when it is not there.

        clock: seconds since 1970.
        Raises: StoreError: damaged, not ours, in use, of a later version, or not to be written.
        """
        store = cls(path, clock)
        try:
            await store._run(store._open)
        except BaseException:
            store._thread.shutdown(wait=False)
            raise
        return store

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._database: sqlite3.Connection

    async def close(self) -> None:
        await self._run(self._database.close)
        self._thread.shutdown(wait=False)

    async def submit(self, job: Job, digest: str, *, target: str, queue: int) -> tuple[Job, bool]:
        """Keep a new job; or give the one of that id, and False, where the same command had made it.

        digest: of the command; target: the result's name, no other job's; queue: how many jobs may wait.
        Raises: Refusal: conflict (another command has that id, another job that target), full.
        """

        def submit(database: sqlite3.Connection) -> tuple[Job, bool]:
            if (known := self._known(job.id, digest)) is not None:
                return known, False
            (waiting,) = database.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()
            if waiting >= queue:
                raise Refusal("full", f"{waiting} jobs wait, and no more than {queue} may; try again later", 10.0)
            other = database.execute(
                "SELECT id FROM jobs WHERE target = ? AND (state = 'completed' OR NOT tidy)", (target,)
            ).fetchone()
            if other is not None:
                raise Refusal("conflict", f"name: {target}: is the file of job {other[0]}; choose another one")
            values = (job.id, digest, job.priority, _json(job.request), _json(job.origin), target, job.seed)
            database.execute(
                "INSERT INTO jobs (id, digest, state, priority, request, origin, target, seed, created_at)"
                " VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
                (*values, self._clock()),
            )
            return self._job(job.id), True

        return await self._change(submit)

    async def known(self, id: str, digest: str) -> Job | None:
        """The job that the same command has made before. Raises: Refusal: conflict."""
        return await self._run(lambda: self._known(id, digest))

    async def get(self, id: str) -> Job | None:
        return await self._run(lambda: self._find(id))

    async def list(self, *, state: State | None = None, limit: int = 100, after: str | None = None) -> Jobs:
        """Newest first; after: those that are older than the job of that id."""
        conditions: Rows = []
        values: Rows = []
        if state is not None:
            conditions, values = ["state = ?"], [state]
        if after is not None:
            conditions.append("n < (SELECT n FROM jobs WHERE id = ?)")
            values.append(after)
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        return await self._jobs(f"SELECT {COLUMNS} FROM jobs {where} ORDER BY n DESC LIMIT ?", *values, limit)

    async def counts(self) -> dict[State, int]:
        found = await self._rows("SELECT state, count(*) FROM jobs GROUP BY state")
        return dict.fromkeys(get_args(State), 0) | dict(found)

    async def waiting(self) -> dict[Priority, int]:
        """How many are queued."""
        found = await self._rows("SELECT priority, count(*) FROM jobs WHERE state = 'queued' GROUP BY priority")
        return dict.fromkeys(get_args(Priority), 0) | dict(found)

    async def needed(self) -> set[str]:
        """The files that jobs which are not over refer to, as their requests name them."""
        found = await self._rows(
            "SELECT json_extract(request, '$.image'), json_extract(request, '$.audio') FROM jobs"
            " WHERE state IN ('queued', 'running')"
        )
        return {name for row in found for name in row if name}

    async def claim(self, priority: Priority) -> Job | None:
        """Make the job that has waited longest a running one; None where none waits."""

        def claim(database: sqlite3.Connection) -> Job | None:
            found = database.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, started_at = coalesce(started_at, ?),"
                " fruitless = CASE WHEN frames > furthest THEN 1 ELSE fruitless + 1 END,"
                " furthest = max(frames, furthest)"
                " WHERE n = (SELECT n FROM jobs WHERE state = 'queued' AND priority = ? ORDER BY n LIMIT 1)"
                " RETURNING id",
                (self._clock(), priority),
            ).fetchone()
            return self._job(found[0]) if found else None

        return await self._change(claim)

    async def progress(self, id: str, frames: int, total: int | None) -> None:
        """How far a running job is. It is on the disk with the next change of anything else, or soon."""

        def progress(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE jobs SET frames = ?, total_frames = ? WHERE id = ? AND state = 'running'", (frames, total, id)
            )

        await self._change(progress, durable=False)

    async def finish(
        self,
        id: str,
        state: State,
        result: dict[str, Any] | None = None,
        error: str | None = None,
        error_type: str | None = None,
    ) -> tuple[Job, bool]:
        """End a job; or give it as it stands, and False, where it does not run any more.

        Cancelled can be what waits as well.
        """

        def finish(database: sqlite3.Connection) -> tuple[Job, bool]:
            also = "queued" if state == "cancelled" else "running"
            frames = result["frames"] if result else None
            changed = database.execute(
                "UPDATE jobs SET state = ?, finished_at = ?, result = ?, bytes = ?, error = ?, error_type = ?,"
                " frames = coalesce(?, frames), total_frames = coalesce(?, total_frames)"
                " WHERE id = ? AND state IN ('running', ?)",
                (
                    state,
                    self._clock(),
                    _json(result) if result else None,
                    result["bytes"] if result else 0,
                    error,
                    error_type,
                    frames,
                    frames,
                    id,
                    also,
                ),
            )
            return self._job(id), changed.rowcount == 1

        return await self._change(finish)

    async def requeue(self, id: str) -> Job:
        """Let a running job wait again, at its old place, as if it had not been begun this time."""

        def requeue(database: sqlite3.Connection) -> Job:
            database.execute(
                "UPDATE jobs SET state = 'queued', fruitless = fruitless - 1 WHERE id = ? AND state = 'running'", (id,)
            )
            return self._job(id)

        return await self._change(requeue)

    async def interrupted(self, id: str, why: str, *, attempts: int) -> Job:
        """Let a running job that was cut off wait again, at its old place.

        It fails where that was so for the `attempts`th time in a row, and it never got any further than before; then
        `why` is part of its error.
        """
        return await self._change(lambda database: self._again(database, id, why, attempts))

    async def recover(self, *, attempts: int) -> Jobs:
        """At the start: as `interrupted`, whatever was running when the last process ended."""

        def recover(database: sqlite3.Connection) -> Jobs:
            found = database.execute("SELECT id FROM jobs WHERE state = 'running' ORDER BY n").fetchall()
            return [self._again(database, id, "the daemon was ended", attempts) for (id,) in found]

        return await self._change(recover)

    async def untidy(self) -> Jobs:
        """The jobs that are over, and of whose work more than a result may be left."""
        return await self._jobs(
            f"SELECT {COLUMNS} FROM jobs WHERE NOT tidy AND state IN ('completed', 'failed', 'cancelled')"
        )

    async def tidied(self, id: str) -> None:
        """Nothing is left of the work on a job that is over."""

        def tidied(database: sqlite3.Connection) -> None:
            database.execute("UPDATE jobs SET tidy = 1 WHERE id = ?", (id,))

        await self._change(tidied, durable=False)

    async def prune(self, age_s: float, bytes_: int, results: Path) -> Ids:
        """Delete jobs that ended longer ago, and the oldest while there are more bytes of results, with their files.

        results: the folder that the results lie below; folders in it that become empty go as well. Returns: the ids.
        """

        def chosen() -> Rows:
            found = self._database.execute(
                "SELECT id, target, state, finished_at, bytes FROM jobs"
                " WHERE tidy AND state IN ('completed', 'failed', 'cancelled') ORDER BY finished_at DESC, n DESC"
            )
            total, going = 0, []
            for number, (id, target, state, finished_at, size) in enumerate(found):
                total += size
                if total > bytes_ or number >= MOST_ENDED or finished_at < self._clock() - age_s:
                    going.append((id, target if state == "completed" else ""))
            return going

        going = await self._run(chosen)
        for start in range(0, len(going), 100):
            # In parts, so that nobody waits for long.
            await self._delete(going[start : start + 100], results)
        return [id for id, _ in going]

    async def _delete(self, going: Rows, results: Path) -> None:
        """Jobs, and their files before them: a file without its job would stay for ever."""

        def delete(database: sqlite3.Connection) -> None:
            for id, target in going:
                if target:
                    _remove(results, target)
                database.execute("DELETE FROM jobs WHERE id = ?", (id,))

        await self._change(delete)

    # In the thread

    def _open(self) -> None:
        path = self.path
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            left = [Path(f"{path}{end}") for end in ("-wal", "-journal")]
            if not path.exists():
                if any(file.exists() and file.stat().st_size for file in left):
                    raise StoreError(
                        f"{path}: is gone, and what was written to it last is still there ({left[0].name}); put it "
                        "back, or move that away to begin with no jobs"
                    )
                self._create()
            _look_at_head(path)
            self._database = self._connect(path)
            try:
                self._check()
                self._migrate()
            except BaseException:
                self._database.close()
                raise

    def _create(self) -> None:
        """An empty database that is there as a whole or not at all: so an empty file is always a damaged one."""
        begun = self.path.with_name(f"{self.path.name}.new")
        begun.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(begun, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = FULL")
            database.execute(f"PRAGMA application_id = {APPLICATION}")
        begun.chmod(0o600)
        os.replace(begun, self.path)
        flush_to_disk(self.path.parent)

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=OPEN_S)
        try:
            # No second process at the same jobs, whatever became of the lock on their folder.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            # Takes the lock, which from now on is kept.
            database.execute("BEGIN IMMEDIATE")
            database.execute("COMMIT")
        except BaseException:
            database.close()
            raise
        return database

    def _check(self) -> None:
        (found,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _damaged(self.path, found.splitlines()[-1].strip())

    def _migrate(self) -> None:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{self.path}: was written by a later avatard (version {version}, this one knows {len(MIGRATIONS)}); "
                "use that one, or another folder as daemon.state"
            )
        for number in range(version, len(MIGRATIONS)):
            with self._transaction() as database:
                for statement in filter(str.strip, MIGRATIONS[number].split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {number + 1}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield self._database
            self._database.execute("COMMIT")
        except BaseException:
            # Where the disk is full SQLite may have rolled back by itself.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _again(self, database: sqlite3.Connection, id: str, why: str, attempts: int) -> Job:
        database.execute(
            "UPDATE jobs SET state = 'queued'"
            " WHERE id = ? AND state = 'running' AND (frames > furthest OR fruitless < ?)",
            (id, attempts),
        )
        # Still running: it is over.
        database.execute(
            "UPDATE jobs SET state = 'failed', finished_at = ?, error_type = 'Interrupted',"
            " error = 'was begun ' || fruitless || ' times and never got further than frame ' || frames || ': ' || ?"
            " WHERE id = ? AND state = 'running'",
            (self._clock(), why, id),
        )
        return self._job(id)

    def _known(self, id: str, digest: str) -> Job | None:
        found = self._database.execute("SELECT digest FROM jobs WHERE id = ?", (id,)).fetchone()
        if found is None:
            return None
        if found[0] != digest:
            raise Refusal("conflict", f"job {id}: there is another one of this id; choose another id")
        return self._job(id)

    def _find(self, id: str) -> Job | None:
        row = self._database.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (id,)).fetchone()
        return _job(row) if row else None

    def _job(self, id: str) -> Job:
        """Raises: Refusal: not found."""
        if (job := self._find(id)) is None:
            raise Refusal("not found", f"job {id}: there is none, or no more")
        return job

    # To the thread

    async def _change(self, work: Callable[[sqlite3.Connection], R], durable: bool = True) -> R:
        def change() -> R:
            if not durable:
                self._database.execute("PRAGMA synchronous = NORMAL")
            try:
                with self._transaction() as database:
                    return work(database)
            finally:
                if not durable:
                    self._database.execute("PRAGMA synchronous = FULL")

        return await self._run(change)

    async def _rows(self, statement: str, *values: Any) -> Rows:
        return await self._run(lambda: self._database.execute(statement, values).fetchall())

    async def _jobs(self, statement: str, *values: Any) -> Jobs:
        return await self._run(lambda: [_job(row) for row in self._database.execute(statement, values)])

    async def _run(self, work: Callable[[], R]) -> R:
        def run() -> R:
            with _told(self.path):
                return work()

        # Who is cancelled must not have to ask whether the thread had begun with it.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, run))


def _look_at_head(path: Path) -> None:
    """Before SQLite does, which takes an empty file for a new one, and writes into another program's."""
    with path.open("rb") as file:
        head = file.read(72)
    if head[:16] != b"SQLite format 3\0":
        raise _damaged(path, "it is no database" if head else "it is empty")
    if int.from_bytes(head[68:72], "big") != APPLICATION:
        raise StoreError(f"{path}: is a database of another program; name another folder as daemon.state")


def _job(row: tuple[Any, ...]) -> Job:
    id, state, priority, request, attempts, frames, total_frames, seed, created, started, finished, result = row[:12]
    return Job(
        id=id,
        state=state,
        priority=priority,
        request=json.loads(request),
        attempts=attempts,
        frames=frames,
        total_frames=total_frames,
        seed=seed,
        created_at=created,
        started_at=started,
        finished_at=finished,
        result=json.loads(result) if result else None,
        error=row[12],
        error_type=row[13],
        origin=json.loads(row[14]),
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _remove(results: Path, target: str) -> None:
    """A result, and the folders below `results` that are empty without it."""
    file = results / target
    file.unlink(missing_ok=True)
    for folder in file.parents:
        if folder == results or results not in folder.parents:
            return
        try:
            folder.rmdir()
        except OSError:
            return


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What SQLite and the disk say, as an error for people."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # Of extended codes the lower byte says which kind it is.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreFull(f"{path}: there is no room left on its disk") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(path, str(error)) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(
                f"{path}: another process has it open; end that one, or name another folder as daemon.state"
            ) from error
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise StoreError(f"{path}: cannot be read or written ({error}); look after its disk") from error
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be used ({(error.strerror or str(error)).lower()})") from error


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path}: is damaged ({why}); put back a copy of it, or move it away to begin with no jobs")
