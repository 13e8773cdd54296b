"""The kernels against what they stand for. Triton interprets them here, on a CPU; tests/gpu compiles them."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from avatar.attention import apply_rope, rope_table
from avatar.float8 import FLOAT8
from avatar.kernels import Norm, Rounded, gelu, residual_norm, rotate, split_heads

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU only; tests/gpu has these for a GPU")

ROWS, HEADS, DIM = 6, 6, 32
WIDTH = HEADS * DIM
COARSE = 0.12
"""The interpreter cuts numbers off where a GPU rounds them."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rows(width: int = WIDTH) -> Tensor:
    return torch.randn(ROWS, width).bfloat16()


def apart(ours: Tensor | Rounded, theirs: Tensor) -> float:
    ours = ours.values.float() * ours.scale if isinstance(ours, Rounded) else ours.float()
    return float((ours - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_sum_and_its_norm_are_one_pass(float8: bool, unit: bool, groups: int) -> None:
    x, y, gate = rows(), rows(), torch.randn(1, WIDTH)
    gain, shift = torch.randn(groups, WIDTH), torch.randn(groups, WIDTH)
    r, h = residual_norm(x, y, gate, torch.float32, Norm(gain, shift, 1e-6, unit), float8)
    wanted = x.float() + gate * y.float()
    torch.testing.assert_close(r, wanted)
    each = ROWS // groups
    normed = F.layer_norm(wanted, (WIDTH,), eps=1e-6) * (gain + unit).repeat_interleave(each, 0)
    assert apart(h, normed + shift.repeat_interleave(each, 0)) < (COARSE if float8 else 0.005)


def test_what_is_not_wanted_is_not_made() -> None:
    assert residual_norm(rows()) == (None, None)
    r, h = residual_norm(rows(), rows(), stream=torch.bfloat16)
    assert r is not None
    assert h is None


@pytest.mark.parametrize("float8", [False, True])
def test_gelu(float8: bool) -> None:
    x = rows(96)
    assert apart(gelu(x, float8), F.gelu(x.float(), approximate="tanh")) < (COARSE if float8 else 0.005)


def test_keys_are_normed_and_turned_into_a_place_of_another_layout() -> None:
    x, weight, table = rows(), torch.randn(WIDTH), rope_table([3, 5, 9], [0, 1], [0], DIM)
    slot = torch.zeros(HEADS, 20, DIM, dtype=torch.bfloat16).transpose(0, 1)[4 : 4 + ROWS]
    rotate(x, table, weight, 1e-6, slot)
    normed = F.rms_norm(x.float(), (WIDTH,), eps=1e-6) * weight
    assert apart(slot, apply_rope(normed.view(1, ROWS, HEADS, DIM), table)[0]) < 0.005
    assert apart(rotate(x, None, weight, 1e-6), normed) < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_a_joint_product_is_split_into_heads(dtype: torch.dtype) -> None:
    x, table = rows(3 * WIDTH), rope_table([3, 5, 9], [0, 1], [0], DIM)
    q_weight, k_weight = torch.randn(2, WIDTH)
    q = torch.zeros(ROWS, HEADS, DIM).to(dtype)
    k = torch.zeros(HEADS, 20, DIM).to(dtype).transpose(0, 1)[4 : 4 + ROWS]
    v = torch.zeros(HEADS, 20, DIM).to(dtype).transpose(0, 1)[4 : 4 + ROWS]
    if dtype == FLOAT8:
        v = torch.zeros(HEADS, DIM, 32).to(dtype).permute(2, 0, 1)[4 : 4 + ROWS]
    split_heads(x, table, q_weight, k_weight, 1e-6, q, k, v)
    limit = COARSE if dtype == FLOAT8 else 0.005
    for part, weight, out in ((0, q_weight, q), (1, k_weight, k)):
        normed = F.rms_norm(x[:, part * WIDTH : (part + 1) * WIDTH].float(), (WIDTH,), eps=1e-6) * weight
        assert apart(out, apply_rope(normed.view(1, ROWS, HEADS, DIM), table)[0]) < limit
    assert apart(v.flatten(1), x[:, 2 * WIDTH :]) < limit
