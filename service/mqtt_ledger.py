"""What was taken from a broker and is not settled: on the disk, so that neither side has to remember it."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from audio.errors import AvatardError
from service.commands import SubmitJob
from service.mqtt_messages import Asker, Body, ResultKind, Submission

R = TypeVar("R")

VERSION = 1
SCHEMA = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE IF NOT EXISTS owed (
    n INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    given INTEGER NOT NULL,
    topic TEXT NOT NULL,
    correlation BLOB NOT NULL,
    in_body INTEGER NOT NULL,
    result TEXT NOT NULL,
    command TEXT,
    upload INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    answer TEXT,
    told INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS owed_by_job ON owed (job);
"""


class LedgerError(AvatardError):
    """The ledger cannot be opened: which file, and what to do."""


@dataclass(frozen=True)
class Debt:
    """Somebody who asked for a job and has not heard its end.

    decided: the job was taken, or refused, in which case `answer` is all there is to tell; told: the asker knows as
    much.
    """

    n: int
    job: str
    given: bool
    asker: Asker
    result: ResultKind
    decided: bool
    upload: bool
    answer: Body | None
    told: bool


@dataclass(frozen=True)
class Undecided:
    """What a message asks for. incomplete: its sound is missing; attempts: how often it has been begun before;
    withdrawn: it was cancelled since.
    """

    command: SubmitJob
    incomplete: bool
    attempts: int
    withdrawn: bool


class Ledger:
    """One row for each message, from before it is acknowledged until its asker has been told how it ended.

    So the broker may forget a message as soon as it is here, however long its picture takes to fetch; and what a
    daemon or a broker missed while it was away is told afterwards. One connection in one thread; every change is on
    the disk when its call returns. Raises, once it is open: sqlite3.Error: the disk is full or broken.
    """

    def __init__(self, folder: Path) -> None:
        """Blocks. Raises: LedgerError."""
        path = Path(os.path.expanduser(folder)) / "mqtt.sqlite"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mqtt ledger")
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise LedgerError(f"{path}: was written by a later version of avatard; use that one")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: cannot be used ({error}); mend it, or move it away") from error

    @classmethod
    async def open(cls, folder: Path) -> Ledger:
        """The one in a folder, which is there. Raises: LedgerError."""
        return await asyncio.to_thread(cls, folder)

    async def close(self) -> None:
        await self._run(self._database.close)
        self._thread.shutdown(wait=False)

    async def take(self, submission: Submission) -> int:
        """A message, before it is acknowledged. Returns: its number."""
        asker = submission.asker

        def insert() -> int:
            # In this thread: a picture in base64 takes a while to be written.
            command = submission.command.model_dump_json(exclude_none=True)
            cursor = self._database.execute(
                "INSERT INTO owed (job, given, topic, correlation, in_body, result, command, upload)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    submission.id,
                    submission.given,
                    asker.topic,
                    asker.correlation,
                    asker.in_body,
                    submission.result,
                    command,
                    submission.upload,
                ),
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

        return await self._run(insert)

    async def undecided(self) -> list[tuple[int, str]]:
        """The messages nobody has looked into, and their jobs; oldest first."""
        return await self._query("SELECT n, job FROM owed WHERE command IS NOT NULL ORDER BY n")

    async def begin(self, n: int) -> Undecided:
        """Look into an undecided message."""

        def read() -> Undecided:
            self._database.execute("UPDATE owed SET attempts = attempts + 1 WHERE n = ?", (n,))
            row = self._database.execute(
                "SELECT command, upload, attempts, answer FROM owed WHERE n = ?", (n,)
            ).fetchone()
            return Undecided(SubmitJob.model_validate_json(row[0]), bool(row[1]), row[2] - 1, row[3] is not None)

        return await self._run(read)

    async def withdraw(self, job: str) -> None:
        """The undecided messages of a job ask for nothing any more."""
        await self._query("UPDATE owed SET answer = '{}' WHERE job = ? AND command IS NOT NULL", (job,))

    async def received(self, n: int, command: SubmitJob) -> None:
        """The sound of a message is there; `command` refers to it."""
        text = command.model_dump_json(exclude_none=True)
        await self._query("UPDATE owed SET command = ?, upload = 0 WHERE n = ?", (text, n))

    async def decide(self, n: int, answer: Body | None = None) -> None:
        """The job of a message is in the store; or there is none, and `answer` says why.

        A message that came twice is owed for once.
        """

        def decide() -> None:
            text = None if answer is None else json.dumps(answer)
            self._database.execute("BEGIN")
            try:
                self._database.execute("UPDATE owed SET command = NULL, answer = ?, told = 0 WHERE n = ?", (text, n))
                self._database.execute(
                    "DELETE FROM owed WHERE n <> :n AND command IS NULL AND answer IS NULL"
                    " AND (job, topic, correlation, result) ="
                    " (SELECT job, topic, correlation, result FROM owed WHERE n = :n AND answer IS NULL)",
                    {"n": n},
                )
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

        await self._run(decide)

    async def jobs(self) -> list[str]:
        """Every job that somebody is still to be told about, oldest first."""
        return [row[0] for row in await self._query("SELECT job FROM owed GROUP BY job ORDER BY MIN(n)")]

    async def debts(self, job: str) -> list[Debt]:
        rows = await self._query(
            "SELECT n, job, given, topic, correlation, in_body, result, command IS NULL, upload, answer, told"
            " FROM owed WHERE job = ? ORDER BY n",
            (job,),
        )
        return [
            Debt(
                n=row[0],
                job=row[1],
                given=bool(row[2]),
                asker=Asker(row[3], bytes(row[4]), bool(row[5])),
                result=row[6],
                decided=bool(row[7]),
                upload=bool(row[8]),
                answer=json.loads(row[9]) if row[7] and row[9] is not None else None,
                told=bool(row[10]),
            )
            for row in rows
        ]

    async def tell(self, n: int) -> None:
        """The asker knows that the sound may come, or after the decision, that the job was taken."""
        await self._query("UPDATE owed SET told = 1 WHERE n = ?", (n,))

    async def settle(self, n: int) -> None:
        """The asker has been told how it ended."""
        await self._query("DELETE FROM owed WHERE n = ?", (n,))

    async def _query(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        return await self._run(lambda: self._database.execute(statement, values).fetchall())

    async def _run(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
