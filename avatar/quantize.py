"""Linear layers in 8-bit floating point: half the bytes of the weights, twice the rate of the products.

Applied from outside, to a finished network: `quantize_linears` puts a `Float8Linear` in the place of each `nn.Linear`.
Weights have one scale for each output channel, activations one for each token, found when they arrive; so an outlier
costs its own row its precision and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar.float8 import FLOAT8, LARGEST, has_float8_products


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] -> the same as e4m3, and float32 [..., 1] to multiply it by: the largest of a row becomes 448."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer [..., in] -> [..., out] with e4m3 weights [out, in] and activations rounded to e4m3.

    in and out are multiples of 16. The product is accumulated in float32 and rounded to the type of the input. Where
    the machine has no product of 8-bit numbers, it is computed from the rounded numbers in the type of the input:
    slower, the same result but for that rounding, and the memory is saved all the same.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> Float8Linear:
        return cls(*quantize(linear.weight.data), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return self.product(*_quantize_rows(rows), x.dtype).unflatten(0, x.shape[:-1])

    def product(self, x: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Of rows that are rounded already: x e4m3 [N, in] and scale float32 [N, 1] -> [N, out]."""
        if not (dtype == torch.bfloat16 and has_float8_products(x)):
            weight = (self.weight.float() * self.scale).to(dtype)
            return F.linear((x.float() * scale).to(dtype), weight, self.bias)
        return torch._scaled_mm(
            x,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            bias=self.bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or not has_float8_products(x):
        return quantize(x)
    from avatar.kernels import residual_norm

    _, rounded = residual_norm(x.contiguous(), float8=True)
    assert isinstance(rounded, tuple)
    return rounded


def quantize_linears(module: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> int:
    """Put a `Float8Linear` in the place of each linear layer whose dotted name is wanted, in place, one at a time.

    Layers whose sides are no multiples of 16 stay. The old weights are let go of layer by layer.
    Returns: how many were replaced.
    """
    count = 0
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and wanted(name) and not (layer.in_features % 16 or layer.out_features % 16):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, Float8Linear.of(layer))
            count += 1
    return count


def join(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer whose outputs are those of all these, side by side. Their weights become views of its own."""
    names = [name for name in ("weight", "bias", "scale") if getattr(layers[0], name, None) is not None]
    whole = {name: torch.cat([getattr(layer, name).data for layer in layers]) for name in names}
    for name, tensor in whole.items():
        sizes = [len(getattr(layer, name)) for layer in layers]
        for layer, part in zip(layers, tensor.split(sizes)):
            getattr(layer, name).data = part
    if "scale" in whole:
        return Float8Linear(whole["weight"], whole["scale"], whole.get("bias"))
    with torch.device("meta"):
        joined = nn.Linear(*reversed(whole["weight"].shape))
    joined.weight = nn.Parameter(whole["weight"], requires_grad=False)
    joined.bias = nn.Parameter(whole["bias"], requires_grad=False)
    return joined
