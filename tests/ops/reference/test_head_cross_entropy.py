"""The one-pass head in plain PyTorch: cross-entropy plus strength times kappa from the full Hessian, in float64."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.ops.reference import softmax_trace
from fam_ext.ops.reference.head_cross_entropy import head_cross_entropy

STRENGTH = 0.3


def trace(z: Tensor, w: Tensor) -> Tensor:
    return softmax_trace.softmax_trace(z, w, "shifted")


def run(x: Tensor, w: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    chosen: dict[str, Any] = {
        "class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean", "strength": STRENGTH,
        "curvature_grad": True,
    }  # fmt: skip
    return head_cross_entropy(x @ w.T, x, w, y, trace=trace, **chosen | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.2},
        {"class_weight": torch.tensor([0.5, 1.0, 2.0]).double()},
        {"ignore_index": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_kappa(options: dict[str, Any], soft: bool) -> None:
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.rand(4, 3).softmax(1).double() if soft else torch.tensor([0, 1, 2, 0])
    if soft and "ignore_index" in options:
        options = {}
    renamed = {"weight" if k == "class_weight" else k: v for k, v in options.items()}

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, y, **renamed)

    total, kappa = run(x, w, y, **options)
    expected = oracle.kappa(loss, w)
    torch.testing.assert_close(kappa, expected.detach())
    torch.testing.assert_close(total, loss(w) + STRENGTH * expected)
    assert not kappa.requires_grad
    for g, e in zip(
        *(torch.autograd.grad(v, (x, w)) for v in (total, loss(w) + STRENGTH * expected)), strict=True
    ):
        torch.testing.assert_close(g, e)


def test_rows_and_positions() -> None:
    """reduction="none": each row's own; positions behind the classes are rows too."""
    x, w = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    y = torch.tensor([[0, 1, 3], [2, -100, 0]])
    z = (x @ w.T).movedim(-1, 1)
    total, kappa = head_cross_entropy(z, x, w, y, None, -100, 0.0, "none", STRENGTH, True, trace)
    v = x.square().sum(-1) * oracle.softmax_trace(z, w) * (y != -100)
    torch.testing.assert_close(kappa, v)
    torch.testing.assert_close(total, F.cross_entropy(z, y, reduction="none") + STRENGTH * v)


def test_the_hessian_held() -> None:
    """The gradient flows through <w_s, w_s'> alone."""
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0])
    total, kappa = run(x, w, y, curvature_grad=False)
    p = (x @ w.T).softmax(1).detach()
    c = x.detach().square().sum(1) / 4
    matrix = torch.einsum("n,nst->st", c, torch.diag_embed(p) - p[:, :, None] * p[:, None])
    expected = F.cross_entropy(x @ w.T, y) + STRENGTH * torch.einsum("st,si,ti->", matrix, w, w)
    torch.testing.assert_close(total, expected)
    for g, e in zip(*(torch.autograd.grad(v, (x, w)) for v in (total, expected)), strict=True):
        torch.testing.assert_close(g, e)
    torch.testing.assert_close(kappa, run(x, w, y)[1])


def test_an_ignored_row_may_hold_anything() -> None:
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, -100, 2, 0])
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for value in (1.0, torch.nan):
        features, z = x.clone(), (x @ w.detach().T).clone()
        features[1], z[1] = value, value
        tensors = (features.requires_grad_(), w, z.requires_grad_())
        total, _ = head_cross_entropy(z, features, w, y, None, -100, 0.0, "mean", STRENGTH, True, trace)
        results.append((total, *torch.autograd.grad(total, tensors)))
    torch.testing.assert_close(*results)
