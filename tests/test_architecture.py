"""Who may import whom, and what a family of models may not say: read from the sources themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("audio", "avatar", "streaming", "service")
BELOW = {
    "audio": set(),
    "avatar": {"audio"},
    "streaming": {"audio", "avatar"},
    "service": {"audio", "avatar", "streaming"},
}
"""What each room may import of the others."""

WITHOUT_TORCH = (
    "audio/chunk.py",
    "audio/blocks.py",
    "audio/decode.py",
    "audio/source.py",
    "audio/errors.py",
    "audio/live.py",
    "audio/opus.py",
    "audio/reader.py",
    "audio/urls.py",
    "avatar/model.py",
    "avatar/picture.py",
    "streaming/",
    "service/",
)
"""Files and folders that must not load torch when they are imported."""

HEAVY = {"torch", "transformers", "diffusers", "librosa", "accelerate"}

ENGINE_CHILD = "streaming/engine_child.py"
"""The one file of streaming that loads a model and handles its states, in the engine's own process, in functions."""

DOWNLOAD = "avatar/live_avatar/fetch.py"
"""Lies beside the layouts it downloads, talks to a network and waits; no other module may import it."""

LOADING = {"load.py", "place.py", "gpu_bench.py"}
"""Those of avatar/ that know families: what loads them, puts their parts in places, and measures them."""

NOT_FOR_FAMILIES = {"avatar.placement", "avatar.offload"}

DEVICE_WORDS = re.compile(r"""\.cuda\(|["']cuda|["']mps["':]|\bdevice\s*=\s*["']""")


@dataclass(frozen=True)
class Import:
    """One imported module: in which file and line, and whether when that file is imported or only in a function."""

    file: str
    line: int
    module: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: imports {self.module}"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> list[Import]:
    """Every import in a file; those for the type checker only are left out."""
    file = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"), file)
    package = path.relative_to(ROOT).with_suffix("").parts
    return list(_imports(tree, file, package if path.name == "__init__.py" else package[:-1], at_import=True))


def _imports(node: ast.AST, file: str, package: tuple[str, ...], at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                for name in names:
                    yield Import(file, child.lineno, name.name, at_import)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join([*package[: len(package) - level + 1], module or ""]).strip(".") if level else module
                # A name may be a module of its own: `from avatar import placement`.
                for name in names:
                    yield Import(file, child.lineno, f"{base}.{name.name}", at_import)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for other in child.orelse:
                    yield from _imports(other, file, package, at_import)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _imports(child, file, package, at_import=False)
            case _:
                yield from _imports(child, file, package, at_import)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_program(path: Path) -> bool:
    """Whether a person runs it by name (`python -m avatar.…`)."""
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def families() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "avatar").glob("*/__init__.py"))


def broken(*found: Import) -> str:
    return "\n".join(map(str, found))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    wrong = [
        found
        for path in sources(room)
        for found in imports_of(path)
        for other in ROOMS
        if within(found.module, other) and other != room and other not in BELOW[room]
    ]
    assert not wrong, broken(*wrong)


def test_streaming_knows_no_family_of_models():
    wrong = [
        found
        for path in sources("streaming")
        for found in imports_of(path)
        if within(found.module, "avatar") and not within(found.module, "avatar.model")
        if not (
            found.file == ENGINE_CHILD
            and not found.at_import
            and (within(found.module, "avatar.load") or within(found.module, "avatar.stateful"))
        )
    ]
    assert not wrong, broken(*wrong)


def test_what_must_start_at_once_loads_no_heavy_package():
    wrong = []
    for path in sources("audio", "avatar", "streaming", "service"):
        file = path.relative_to(ROOT).as_posix()
        if file.startswith(WITHOUT_TORCH):
            wrong += [found for found in imports_of(path) if found.module.split(".")[0] in HEAVY]
    assert not wrong, broken(*wrong)


def test_what_must_start_at_once_loads_no_module_that_loads_torch():
    """The same through our own modules: what is imported at import time, followed to its end."""
    graph: dict[str, list[Import]] = {}
    for path in sources(*ROOMS):
        graph[module_name(path)] = [found for found in imports_of(path) if found.at_import]

    def reaches_torch(module: str, seen: set[str]) -> list[Import]:
        for found in graph.get(module, ()):
            if found.module.split(".")[0] in HEAVY:
                return [found]
            for target in (found.module, found.module.rpartition(".")[0]):
                if target in graph and target not in seen:
                    seen.add(target)
                    if chain := reaches_torch(target, seen):
                        return [found, *chain]
        return []

    for path in sources(*ROOMS):
        file = path.relative_to(ROOT).as_posix()
        if file.startswith(WITHOUT_TORCH):
            chain = reaches_torch(
                ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), set()
            )
            assert not chain, broken(*chain)


@pytest.mark.parametrize("family", families())
def test_a_family_imports_no_other_family(family):
    """pocket is a size of live_avatar and may use its networks."""
    allowed = {family, "live_avatar"} if family == "pocket" else {family}
    wrong = [
        found
        for path in sources(f"avatar/{family}")
        for found in imports_of(path)
        for other in families()
        if within(found.module, f"avatar.{other}") and other not in allowed
    ]
    assert not wrong, broken(*wrong)


@pytest.mark.parametrize("family", families())
def test_a_family_knows_neither_placement_nor_offload(family):
    wrong = [
        found
        for path in sources(f"avatar/{family}")
        for found in imports_of(path)
        if any(within(found.module, name) for name in NOT_FOR_FAMILIES)
    ]
    assert not wrong, broken(*wrong)


def test_the_mathematics_knows_no_family_but_where_models_are_loaded():
    wrong = [
        found
        for path in (ROOT / "avatar").glob("*.py")
        if path.name not in LOADING
        for found in imports_of(path)
        for family in families()
        if within(found.module, f"avatar.{family}")
    ]
    assert not wrong, broken(*wrong)


@pytest.mark.parametrize("family", families())
def test_a_family_says_no_device_word(family):
    """Comments and docstrings may; code takes the device from a tensor. A program runs where its user has it run."""
    wrong = []
    for path in sources(f"avatar/{family}"):
        if is_program(path):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        for number, line in enumerate(ast.unparse(tree).splitlines(), 1):
            if DEVICE_WORDS.search(line):
                wrong.append(f"{path.relative_to(ROOT)} (line {number} without comments): {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_the_mathematics_knows_no_clock_thread_socket_or_settings():
    """Programs may measure time."""
    outside = {"time", "threading", "socket", "asyncio", "subprocess", "multiprocessing"}
    wrong = [
        found
        for path in sources("avatar")
        if not is_program(path)
        for found in imports_of(path)
        if (found.at_import and found.module.split(".")[0] in outside and found.file != DOWNLOAD)
        or within(found.module, "avatar.live_avatar.fetch")
    ]
    assert not wrong, broken(*wrong)


def test_nothing_is_pickled():
    """The module may be imported for the name of its error."""
    wrong = []
    for path in sources(*ROOMS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="pickle" | "cloudpickle" | "dill" | "joblib"), attr=name):
                    if not name.endswith("Error"):
                        wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                    if "weights_only=True" not in [ast.unparse(keyword) for keyword in keywords]:
                        wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
