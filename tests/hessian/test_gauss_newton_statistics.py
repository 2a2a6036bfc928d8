"""Gauss-Newton and Fisher matrices behind batch_norm in training mode: the Jacobian takes its statistics for constants."""

from __future__ import annotations

import copy
from typing import Any

import dense_factors
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import RelativeFlatness, UnsupportedError


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    nn.init.uniform_(net[1].weight, 0.5, 2.0)
    return net, torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3


def held(net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """The dense form in evaluation mode, with the batch's own statistics as the running ones."""
    constant = copy.deepcopy(net).eval()
    z = net[0](x).detach()
    norm: Any = constant[1]
    norm.running_mean, norm.running_var = z.mean(0), z.var(0, correction=0)
    matrix = dense_factors.of_loss(lambda f: F.cross_entropy(f, y))
    return dense_factors.quadratic_form(net[0], constant[1:], x, matrix).detach()


@pytest.mark.parametrize("hold", [None, True])
def test_statistics_are_held(hold: bool | None) -> None:
    net, x, y = problem()
    exact = RelativeFlatness(nn.CrossEntropyLoss(), net[0], curvature="ggn", hold_statistics=hold)
    expected = held(net, x, y)
    torch.testing.assert_close(exact(net(x), y).detach(), expected)
    assert exact.plan.method == "ggn" and "batch statistics held constant" in exact.plan.reason
    drawn = RelativeFlatness(
        nn.CrossEntropyLoss(), net[0], curvature="fisher", probes=300, hold_statistics=hold
    )
    assert abs(drawn(net(x), y) - expected) < 4 * drawn.standard_error
    assert "batch statistics held constant" in drawn.plan.reason


def test_refused_on_request_and_needless_without_them() -> None:
    net, x, y = problem()
    strict = RelativeFlatness(nn.CrossEntropyLoss(), net[0], curvature="ggn", hold_statistics=False)
    with pytest.raises(UnsupportedError, match=r"samples interact after the layer.*hold_statistics=True"):
        strict(net(x), y)
    strict.reset()
    net[1].eval()
    assert strict(net(x), y) > 0 and "held" not in strict.plan.reason
    net[1].train()
    head = RelativeFlatness(nn.CrossEntropyLoss(), net[3], curvature="ggn", hold_statistics=False)
    head(net(x), y)  # batch_norm before the layer makes no difference
