"""kappa does not change where a ReLU network is rescaled and its function is not, at any layer (Petzka et al. 2021)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fam_ext import RelativeFlatness

pytestmark = pytest.mark.on_devices

INVARIANT: list[dict[str, Any]] = [
    {},
    {"measure": "layerwise"},
    {"measure": "layerwise_eigenvalue"},
    {"measure": "neuronwise_eigenvalue"},
    {"curvature": "ggn"},
    {"curvature": "fisher", "probes": 3},
    {"method": "hutchinson", "probes": 2},
]
SCALES = st.lists(st.floats(0.05, 20.0), min_size=3, max_size=3)


def perceptron() -> tuple[nn.Sequential, Tensor]:
    net = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    return net, torch.randn(7, 5)


def convolutions() -> tuple[nn.Sequential, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 3),
    )
    return net, torch.randn(3, 2, 5, 5)


def weighted(net: nn.Sequential) -> list[Any]:
    return [m for m in net if hasattr(m, "weight")]


def values(net: nn.Sequential, x: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    """The measure at every layer, each with its own signs and draws."""
    found = []
    for layer in weighted(net):
        generator = torch.Generator(torch.get_default_device()).manual_seed(5)
        criterion = RelativeFlatness(nn.CrossEntropyLoss(), layer, generator=generator, **options)
        found.append(criterion(net(x), y).detach())
        criterion.detach()
    return torch.stack(found)


def rescale(net: nn.Sequential, scales: list[float]) -> nn.Sequential:
    """Each hidden layer times its scale, and the scale taken back by the layer after it."""
    net = copy.deepcopy(net)
    layers = weighted(net)
    with torch.no_grad():
        for before, after, scale in zip(layers, layers[1:], scales, strict=False):
            before.weight.mul_(scale)
            before.bias.mul_(scale)
            after.weight.div_(scale)
    return net


@pytest.mark.parametrize("options", INVARIANT, ids=str)
@pytest.mark.parametrize("make", [perceptron, convolutions])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(scales=SCALES)
def test_layers_rescaled(make: Any, options: dict[str, Any], scales: list[float]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net, x = make()
        net, x, y = net.double(), x.double(), torch.randint(3, (len(x),))
    rescaled = rescale(net, scales)
    torch.testing.assert_close(rescaled(x), net(x))
    expected = values(net, x, y, options)
    assert (expected.abs() > 1e-4).all()  # no dead network
    torch.testing.assert_close(values(rescaled, x, y, options), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [perceptron, convolutions])
def test_neurons_rescaled(make: Any) -> None:
    """kappa of a layer stands even where each of its neurons has a scale of its own."""
    net, x = make()
    net, x, y = net.double(), x.double(), torch.randint(3, (len(x),))
    layers = weighted(net)
    changed = copy.deepcopy(net)
    scale = torch.rand(layers[0].weight.shape[0], dtype=torch.float64) * 9 + 0.1
    first, second = weighted(changed)[:2]
    with torch.no_grad():
        first.weight.mul_(scale.reshape(-1, *(1,) * (first.weight.dim() - 1)))
        first.bias.mul_(scale)
        inputs = scale.reshape(getattr(second, "groups", 1), 1, -1)
        shape = (inputs.shape[0], -1, *second.weight.shape[1:])
        second.weight.copy_(
            (second.weight.reshape(shape) / inputs.reshape(*inputs.shape, *(1,) * (first.weight.dim() - 2)))
            .reshape(second.weight.shape)
        )  # fmt: skip
    torch.testing.assert_close(changed(x), net(x))
    torch.testing.assert_close(values(changed, x, y, {})[0], values(net, x, y, {})[0])


def test_the_trace_and_norm_power_1_are_not_invariant() -> None:
    net, x = perceptron()
    y = torch.randint(3, (len(x),))
    for options in ({"measure": "trace"}, {"measure": "layerwise", "norm_power": 1}):
        ratio = values(rescale(net, [4.0, 1.0, 1.0]), x, y, options) / values(net, x, y, options)
        assert ratio[0] < 0.5 and ratio[1] > 2, options
