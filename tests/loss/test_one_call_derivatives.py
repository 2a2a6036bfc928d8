"""Losses that hold derivatives of the network, or the weight itself: kappa is that of the whole Hessian by the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from torch import Tensor, nn
from torch.func import functional_call

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:.*has never been verified")

Loss = Callable[[Callable[[Tensor], Tensor]], Any]
CALLS = {"one call": 1, "three calls": 3}


def gradient_penalty(net: Callable[[Tensor], Tensor], x: Tensor, calls: int = 1) -> tuple[Tensor, Tensor]:
    """What a critic's loss is made from: its output, and the gradient by its input."""
    x = x.clone().requires_grad_()
    score = sum(net(x * (k + 1)) for k in range(calls))
    return score, torch.autograd.grad(score.sum(), x, create_graph=True)[0]


def penalized(score: Tensor, slope: Tensor) -> Tensor:
    return F.softplus(-score).mean() + 5 * slope.pow(2).flatten(1).sum(1).mean()


def heat_equation(net: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """u, and the residual u_t - 0.3 u_xx at points (x, t)."""
    points = points.clone().requires_grad_()
    u = net(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    return u, first[:, 1] - 0.3 * second[:, 0]


def forces(net: Callable[[Tensor], Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    positions = positions.clone().requires_grad_()
    energy = net(positions)
    return energy, -torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]


def score_matching(net: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Hyvaerinen's objective for an energy: tr(d score / dx) + |score|^2 / 2."""
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(-net(x).sum(), x, create_graph=True)
    trace = sum(
        torch.autograd.grad(score[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(x.shape[1])
    )
    return score, trace


def jvp(net: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output and its derivative along a direction, by forward-mode differentiation."""
    with torch.autograd.forward_ad.dual_level():
        out = torch.autograd.forward_ad.unpack_dual(
            net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        )
        return out.primal, out.tangent


TASKS: dict[str, tuple[Any, Any]] = {
    "gradient penalty": (gradient_penalty, penalized),
    "three calls": (lambda net, x: gradient_penalty(net, x, 3), penalized),
    "heat equation": (heat_equation, lambda u, r: u.square().mean() + r.square().mean()),
    "forces": (forces, lambda e, f: (e - 0.3).square().mean() + 2 * (f - 0.1).square().mean()),
    "score matching": (score_matching, lambda s, t: (t + s.square().sum(1) / 2).mean()),
    "jvp": (jvp, lambda out, tangent: out.square().mean() + (tangent - 1).square().mean()),
}


class Case:
    """A network in float64, one of its layers, an input, and the task's loss as a function of that layer's weight."""

    def __init__(self, task: str, net: nn.Module, index: str, x: Tensor) -> None:
        self.outputs, self.criterion = TASKS[task]
        self.net, self.x = net, x
        self.name, self.layer = f"{index}.weight", net.get_submodule(index)

    def loss(self, weight: Tensor) -> Tensor:
        result: Tensor = self.criterion(
            *self.outputs(lambda x: functional_call(self.net, {self.name: weight}, x), self.x)
        )
        return result

    def exact(self) -> tuple[Tensor, Tensor]:
        """kappa and its gradient by the layer's weight from the full Hessian."""
        weight = self.layer.weight.detach().clone().requires_grad_()  # type: ignore[operator]
        groups = getattr(self.layer, "groups", 1)
        kappa = oracle.kappa(self.loss, weight, groups=groups)
        return kappa.detach(), torch.autograd.grad(kappa, weight)[0]


def perceptron(task: str, index: str) -> Case:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 1)).double()
    return Case(task, net, index, torch.randn(4, 2, dtype=torch.float64))


def convolutional(task: str, index: str) -> Case:
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.Conv1d(4, 3, 2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(9, 1),
    ).double()
    return Case(task, net, index, torch.randn(3, 2, 6, dtype=torch.float64))


CASES = {
    **{f"{task}, layer {k}": (perceptron, task, k) for task in TASKS for k in ("0", "2", "4")},
    **{
        f"{task}, convolution {k}": (convolutional, task, k)
        for task in ("gradient penalty", "three calls", "forces", "jvp")
        for k in ("0", "2", "5")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    make, task, index = CASES[name]
    case = make(task, index)
    kappa, gradient = case.exact()
    criterion = RelativeFlatness(case.criterion, case.layer, method="exact", max_bytes=2**40)
    value = criterion(*case.outputs(case.net, case.x))
    torch.testing.assert_close(value.detach(), kappa)
    torch.testing.assert_close(torch.autograd.grad(value, case.layer.weight)[0], gradient)
    assert criterion.plan.level == "batch"


@pytest.mark.parametrize("task", ["gradient penalty", "heat equation"])
def test_estimates(task: str) -> None:
    case = perceptron(task, "2")
    kappa, _ = case.exact()
    hutchinson = RelativeFlatness(case.criterion, case.layer, method="hutchinson", probes=200)
    value = hutchinson(*case.outputs(case.net, case.x))
    assert abs(value - kappa) < 4 * hutchinson.standard_error
    assert "past the layer's own calls" in hutchinson.plan.reason
    differences = RelativeFlatness(case.criterion, case.layer, method="finite_difference", probes=200)
    value = differences(
        *case.outputs(case.net, case.x), closure=lambda: case.criterion(*case.outputs(case.net, case.x))
    )
    assert abs(value - kappa) < 4 * differences.standard_error


def test_positive_forms_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])

    class Penalized(nn.CrossEntropyLoss):
        """The loss that torch knows, of outputs that hold a derivative of the network."""

    def outputs() -> Tensor:
        inputs = x.clone().requires_grad_()
        out = net(inputs)
        return out + torch.autograd.grad(out.sum(), inputs, create_graph=True)[0].square().sum(
            1, keepdim=True
        )

    criterion = FAMLoss(nn.CrossEntropyLoss(), net[0], 0.1, curvature="ggn")
    expect("depends through that call", lambda: criterion(outputs(), y))


@pytest.mark.parametrize("calls", [1, 2])
def test_a_penalty_on_the_weight_counts(calls: int) -> None:
    """One rule, however often the layer is called: the Hessian is that of what the criterion returns."""
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return sum((k + 1) * F.linear(x * (k + 1), weight).tanh().square().mean() for k in range(calls)) + (
            weight.pow(4).sum()
        )

    def criterion(*outputs: Tensor) -> Tensor:
        return sum((k + 1) * out.tanh().square().mean() for k, out in enumerate(outputs)) + (
            layer.weight.pow(4).sum()
        )

    with torch.no_grad():
        layer.bias.zero_()
    term = RelativeFlatness(criterion, layer, method="exact")
    value = term(*[layer(x * (k + 1)) for k in range(calls)])
    weight = layer.weight.detach().clone().requires_grad_()
    kappa = oracle.kappa(loss, weight)
    torch.testing.assert_close(value.detach(), kappa.detach())
    torch.testing.assert_close(
        torch.autograd.grad(value, layer.weight)[0], torch.autograd.grad(kappa, weight)[0]
    )


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    original = layer.parametrizations.weight.original1
    criterion = FAMLoss(lambda out: out.square().mean() + original.square().sum(), layer, 0.1, method="exact")
    with pytest.raises(UnsupportedError, match="past the layer's calls"):
        criterion(layer(torch.randn(4, 3)))
