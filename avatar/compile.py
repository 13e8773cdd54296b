"""Compilation by regions: a piece of one block is compiled once and serves all blocks of its kind.

The pieces hold no state and no Python number that changes from call to call; rings, positions and attention over the
rings stay outside. So there is one graph for each piece and shape, its kernels are kept on disk by the compiler, and a
start with warm caches takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def compile_methods(modules: Iterable[nn.Module], *names: str) -> None:
    """Put a compiled function in the place of each named method, in place. Modules of one class share the code."""
    for module in modules:
        for name in names:
            setattr(module, name, torch.compile(getattr(module, name), fullgraph=True, dynamic=False))


def replay(owner: Any, name: str) -> None:
    """Let a method that makes many small kernels be replayed as a CUDA graph, in place.

    That begins when its input (one tensor, and keywords that stay the same) has the shape of the call before; until
    then, and for any other shape, it runs as it was written. What a replay gives is overwritten by the next: it is for
    results that are used up before the method is called again.
    """
    written = getattr(owner, name)
    kept: dict[str, Any] = {"shape": None, "graph": None}

    def replayed(x: Tensor, **options: Any) -> Any:
        if not x.is_cuda or torch.is_grad_enabled():
            return written(x, **options)
        if x.shape != kept["shape"]:
            kept.update(shape=x.shape, graph=None)
            return written(x, **options)
        if kept["graph"] is None:
            # The call before was the warm-up.
            kept.update(graph=torch.cuda.CUDAGraph(), x=x.clone())
            with torch.cuda.graph(kept["graph"]):
                kept["out"] = written(kept["x"], **options)
        kept["x"].copy_(x)
        kept["graph"].replay()
        return kept["out"]

    setattr(owner, name, replayed)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with everything compiled inside it run as it was written: for what runs once, in other shapes."""
    return torch.compiler.set_stance("force_eager")(function)
