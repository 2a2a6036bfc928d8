"""linear_cross_entropy in float16 and bfloat16 under a loss scale, which its forward pass does not know yet."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from inputs import needs_native
from loss_scaling import GAPS, assert_scales_like_torch, scaled_gradients
from torch import Tensor

from fam_ext.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = needs_native
HALVES = [torch.float16, torch.bfloat16]
SIZES = [(64, 10), (4096, 40), (65536, 20)]


def confident_problem(rows: int, classes: int, gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """input, weight and targets: feature k lifts class k above the others, in numbers that every dtype holds."""
    target = torch.arange(rows) % classes
    lift = round((gap + math.log(classes - 1)) * 8) / 8
    noise = torch.randint(-4, 5, (rows, 4)) / 16
    x = torch.cat([lift * torch.nn.functional.one_hot(target, classes), noise], 1)
    return x, torch.cat([torch.eye(classes), torch.randint(-8, 9, (classes, 4)) / 16], 1), target


def loss(backend: str, target: Tensor, x: Tensor, weight: Tensor, **options: object) -> Tensor:
    values: Tensor = linear_cross_entropy(x, weight, target, backend=backend, **options)[0]
    return values.mean()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtypes", [(d, e) for d in HALVES for e in (d, torch.float32)], ids=str)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_at_every_scale(
    size: tuple[int, int], gap: float, dtypes: tuple[torch.dtype, torch.dtype], reduction: str
) -> None:
    """A head in half precision, and autocast's: features in half precision, the weight in float32."""
    x, weight, target = confident_problem(*size, gap)
    inputs = x.to(dtypes[0]), weight.to(dtypes[1])
    ours, plain = (
        partial(loss, backend, target, strength=0.1, reduction=reduction)
        for backend in ("native", "reference")
    )
    assert_scales_like_torch(ours, plain, inputs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_upstream_gradients_that_are_no_power_of_two(dtype: torch.dtype) -> None:
    """bfloat16 gradients are rounded when they are made and when they are multiplied: sqrt(2) times the error of one rounding."""
    x, weight, target = torch.randn(64, 16), torch.randn(10, 16), torch.arange(64) % 10
    ours, plain = (partial(loss, backend, target, strength=0.1) for backend in ("native", "reference"))
    assert_scales_like_torch(ours, plain, (x.to(dtype), weight.to(dtype)), (1 / 3, -1.0, 4095.0, 1e-3))


def test_what_is_too_large_before_the_factor_is_known() -> None:
    x, weight, target = confident_problem(64, 10, 1.0)
    inputs, scale = (x.half(), weight.half()), 2.0**-14
    ours, plain = (partial(loss, backend, target, strength=1e7) for backend in ("native", "reference"))
    assert not all(t.isfinite().all() for t in scaled_gradients(ours, inputs, 1.0))
    assert all(t.isfinite().all() for t in scaled_gradients(ours, inputs, scale))
    assert_scales_like_torch(ours, plain, inputs, (scale,))
