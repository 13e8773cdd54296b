"""What a batch has to do: the sounds there are, who speaks each of them, what the results are called, what is done."""

from __future__ import annotations

import contextlib
import csv
import difflib
import fnmatch
import hashlib
import io
import itertools
import json
import os
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from audio.errors import AvatardError
from service.config import Settings
from service.manifest import Manifest, Record
from service.models import resolve_model

SUFFIXES = (
    *("wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "wma", "aif", "aiff", "amr", "ac3", "caf", "mka"),
    *("mp4", "m4v", "mov", "mkv", "webm", "avi"),
)
"""Of what is taken out of a folder where no pattern says otherwise. A file that is named is taken whatever it is."""

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")

COLUMNS = ("audio", "image", "prompt", "seed", "name")

LONGEST_NAME = 200
"""Bytes of one part of a result's path; file systems take 255, and a part file needs some more than its target."""

OWN_FOLDER = ".avatard"
"""Below the folder of results: the work in progress, and the lock."""
WORK_FOLDER = f"{OWN_FOLDER}/work"

OWN_FILES = ("manifest.jsonl", "report.json", "report.txt")
"""In the folder of results: what tells of them."""


class BatchError(AvatardError):
    """The batch cannot be begun as it was asked for: which word, file or line, and what would do."""


@dataclass(frozen=True)
class Item:
    """One video to make: the files as they were named, prompt and seed, and the path of the result below `out`.

    chosen: whether the user gave it that name. key: of all that the frames depend on, so two items with the same key
    are the same video; "" while it is not known. inputs: path, bytes, mtime_ns and sha256 of sound and picture.
    """

    audio: Path
    image: Path
    prompt: str
    seed: int
    name: str
    chosen: bool = False
    key: str = ""
    inputs: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Step:
    """What is to be done about one item.

    make: render it; copy: it is the same video as the one at `source` below `out`, which is made on the way, or was
    there before anything is done if it is `earlier`; done: it is there; failed: it failed before, or can only fail, as
    `why` says.
    """

    item: Item
    do: Literal["make", "copy", "done", "failed"]
    why: str = ""
    source: str = ""
    earlier: bool = False


@dataclass(frozen=True)
class BatchRequest:
    """What the command was given. images: at most one picture for all, and at most one table."""

    sources: tuple[Path, ...]
    images: tuple[Path, ...]
    out: Path
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recursive: bool = True
    overwrite: bool = False
    retry_failed: bool = False


@dataclass(frozen=True)
class _Row:
    """A line of a table, `at` FILE:LINE; what it does not say is as for all."""

    at: str
    folder: Path
    audio: str
    image: Path | None = None
    prompt: str | None = None
    seed: int | None = None
    name: str = ""

    @property
    def is_pattern(self) -> bool:
        # Not Path.exists, which takes a pattern longer than any name for a bug.
        return any(mark in self.audio for mark in "*?[") and not os.path.exists(self.folder / self.audio)


@dataclass(frozen=True)
class _Sound:
    """A sound that was found; relative: what its result is called after."""

    path: Path
    relative: PurePosixPath


def find_items(request: BatchRequest, settings: Settings) -> list[Item]:
    """The videos that are asked for, without keys, under the names that they would like to have. Blocking.

    Raises: BatchError: a source that is not there, no sound at all, a table that is not right, a sound that nobody
    is to speak.
    """
    picture, rows = _read_images(request.images)
    sounds = list(_found(request)) if request.sources else list(_in_table(rows))
    if not sounds:
        where = ", ".join(map(shown, request.sources or request.images))
        what = f"sound file that matches {' '.join(request.patterns)}" if request.patterns else "sound or video file"
        raise BatchError(f"{where}: there is no {what} in it")
    return [_item(sound, row, picture, settings) for sound, row in _with_rows(sounds, rows)]


def plan(
    items: Sequence[Item],
    request: BatchRequest,
    settings: Settings,
    manifest: Manifest,
    on_look: Callable[[int], None] = lambda number: None,
) -> list[Step]:
    """What is to be done about each of them, in their order. Reads every byte of what is not known yet. Blocking.

    on_look: called before each item is looked at, with its number; what it raises ends the plan.
    Raises: BatchError: two are to have the same name, or one that of a file which the batch is made from.
    """
    hashes = _Hashes(manifest)
    alike = _for_all(settings)
    known: list[Item | Step] = []
    for number, item in enumerate(items):
        on_look(number)
        known.append(_with_key(item, hashes, alike))
    named = _with_names([item for item in known if isinstance(item, Item)], request, manifest)
    of_named = list(_steps(named, request, manifest))
    _spare_inputs(of_named, items, request)
    steps = iter(of_named)
    return [next(steps) if isinstance(item, Item) else item for item in known]


def read_manifest(request: BatchRequest) -> Manifest:
    """What is known of the folder of results. Raises: BatchError."""
    try:
        return Manifest(request.out / "manifest.jsonl")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BatchError(
            f"--out {shown(request.out)}: cannot be a folder of results ({reason}); name another"
        ) from error


def kept(key: str) -> str:
    """The path below `out` of a video that is to be copied, and loses its name before that is done."""
    return f"{WORK_FOLDER}/kept/{key}"


def shown(path: object) -> str:
    """A path as it can be printed, whatever bytes are in it."""
    return os.fsencode(str(path)).decode("utf-8", "replace")


# Sounds


def _real(path: Path) -> str:
    """The path without links; not Path.resolve, which takes a link that leads to itself for a bug."""
    return os.path.realpath(path)


def _found(request: BatchRequest) -> Iterator[_Sound]:
    """Each sound of the sources once, in the order of their names."""
    seen: set[str] = set()
    for source in request.sources:
        if os.path.isdir(source):
            sounds = _without_results(list(_below(source, request)), request)
        elif os.path.exists(source):
            sounds = iter([_Sound(source, PurePosixPath(source.name))])
        else:
            raise BatchError(f"{shown(source)}: no such file or folder; check the path of the sounds")
        for sound in sounds:
            if (real := _real(sound.path)) not in seen:
                seen.add(real)
                yield sound


def _below(folder: Path, request: BatchRequest) -> Iterator[_Sound]:
    """The sounds in a folder. Nothing hidden, nothing in a folder of results below; no link to a folder is followed."""
    out, patterns = _real(request.out), request.patterns or tuple(f"*.{suffix}" for suffix in SUFFIXES)
    for top, folders, files in os.walk(folder, onerror=_complain):
        here = Path(top)
        relative = PurePosixPath(here.relative_to(folder))
        folders[:] = sorted(
            name
            for name in folders
            if request.recursive
            and not name.startswith(".")
            and not _matches(relative / name, request.exclude)
            and _real(here / name) != out
        )
        for name in sorted(files):
            path = relative / name
            if not name.startswith(".") and _matches(path, patterns) and not _matches(path, request.exclude):
                yield _Sound(here / name, path)


def _without_results(sounds: Sequence[_Sound], request: BatchRequest) -> Iterator[_Sound]:
    """Those that no run of this batch has made, where its results lie among the sounds.

    The manifest is read after the folder: what another batch makes there meanwhile is noted before it has its name.
    """
    out = _real(request.out)
    folders = {folder: Path(_real(folder)) for folder in {sound.path.parent for sound in sounds}}
    if not any(folder.is_relative_to(out) for folder in folders.values()):
        yield from sounds
        return
    manifest = read_manifest(request)
    for sound in sounds:
        folder = folders[sound.path.parent]
        if folder.is_relative_to(out):
            name = str(PurePosixPath(folder.relative_to(out) / sound.path.name))
            if name in OWN_FILES or manifest.made(name) is not None or manifest.begun(name):
                continue
        yield sound


def _complain(error: OSError) -> None:
    reason = (error.strerror or str(error)).lower()
    raise BatchError(f"{shown(error.filename)}: cannot be read ({reason}); check its permissions") from error


def _matches(path: PurePosixPath, patterns: Iterable[str]) -> bool:
    """By its name or by its whole path below the source; capitals do not matter."""
    return any(
        fnmatch.fnmatchcase(text.lower(), pattern.lower().rstrip("/"))
        for pattern in patterns
        for text in (path.name, str(path))
    )


# Tables


def _read_images(images: Sequence[Path]) -> tuple[Path | None, list[_Row]]:
    """The picture for all, and the lines of the table."""
    tables = [path for path in images if path.suffix.lower() in TABLES]
    pictures = [path for path in images if path not in tables]
    for path in images:
        if not os.path.isfile(path):
            raise BatchError(f"--image {shown(path)}: no such file; give a picture, or a table ({', '.join(TABLES)})")
    for several, what in ((tables, "tables"), (pictures, "pictures for all")):
        if len(several) > 1:
            raise BatchError(f"--image {shown(several[1])}: there are two {what}; name them in one table")
    rows = list(_rows(tables[0])) if tables else []
    if tables and not rows:
        raise BatchError(f"{shown(tables[0])}: is empty; its columns are {', '.join(COLUMNS)}")
    return (pictures[0] if pictures else None), rows


def _rows(table: Path) -> Iterator[_Row]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{shown(table)}: is not a text in UTF-8 that can be read; save the table anew") from error
    lines = _json_lines if table.suffix.lower() in (".jsonl", ".ndjson") else _csv_lines
    for at, values in lines(shown(table), text):
        _check_columns(at, values)
        yield _row(at, table.parent, values)


def _check_columns(at: str, columns: Iterable[str]) -> None:
    for column in columns:
        if column not in COLUMNS:
            close = difflib.get_close_matches(column, COLUMNS, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COLUMNS)}"
            raise BatchError(f"{at}: {reprlib.repr(column)}: unknown column; {hint}")


