"""The sum of several layers' terms: its value and gradients, and what they share."""

from __future__ import annotations

import warnings
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError
from fam_ext.capture import graph_walk

pytestmark = pytest.mark.on_devices


class Counted(torch.autograd.Function):
    """The identity; counts backward passes, to any order."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counted.passes += 1
        result: Tensor = Counted.apply(grad)
        return result


class Net(nn.Module):
    """Two layers in a row, two beside each other, a head; with a norm whose third derivative torch gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)
        self.left, self.right = nn.Conv1d(1, 2, 2), nn.Linear(4, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        left = F.softplus(self.left(x.unsqueeze(1))).flatten(1)
        result: Tensor = self.head(self.norm(left + self.right(x).sigmoid()))
        return result


NAMES = ("first", "second", "left", "right", "head")


def case() -> tuple[Net, Tensor, Tensor]:
    return Net().double(), torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))


def expected(net: Net, x: Tensor, y: Tensor) -> Tensor:
    def loss(name: str) -> Any:
        return lambda w: F.cross_entropy(torch.func.functional_call(net, {f"{name}.weight": w}, (x,)), y)

    return sum(oracle.kappa(loss(name), getattr(net, name).weight) for name in NAMES)  # type: ignore[return-value]


def test_sum_against_the_full_hessians() -> None:
    net, x, y = case()
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), [getattr(net, n) for n in NAMES], method="auto")
    value = criterion(net(x), y)
    assert [plan.method for plan in criterion.plan] == ["exact"] * 4 + ["closed_form"]
    torch.testing.assert_close(value, expected(net, x, y))
    gradients = torch.autograd.grad(value, list(net.parameters()), allow_unused=True, materialize_grads=True)
    step, directions = 1e-5, [torch.randn_like(p) for p in net.parameters()]
    slopes = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(net.parameters(), directions, strict=True):
                p.add_(d, alpha=sign * step)
        slopes.append(expected(net, x, y))
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(along, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{"method": "exact"}, {"curvature": "ggn"}], ids=str)
def test_sum_of_the_single_terms(options: dict[str, Any]) -> None:
    net, x, y = case()
    layers = [getattr(net, n) for n in NAMES]
    terms = []
    for layer in layers:
        with RelativeFlatness(nn.CrossEntropyLoss(), layer, **options) as single:
            terms.append(single(net(x), y).detach())
    together = RelativeFlatness(nn.CrossEntropyLoss(), layers, **options)
    torch.testing.assert_close(together(net(x), y).detach(), torch.stack(terms).sum())


@pytest.mark.parametrize("per_sample_probes", [None, False])
@pytest.mark.parametrize("norm", [True, False])
def test_one_estimate_for_all_layers(norm: bool, per_sample_probes: bool | None) -> None:
    """Within four standard errors, in value and along the weights: layers of one shape must not see the same signs."""
    torch.manual_seed(2)
    layers = [nn.Linear(4, 4) for _ in range(3)]
    between = [nn.BatchNorm1d(4) if norm else nn.Softplus(), nn.Tanh(), nn.Tanh()]
    net = nn.Sequential(*(m for pair in zip(layers, between, strict=True) for m in pair), nn.Linear(4, 3))
    net, x, y = net.double(), torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    weights = [layer.weight for layer in layers]
    exact = RelativeFlatness(nn.CrossEntropyLoss(), layers, method="exact")
    expected = exact(net(x), y)
    slopes = torch.autograd.grad(expected, weights)
    estimate = RelativeFlatness(
        nn.CrossEntropyLoss(), layers, method="hutchinson", per_sample_probes=per_sample_probes, probes=8
    )
    draws = []
    for _ in range(150):
        value = estimate(net(x), y)
        along = [(g * w).sum() for g, w in zip(torch.autograd.grad(value, weights), weights, strict=True)]
        draws.append(torch.stack([value, *along]).detach())
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / len(draws) ** 0.5
    wanted = torch.stack([expected, *((s * w).sum() for s, w in zip(slopes, weights, strict=True))])
    assert ((mean - wanted).abs() < 4 * error).all(), (mean, wanted, error)
    assert (error < 0.2 * wanted.abs().max()).all()


def test_by_name() -> None:
    net, x, y = case()
    ce = nn.CrossEntropyLoss()
    total = FAMLoss(ce, [net.first, net.left, net.right], 0.3)(net(x), y)
    by_name = FAMLoss.for_model(ce, net, ["first", "[lr]*t"], strength=0.3)
    assert [part.module for part in by_name.terms] == [net.first, net.left, net.right]
    torch.testing.assert_close(by_name(net(x), y), total)


def test_one_walk_one_first_gradient_and_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = case()
    walks = []
    find = graph_walk.find
    monkeypatch.setattr(graph_walk, "find", lambda *a: walks.append(a) or find(*a))

    def passes(layers: list[nn.Module]) -> int:
        options: dict[str, Any] = {
            "method": "hutchinson",
            "per_sample_probes": False,
            "curvature_grad": False,
        }
        criterion = RelativeFlatness(nn.CrossEntropyLoss(), layers, **options)
        outputs = Counted.apply(net(x))
        Counted.passes = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CountedBackward was never verified
            criterion(outputs, y)
        return Counted.passes

    one = passes([net.first])
    assert one > 1
    walks.clear()
    three = passes([net.first, net.second, net.right])
    assert len(walks) == 1
    assert three == one


def test_a_layer_that_is_not_called_is_named() -> None:
    net, x, y = case()
    other = nn.Linear(2, 2).double()
    criterion = FAMLoss(nn.CrossEntropyLoss(), [net.first, other], 0.1)
    with pytest.raises(UnsupportedError, match=r"FAMLoss: Linear\(in_features=2.* was not called"):
        criterion(net(x), y)
