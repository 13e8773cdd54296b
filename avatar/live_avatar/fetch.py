"""Downloading the published weights: only the files that are used, with resume, checked by size and hash.

`huggingface_hub` finds and names the files and opens the connections (so HF_ENDPOINT, HF_TOKEN, proxies and offline
mode are its own); the bytes are taken here, because its release 2.4 keeps no partial file and starts 10 GB anew after
an interruption. What was fetched stands in a lock file in the folder, and later calls hold to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from audio.errors import AvatardError

log = logging.getLogger(__name__)

LOCK_NAME = "avatard.lock.json"
CHUNK = 1 << 20
TRIES = 5


class FetchError(AvatardError):
    """A download that cannot be finished; names the file and what to do."""


@dataclass(frozen=True)
class Source:
    """One repository and what is taken from it.

    folder: where it goes, under the model's folder; needed: patterns that must each match a file; wanted: patterns of
    more files; alternatives: of these the first that exists. revision: a branch, tag or commit.
    """

    repo: str
    folder: str
    needed: tuple[str, ...]
    wanted: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    # "main" until someone with access has tried a commit and writes its hash here; the lock file has what was resolved.
    revision: str = "main"


SPEECH = "wav2vec2-large-xlsr-53-english"
SOURCES = (
    Source(
        "Wan-AI/Wan2.2-S2V-14B",
        "Wan2.2-S2V-14B",
        needed=(
            "config.json",
            "diffusion_pytorch_model*.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
            "models_t5_umt5-xxl-enc-bf16.pth",
            "Wan2.1_VAE.pth",
            "google/umt5-xxl/*",
            f"{SPEECH}/config.json",
        ),
        wanted=(f"{SPEECH}/preprocessor_config.json", "LICENSE*"),
        alternatives=(f"{SPEECH}/model.safetensors", f"{SPEECH}/pytorch_model.bin"),
    ),
    Source("Quark-Vision/Live-Avatar", "Live-Avatar", needed=("liveavatar.safetensors",), wanted=("LICENSE*",)),
)


@dataclass(frozen=True)
class RemoteFile:
    """A file at a commit: size in bytes, and its sha256 or, where it is small, the hash git gives it."""

    repo: str
    commit: str
    name: str
    size: int
    sha256: str | None
    git: str

    def digest(self) -> Any:
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    @property
    def expected(self) -> str:
        return self.sha256 or self.git


Progress = Callable[[str, int, int], None]
"""Called with (file, bytes there, bytes in all) as they arrive."""


def fetch(
    folder: Path,
    *,
    revision: str | None = None,
    progress: bool = False,
    verify: bool = False,
    endpoint: str | None = None,
    sources: tuple[Source, ...] = SOURCES,
    retry_wait_s: float = 2.0,
) -> None:
    """Bring `live-avatar-14b` (47 GB) into a folder, or what is missing of it.

    Calling it again goes on where it stopped. A file that is there and unchanged since it was checked is not read
    again; with `verify` it is.

    Args:
        folder: made when missing; gets `Wan2.2-S2V-14B/`, `Live-Avatar/` and the lock file.
        revision: a branch, tag or commit for both repositories, or `REPO=REVISION,REPO=REVISION`. Without it what the
            lock file says, and in a new folder the revisions of `sources`.
        progress: whether bars are drawn on stderr.
        endpoint: the hub's address; HF_ENDPOINT or the public hub without it.
    Raises: FetchError: no connection, no such revision, too little disk space, another fetch in the same folder, a file
        that arrives damaged twice.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".fetch.lock", timeout=0), _bars(progress) as report:
            _fetch(folder, _revisions(revision, sources), verify, endpoint, sources, report, retry_wait_s)
    except Timeout as error:
        raise FetchError(f"{folder}: another fetch is at work here; wait for it to end") from error
    except OSError as error:
        raise FetchError(f"{error.filename or folder}: {error.strerror or error}") from error


def _fetch(
    folder: Path,
    revisions: Mapping[str, str],
    verify: bool,
    endpoint: str | None,
    sources: tuple[Source, ...],
    report: Progress,
    retry_wait_s: float,
) -> None:
    lock = _read_lock(folder)
    files: list[tuple[Path, RemoteFile]] = []
    for source in sources:
        entry = lock.get(source.repo)
        asked = revisions.get(source.repo)
        if entry is None or (asked is not None and asked not in (entry["revision"], entry["commit"])):
            entry = lock[source.repo] = _resolve(source, asked or source.revision, endpoint)
            _write_lock(folder, lock)
        for name, facts in entry["files"].items():
            remote = RemoteFile(source.repo, entry["commit"], name, facts["size"], facts["sha256"], facts["git"])
            path = folder / source.folder / name
            if verify or not _unchanged(path, facts):
                files.append((path, remote))
    missing = [(path, remote) for path, remote in files if not _is_whole(path, remote, report)]
    _check_space(folder, sum(remote.size - _size(_part(path)) for path, remote in missing))
    for path, remote in missing:
        _download(path, remote, endpoint, report, retry_wait_s)
    for path, remote in files:
        facts = lock[remote.repo]["files"][remote.name]
        facts["checked"] = _stamp(path)
    _write_lock(folder, lock)


def _revisions(revision: str | None, sources: tuple[Source, ...]) -> dict[str, str]:
    if revision is None:
        return {}
    if "=" not in revision:
        return {source.repo: revision for source in sources}
    known = [source.repo for source in sources]
    pairs = dict(part.strip().split("=", 1) for part in revision.split(",") if "=" in part)
    for repo in pairs:
        if repo not in known:
            raise FetchError(f"revision {revision}: no repository {repo}; there are {', '.join(known)}")
    return pairs


