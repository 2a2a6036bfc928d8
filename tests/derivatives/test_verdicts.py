"""What a graph is refused for, named so that the reader knows what to change."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from inputs import batch, expect, needs_native, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from verified_cases import Problem
from verified_cases_base import Case

from fam_ext import FAMLoss
from fam_ext.derivatives import verdicts


@needs_native
def test_a_criterion_that_is_a_famloss_itself() -> None:
    net, (x, y) = network(), batch()
    inner = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.1)
    outer = FAMLoss(inner, net[0], 0.1)
    expect(
        "holds fam_ext::HeadCrossEntropy, which can be differentiated once only.*give one FAMLoss",
        lambda: outer(net(x), y),
    )


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson"])
def test_reentrant_checkpointing_around_the_layer(method: str) -> None:
    net, (x, y) = network(), batch()
    fam = FAMLoss(nn.CrossEntropyLoss(), net[0], 0.1, method=method)
    z = net[2](checkpoint(net[:2], x.requires_grad_(), use_reentrant=True))
    expect("reentrant checkpointing", lambda: fam(z, y))


def test_anomaly_mode_reports_nothing_of_ours() -> None:
    """Products that vmap has no rule for are tried together first: anomaly mode would report that as an error."""
    layer, rnn, x, y = nn.Linear(2, 2), nn.LSTM(2, 2), torch.randn(2, 2), torch.tensor([0, 1])
    fam = FAMLoss(nn.CrossEntropyLoss(), layer, 0.1, method="exact")
    expected = fam(rnn(layer(x))[0], y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            warnings.simplefilter("error")
            torch.testing.assert_close(fam(rnn(layer(x))[0], y), expected)


def test_every_way_out_is_named() -> None:
    for name, (why, way_out) in verdicts.REFUSED.items():
        assert why and way_out
        assert name.endswith("Backward") or name == "torch::autograd::NotImplemented"


class Unknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_unknown_operation_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_warned", set())
    problem = Problem(Case("unknown", lambda: lambda z: Unknown.apply(Unknown.apply(z))))
    with pytest.warns(UserWarning, match=r"caller: .*UnknownBackward.* never been verified") as caught:
        verdicts.check("caller", problem.forward()[2])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts.check("caller", problem.forward()[2])
        verdicts.check("caller", Problem(Case("relu", lambda: torch.relu)).forward()[2])


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_reentrant_checkpointing_is_refused_by_every_curvature(curvature: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[0], 0.1, curvature=curvature)
    outputs = checkpoint(net[1:], net[0](torch.randn(5, 3)), use_reentrant=True)
    expect(
        "holds CheckpointFunction.*use_reentrant=False",
        lambda: criterion(outputs, torch.zeros(5, dtype=torch.int64)),
    )
