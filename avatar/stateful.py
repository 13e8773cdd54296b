"""State is an argument: what can be done with any session's state, whatever its family keeps in it.

A state is a tree of dataclasses, dicts, lists and tuples whose leaves are tensors, numpy arrays, random generators and
plain values. Weights have no place in it, nor have threads or open files.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Tree = TypeVar("Tree")

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, np.generic, range)


def state_bytes(tree: Any) -> int:
    """Bytes that the tensors and arrays of a state hold; memory that several of them share counts once.

    Works on the meta device.
    """
    sizes: dict[int, int] = {}
    for leaf in _leaves(tree):
        if isinstance(leaf, Tensor):
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
    as it is and can be used again. Only where the two differ in kind, shape or number is anything made anew.
    """
    return _restore(tree, saved, {})


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
    if isinstance(leaf, torch.nn.Parameter):
        raise TypeError("a state holds a parameter; weights belong to the model")
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, torch.Generator):
        made = torch.Generator(device=leaf.device)
        made.set_state(leaf.get_state())
        return made
    if isinstance(leaf, np.random.Generator):
        return copy.deepcopy(leaf)
    if isinstance(leaf, PLAIN):
        return leaf
    raise TypeError(f"a state holds a {type(leaf).__module__}.{type(leaf).__qualname__}, which cannot be cloned")


def _restore(tree: Any, saved: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    if id(saved) in done:
        return done[id(saved)][1]
    made = _restore_node(tree, saved, lambda t, s: _restore(t, s, done))
    done[id(saved)] = saved, made
    return made


def _restore_node(tree: Any, saved: Any, branch: Callable[[Any, Any], Any]) -> Any:
    if type(tree) is not type(saved):
        return clone(saved)
    if isinstance(tree, Tensor):
        if (tree.shape, tree.dtype, tree.device) != (saved.shape, saved.dtype, saved.device):
            return clone(saved)
        return tree.copy_(saved)
    if isinstance(tree, np.ndarray):
        if (tree.shape, tree.dtype) != (saved.shape, saved.dtype) or not tree.flags.writeable:
            return saved.copy()
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
