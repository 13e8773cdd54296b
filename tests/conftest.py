"""What all tests share: golden tensors, one thread, and the rule for tests that start system programs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def find_program(name: str) -> str | None:
    """Where a system program is; servers live in /usr/sbin, which is not in an ordinary user's PATH."""
    return shutil.which(name, path=SYSTEM_PATH)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        missing = [program for program in mark.args if find_program(program) is None]
        if missing:
            reason = f"needs {', '.join(missing)}, not installed"
            if os.environ.get("REQUIRE_SYSTEM_PACKAGES") == "1":
                pytest.fail(reason)
            pytest.skip(reason)


class Golden:
    """Tensors that the reference implementation computed; the essential part is in tests/data/golden.

    The whole set is looked for in AVATARD_GOLDEN, then in ../shared/golden beside the checkout.
    """

    def __init__(self) -> None:
        whole = os.environ.get("AVATARD_GOLDEN") or HERE.parent.parent / "shared" / "golden"
        self.folders = [HERE / "data" / "golden", Path(whole)]

    def path(self, name: str) -> Path:
        """The file of that name; skips the test where only the essential part is present."""
        for folder in self.folders:
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"golden file {name} is in the whole set only (set AVATARD_GOLDEN)")

    def tensors(self, name: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.path(name))

    def json(self, name: str) -> Any:
        return json.loads(self.path(name).read_text())


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks this small a second thread costs more than it brings, and a busy machine makes that much worse."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
