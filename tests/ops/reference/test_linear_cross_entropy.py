"""The loss from the head's input in plain PyTorch, against F.linear, cross-entropy and the trace of every row."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.ops.reference.linear_cross_entropy import linear_cross_entropy

STRENGTH = 0.3


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    return x, w, bias, torch.tensor([[0, 4, -100], [2, 2, 1]])


def expected(x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    rows, labels = x.reshape(-1, 4), y.flatten()
    z = F.linear(rows, w, bias)
    valid = labels != -100
    kappa = rows.square().sum(1) * oracle.softmax_trace(z, w) * valid
    kappa = {"none": kappa.reshape(y.shape), "sum": kappa.sum(), "mean": kappa.sum() / valid.sum()}[reduction]
    loss = F.cross_entropy(z, labels, reduction=reduction)
    return (loss.reshape(y.shape) if reduction == "none" else loss) + STRENGTH * kappa, kappa.detach()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_kappa(reduction: str, with_bias: bool) -> None:
    x, w, bias, y = problem()
    given = bias if with_bias else None
    got = linear_cross_entropy(x, w, y, given, None, -100, 0.0, reduction, STRENGTH, True)
    want = expected(x, w, given, y, reduction)
    torch.testing.assert_close(got, want)
    tensors = (x, w, bias) if with_bias else (x, w)
    for g, e in zip(*(torch.autograd.grad(v[0].sum(), tensors) for v in (got, want)), strict=True):
        torch.testing.assert_close(g, e)


def test_dtypes_and_ignored_rows() -> None:
    x, w, bias, y = problem()
    low = [t.detach().bfloat16() for t in (x, w, bias)]
    options: Any = (None, -100, 0.0, "mean", STRENGTH, True)
    got = linear_cross_entropy(low[0], low[1], y, low[2], *options)
    want = expected(*(t.double() for t in low), y, "mean")
    assert got[0].dtype == torch.float32  # rows, weight and bias are converted before they are multiplied
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=0)
    dirty = x.detach().clone()
    dirty[0, 2] = torch.inf
    totals = [linear_cross_entropy(t, w, y, bias, *options)[0] for t in (x, dirty)]
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*(torch.autograd.grad(t, w)[0] for t in totals))
