"""What can be done with any state."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audio.wav2vec import Loudness
from avatar.sampling import Reanchor
from avatar.stateful import HEAD, MAGIC, StateError, clone, load, restore, save, state_bytes


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


def test_restoring_parts_what_was_one_and_joins_what_was_two() -> None:
    state: dict[str, Any] = {"a": torch.ones(2), "b": torch.zeros(2)}
    apart = clone(state)
    state["b"] = state["a"]
    together = clone(state)
    restore(state, apart)
    assert [state["a"].tolist(), state["b"].tolist()] == [[1, 1], [0, 0]]
    restore(state, together)
    assert state["a"] is state["b"]


@pytest.mark.parametrize("stranger", [object(), torch.nn.Linear(1, 1), torch.nn.Parameter(torch.zeros(1)), open])
def test_what_does_not_belong_in_a_state_is_named(stranger: Any) -> None:
    with pytest.raises(TypeError, match="a state holds a"):
        clone({"x": [stranger]})


# As bytes.

HERE = {__name__}


class Colour(enum.Enum):
    RED = "r"


def saved(tree: Any) -> bytes:
    return b"".join(save(tree, HERE))


def again(tree: Any) -> Any:
    return load(saved(tree), HERE)


def test_a_saved_state_goes_the_same_way() -> None:
    state = session()
    advance(state)
    loaded = again(state)
    assert [advance(loaded) for _ in range(3)] == [advance(state) for _ in range(3)]


def test_types_and_what_is_shared_survive_being_saved() -> None:
    loaded = again(session())
    assert type(loaded) is Session
    assert type(loaded.rings[0]) is Pair
    assert loaded.shared is loaded.rings[0].k


def test_nothing_done_to_a_loaded_state_reaches_the_bytes() -> None:
    data = saved(session())
    advance(load(data, HERE))
    assert advance(load(data, HERE)) == advance(session())


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [True, 7, -(2**130), 0.1, -0.0, float("inf"), "häh\n", b"\x00\xff", 1 - 2j, range(9, 1, -2)],
        (),
        {"a": 1, 2: (3,), (4, "b"): [], Reanchor.NONE: {}},
        [Reanchor.REFERENCE, torch.bfloat16, torch.device("cpu")],
        [np.float32(0.1), np.int64(3), np.bool_(True), np.datetime64("2020-02-03")],
        Loudness(1.5, 2.5, 3.5),
    ],
)
def test_plain_values_come_back_as_they_were(tree: Any) -> None:
    loaded = load(saved(tree))
    assert repr(loaded) == repr(tree)
    assert type(loaded) is type(tree)


def test_no_number_is_still_no_number() -> None:
    assert repr(load(saved([float("nan"), np.float32("nan")]))) == "[nan, np.float32(nan)]"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0, 3),
        torch.tensor(5),
        torch.randn(2, 3).T,
        torch.randn(2, 5, 3, 4).transpose(1, 2),
        torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 6)[:, ::2],
        torch.randn(3, 1).expand(3, 4),
        torch.randn(3, 3).bfloat16(),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, requires_grad=True),
        torch.tensor([float("nan"), float("inf")]),
    ],
)
def test_a_tensor_comes_back_to_the_bit_with_the_strides_of_its_clone(tensor: Tensor) -> None:
    loaded, copy = load(saved(tensor)), tensor.detach().clone().resolve_conj()
    assert (loaded.dtype, loaded.shape, loaded.stride()) == (copy.dtype, copy.shape, copy.stride())
    assert loaded.flatten().view(torch.uint8).tolist() == copy.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 2)),
        np.array(3.5, ">f8"),
        np.arange(12).reshape(3, 4).T,
        np.arange(10, dtype=np.float32)[::3],
        np.array(["ä", "bc"]),
        np.array([True]),
    ],
)
def test_an_array_comes_back_to_the_bit(array: np.ndarray) -> None:
    loaded = load(saved(array))
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)
    assert loaded.flags.writeable


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "SFC64", "MT19937", "Philox"])
def test_numpys_generators_go_on_where_they_were(kind: str) -> None:
    rng = np.random.Generator(getattr(np.random, kind)(5))
    rng.standard_normal(7, np.float32)
    loaded = load(saved(rng))
    np.testing.assert_array_equal(loaded.integers(0, 255, 1000), rng.integers(0, 255, 1000))


def test_a_state_without_tensors_is_copied_and_saved_without_torch() -> None:
    probe = (
        "import sys, numpy as np; from avatar.stateful import *; "
        "tree = {'rng': np.random.default_rng(1), 'a': np.arange(3)}; "
        "kept = clone(tree); restore(tree, kept); state_bytes(load(b''.join(save(tree)))); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 0


@dataclass
class Inner:
    x: int = 0


@pytest.mark.parametrize(
    "stranger", [object(), {1}, open, torch.nn.Parameter(torch.zeros(1)), torch.empty(1, device="meta"), np.array([{}])]
)
def test_what_cannot_be_saved_is_named(stranger: Any) -> None:
    with pytest.raises(TypeError, match="a state holds a"):
        save({"x": [stranger]})


def test_a_class_made_in_a_function_cannot_be_saved() -> None:
    @dataclass
    class Local:
        x: int = 0

    with pytest.raises(TypeError, match="no class of a module"):
        save(Local(), HERE)


def message(nodes: list[Any], lengths: list[int] | None = None, tail: bytes = b"") -> bytes:
    """Bytes that somebody else may have written."""
    text = json.dumps({"root": [len(nodes) - 1], "nodes": nodes, "bytes": lengths or []}).encode()
    return HEAD.pack(MAGIC, len(text)) + text + tail


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:Popen",
        "os:system",
        "avatar.stateful:sys.modules",
        "avatar.load:load_model",
        "avatar.stateful:dataclasses.Field",  # a class, and reached through one of our modules, but not ours
        f"{__name__}:session",
        f"{__name__}:Nobody",
        f"{__name__}:Session.rings",
        "avatar.not_there:Session",
        "",
    ],
)
@pytest.mark.parametrize("kind", ["dataclass", "namedtuple", "enum"])
def test_only_classes_of_states_are_made(kind: str, name: str) -> None:
    values: Any = {"dataclass": {}, "namedtuple": [], "enum": "RED"}[kind]
    with pytest.raises(StateError, match=r"is no class that a state here may hold|has (other fields|no 'RED') here"):
        load(message([[kind, name, values]]), HERE)


def test_a_class_of_another_module_needs_that_module_to_be_named() -> None:
    with pytest.raises(StateError, match="is no class that a state here may hold"):
        load(saved(Inner(3)))
    with pytest.raises(TypeError, match="Inner, which is no class of a module of avatar or audio"):
        save(Inner(3))
    assert load(saved(Inner(3)), HERE) == Inner(3)


def test_a_class_with_other_fields_is_refused() -> None:
    with pytest.raises(StateError, match="other fields here; it was saved by another version"):
        load(message([["dataclass", f"{__name__}:Inner", {"y": 1}]]), HERE)


@pytest.mark.parametrize(
    ("node", "lengths", "tail"),
    [
        (["tensor", "float32", [2**40], [1], "cpu", 0], [4], b"1234"),
        (["tensor", "float32", [1], [1], "cpu", 0], [8], b"1234"),
        (["tensor", "float32", [2], [4], "cpu", 0], [8], b"12345678"),
        (["tensor", "float32", [-1, -1], [1, 1], "cpu", 0], [4], b"1234"),
        (["tensor", "load", [1], [1], "cpu", 0], [4], b"1234"),
        (["tensor", "float32", [1], [1], "cuda:99", 0], [4], b"1234"),
        (["array", "|O", [1], 0], [8], b"12345678"),
        (["array", "f4,O", [1], 0], [12], b"1" * 12),
        (["array", "<f4", [9], 0], [4], b"1234"),
        (["array", "<f4", ["a"], 0], [4], b"1234"),
        (["list", [[0]]], None, b""),
        (["list", [[-1]]], None, b""),
        (["list", [["x", {}]]], None, b""),
        (["dict", [[1]]], None, b""),
        (["numpy generator", "PCG64", {"bit_generator": "PCG64"}], None, b""),
        (["generator", "cpu", 3], None, b""),
        (["eval", "1"], None, b""),
        ("list", None, b""),
        (["bytes", 0], [-1], b""),
    ],
)
def test_damaged_bytes_are_one_clear_error(node: Any, lengths: list[int] | None, tail: bytes) -> None:
    with pytest.raises(StateError, match="saved state: ") as caught:
        load(message([node], lengths, tail))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "key", "place"), [("MT19937", "pos", 625), ("Philox", "buffer_pos", -1)])
def test_a_generator_cannot_be_made_to_read_beyond_its_memory(kind: str, key: str, place: int) -> None:
    rng = np.random.Generator(getattr(np.random, kind)(5))
    state = rng.bit_generator.state
    (state if key in state else state["state"])[key] = place
    nodes = json.loads(saved(state)[HEAD.size :].partition(b', "bytes"')[0] + b"}")["nodes"]
    parts = save(state)[1:]
    nodes.append(["numpy generator", kind, [len(nodes) - 1]])
    with pytest.raises(StateError, match=f"{key} of a {kind} is not within"):
        load(message(nodes, [len(part) for part in parts], b"".join(parts)))


def test_a_deep_nest_is_refused() -> None:
    text = b"[" * 100_000
    with pytest.raises(StateError):
        load(HEAD.pack(MAGIC, len(text)) + text)


def test_a_pickle_is_not_looked_into() -> None:
    with pytest.raises(StateError, match="none, or no more than its beginning"):
        load(pickle.dumps(os.getcwd))


WHOLE = saved(session())


@pytest.mark.parametrize("length", [0, 1, HEAD.size - 1, HEAD.size, HEAD.size + 1, len(WHOLE) // 2, len(WHOLE) - 1])
def test_the_beginning_of_a_state_is_no_state(length: int) -> None:
    with pytest.raises(StateError):
        load(WHOLE[:length], HERE)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_bytes_that_were_changed_give_a_state_or_that_one_error(data: st.DataObject) -> None:
    changed = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StateError):
        load(bytes(changed), HERE)
