"""State is an argument: what can be done with any session's state, whatever its family keeps in it.

A state is a tree of dataclasses, dicts, lists and tuples whose leaves are tensors, numpy arrays, random generators and
plain values. Weights have no place in it, nor have threads or open files.

torch is used here only where something else has loaded it: a model of numpy alone starts seconds sooner without.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from audio.errors import AvatardError

if TYPE_CHECKING:
    from torch import Tensor

Tree = TypeVar("Tree")

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.generic, range)
"""Leaves that nobody can change. Of torch's there are also dtype and device."""

NO_TORCH: Any = SimpleNamespace(Tensor=(), Generator=(), dtype=(), device=(), nn=SimpleNamespace(Parameter=()))
"""Stands for torch where nothing has loaded it: no leaf is an instance of an empty tuple."""


class StateError(AvatardError):
    """Bytes that cannot be loaded as a state: damaged, or of classes that this program does not have."""


def state_bytes(tree: Any) -> int:
    """Bytes that the tensors and arrays of a state hold; memory that several of them share counts once.

    Works on the meta device.
    """
    torch = _torch()
    sizes: dict[int, int] = {}
    for leaf in _leaves(tree):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        elif isinstance(leaf, np.ndarray):
            owner = leaf if leaf.base is None or not isinstance(leaf.base, np.ndarray) else leaf.base
            sizes[id(owner)] = owner.nbytes
    return sum(sizes.values())


def clone(tree: Tree) -> Tree:
    """A copy that nothing done to the original can reach: a snapshot to roll back to.

    What the original refers to in two places is one thing in the copy as well.
    Raises: TypeError: a leaf of a kind that has no place in a state.
    """
    return _clone(tree, {})


def restore(tree: Tree, saved: Tree) -> Tree:
    """Bring `tree` back to `saved`, a clone made of it earlier, and give it.

    Tensors and arrays keep their memory, so addresses others hold (a captured graph, a view) stay true; `saved` stays
    as it is and can be used again. Only where the two differ in kind, shape or number, or where `tree` has one thing in
    two places and `saved` has two, is anything made anew.
    """
    return _restore(tree, saved, {}, set())


def save(tree: Any, modules: Collection[str] = ()) -> list[memoryview]:
    """A state as bytes: what `load` takes is all parts one after another.

    The parts are the memory of its tensors and arrays where that can be had, so they are true until the state is used
    again. Whatever `clone` copies is kept to the bit, strides included; of a numpy generator what it draws, not what it
    would spawn.
    Raises: TypeError: a leaf of a kind that has no place in a state, or a class that `load` would not find.
    """
    saver = _Saver(modules)
    root = saver.write(tree)
    text = json.dumps({"root": root, "nodes": saver.nodes, "bytes": [len(part) for part in saver.parts]}).encode()
    return [memoryview(HEAD.pack(MAGIC, len(text)) + text), *saver.parts]


def load(saved: bytes | memoryview, modules: Collection[str] = ()) -> Any:
    """The state that `save` was given. Nothing that the bytes say is called, imported or trusted with a size.

    Args:
        modules: those whose classes may be named beside the ones of `avatar` and `audio`.
    Raises: StateError: damaged or cut bytes, a class that is not one of those, or one with other fields by now.
    """
    whole = memoryview(saved).cast("B")
    try:
        magic, length = HEAD.unpack_from(whole) if len(whole) >= HEAD.size else (b"", 0)
        text = bytes(whole[HEAD.size : HEAD.size + length])
        if magic != MAGIC or len(text) != length:
            raise StateError("none, or no more than its beginning")
        head = json.loads(text)
        loader = _Loader(_split(whole[HEAD.size + length :], head["bytes"]), modules)
        for node in head["nodes"]:
            loader.made.append(loader.build(node))
        return loader.read(head["root"])
    except StateError as error:
        raise StateError(f"saved state: {error}") from error.__cause__
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise StateError(f"saved state: damaged ({type(error).__name__}: {reason})") from error


def _torch() -> Any:
    return sys.modules.get("torch", NO_TORCH)


def _kind(leaf: Any) -> str:
    return f"a {type(leaf).__module__}.{type(leaf).__qualname__}"