def _resolve(source: Source, revision: str, endpoint: str | None) -> dict[str, Any]:
    """The commit a revision stands for, and the files that are taken from it."""
    from huggingface_hub import HfApi

    with _hub_errors(f"{source.repo} at {revision}"):
        info = HfApi(endpoint=endpoint).model_info(source.repo, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    chosen: list[str] = []
    for pattern in source.needed + source.wanted:
        found = [name for name in siblings if fnmatch(name, pattern)]
        if not found and pattern in source.needed:
            raise FetchError(f"{source.repo} at {revision}: has no {pattern}; is this the right revision?")
        chosen += found
    if source.alternatives:
        first = next((name for name in source.alternatives if name in siblings), None)
        if first is None:
            raise FetchError(f"{source.repo} at {revision}: has none of {', '.join(source.alternatives)}")
        chosen.append(first)
    files = {}
    for name in sorted(set(chosen)):
        if name.startswith("/") or ".." in Path(name).parts:
            raise FetchError(f"{source.repo} at {revision}: {name}: a file name that leads out of the folder")
        sibling = siblings[name]
        files[name] = {
            "size": sibling.size,
            "sha256": sibling.lfs.sha256 if sibling.lfs else None,
            "git": sibling.blob_id,
        }
    return {"revision": revision, "commit": info.sha, "files": files}


def _download(path: Path, remote: RemoteFile, endpoint: str | None, report: Progress, retry_wait_s: float) -> None:
    """One file, through `<name>.part`, from where that ends."""
    part = _part(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        _receive(part, remote, endpoint, report, retry_wait_s)
        found = _digest(part, remote, report)
        if found == remote.expected:
            os.replace(part, path)
            return
        part.unlink()
        if last:
            raise FetchError(f"{path}: arrived damaged twice ({found[:12]} where {remote.expected[:12]} was promised)")
        log.warning("%s: arrived damaged, fetched again", path)


def _receive(part: Path, remote: RemoteFile, endpoint: str | None, report: Progress, retry_wait_s: float) -> None:
    """Fill `part` up to the file's size; a connection that breaks is opened again, `TRIES` times without a new byte."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(remote.repo, remote.name, revision=remote.commit, endpoint=endpoint)
    tries = 0
    while (have := _size(part)) < remote.size or not part.exists():
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        before = have
        try:
            with (
                _hub_errors(f"{remote.repo}: {remote.name}"),
                get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response,
            ):
                hf_raise_for_status(response)
                # 200 to a range: the server sends all of it, so all of it is written.
                with part.open("ab" if response.status_code == 206 else "wb") as file:
                    have = file.tell()
                    # As it arrives: gathered into larger pieces, what came before a break would be lost.
                    for piece in response.iter_raw():
                        file.write(piece)
                        have += len(piece)
                        report(remote.name, have, remote.size)
        except _Broken as error:
            tries = 1 if _size(part) > before else tries + 1
            if tries > TRIES:
                raise FetchError(f"{error}; call again to go on at {_size(part) / 1e9:.2f} GB") from error
            log.warning("%s; trying again", error)
            time.sleep(retry_wait_s * tries)
        if _size(part) > remote.size:
            part.unlink()
            raise FetchError(f"{remote.repo}: {remote.name}: longer than the {remote.size} bytes that were promised")


class _Broken(FetchError):
    """The connection failed; another try may do."""


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """The hub's errors in the words of a user."""
    from huggingface_hub import errors

    try:
        import httpx2 as httpx
    except ImportError:
        import httpx  # type: ignore[no-redef]  # huggingface_hub 1.x

    try:
        yield
    except errors.GatedRepoError as error:
        raise FetchError(f"{what}: access must be asked for on the hub; then set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FetchError(f"{what}: not found on the hub; check the revision, or HF_ENDPOINT") from error
    except errors.OfflineModeIsEnabled as error:
        raise FetchError(f"{what}: HF_HUB_OFFLINE is set; unset it to download") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        kind = _Broken if status >= 500 or status in (408, 429) else FetchError
        raise kind(f"{what}: the hub answers {status}") from error
    except httpx.HTTPError as error:
        raise _Broken(f"{what}: no connection ({type(error).__name__})") from error


def _digest(path: Path, remote: RemoteFile, report: Progress) -> str:
    digest = remote.digest()
    done = 0
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            done += len(piece)
            report(f"{remote.name} (check)", done, remote.size)
    return str(digest.hexdigest())


def _is_whole(path: Path, remote: RemoteFile, report: Progress) -> bool:
    return path.is_file() and path.stat().st_size == remote.size and _digest(path, remote, report) == remote.expected


def _unchanged(path: Path, facts: Mapping[str, Any]) -> bool:
    return path.is_file() and facts.get("checked") == _stamp(path)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(f"{folder}: {needed / 1e9:.1f} GB are still to come, {free / 1e9:.1f} GB are free there")


def _read_lock(folder: Path) -> dict[str, Any]:
    path = folder / LOCK_NAME
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text())["repos"])
    except (ValueError, KeyError, TypeError) as error:
        raise FetchError(f"{path}: damaged; remove it, and what is there is checked anew") from error


def _write_lock(folder: Path, repos: Mapping[str, Any]) -> None:
    path = folder / LOCK_NAME
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"repos": repos}, indent=1))
    os.replace(temporary, path)


@contextmanager
def _bars(wanted: bool) -> Iterator[Progress]:
    """A bar for each file, on stderr; or nothing."""
    if not wanted:
        yield lambda name, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield report
