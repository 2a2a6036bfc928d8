"""normalize_features: one function, one number, however its features are scaled, and whatever weights dead features have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fam_ext
from fam_ext.measurement.features import Moments

pytestmark = pytest.mark.on_devices

ALL = ("neuronwise", "layerwise", "trace", "layerwise_eigenvalue", "neuronwise_eigenvalue")


def values(net: nn.Module, x: Tensor, y: Tensor, layer: str, names: Any = ALL) -> dict[str, float]:
    pairs = list(zip(x.split(5), y.split(5), strict=True))
    return fam_ext.measure(
        net, pairs, layer, nn.CrossEntropyLoss(), names, progress=False, normalize_features=True
    ).values


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return net, torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))


def test_weights_of_dead_features_do_not_count() -> None:
    net, x, y = problem()
    with torch.no_grad():
        net[0].bias[:3] = -50.0  # three of eight ReLUs are dead
    without = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        without[0].weight.copy_(net[0].weight[3:])
        without[0].bias.copy_(net[0].bias[3:])
        without[2].weight.copy_(net[2].weight[:, 3:])
        without[2].bias.copy_(net[2].bias)
    expected = values(without, x, y, "2")
    assert values(net, x, y, "2") == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        net[2].weight[:, :3] = 7.0
    assert values(net, x, y, "2") == pytest.approx(expected, rel=1e-9)


def test_weights_of_dead_features_of_a_hidden_convolution() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 2, groups=2, padding=1), nn.Flatten(), nn.Linear(50, 3)
    ).double()
    x, y = torch.randn(5, 1, 5, 5, dtype=torch.float64), torch.randint(0, 3, (5,))
    with torch.no_grad():
        net[0].bias[1] = -50.0
    before = values(net, x, y, "2", ["neuronwise", "trace"])
    with torch.no_grad():
        net[2].weight[0, 1] = 9.0  # channel 1 is the second one of the first group
    assert values(net, x, y, "2", ["neuronwise", "trace"]) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_a_feature_and_its_weight_may_be_rescaled(factor: float) -> None:
    """A varying feature, and a constant one: the function is the same, and so are the numbers."""
    net, x, y = problem()
    with torch.no_grad():
        net[0].weight[0], net[0].bias[0] = 0.0, 2.5  # constant
        net[0].bias[1] = 3.0
    before = values(net, x, y, "2")
    with torch.no_grad():
        net[0].weight[:2] *= factor
        net[0].bias[:2] *= factor
        net[2].weight[:, :2] /= factor
    assert values(net, x, y, "2") == pytest.approx(before, rel=1e-6)


def test_moments_of_parts() -> None:
    rows = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 0.0, 0.0]).double()
    rows += torch.tensor([0.0, 1e6, -2.0, 0.0]).double()
    moments = Moments()
    for part in rows.split([1, 30, 0, 19]):
        moments.add(part)
    expected = rows.std(0, correction=0)
    expected[2] = 2.0
    torch.testing.assert_close(moments.scale(), expected, rtol=1e-6, atol=0)


def test_nan_comes_out() -> None:
    net, x, y = problem()
    x[3, 1] = torch.nan
    report = values(net, x, y, "0", ["neuronwise"])
    assert report["neuronwise"] != report["neuronwise"]