def _children(tree: Any) -> list[Any] | None:
    """The branches of a node in fixed order; None for a leaf."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, list | tuple):
        return list(tree)
    return None


def _rebuild(tree: Any, children: list[Any]) -> Any:
    """A node like `tree` with other branches."""
    if isinstance(tree, dict):
        return type(tree)(zip(tree, children))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*children)
    if isinstance(tree, list | tuple):
        return type(tree)(children)
    node = object.__new__(type(tree))
    for field, child in zip(dataclasses.fields(tree), children):
        object.__setattr__(node, field.name, child)
    return node


def _leaves(tree: Any, seen: set[int] | None = None) -> Iterator[Any]:
    seen = set() if seen is None else seen
    children = _children(tree)
    if children is None:
        yield tree
    elif id(tree) not in seen:
        seen.add(id(tree))
        for child in children:
            yield from _leaves(child, seen)


def _clone(tree: Any, copies: dict[int, tuple[Any, Any]]) -> Any:
    if id(tree) in copies:
        return copies[id(tree)][1]
    children = _children(tree)
    made = _clone_leaf(tree) if children is None else _rebuild(tree, [_clone(child, copies) for child in children])
    # The original is kept beside its copy: as long as it lives, no other object has its id.
    copies[id(tree)] = tree, made
    return made


def _clone_leaf(leaf: Any) -> Any:
    torch = _torch()
    if isinstance(leaf, torch.nn.Parameter):
        raise TypeError("a state holds a parameter; weights belong to the model")
    if isinstance(leaf, torch.Tensor):
        return leaf.clone()
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, torch.Generator):
        made = torch.Generator(device=leaf.device)
        made.set_state(leaf.get_state())
        return made
    if isinstance(leaf, np.random.Generator):
        return copy.deepcopy(leaf)
    if isinstance(leaf, (PLAIN, torch.dtype, torch.device)):
        return leaf
    raise TypeError(f"a state holds {_kind(leaf)}, which cannot be cloned")


def _restore(tree: Any, saved: Any, done: dict[int, tuple[Any, Any]], taken: set[int]) -> Any:
    """`done` is what `saved` has become so far, as for `_clone`; `taken` are the parts of `tree` that became it."""
    if id(saved) in done:
        return done[id(saved)][1]
    if id(tree) in taken:
        return _clone(saved, done)
    taken.add(id(tree))

    def branch(t: Any, s: Any) -> Any:
        return _restore(t, s, done, taken)

    made = _restore_node(tree, saved, branch, lambda s: _clone(s, done))
    done[id(saved)] = saved, made
    return made


def _restore_node(tree: Any, saved: Any, branch: Callable[[Any, Any], Any], clone: Callable[[Any], Any]) -> Any:
    torch = _torch()
    if type(tree) is not type(saved):
        return clone(saved)
    if isinstance(tree, torch.Tensor):
        if (tree.shape, tree.dtype, tree.device) != (saved.shape, saved.dtype, saved.device):
            return clone(saved)
        return tree.copy_(saved)
    if isinstance(tree, np.ndarray):
        if (tree.shape, tree.dtype) != (saved.shape, saved.dtype) or not tree.flags.writeable:
            return clone(saved)
        tree[...] = saved
        return tree
    if isinstance(tree, torch.Generator):
        return tree.set_state(saved.get_state())
    ours, theirs = _children(tree), _children(saved)
    if ours is None or theirs is None:
        return clone(saved)
    if len(ours) != len(theirs) or (isinstance(tree, dict) and list(tree) != list(saved)):
        restored = [clone(child) for child in theirs]
    else:
        restored = [branch(a, b) for a, b in zip(ours, theirs)]
    if isinstance(tree, dict):
        tree.clear()
        tree.update(zip(saved, restored))
        return tree
    if isinstance(tree, list):
        tree[:] = restored
        return tree
    if isinstance(tree, tuple):
        return _rebuild(tree, restored)
    for field, child in zip(dataclasses.fields(tree), restored):
        object.__setattr__(tree, field.name, child)
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# a state as bytes

MAGIC = b"avatard state 1\n"
HEAD = struct.Struct("<16sQ")
"""Before the JSON: what this is, and the JSON's length in bytes. The bytes of tensors and arrays come after it.

The JSON is a table of nodes. A node is a list, its kind first; what it holds is either a plain JSON value, or [n] for
node n, which stands before it. So what is shared is written once, and nothing can hold itself.
"""

OUR_PACKAGES = ("avatar", "audio")

DAMAGE = (
    ArithmeticError,
    AssertionError,  # a device that this torch was built without
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What json, torch and numpy raise at bytes that make no sense."""

ARRAY_DTYPE = re.compile(r"[<>|][biufcmMSU]\d+(\[\d*\w+\])?")
"""numpy's names of plain types: byte order, kind, size, and the unit of a time."""

PLACES = {"PCG64": (), "PCG64DXSM": (), "SFC64": (), "MT19937": ("pos", 624), "Philox": ("buffer_pos", 4)}
"""numpy's bit generators; where one keeps a place in its buffer, the name of that and how far it goes.

numpy itself does not look whether a state that it is given reaches beyond.
"""


