"""FAMLoss(..., num_items=n): micro-batches that share one mean add up to the batch of all of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from torch import Tensor, nn

from fam_ext import FAMLoss

pytestmark = pytest.mark.on_devices
ROWS, CLASSES = 12, 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(ROWS, 5, dtype=torch.float64), torch.randint(0, CLASSES, (ROWS,))
    y[[1, 2, 7, 9, 10, 11]] = -100  # the last micro-batch has no label at all
    return x, y


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


CRITERIA: dict[str, Any] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "function": functools.partial(F.cross_entropy, label_smoothing=0.1),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("layer", "options"), [(2, {}), (0, {}), (0, {"curvature": "ggn"}), (2, {"measure": "layerwise"})]
)
def test_micro_batches_add_up(criterion: str, layer: int, options: dict[str, Any]) -> None:
    x, y = batch()
    loss = CRITERIA[criterion]
    of_mean = loss if criterion != "sum" else nn.CrossEntropyLoss()
    whole = network()
    expected = FAMLoss(of_mean, whole[layer], 0.3, **options)
    total = expected(whole(x), y)
    total.backward()

    model = network()
    famed = FAMLoss(loss, model[layer], 0.3, **options)
    count = (y != -100).sum()
    parts, kappas, plain = 0.0, 0.0, 0.0
    for rows in torch.arange(ROWS).split([5, 4, 3]):
        part = famed(model(x[rows]), y[rows], num_items=count)
        part.backward()
        parts, kappas = parts + part.detach(), kappas + famed.last.flatness
        plain = plain + famed.last.loss
    torch.testing.assert_close(parts, total.detach())
    torch.testing.assert_close(kappas, expected.last.flatness)
    torch.testing.assert_close(plain, expected.last.loss)
    torch.testing.assert_close(gradients(model), gradients(whole))
    if criterion != "function":
        assert loss.reduction == criterion  # as before


def test_evaluation_and_steps_without_the_term() -> None:
    x, y = batch()
    model = network()
    famed = FAMLoss(nn.CrossEntropyLoss(), model[2], 0.3, every=2)
    expected = F.cross_entropy(model(x), y, reduction="sum") / 9
    famed(model(x), y)
    torch.testing.assert_close(famed(model(x), y, num_items=9), expected)
    assert famed.last.flatness is None
    famed.eval()
    torch.testing.assert_close(famed(model(x), y, num_items=9), expected)


def test_noise() -> None:
    x, y = batch()
    famed = [FAMLoss(nn.CrossEntropyLoss(), network()[2], 0.3, method="noise") for _ in range(2)]
    models = [network(), network()]
    famed = [
        FAMLoss(nn.CrossEntropyLoss(), m[2], 0.3, method="noise", generator=torch.Generator().manual_seed(3))
        for m in models
    ]
    mean = famed[0](models[0](x), y)
    torch.testing.assert_close(famed[1](models[1](x), y, num_items=12), mean * 6 / 12)


def test_refusals_leave_the_criterion_as_it_is() -> None:
    x, y = batch()
    model = network()

    def refused(criterion: Any, text: str, **options: Any) -> None:
        famed = FAMLoss(criterion, model[2], 0.3, **options)
        before = copy.deepcopy(vars(criterion)) if isinstance(criterion, nn.Module) else None
        expect(text, lambda: famed(model(x), y, num_items=9))
        if before is not None:
            assert vars(criterion).get("reduction") == before.get("reduction")
        famed.detach()

    refused(lambda z, t: F.cross_entropy(z, t), "num_items needs a criterion that is known")
    refused(nn.CrossEntropyLoss(torch.ones(CLASSES).double()), "num_items counts terms")
    refused(nn.CrossEntropyLoss(), "method='finite_difference'", method="finite_difference")
    famed = FAMLoss(nn.CrossEntropyLoss(reduction="none"), model[2], 0.3)
    with pytest.raises(ValueError, match="reduction"):
        famed(model(x), y, num_items=9)
    famed.detach()
    famed = FAMLoss(nn.CrossEntropyLoss(), model[2], 0.3)
    for wrong in ("9", -9, torch.ones(2)):
        with pytest.raises((TypeError, ValueError), match="FAMLoss: num_items must be"):
            famed(model(x), y, num_items=wrong)
    assert famed.step == 0


def test_weights_of_a_function_count_wherever_they_are_given() -> None:
    """By position or by name: refused under "mean", and what divides the sum under "sum"."""
    x, y = batch()
    model, weight = network(), torch.tensor([1.0, 5.0, 0.2, 2.0]).double()
    famed = FAMLoss(F.cross_entropy, model[2], 0.3)
    expect("num_items counts terms", lambda: famed(model(x), y, weight, num_items=8))
    expect("num_items counts terms", lambda: famed(model(x), y, weight=weight, num_items=8))
    assert famed.step == 0
    famed.reset()
    module = FAMLoss(nn.CrossEntropyLoss(weight, reduction="sum"), model[2], 0.3)
    want = module(model(x), y) / 8
    module.detach()
    famed.reset()
    total = famed(model(x), y, weight, None, -100, None, "sum", num_items=8)  # all by position
    torch.testing.assert_close(total, want)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(total, parameters), torch.autograd.grad(want, parameters))


def test_an_error_of_the_criterion_restores_its_reduction() -> None:
    x, _ = batch()
    model, loss = network(), nn.CrossEntropyLoss()
    famed = FAMLoss(loss, model[2], 0.3)
    with pytest.raises(Exception, match=r"."):
        famed(model(x), torch.full((ROWS,), CLASSES + 3), num_items=9)
    assert loss.reduction == "mean"
