"""The spool: what came from outside, as files that are named by their content and lie whole on the disk.

Everything here blocks and may be called from any thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from audio.errors import AvatardError
from streaming.muxer import flush_to_disk

NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{2,4}")

INCOMING = ".incoming-"

GRACE_S = 600.0
"""What came or was asked for in the last seconds is kept in any case: a job that needs it is about to be stored."""

FULL = 0.8
"""The share of the limit from which on the oldest are deleted, so that there is always room for the next."""

_HEAD = 64


class SpoolFull(AvatardError):
    """There is no room for more, by the limit or on the disk."""


class Spool:
    """A folder of files, named sha256 and a suffix by content; at most `limit` bytes of them, begun ones included.

    Made where it is missing, readable by its owner alone. What an earlier process left half written is deleted: only
    one process may use a spool at a time.
    """

    def __init__(self, folder: Path, limit: int, clock: Callable[[], float] = time.time) -> None:
        self._folder, self.limit, self._clock = folder, limit, clock
        # Held while a file is placed, looked up or deleted, so that none is deleted between being found and touched.
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for left in folder.glob(f"{INCOMING}*"):
            left.unlink(missing_ok=True)
        self._bytes = sum(stat.st_size for _, stat in self._files())

    @property
    def bytes(self) -> int:
        return self._bytes

    def receive(self) -> Incoming:
        """A place for what comes next."""
        return Incoming(self, self._folder / f"{INCOMING}{uuid.uuid4().hex}")

    def find(self, name: str) -> Path | None:
        """The file of that name, kept for a while from now on; None when there is none."""
        if not NAME.fullmatch(name):
            return None
        with self._lock:
            return self._touched(self._folder / name)

    def prune(self, needed: Collection[Path], older_s: float) -> int:
        """Delete what nobody needs: whatever is older than that, and the oldest while the spool is nearly full.

        needed: as found out just before; what came since is too young to be deleted. Returns: files deleted.
        """
        keep = {path.name for path in needed}
        deleted = 0
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        for path, _ in files:
            if path.name in keep or not NAME.fullmatch(path.name):
                continue
            with self._lock:
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                age_s = self._clock() - stat.st_mtime
                if age_s > max(older_s, GRACE_S) or (age_s > GRACE_S and self._bytes > FULL * self.limit):
                    path.unlink(missing_ok=True)
                    self._bytes -= stat.st_size
                    deleted += 1
        return deleted

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    yield Path(entry.path), entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue

    def _take(self, count: int) -> None:
        with self._lock:
            if count > 0 and self._bytes + count > self.limit:
                raise SpoolFull(f"the spool is full ({self.limit / 1e9:g} GB)")
            self._bytes += count

    def _touched(self, path: Path) -> Path | None:
        try:
            os.utime(path, (self._clock(),) * 2)
        except FileNotFoundError:
            return None
        return path

    def _place(self, incoming: Path, name: str, size: int) -> Path:
        target = self._folder / name
        with self._lock:
            if self._touched(target):
                return target
            os.utime(incoming, (self._clock(),) * 2)
            incoming.rename(target)
            self._bytes += size
        flush_to_disk(self._folder)
        return target


class Incoming:
    """A file that is on its way into the spool; whoever asked for it calls `discard` in the end, also after `place`.

    Each method may be called while another one still runs in another thread: a task that was cancelled leaves its
    write behind.
    """

    def __init__(self, spool: Spool, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._spool = spool
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._head = b""
        self._over = False

    @property
    def name(self) -> str:
        """What the file will be called, if nothing more is written."""
        return f"{self._hash.hexdigest()}{suffix(self._head)}"

    def write(self, part: bytes) -> None:
        """Raises: SpoolFull, OSError."""
        with self._lock:
            if self._over:
                return
            self._spool._take(len(part))
            self.bytes += len(part)
            try:
                if self._file is None:
                    self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
                self._file.write(part)
            except OSError as error:
                raise _full(error) from error
            self._hash.update(part)
            self._head += part[: _HEAD - len(self._head)]

    def finish(self) -> None:
        """All has been written: now it is on the disk, under its temporary name. Raises: SpoolFull, OSError."""
        with self._lock:
            if self._file is not None and not self._over:
                try:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                except OSError as error:
                    raise _full(error) from error

    def place(self) -> Path:
        """The final file, after `finish`; the one that was there already when the content is the same."""
        with self._lock:
            assert not self._over, "place() after discard()"
            return self._spool._place(self.path, self.name, self.bytes)

    def discard(self) -> None:
        """Let the temporary file go."""
        with self._lock:
            if self._over:
                return
            self._over = True
            self._spool._take(-self.bytes)
            if self._file is not None:
                try:
                    self._file.close()
                finally:
                    self.path.unlink(missing_ok=True)


def suffix(head: bytes) -> str:
    """What a file's first bytes say that it is; `.bin` where they say nothing known."""
    if head[:4] == b"RIFF":
        return {b"WAVE": ".wav", b"WEBP": ".webp"}.get(head[8:12], ".riff")
    if head[4:8] == b"ftyp":
        return ".mp4"
    known = {
        b"\x89PNG\r\n\x1a\n": ".png",
        b"\xff\xd8\xff": ".jpg",
        b"GIF8": ".gif",
        b"BM": ".bmp",
        b"fLaC": ".flac",
        b"OggS": ".ogg",
        b"ID3": ".mp3",
        b"\xff\xfb": ".mp3",
        b"\x1aE\xdf\xa3": ".webm",
    }
    return next((name for start, name in known.items() if head.startswith(start)), ".bin")


def _full(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpoolFull("there is no room left on the disk of the spool")
    return error
