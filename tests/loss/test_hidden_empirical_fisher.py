"""curvature="empirical_fisher": sum_i c_i |W^T dl_i/dW|^2 over the batch's own losses l_i, on hidden layers and on heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError, measure

pytestmark = pytest.mark.on_devices

B = 5


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def cross_entropy() -> tuple[nn.Module, nn.Sequential, Tensor]:
    return nn.CrossEntropyLoss(), network(3), torch.randint(0, 3, (B,))


def binary() -> tuple[nn.Module, nn.Sequential, Tensor]:
    return nn.BCEWithLogitsLoss(), network(1), torch.rand(B, 1).double()


def by_hand(criterion: nn.Module, model: nn.Sequential, layer: int, x: Tensor, y: Tensor) -> Tensor:
    weight: Any = model[layer].weight
    total = torch.zeros(()).double()
    for sample, target in zip(x.split(1), y.split(1), strict=True):
        (g,) = torch.autograd.grad(criterion(model(sample), target), weight, create_graph=True)
        total = total + (weight.t() @ g).square().sum() / B
    return total


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("make", [cross_entropy, binary])
def test_value_and_gradients(make: Any, layer: int) -> None:
    criterion, model, y = make()
    x = torch.randn(B, 3).double()
    kappa = RelativeFlatness(criterion, model[layer], curvature="empirical_fisher")
    got, want = kappa(model(x), y), by_hand(criterion, model, layer, x, y)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    for g, w in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_all_layers_and_measure() -> None:
    criterion, model, y = cross_entropy()
    x = torch.randn(B, 3).double()
    expected = sum(by_hand(criterion, model, layer, x, y) for layer in (0, 2))
    loss = FAMLoss.for_model(criterion, model, "*", strength=0.3, curvature="empirical_fisher")
    loss(model(x), y)
    torch.testing.assert_close(loss.last.flatness, expected.detach(), rtol=1e-10, atol=0)
    loss.detach()
    report = measure(model, [(x, y)], "2", criterion, curvature="empirical_fisher", progress=False)
    assert report.values["neuronwise"] == pytest.approx(
        float(by_hand(criterion, model, 2, x, y).detach()), rel=1e-9
    )


def test_where_the_closed_form_is_another_matrix() -> None:
    model = network(3)
    with pytest.raises(ValueError, match="method must be 'auto' with curvature='empirical_fisher'"):
        FAMLoss(nn.CrossEntropyLoss(), model[2], 0.1, curvature="empirical_fisher", method="closed_form")
    loss = FAMLoss(nn.CrossEntropyLoss(), model[2], 0.1, curvature="empirical_fisher")
    with pytest.raises(UnsupportedError, match="got 'empirical_fisher'"):
        loss.linear_cross_entropy(torch.randn(B, 4).double(), model[2].weight, torch.randint(0, 3, (B,)))


def test_it_is_not_the_hessian_on_a_head() -> None:
    _, model, y = cross_entropy()
    x = torch.randn(B, 3).double()
    values = []
    for curvature in ("hessian", "empirical_fisher"):
        kappa = RelativeFlatness(F.cross_entropy, model[2], curvature=curvature)
        values.append(float(kappa(model(x), y)))
        kappa.detach()
    assert abs(values[0] - values[1]) > 0.01 * values[0]
