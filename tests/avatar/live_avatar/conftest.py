"""What the tests of the family share: the golden networks as a published folder, and one thread."""

from __future__ import annotations

import pytest
from published import write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def tiny_networks(one_thread):
    """All of them are tiny here."""


@pytest.fixture(scope="session")
def checkpoint(golden, tmp_path_factory):
    """A model folder as `avatard fetch` leaves it, at small size."""
    root = tmp_path_factory.mktemp("live-avatar-14b")
    write_checkpoint(golden, root)
    return root
