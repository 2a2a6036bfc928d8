"""Measures of the whole network against their definitions, formed another way."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fam_ext

pytestmark = pytest.mark.on_devices


def measured(net: nn.Module, batches: Any, name: str, criterion: Any = None, **options: Any) -> float:
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    before = copy.deepcopy(net.state_dict())
    report = fam_ext.measure(net, batches, None, criterion, [name], progress=False, **options)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert report.rows == {} and list(report.network) == [name]
    return report.values[name]


def problem(bias: bool = True) -> tuple[nn.Sequential, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Linear(4, 7, bias=bias), nn.ReLU(), nn.Linear(7, 3, bias=bias)).double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    return net, x, y, list(zip(x.split(6), y.split(6), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [0, 3])
def test_fisher_rao_is_the_norm_in_the_fisher_matrix(reduction: str, ignored: int) -> None:
    """<w, I w> = E[<w, dl/dw>^2], by the gradient of every sample's loss: equal for a ReLU network without biases."""
    net, x, y, _ = problem(bias=False)
    y[:ignored] = -100
    batches = list(zip(x.split(6), y.split(6), strict=True))
    squares = []
    for sample, label in zip(x[ignored:], y[ignored:], strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(net(sample), label), list(net.parameters()))
        squares.append(
            sum(float((g * p).sum()) for g, p in zip(gradients, net.parameters(), strict=True)) ** 2
        )
    expected = sum(squares) / len(squares)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    assert measured(net, batches, "fisher_rao", criterion) == pytest.approx(expected, rel=1e-9)


def test_fisher_rao_does_not_depend_on_how_the_criterion_is_written() -> None:
    net, x, y, _ = problem()
    y[:3] = -100
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    batches = list(zip(x.split(6), y.split(6), strict=True))
    for module, function in (
        (nn.CrossEntropyLoss(), F.cross_entropy),
        (nn.CrossEntropyLoss(weight=weight), functools.partial(F.cross_entropy, weight=weight)),
    ):
        values = [measured(net, batches, "fisher_rao", criterion) for criterion in (module, function)]
        assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_fisher_rao_counts_small_integers_as_they_are() -> None:
    """Class 156 in uint8 is -100 modulo 256, which ignores nothing."""
    net = nn.Linear(3, 200).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([156, 3, 156, 199, 0, 156])
    values = [measured(net, [(x, labels)], "fisher_rao") for labels in (y, y.to(torch.uint8))]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_fisher_rao_of_a_regression() -> None:
    net, x, _, _ = problem(bias=False)
    target = torch.randn(10, 3, dtype=torch.float64)
    squares = []
    for sample, value in zip(x, target, strict=True):
        gradients = torch.autograd.grad(F.mse_loss(net(sample), value), list(net.parameters()))
        squares.append(
            sum(float((g * p).sum()) for g, p in zip(gradients, net.parameters(), strict=True)) ** 2
        )
    batches = list(zip(x.split(6), target.split(6), strict=True))
    value = measured(net, batches, "fisher_rao", nn.MSELoss())
    assert value == pytest.approx(sum(squares) / 10, rel=1e-9)


class Quadratic(nn.Module):
    """Outputs are the parameters themselves: with the criterion below the loss is 1/2 sum a w^2 over them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(40, 30, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.eye(40, dtype=torch.float64)).flatten().expand(len(x), -1)


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (
        0.5
        * (torch.linspace(0.5, 1.5, outputs.shape[1], dtype=torch.float64) * outputs.square()).sum(1).mean()
    )


def test_pac_bayes_sharpness_of_a_quadratic() -> None:
    """E L(w + sigma u) - L(w) = sigma^2 Tr(H) / 2, so that 1 / sigma^2 = Tr(H) / 0.2; draws differ by sqrt(2 / 1200 / 8)."""
    net, batches = Quadratic(), [(torch.zeros(3, 1), torch.zeros(3))]
    with torch.no_grad():
        net.head.weight.mul_(1e-3)
    value = measured(net, batches, "pac_bayes_sharpness", half_squares, probes=8)
    assert value == pytest.approx(1200 / 0.2, rel=0.07)
    assert value == measured(net, batches, "pac_bayes_sharpness", half_squares, probes=8)
    generators = [torch.Generator("cpu").manual_seed(k) for k in range(6)]
    others = [
        measured(net, batches, "pac_bayes_sharpness", half_squares, probes=1, generator=g) for g in generators
    ]
    assert len(set(others)) > 1 and others == pytest.approx([1200 / 0.2] * 6, rel=0.2)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 0.0), (math.nan, math.nan), (1e30, math.inf)])
def test_pac_bayes_sharpness_at_its_ends(scale: float, expected: float) -> None:
    net, batches = Quadratic(), [(torch.zeros(3, 1), torch.zeros(3))]

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * outputs.square().sum()

    value = measured(net, batches, "pac_bayes_sharpness", criterion, probes=2)
    assert value == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("name", ["sam_sharpness", "adaptive_sam_sharpness"])
def test_sam_sharpness_is_the_step_of_the_whole_data_set(name: str) -> None:
    net, x, y, batches = problem()
    adaptive = name.startswith("adaptive")
    weights = [p.detach().clone() for p in net.parameters()]
    loss = F.cross_entropy(net(x), y)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    flat_w, flat_g = (torch.cat([t.flatten() for t in ts]) for ts in (weights, gradients))
    if adaptive:
        step = 0.3 * flat_w.square() * flat_g / (flat_w * flat_g).norm()
        assert float((step / flat_w).norm()) == pytest.approx(0.3)
    else:
        step = 0.02 * flat_g / flat_g.norm()
    moved = copy.deepcopy(net)
    torch.nn.utils.vector_to_parameters(flat_w + step, moved.parameters())
    expected = float(F.cross_entropy(moved(x), y) - loss)
    value = measured(net, batches, name, radius=0.02, adaptive_radius=0.3)
    assert value == pytest.approx(expected, rel=1e-9)


def test_adaptive_sharpness_is_that_of_the_function() -> None:
    net, _, _, batches = problem()
    names = ["adaptive_sam_sharpness", "sam_sharpness"]
    values = []
    for factor in (1.0, 10.0):
        with torch.no_grad():
            net[0].weight *= factor
            net[0].bias *= factor
            net[2].weight /= factor
        values.append(
            fam_ext.measure(net, batches, None, nn.CrossEntropyLoss(), names, progress=False).values
        )
    assert values[0][names[0]] == pytest.approx(values[1][names[0]], rel=1e-9)
    assert values[0][names[1]] != pytest.approx(values[1][names[1]], rel=0.1)


def test_a_flat_point_has_no_direction() -> None:
    net, batches = Quadratic(), [(torch.zeros(3, 1), torch.zeros(3))]
    with torch.no_grad():
        net.head.weight.zero_()
    assert measured(net, batches, "sam_sharpness", half_squares) == 0


def test_weight_norm_leaves_out_biases_and_scales_of_norms() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    batches = [(torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1]))]
    expected = math.hypot(float(net[0].weight.norm()), float(net[3].weight.norm()))
    assert measured(net, batches, "weight_norm") == pytest.approx(expected, rel=1e-12)
