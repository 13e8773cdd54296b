"""What the tests of the family share: the golden networks as a published folder, and one thread.

The networks here are tiny: a second thread costs more than it brings, and a busy machine makes that much worse.
"""

from __future__ import annotations

import pytest
import torch
from published import write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(golden, tmp_path_factory):
    """A model folder as `avatard fetch` leaves it, at small size."""
    root = tmp_path_factory.mktemp("live-avatar-14b")
    write_checkpoint(golden, root)
    return root
