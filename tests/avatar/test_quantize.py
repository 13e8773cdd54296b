"""Linear layers in 8-bit floating point: what is replaced, and how near the products stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avatar.float8 import FLOAT8
from avatar.quantize import Float8Linear, quantize, quantize_linears


@pytest.fixture(autouse=True)
def seeded_and_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def relative(ours, theirs):
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def test_each_row_has_its_own_scale_and_its_largest_becomes_the_largest_number():
    x = torch.randn(5, 64) * torch.tensor([[1e-4], [1.0], [10.0], [1e4], [0.0]])
    rounded, scale = quantize(x)
    assert rounded.dtype == FLOAT8
    assert scale.shape == (5, 1)
    assert (rounded.float().abs().amax(1)[:4] == 448).all()
    assert (rounded[4].float() == 0).all()
    assert relative((rounded.float() * scale)[0], x[0]) < 0.04


def test_an_outlier_costs_its_own_row_its_precision_and_no_other():
    x = torch.randn(8, 256)
    loud = x.clone()
    loud[3, 7] = 1e4
    (rounded, scale), (other, its_scale) = quantize(x), quantize(loud)
    others = [row for row in range(8) if row != 3]
    torch.testing.assert_close((rounded.float() * scale)[others], (other.float() * its_scale)[others], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_stays_near_that_of_the_whole_numbers(dtype):
    linear = nn.Linear(256, 128).to(dtype)
    x = torch.randn(2, 9, 256, dtype=dtype)
    out = Float8Linear.of(linear)(x)
    assert out.shape == (2, 9, 128)
    assert out.dtype == dtype
    assert relative(out, linear(x)) < 0.05


def test_weights_take_a_byte_each():
    layer = Float8Linear.of(nn.Linear(256, 128, dtype=torch.bfloat16))
    assert {name: tensor.nbytes for name, tensor in layer.state_dict().items()} == {
        "weight": 256 * 128,
        "scale": 4 * 128,
        "bias": 2 * 128,
    }


def test_layers_are_replaced_by_name_and_odd_ones_stay():
    module = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.GELU(), nn.Linear(32, 64)), nn.Linear(64, 10))
    assert quantize_linears(module, lambda name: name != "0") == 1
    assert [type(layer) for layer in module] == [nn.Linear, nn.Sequential, nn.Linear]
    assert type(module[1][1]) is Float8Linear