def _csv_lines(name: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    titles: list[str] = []
    for at, values in _csv_records(name, text):
        if titles:
            if len(values) > len(titles):
                raise BatchError(f"{at}: has more columns than the first line names")
            yield at, dict(itertools.zip_longest(titles, values, fillvalue=""))
            continue
        titles = values
        _check_columns(at, titles)
        if twice := [column for column, number in Counter(titles).items() if number > 1]:
            raise BatchError(f"{at}: {twice[0]}: is the title of two columns; leave one out")


def _csv_records(name: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """What is not empty, with the line on which it begins."""
    # Spreadsheets part columns by what their language leaves free.
    head = text.partition("\n")[0]
    # Strict, since a quote that is not closed would take the rest of the table for one text.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    while True:
        at = f"{name}:{reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise BatchError(
                f"{at}: is not CSV ({error}); close each quote, and write one that belongs to a text twice"
            ) from error
        if values is None:
            return
        if values:
            yield at, [value.strip() for value in values]


def _json_lines(name: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines, which also parts a text at characters that JSON allows in it.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values = json.loads(line)
            except RecursionError as error:
                raise BatchError(
                    f"{name}:{number}: is nested too deeply; write each value as a text or number"
                ) from error
            except ValueError as error:
                raise BatchError(f"{name}:{number}: is not JSON ({error})") from error
            if not isinstance(values, dict):
                raise BatchError(f'{name}:{number}: is not an object, such as {{"audio": "a.wav"}}')
            yield f"{name}:{number}", {column: value for column, value in values.items() if value is not None}


def _row(at: str, folder: Path, values: dict[str, Any]) -> _Row:
    for column, value in values.items():
        if column != "seed" and not _is_text(value, column):
            raise BatchError(f"{at}: {column}: {reprlib.repr(value)} is not a text")
    if not values.get("audio"):
        raise BatchError(f"{at}: audio: is missing; name the sound that this line is about")
    seed = values.get("seed", "")
    if seed != "":
        try:
            seed = int(seed)
        except (TypeError, ValueError, OverflowError):  # the last is what JSON's Infinity gives
            seed = -1
        if not 0 <= seed < 2**63 or isinstance(values["seed"], bool | float):
            raise BatchError(f"{at}: seed: {reprlib.repr(values['seed'])} is not a whole number from 0 on")
    image = folder / values["image"] if values.get("image") else None
    if image is not None and not os.path.isfile(image):
        raise BatchError(f"{at}: image: {shown(image)}: no such file; name a picture beside the table")
    return _Row(
        at=at,
        folder=folder,
        audio=values["audio"],
        image=image,
        prompt=values.get("prompt") or None,
        seed=None if seed == "" else seed,
        name=_chosen_name(at, values["name"]) if values.get("name") else "",
    )


def _is_text(value: object, column: str) -> bool:
    """Whether it can be said or, where it is a path, opened; JSON can write halves of characters, which cannot."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        # Some of these halves stand for bytes of a path that is no text.
        value.encode(errors="surrogateescape" if column in ("audio", "image") else "strict")
    except UnicodeEncodeError:
        return False
    return True


def _chosen_name(at: str, name: str) -> str:
    """A result's path below the folder of results, which it cannot leave."""
    from streaming.files import FILE_TYPES  # here, since it loads FFmpeg, and the model's process is started first

    path = PurePosixPath(name if name.lower().endswith(FILE_TYPES) else f"{name}.mp4")
    hidden = any(part.startswith(".") for part in path.parts)
    if path.is_absolute() or hidden or not name.isprintable():
        raise BatchError(f"{at}: name: {name!r} is not a path below the folder of results")
    return str(path)


def _in_table(rows: Iterable[_Row]) -> Iterator[_Sound]:
    """The sounds that a table names, each once."""
    seen: set[str] = set()
    for row in rows:
        if row.is_pattern:
            raise BatchError(
                f"{row.at}: audio: {shown(row.audio)} is a pattern; name the folder it is about, or a file"
            )
        path = row.folder / row.audio
        if not os.path.isfile(path):
            raise BatchError(
                f"{row.at}: audio: {shown(path)}: no such file; name one beside the table, or add the folder it is in"
            )
        if (real := _real(path)) not in seen:
            seen.add(real)
            inside = not PurePosixPath(row.audio).is_absolute() and ".." not in PurePosixPath(row.audio).parts
            yield _Sound(path, PurePosixPath(row.audio if inside else path.name))


def _with_rows(sounds: Sequence[_Sound], rows: Sequence[_Row]) -> Iterator[tuple[_Sound, _Row | None]]:
    """Each sound with every line that names it; with the first pattern that fits where none does."""
    patterns = [row for row in rows if row.is_pattern]
    of_sound: dict[_Sound, list[_Row]] = {}
    real = {_real(sound.path): sound for sound in sounds}
    relative = {str(sound.relative): sound for sound in reversed(sounds)}
    names = Counter(sound.path.name for sound in sounds)
    for row in rows:
        if row.is_pattern:
            continue
        sound = real.get(_real(row.folder / row.audio)) or relative.get(str(PurePosixPath(row.audio)))
        if sound is None and names[row.audio] == 1:
            sound = next(sound for sound in sounds if sound.path.name == row.audio)
        if sound is None:
            raise BatchError(f"{row.at}: audio: {shown(row.audio)} is none of the {len(sounds)} sounds of this batch")
        of_sound.setdefault(sound, []).append(row)
    for sound in sounds:
        fitting = next((row for row in patterns if _matches(sound.relative, [row.audio])), None)
        exact: list[_Row | None] = [*of_sound.get(sound, ())]
        for of_it in exact or [fitting]:
            yield sound, of_it
    for row in patterns:
        if not any(_matches(sound.relative, [row.audio]) for sound in sounds):
            raise BatchError(
                f"{row.at}: audio: none of the {len(sounds)} sounds of this batch matches {shown(row.audio)}"
            )


def _item(sound: _Sound, row: _Row | None, picture: Path | None, settings: Settings) -> Item:
    row = row or _Row("", Path(), "")
    image = row.image or picture
    if image is None:
        raise BatchError(
            f"{shown(sound.path)}: nobody is to speak it; add --image PICTURE for all that the table leaves out"
        )
    return Item(
        audio=sound.path,
        image=image,
        prompt=settings.model.prompt if row.prompt is None else row.prompt,
        seed=settings.model.seed if row.seed is None else row.seed,
        name=row.name or _short(sound.relative.with_suffix(".mp4")),
        chosen=bool(row.name),
    )


# Keys


class _Hashes:
    """SHA-256 of files, each read once: in this run, or in an earlier one if it was not touched since."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._known: dict[Path, dict[str, Any]] = {}

    def of(self, path: Path) -> dict[str, Any]:
        """Raises: OSError."""
        if path not in self._known:
            stat = path.stat()
            digest = self._manifest.hash_of(str(path.absolute()), stat)
            if digest is None:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._known[path] = {
                "path": str(path.absolute()),
                "bytes": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "sha256": digest,
            }
        return self._known[path]


def _for_all(settings: Settings) -> dict[str, Any]:
    """What the frames of every item depend on."""
    model = settings.model
    return {
        "model": [resolve_model(model.name, settings), model.width, model.height, model.steps, model.options],
        "encoder": settings.encoder.model_dump(),
    }


def _with_key(item: Item, hashes: _Hashes, alike: dict[str, Any]) -> Item | Step:
    """The item with its key; one whose files cannot be read can only fail."""
    inputs = []
    for path in (item.audio, item.image):
        try:
            if path.exists() and not path.is_file():
                raise OSError(0, "is no file")
            inputs.append(hashes.of(path))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            return Step(item, "failed", f"{shown(path)}: cannot be read ({reason}); check the path and its permissions")
    own = {"audio": inputs[0]["sha256"], "image": inputs[1]["sha256"], "prompt": item.prompt, "seed": item.seed}
    depends = {**alike, **own}
    key = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
    return replace(item, key=key, inputs=tuple(inputs))


# Names


def _with_names(items: Sequence[Item], request: BatchRequest, manifest: Manifest) -> list[Item]:
    """Each with a name of its own, the same in every run; what is there of another sound keeps its name too."""
    taken: dict[str, Item] = {}
    for item in items:
        if item.chosen:
            other = taken.setdefault(folded(item.name), item)
            if other is not item:
                raise BatchError(
                    f"name: {item.name}: is to be the name of {shown(other.audio)} and of {shown(item.audio)}"
                )
    wishes = Counter(folded(item.name) for item in items if not item.chosen)
    named = []
    for item in items:
        if not item.chosen:
            item = replace(item, name=_free_name(item, wishes, taken, request, manifest))
            taken[folded(item.name)] = item
        named.append(item)
    return named


def _free_name(
    item: Item, wishes: Counter[str], taken: dict[str, Item], request: BatchRequest, manifest: Manifest
) -> str:
    def is_free(name: str) -> bool:
        record = manifest.made(name)
        others = record is not None and record["audio"] != str(item.audio.absolute())
        another = others and _held(name, request, manifest) is not None
        return folded(name) not in taken and not another

    before = manifest.last(item.key)
    if before is not None and before["audio"] == str(item.audio.absolute()) and is_free(before["name"]):
        return str(before["name"])
    if wishes[folded(item.name)] == 1 and is_free(item.name):
        return item.name
    wish = PurePosixPath(item.name)
    with_type = _short(wish.with_name(f"{wish.stem}{item.audio.suffix.lower()}.mp4"))
    with_key = _short(wish.with_name(f"{wish.stem}-{item.key[:8]}.mp4"))
    candidates = [with_type, with_key, *(_short(wish.with_name(f"{wish.stem}-{n}.mp4")) for n in range(2, 10_000))]
    return next(name for name in candidates if is_free(name))


def folded(name: str) -> str:
    """What a file system that does not tell capitals or ways of writing an accent apart makes of a name."""
    return unicodedata.normalize("NFC", name).casefold()


def _short(name: PurePosixPath) -> str:
    """The name, with the middle of a part that no file system takes replaced by a hash of it."""
    parts = []
    for part in name.parts:
        content = os.fsencode(part)
        if len(content) > LONGEST_NAME:
            digest = hashlib.sha256(content).hexdigest()[:8]
            start = content[: LONGEST_NAME - 20].decode("utf-8", "ignore")
            part = f"{start}~{digest}{name.suffix if part == name.name else ''}"
        parts.append(part)
    return str(PurePosixPath(*parts))


# Steps


def _steps(items: Iterable[Item], request: BatchRequest, manifest: Manifest) -> Iterator[Step]:
    made: dict[str, Step] = {}
    """By keys: what is there, and what will have been made before the copies of it."""
    for item in items:
        step = _step(item, request, manifest, made)
        if step.do in ("make", "done"):
            made.setdefault(item.key, step)
        yield step


def _spare_inputs(steps: Iterable[Step], items: Iterable[Item], request: BatchRequest) -> None:
    """Raises: BatchError: a result would replace a sound, a picture or the table, by whatever path it is named."""
    inputs: dict[Path, str] = {}
    for item in items:
        inputs |= {item.audio: "a sound", item.image: "a picture"}
    inputs |= {path: "the table" for path in request.images if path.suffix.lower() in TABLES}
    known: dict[tuple[int, int], str] = {}
    for path, what in inputs.items():
        with contextlib.suppress(OSError):
            stat = path.stat()
            known[stat.st_dev, stat.st_ino] = f"{shown(path)}, {what} of this batch"
    for step in steps:
        if step.do == "done":
            continue
        with contextlib.suppress(OSError):
            stat = (request.out / step.item.name).stat()
            if replaced := known.get((stat.st_dev, stat.st_ino)):
                raise BatchError(
                    f"--out {shown(request.out)}: the result of {shown(step.item.audio)} would replace {replaced}; "
                    "name another folder"
                )


def _step(item: Item, request: BatchRequest, manifest: Manifest, made: dict[str, Step]) -> Step:
    held, last = _held(item.name, request, manifest), manifest.last(item.key)
    if held is not None and held["key"] == item.key and not request.overwrite:
        return Step(item, "done")
    path = request.out / item.name
    is_ours = held is not None or manifest.begun(item.name)
    if os.path.lexists(path) and not is_ours and not request.overwrite:
        return Step(
            item, "failed", f"{shown(path)}: exists already and was not made by this batch; remove it, or --overwrite"
        )
    if item.key in made:
        step = made[item.key]
        return Step(item, "copy", source=step.item.name, earlier=step.do == "done")
    if last is not None and not request.overwrite:
        if last["state"] == "failed" and not request.retry_failed:
            return Step(item, "failed", f"{last['error']} (it was tried before; --retry-failed tries it again)")
        if last["state"] == "done" and (source := _source(last, request, manifest)):
            return Step(item, "copy", source=source, earlier=True)
    return Step(item, "make")


def _held(name: str, request: BatchRequest, manifest: Manifest) -> Record | None:
    """What was done under that name, if it lies there still, as far as its length tells."""
    record, path = manifest.made(name), request.out / name
    try:
        if record is None or path.stat().st_size != record["bytes"]:
            return None
        if manifest.begun(name):  # another may have got the name before a kill, perhaps of the same length
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record.get("sha256"):
                    return None
    except OSError:
        return None
    return record


def _source(done: Record, request: BatchRequest, manifest: Manifest) -> str:
    """Where the video of that work lies below `out`; "" where it does not any more.

    Never under a name that another work has got since, whatever the record says.
    """
    for name in manifest.names_of(done["key"]):
        if _held(name, request, manifest) is not None:
            return name
    try:
        is_kept = (request.out / kept(done["key"])).stat().st_size == done["bytes"]
    except OSError:
        return ""
    return kept(done["key"]) if is_kept else ""
