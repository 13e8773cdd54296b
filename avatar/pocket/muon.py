"""Muon: momentum whose matrices are orthogonalised before the step (Keller Jordan, 2024), AdamW for the rest.

torch.optim.Muon takes two-dimensional parameters only and one at a time; here convolutions count as matrices
[out, in * k * k], and equal shapes are orthogonalised in one batch, which is what makes it fast for a small network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from avatar.pocket.generator import Precision, choose_dtype


def orthogonalise(gradient: Tensor, iterations: int = 5) -> Tensor:
    """[n, a, b] to the nearest matrices with all singular values near 1: quintic Newton-Schulz, in bf16 if it pays."""
    x = gradient.to(choose_dtype(Precision.AUTO, gradient.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def is_matrix(p: Tensor) -> bool:
    """True for weights that Muon should step: two or more dimensions, none of them tiny."""
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16


class Muon(torch.optim.Optimizer):
    """One optimiser over two groups: matrices (lr, momentum 0.95) and the rest (AdamW, adam_lr)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 0.02,
        adam_lr: float = 1e-3,
        weight_decay: float = 0.0,
        matrix: Callable[[Tensor], bool] = is_matrix,
    ) -> None:
        wanted = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in wanted if matrix(p)], "lr": lr, "base_lr": lr, "muon": True},
            {"params": [p for p in wanted if not matrix(p)], "lr": adam_lr, "base_lr": adam_lr, "muon": False},
        ]
        super().__init__(groups, {})
        self.weight_decay = weight_decay
        self.steps = 0

    def schedule(self, factor: float) -> None:
        """Set both learning rates to `factor` times their base."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def forget(self) -> None:
        """Empty the momenta, after weights were put back."""
        for buffers in self.state.values():
            for buffer in buffers.values():
                buffer.zero_()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step on the gradients present."""
        self.steps += 1
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                for name in ("mean",) if group["muon"] else ("mean", "square"):
                    self.state[p].setdefault(name, torch.zeros_like(p))
            (self._muon if group["muon"] else self._adam)(parameters, group["lr"])

    def _muon(self, parameters: list[Tensor], lr: float) -> None:
        gradients = [p.grad for p in parameters]
        means = [self.state[p]["mean"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 0.05)
        updates = torch._foreach_lerp(gradients, means, 0.95)
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, update in zip(parameters, updates, strict=True):
            by_shape.setdefault((p.shape[0], p[0].numel()), []).append((p, update))
        if self.weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
        for (rows, columns), members in by_shape.items():
            stacked = torch.stack([u.reshape(rows, columns) for _, u in members])
            steps = orthogonalise(stacked).float() * max(1.0, rows / columns) ** 0.5
            for (p, _), s in zip(members, steps.unbind(0), strict=True):
                p.add_(s.reshape(p.shape), alpha=-lr)

    def _adam(self, parameters: list[Tensor], lr: float) -> None:
        gradients = [p.grad for p in parameters]
        means = [self.state[p]["mean"] for p in parameters]
        squares = [self.state[p]["square"] for p in parameters]
        b1, b2 = 0.9, 0.98
        torch._foreach_lerp_(means, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        scale = torch._foreach_sqrt(torch._foreach_div(squares, 1 - b2**self.steps))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(parameters, means, scale, -lr / (1 - b1**self.steps))
