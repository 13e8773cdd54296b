"""What can be done with any state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from avatar.stateful import clone, restore, state_bytes


class Pair(NamedTuple):
    k: Tensor
    v: Tensor


@dataclass
class Session:
    rings: list[Pair]
    memory: dict[str, Any]
    rng: torch.Generator
    noise: np.random.Generator
    position: int = 0
    prompt: str = "hello"
    shared: Tensor | None = None
    history: list[int] = field(default_factory=list)


def session(seed: int = 0) -> Session:
    torch.manual_seed(seed)
    ring = Pair(torch.randn(2, 3), torch.randn(2, 3).bfloat16())
    return Session(
        [ring],
        {"audio": np.arange(5, dtype=np.float32), "frame": torch.zeros(4), "none": None},
        torch.Generator().manual_seed(seed),
        np.random.default_rng(seed),
        shared=ring.k,
    )


def advance(state: Session) -> list[float]:
    """One step of a stream: everything changes, in place or by replacement."""
    state.rings[0].k.add_(1)
    state.memory["audio"] = state.memory["audio"] + 1
    state.memory["frame"][0] += 1
    state.position += 1
    state.history.append(state.position)
    return [
        torch.rand(1, generator=state.rng).item(),
        state.noise.random(),
        state.rings[0].k.sum().item(),
        state.memory["audio"].sum().item(),
        state.memory["frame"].sum().item(),
    ]


def test_bytes_are_those_of_tensors_and_arrays() -> None:
    assert state_bytes(session()) == 6 * 4 + 6 * 2 + 5 * 4 + 4 * 4


def test_shared_memory_counts_once() -> None:
    x = torch.zeros(10)
    a = np.zeros(6)
    assert state_bytes([x, x, x[:3], x.view(2, 5), a, a[:2]]) == 10 * 4 + 6 * 8


def test_bytes_of_what_is_not_there_yet() -> None:
    with torch.device("meta"):
        assert state_bytes({"a": torch.empty(1000, 1000), "b": (torch.empty(5).bfloat16(),)}) == 4_000_010


def test_a_clone_goes_the_same_way() -> None:
    state = session()
    advance(state)
    copy = clone(state)
    assert [advance(state) for _ in range(3)] == [advance(copy) for _ in range(3)]


def test_nothing_done_to_the_original_reaches_a_clone() -> None:
    state = session()
    saved = clone(state)
    for _ in range(3):
        advance(state)
    assert saved.position == 0
    assert saved.history == []
    assert advance(saved) == advance(session())


def test_what_is_shared_stays_shared_in_a_clone() -> None:
    copy = clone(session())
    assert copy.shared is copy.rings[0].k


def test_types_survive_a_clone() -> None:
    copy = clone(session())
    assert type(copy) is Session
    assert type(copy.rings[0]) is Pair
    assert copy.rings[0].v.dtype == torch.bfloat16


def test_restoring_goes_back_to_the_snapshot_as_often_as_wanted() -> None:
    state = session()
    advance(state)
    saved = clone(state)
    first = [advance(state) for _ in range(2)]
    for _ in range(2):
        assert restore(state, saved) is state
        assert [advance(state) for _ in range(2)] == first


def test_restoring_keeps_addresses() -> None:
    state = session()
    saved = clone(state)
    ring, frame, rng = state.rings[0].k, state.memory["frame"], state.rng
    advance(state)
    restore(state, saved)
    assert state.rings[0].k is ring
    assert state.memory["frame"] is frame
    assert state.rng is rng
    assert torch.equal(ring, saved.rings[0].k)


def test_restoring_across_a_change_of_shape() -> None:
    state = session()
    saved = clone(state)
    state.memory = {"audio": np.zeros(9, np.float32), "more": [1, 2]}
    state.rings.append(Pair(torch.zeros(1), torch.zeros(1)))
    state.shared = None
    restore(state, saved)
    assert state.memory["audio"].tolist() == [0, 1, 2, 3, 4]
    assert list(state.memory) == ["audio", "frame", "none"]
    assert len(state.rings) == 1
    advance(state)
    assert saved.memory["frame"].sum() == 0


@pytest.mark.parametrize("stranger", [object(), torch.nn.Linear(1, 1), torch.nn.Parameter(torch.zeros(1)), open])
def test_what_does_not_belong_in_a_state_is_named(stranger: Any) -> None:
    with pytest.raises(TypeError, match="a state holds a"):
        clone({"x": [stranger]})