class _Saver:
    """Writes a tree into a table of nodes and a list of bytes."""

    def __init__(self, modules: Collection[str]) -> None:
        self.nodes: list[list[Any]] = []
        self.parts: list[memoryview] = []
        self._modules = modules
        # The object is kept beside its place: as long as it lives, no other one has its id.
        self._places: dict[int, tuple[Any, int]] = {}

    def write(self, tree: Any) -> Any:
        """What stands for `tree` in the node that holds it."""
        if type(tree) in (type(None), bool, int, float, str):
            return tree
        if id(tree) not in self._places:
            node = self._node(tree)
            self.nodes.append(node)
            self._places[id(tree)] = tree, len(self.nodes) - 1
        return [self._places[id(tree)][1]]

    def _node(self, tree: Any) -> list[Any]:
        torch = _torch()
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            values = {field.name: self.write(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
            return ["dataclass", self._name(type(tree)), values]
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return ["namedtuple", self._name(type(tree)), [self.write(child) for child in tree]]
        if type(tree) in (list, tuple):
            return [type(tree).__name__, [self.write(child) for child in tree]]
        if type(tree) is dict:
            return ["dict", [[self.write(key), self.write(value)] for key, value in tree.items()]]
        if isinstance(tree, enum.Enum):
            return ["enum", self._name(type(tree)), tree.name]
        if isinstance(tree, torch.nn.Parameter):
            raise TypeError("a state holds a parameter; weights belong to the model")
        if isinstance(tree, torch.Tensor):
            return self._tensor(tree)
        if isinstance(tree, torch.Generator):
            return ["generator", str(tree.device), self.write(tree.get_state())]
        if isinstance(tree, torch.dtype):
            return ["dtype", _dtype_name(tree)]
        if isinstance(tree, torch.device):
            return ["device", str(tree)]
        if type(tree) is np.ndarray and not tree.dtype.hasobject and tree.dtype.names is None:
            return ["array", tree.dtype.str, list(tree.shape), self._bytes(np.ascontiguousarray(tree))]
        if isinstance(tree, np.generic) and not tree.dtype.hasobject and tree.dtype.names is None:
            return ["scalar", tree.dtype.str, self._bytes(np.asarray(tree))]
        if isinstance(tree, np.random.Generator) and type(tree.bit_generator).__name__ in PLACES:
            return ["numpy generator", type(tree.bit_generator).__name__, self.write(tree.bit_generator.state)]
        if type(tree) is bytes:
            return ["bytes", self._bytes(np.frombuffer(tree, np.uint8))]
        if type(tree) is complex:
            return ["complex", tree.real, tree.imag]
        if type(tree) is range:
            return ["range", tree.start, tree.stop, tree.step]
        raise TypeError(f"a state holds {_kind(tree)}, which cannot be saved")

    def _tensor(self, tensor: Tensor) -> list[Any]:
        """Its memory from first to last, and the strides with which to read it."""
        import torch

        if tensor.layout is not torch.strided or tensor.is_meta or type(tensor) is not torch.Tensor:
            raise TypeError(f"a state holds {_kind(tensor)} ({tensor.layout}, {tensor.device}), which cannot be saved")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        outward = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        if not tensor.permute(outward).is_contiguous():  # it has gaps, or reads memory twice
            tensor = tensor.contiguous()
        memory = tensor.as_strided((tensor.numel(),), (1,)).cpu().view(torch.uint8).numpy()
        where = self._bytes(memory)
        return [
            "tensor",
            _dtype_name(tensor.dtype),
            list(tensor.shape),
            list(tensor.stride()),
            str(tensor.device),
            where,
        ]

    def _name(self, cls: type) -> str:
        name = f"{cls.__module__}:{cls.__qualname__}"
        if _find(name, self._modules) is not cls:
            raise TypeError(f"a state holds a {name}, which is no class of a module of avatar or audio")
        return name

    def _bytes(self, array: np.ndarray) -> int:
        self.parts.append(array.reshape(-1).view(np.uint8).data)
        return len(self.parts) - 1


class _Loader:
    """Makes a tree of the nodes that a `_Saver` wrote; `made` are those before the present one."""

    def __init__(self, parts: list[memoryview], modules: Collection[str]) -> None:
        self.made: list[Any] = []
        self._parts, self._modules = parts, modules

    def read(self, value: Any) -> Any:
        """What a value in a node stands for."""
        match value:
            case None | bool() | int() | float() | str():
                return value
            case [int(place)] if 0 <= place < len(self.made):
                return self.made[place]
        raise StateError(f"damaged: {str(value)[:40]!r} stands for nothing")

    def build(self, node: Any) -> Any:
        match node:
            case ["dataclass", str(name), dict(values)]:
                return self._dataclass(name, values)
            case ["namedtuple", str(name), list(values)]:
                cls = self._class(name)
                if not issubclass(cls, tuple) or len(getattr(cls, "_fields", "")) != len(values):
                    raise StateError(f"{name} has other fields here")
                return tuple.__new__(cls, map(self.read, values))
            case ["list", list(values)]:
                return [self.read(value) for value in values]
            case ["tuple", list(values)]:
                return tuple(self.read(value) for value in values)
            case ["dict", list(pairs)]:
                return {self.read(key): self.read(value) for key, value in pairs}
            case ["enum", str(name), str(member)]:
                cls = self._class(name)
                if not issubclass(cls, enum.Enum) or member not in cls.__members__:
                    raise StateError(f"{name} has no {member[:40]!r} here")
                return cls.__members__[member]
            case ["tensor", str(dtype), list(shape), list(stride), str(device), int(part)]:
                return self._tensor(dtype, shape, stride, device, self._parts[part])
            case ["array", str(dtype), list(shape), int(part)]:
                return _array(dtype, shape, self._parts[part])
            case ["scalar", str(dtype), int(part)]:
                return _array(dtype, [], self._parts[part])[()]
            case ["generator", str(device), state]:
                import torch

                return torch.Generator(torch.device(device)).set_state(self.read(state).cpu())
            case ["numpy generator", str(name), state] if name in PLACES:
                return _numpy_generator(name, self.read(state))
            case ["bytes", int(part)]:
                return bytes(self._parts[part])
            case ["complex", float(real), float(imaginary)]:
                return complex(real, imaginary)
            case ["range", int(start), int(stop), int(step)]:
                return range(start, stop, step)
            case ["dtype", str(name)]:
                return _dtype(name)
            case ["device", str(name)]:
                import torch

                return torch.device(name)
        raise StateError(f"damaged: {str(node)[:40]!r} is no part of a state")

    def _dataclass(self, name: str, values: dict[str, Any]) -> Any:
        cls = self._class(name)
        if not dataclasses.is_dataclass(cls) or [field.name for field in dataclasses.fields(cls)] != list(values):
            raise StateError(f"{name} has other fields here; it was saved by another version")
        made = object.__new__(cls)
        for field, value in values.items():
            object.__setattr__(made, field, self.read(value))
        return made

    def _class(self, name: str) -> type:
        cls = _find(name, self._modules)
        if cls is None:
            raise StateError(f"{name[:80]!r} is no class that a state here may hold")
        return cls

    def _tensor(self, dtype: str, shape: list[int], stride: list[int], device: str, memory: memoryview) -> Tensor:
        import torch

        kind = _dtype(dtype)
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(memory):
            raise StateError(f"damaged: {len(memory)} bytes are no {dtype} {shape}")
        # torch's own memory, since what its kernels compute may hang on how that is aligned.
        flat = torch.empty(math.prod(shape), dtype=kind)
        flat.view(torch.uint8).numpy()[:] = memory
        return flat.as_strided(shape, stride).to(torch.device(device))


def _split(memory: memoryview, lengths: list[int]) -> list[memoryview]:
    parts, start = [], 0
    for length in lengths:
        parts.append(memory[start : start + length])
        start += length
    if start != len(memory) or min(lengths, default=0) < 0:
        raise StateError(f"damaged: {len(memory)} bytes of tensors where there were {start}")
    return parts


def _array(dtype: str, shape: list[int], memory: memoryview) -> np.ndarray:
    if not ARRAY_DTYPE.fullmatch(dtype):  # numpy would read whole records out of it, and objects
        raise StateError(f"damaged: {dtype[:40]!r} is no type of numbers")
    kind = np.dtype(dtype)
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(memory):
        raise StateError(f"damaged: {len(memory)} bytes are no {dtype} {shape}")
    made = np.empty(shape, kind)
    made.reshape(-1).view(np.uint8)[:] = memory
    return made


def _numpy_generator(name: str, state: dict[str, Any]) -> np.random.Generator:
    made: np.random.BitGenerator = getattr(np.random, name)()
    if PLACES[name]:
        key, last = PLACES[name]
        if not 0 <= {**state, **state["state"]}[key] <= last:
            raise StateError(f"damaged: {key} of a {name} is not within 0..{last}")
    made.state = state
    return np.random.Generator(made)


def _dtype(name: str) -> Any:
    import torch

    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise StateError(f"damaged: {name[:40]!r} is no type of numbers")
    return found


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _find(name: str, modules: Collection[str]) -> type | None:
    """A class by "module:name", from our packages or `modules`; None where that is no class that the module defines.

    Nothing is run for it: the module is imported already, or the class is not found.
    """
    module, _, path = name.partition(":")
    if module.partition(".")[0] not in OUR_PACKAGES and module not in modules:
        return None
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    itself = isinstance(found, type) and (found.__module__, found.__qualname__) == (module, path)
    return found if itself else None
