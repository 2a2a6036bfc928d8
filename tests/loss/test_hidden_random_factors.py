"""curvature="ggn" with method="hutchinson": random factors of a criterion's Hessian, against the exact Gauss-Newton form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError, measure

pytestmark = pytest.mark.on_devices

B, DRAWS, ROUNDS = 6, 200, 20


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, outputs)
    ).double()


def smoothed() -> tuple[nn.Module, int, Tensor]:
    return nn.CrossEntropyLoss(label_smoothing=0.2), 3, torch.randint(0, 3, (B,))


def class_weights() -> tuple[nn.Module, int, Tensor]:
    return nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double()), 3, torch.randint(0, 3, (B,))


def mse() -> tuple[nn.Module, int, Tensor]:
    return nn.MSELoss(), 3, torch.randn(B, 3).double()


def positive_weights() -> tuple[nn.Module, int, Tensor]:
    weights = torch.tensor([0.5, 4.0]).double()
    return nn.BCEWithLogitsLoss(pos_weight=weights), 2, torch.rand(B, 2).double()


@pytest.mark.parametrize("make", [smoothed, class_weights, mse, positive_weights])
def test_the_mean_is_the_gauss_newton_form(make: Any) -> None:
    """Of the sum over all layers: the value and every gradient, within 5 standard errors of the mean over rounds."""
    criterion, outputs, y = make()
    model, x = network(outputs), torch.randn(B, 5).double()
    layers, parameters = [model[0], model[2], model[4]], list(model.parameters())

    def flattened(kappa: Tensor) -> Tensor:
        gradients = torch.autograd.grad(kappa, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([kappa.detach().reshape(1), *(g.flatten() for g in gradients)])

    exact = RelativeFlatness(criterion, layers, curvature="ggn", method="auto")
    expected = flattened(exact(model(x), y))
    exact.detach()
    sampled = RelativeFlatness(criterion, layers, curvature="ggn", method="hutchinson", probes=DRAWS)
    rounds = torch.stack([flattened(sampled(model(x), y)) for _ in range(ROUNDS)])
    spread = rounds.std(0) / ROUNDS**0.5
    assert bool((spread[0] < 0.05 * expected[0]) & (spread[0] > 0))
    off = (rounds.mean(0) - expected).abs() - 5 * spread - 1e-9 * expected.abs().max()
    assert bool((off <= 0).all()), off.max()
    assert all(p.method == "ggn" and "random factors" in p.reason for p in sampled.plan)
    error = sampled.standard_error
    assert 0.5 < float(error) * ROUNDS**-0.5 / float(spread[0]) < 2


def test_one_draw_is_exact_for_one_output() -> None:
    model, x, y = network(1), torch.randn(B, 5).double(), torch.randn(B, 1).double()
    values = []
    for method in ("auto", "hutchinson"):
        kappa = RelativeFlatness(nn.MSELoss(), model[2], curvature="ggn", method=method)
        values.append(kappa(model(x), y))
        kappa.detach()
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)


def test_all_layers_in_one_line() -> None:
    model, y = network(3), torch.randint(0, 3, (B,))
    ce = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(UnsupportedError, match=r"curvature='ggn' with method='hutchinson'"):
        FAMLoss.for_model(ce, model, "*", strength=0.1, curvature="fisher")(
            model(torch.randn(B, 5).double()), y
        )
    criterion = FAMLoss.for_model(ce, model, "*", strength=0.1, curvature="ggn", method="hutchinson")
    loss = criterion(model(torch.randn(B, 5).double()), y)
    loss.backward()
    assert float(criterion.last.flatness) > 0
    torch.testing.assert_close(loss.detach(), criterion.last.loss + 0.1 * criterion.last.flatness)


def test_measure_tells_its_standard_error() -> None:
    model, x, y = network(3), torch.randn(B, 5).double(), torch.randint(0, 3, (B,))
    options: dict[str, Any] = {"curvature": "ggn", "progress": False}
    exact = measure(model, [(x, y)], "0", nn.CrossEntropyLoss(label_smoothing=0.1), **options)
    sampled = measure(
        model,
        [(x, y)],
        "0",
        nn.CrossEntropyLoss(label_smoothing=0.1),
        method="hutchinson",
        probes=300,
        **options,
    )
    assert exact.standard_errors["neuronwise"] is None
    error = sampled.standard_errors["neuronwise"]
    assert error > 0 and abs(sampled.values["neuronwise"] - exact.values["neuronwise"]) < 4 * error
