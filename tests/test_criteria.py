"""fastai's flattened losses are the closed forms of the losses inside them; fastai's own where installed, else a stand-in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import flattened_losses
import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, criteria, measure

STRENGTH = 0.3


@pytest.fixture(params=[False, True], ids=["stand-in", "fastai"])
def fastai(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return flattened_losses.losses(request.param, monkeypatch)


def network(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), *last).double()


def precision(fastai: Any) -> torch.dtype:
    """fastai's own losses cast float64 to float32."""
    return torch.float64 if fastai.BaseLoss is flattened_losses.BaseLoss else torch.float32


def check(net: nn.Sequential, criterion: Any, plain: Any, x: Tensor, y: Tensor, dtype: torch.dtype) -> None:
    """Loss, kappa and every gradient against `plain` as a function of (outputs, y) and the full float64 Hessian."""
    single = dtype == torch.float32
    near = {"rtol": 1e-5, "atol": 1e-6} if single else {"rtol": 1e-9, "atol": 1e-11}
    trained = copy.deepcopy(net).to(dtype)
    fam = FAMLoss(criterion, trained[2], STRENGTH)
    parameters = list(net.parameters())
    total = fam(trained(x.to(dtype)), y)
    gradients = torch.autograd.grad(total, list(trained.parameters()))

    def loss(weight: Tensor) -> Tensor:
        names = {"2.weight": weight}
        value: Tensor = plain(torch.func.functional_call(net, names, (x,)), y)
        return value

    kappa = oracle.kappa(loss, net[2].weight)  # type: ignore[arg-type]
    expected = loss(net[2].weight) + STRENGTH * kappa  # type: ignore[arg-type]
    torch.testing.assert_close(total.double(), expected, **near)
    torch.testing.assert_close(fam.last.flatness.double(), kappa.detach(), **near)
    for got, e in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got.double(), e, **near)
    assert fam.plan.method == "closed_form"
    assert type(total) is Tensor
    trained.eval()
    evaluated = torch.as_tensor(fam(trained(x.to(dtype)), y).detach()).double()
    torch.testing.assert_close(evaluated, loss(net[2].weight).detach(), **near)  # type: ignore[arg-type]


def test_rows_of_classes(fastai: Any) -> None:
    x, y = torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(0, 4, (4, 3))
    y[0, 1] = -100
    weight = torch.rand(4).double()
    dtype = precision(fastai)

    def plain(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), weight)

    check(network(nn.Linear(6, 4)), fastai.CrossEntropyLossFlat(weight=weight.to(dtype)), plain, x, y, dtype)


