"""What a batch has made so far: a file of JSON lines that a kill at any moment leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
"""A line: `state` (begun, done or failed), key, audio, name, inputs; of what is done also bytes, sha256, frames, ..."""

STATES = ("begun", "done", "failed")


class Manifest:
    """What all runs over one folder have begun and how it ended, in the order in which it came.

    A line is written with one call and seen safe on the disk. One that a kill or a full disk has cut off is passed
    over, and the next begins on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[str, Record] = {}
        self._by_name: dict[str, Record] = {}
        self._names: dict[str, dict[str, None]] = {}
        self._begun: set[str] = set()
        self._hashes: dict[tuple[str, int, int], str] = {}
        for record in _records(path):
            self._take(record)

    def add(self, record: Record) -> None:
        """Write a line. Raises: OSError."""
        line = json.dumps(record).encode() + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._take(record)

    def last(self, key: str) -> Record | None:
        """What became of that work the last time."""
        return self._by_key.get(key)

    def made(self, name: str) -> Record | None:
        """The last outcome that was done under that name."""
        return self._by_name.get(name)

    def names_of(self, key: str) -> list[str]:
        """The names under which that work was the last that was done, the latest first."""
        return [name for name in reversed(self._names.get(key, {})) if self._by_name[name]["key"] == key]

    def begun(self, name: str) -> bool:
        """Whether the last that is known of that name is that it was begun: a kill may have come after its file."""
        return name in self._begun

    def hash_of(self, path: str, stat: os.stat_result) -> str | None:
        """The SHA-256 of a file's bytes as it was noted, if the file has not been touched since."""
        return self._hashes.get((path, stat.st_size, stat.st_mtime_ns))

    def _take(self, record: Record) -> None:
        if record["state"] == "begun":
            self._begun.add(record["name"])
        else:
            self._begun.discard(record["name"])
            self._by_key[record["key"]] = record
        if record["state"] == "done":
            self._by_name[record["name"]] = record
            names = self._names.setdefault(record["key"], {})
            names.pop(record["name"], None)  # so that it comes last
            names[record["name"]] = None
        for file in record.get("inputs", ()):
            self._hashes[file["path"], file["bytes"], file["mtime_ns"]] = file["sha256"]


def _records(path: Path) -> Iterator[Record]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
            if record["state"] in STATES and record["key"] and record["name"]:
                yield record
        except (ValueError, KeyError, TypeError):
            continue
