"""docs/security.md says of every threat what tries it: here, that these tests exist."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "security.md"
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


@dataclass(frozen=True)
class Row:
    line: int
    threat: str
    done: str
    tests: str

    def __str__(self) -> str:
        return f"docs/security.md:{self.line}: {self.threat}"


def rows() -> list[Row]:
    """Of all tables whose last column is `test`."""
    found, inside = [], False
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[-1] == "test":
            inside = True
        elif inside and not set(line) <= set("|-: "):
            assert len(cells) == 3, f"docs/security.md:{number}: {len(cells)} columns"
            found.append(Row(number, *cells))
    return found


@cache
def defined_in(file: str) -> frozenset[str]:
    """The tests that a file of this name defines, whether they run by default or by name."""
    paths = (ROOT / "tests").rglob(file)
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_there_are_rows():
    assert len(rows()) > 50


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"line {row.line}")
def test_the_tests_of_a_row_exist(row):
    named = TEST.findall(row.tests)
    assert row.threat, row
    assert row.done, row
    assert named, f"{row}: no test is named"
    rest = TEST.sub("", row.tests).strip()
    assert not rest, f"{row}: {rest}: write `test_FILE.py::test_NAME`"
    missing = [f"{file}::{test}" for file, test in named if test not in defined_in(file)]
    assert not missing, f"{row}: there is no {', '.join(missing)}"


def test_no_row_is_there_twice():
    threats = [row.threat for row in rows()]
    assert len(set(threats)) == len(threats)
