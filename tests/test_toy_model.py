"""The toy keeps the contract of a model, so that what is tested with it means something."""

from __future__ import annotations

import pytest
from contracts import check_model
from toy_model import ToyModel


@pytest.mark.parametrize("delay", [0, 2])
def test_the_toy_keeps_the_contract(delay):
    check_model(ToyModel((64, 64), delay=delay))
