"""Squared norms of patches in plain PyTorch, against F.unfold and a convolution of the squares in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fam_ext.ops.reference.patch_sqnorm import patch_sqnorm

WINDOWS: list[Any] = [
    ((2, 3), (1, 1), (0, 0), (1, 1)),
    ((3, 2), (2, 1), (1, 1), (1, 2)),
    ((1, 1), (3, 2), (2, 0), (1, 1)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_patches_of_images(window: Any) -> None:
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    kernel, stride, padding, dilation = window
    for groups in (1, 2):
        got = patch_sqnorm(x, kernel, stride, padding, dilation, groups)
        columns = F.unfold(x, kernel, dilation, padding, stride).reshape(2, groups, -1, got[0, 0].numel())
        want = columns.square().sum(2).reshape(got.shape)
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(got)
        torch.testing.assert_close(*(torch.autograd.grad(v, x, upstream)[0] for v in (got, want)))


@pytest.mark.parametrize("rank", [1, 3])
def test_signals_and_volumes(rank: int) -> None:
    x = torch.randn(2, 2, *(5,) * rank)
    got = patch_sqnorm(x, (2,) * rank, (2,) * rank, (1,) * rank, (2,) * rank, 1)
    convolve = {1: F.conv1d, 3: F.conv3d}[rank]
    ones = torch.ones(1, 2, *(2,) * rank, dtype=torch.float64)
    want = convolve(x.double().square(), ones, None, 2, 1, 2)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_sums_are_formed_in_float32_at_least() -> None:
    x = torch.full((1, 300, 1, 1), 1.01, dtype=torch.bfloat16)
    got = patch_sqnorm(x, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double().squeeze(), x.double().square().sum(), rtol=1e-6, atol=0)