def test_classes_in_the_middle(fastai: Any) -> None:
    """A segmentation head: classes in dimension 1, a target for every pixel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2)).double()
    x, y = torch.randn(2, 2, 5, 6, dtype=torch.float64), torch.randint(0, 4, (2, 2, 3))
    check(net, fastai.CrossEntropyLossFlat(axis=1), F.cross_entropy, x, y, precision(fastai))


def test_elementwise(fastai: Any) -> None:
    """The means over elements keep their neurons, and targets become floats."""
    x = torch.randn(7, 5, dtype=torch.float64)
    y = torch.randint(0, 2, (7, 3))

    def mse(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y.double())

    def bce(z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, y.double())

    check(network(nn.Linear(6, 3)), fastai.MSELossFlat(), mse, x, y, precision(fastai))
    check(network(nn.Linear(6, 3)), fastai.BCEWithLogitsLossFlat(), bce, x, y, precision(fastai))
    single = torch.randn(7)

    def of_one(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z.flatten(), y.double())

    check(network(nn.Linear(6, 1)), fastai.MSELossFlat(), of_one, x, single, precision(fastai))


def test_num_items_and_by_row(fastai: Any) -> None:
    net, x, y = (
        network(nn.Linear(6, 4)),
        torch.randn(6, 5, dtype=torch.float64),
        torch.randint(0, 4, (6,)),
    )
    criterion = fastai.CrossEntropyLossFlat()
    fam = FAMLoss(criterion, net[2], STRENGTH)
    whole = fam(net(x), y)
    halves = [fam(net(x[r]), y[r], num_items=6) for r in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(sum(halves), whole)
    assert fam.reduction == "mean"
    fam.reduction = "none"
    assert criterion.func.reduction == "none"
    rows = fam(net(x), y)
    assert rows.shape == (6,)
    torch.testing.assert_close(rows.mean(), whole)


def test_an_inner_layer_and_the_term_alone(fastai: Any) -> None:
    net, x, y = (
        network(nn.Linear(6, 4)),
        torch.randn(6, 5, dtype=torch.float64),
        torch.randint(0, 4, (6,)),
    )
    for layer, curvature in ((net[0], "ggn"), (net[0], "hessian"), (net[2], "hessian")):
        values = [
            RelativeFlatness(ce, layer, curvature=curvature, method="auto")(net(x), y)
            for ce in (fastai.CrossEntropyLossFlat(), nn.CrossEntropyLoss())
        ]
        torch.testing.assert_close(*(v.double() for v in values), rtol=1e-5, atol=0)


def test_measured_with_ignored_targets(fastai: Any) -> None:
    net, x, y = (
        network(nn.Linear(6, 4)),
        torch.randn(6, 5, dtype=torch.float64),
        torch.randint(0, 4, (6,)),
    )
    y[:2] = -100
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    reports = [
        measure(net, batches, net[2], ce, ["neuronwise", "fisher_rao"], progress=False)
        for ce in (fastai.CrossEntropyLossFlat(), nn.CrossEntropyLoss())
    ]
    assert reports[0].values == pytest.approx(reports[1].values)
    assert reports[0].loss == pytest.approx(reports[1].loss)


def test_what_the_loss_offers_is_offered(fastai: Any) -> None:
    head = nn.Linear(3, 2)
    fam = FAMLoss(fastai.CrossEntropyLossFlat(weight=torch.ones(2)), head, STRENGTH)
    z = torch.randn(4, 2)
    torch.testing.assert_close(torch.as_tensor(fam.activation(z)), z.softmax(-1))
    assert torch.equal(torch.as_tensor(fam.decodes(z)), z.argmax(-1))
    assert fam.y_int is True
    fam.to(torch.float16)
    assert fam.criterion.func.weight.dtype == torch.float16
    fam.float()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fam.eval())))
    copied.train()
    copied(copied.layer(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0]))
    assert copied.plan.method == "closed_form"
    plain = FAMLoss(nn.CrossEntropyLoss(), head, STRENGTH)
    assert plain.reduction == "mean"
    assert not any(hasattr(plain, name) for name in ("activation", "decodes", "y_int"))
    of_function = FAMLoss(lambda z, y: F.cross_entropy(z, y), head, STRENGTH)
    assert not hasattr(of_function, "reduction")
    with pytest.raises(AttributeError, match="FAMLoss: the criterion has no reduction"):
        of_function.reduction = "none"


def test_another_call_is_no_closed_form(fastai: Any) -> None:
    class Doubled(fastai.CrossEntropyLossFlat):  # type: ignore[misc]
        def __call__(self, outputs: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
            loss: Tensor = 2 * super().__call__(outputs, target, **kwargs)
            return loss

    assert criteria.flattened(Doubled()) is None
    assert criteria.flattened(nn.CrossEntropyLoss()) is None and criteria.flattened(lambda z: z) is None
    net, x, y = network(nn.Linear(6, 4)), torch.randn(6, 5), torch.randint(0, 4, (6,))
    net.float()
    doubled = RelativeFlatness(Doubled(), net[2])(net(x), y)
    torch.testing.assert_close(
        torch.as_tensor(doubled), 2 * RelativeFlatness(nn.CrossEntropyLoss(), net[2])(net(x), y)
    )
    expect(
        "no closed form is known for the criterion",
        lambda: FAMLoss(Doubled(), net[2], 0.1, method="closed_form"),
    )


def test_inside_of_compile() -> None:
    ce = nn.CrossEntropyLoss()
    assert criteria.uncompiled(torch.compile(ce)) is ce and criteria.uncompiled(F.mse_loss) is F.mse_loss
    nested = FAMLoss(FAMLoss(ce, nn.Linear(3, 2), STRENGTH), nn.Linear(3, 2), STRENGTH)
    assert (
        criteria.uncompiled(nested) is nested
    )  # no wrapper of torch.compile, although skorch may look inside
    assert nested.criterion._orig_mod is ce and nested._bind is None
