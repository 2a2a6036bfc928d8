"""FAMLoss.linear_cross_entropy: the same step as FAMLoss of the logits, with its bookkeeping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inputs import expect
from torch import Tensor, nn

from fam_ext import FAMLoss, schedules
from fam_ext import functional as fam

pytestmark = pytest.mark.on_devices


def make(criterion: Any = None, bias: bool = True, **options: Any) -> tuple[nn.Linear, FAMLoss]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 40, bias=bias, dtype=torch.float64)
    options = {"strength": 0.3, **options}
    return layer, FAMLoss(criterion or nn.CrossEntropyLoss(), layer, **options)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    target = torch.randint(0, 40, (3, 7))
    target[0, ::2] = -100
    return torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True), target


def step(layer: nn.Linear, loss: Tensor, x: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (x, *layer.parameters()))]


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        (nn.CrossEntropyLoss(), {}),
        (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), {"normalize": "fan_in"}),
        (nn.CrossEntropyLoss(torch.rand(40).double(), ignore_index=3), {"strength": -0.2}),
        (nn.functional.cross_entropy, {"curvature_grad": False}),
        (nn.CrossEntropyLoss(), {"strength": schedules.TargetRatio(0.5)}),
        (nn.CrossEntropyLoss(), {"strength": schedules.Warmup(0.5, 3)}),
        (nn.CrossEntropyLoss(), {"every": 2}),
        (nn.CrossEntropyLoss(), {"backend": "reference"}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_same_steps_as_of_the_logits(criterion: Any, options: dict[str, Any], bias: bool) -> None:
    """Three steps: losses, gradients, last, and the step count."""
    # a TargetRatio has a state of its own
    (layer, fused), (other, plain) = (make(criterion, bias, **copy.deepcopy(options)) for _ in range(2))
    x, y = batch()
    if getattr(criterion, "ignore_index", 0) == 3:
        y = y.clamp(min=3)
    for _ in range(3):
        got = step(layer, fused.linear_cross_entropy(x, layer.weight, y, layer.bias), x)
        expected = step(other, plain(other(x).movedim(-1, 1), y), x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(fused.last.loss, plain.last.loss)
        assert (fused.last.flatness is None) == (plain.last.flatness is None)
        if plain.last.flatness is not None:
            torch.testing.assert_close(fused.last.flatness, plain.last.flatness)
        torch.testing.assert_close(float(fused.last.strength), float(plain.last.strength))
        assert fused.step == plain.step


def test_per_row() -> None:
    layer, criterion = make(nn.CrossEntropyLoss(reduction="none"))
    x, y = batch()
    loss = criterion.linear_cross_entropy(x, layer.weight, y, layer.bias)
    assert loss.shape == y.shape
    expected = fam.linear_cross_entropy(x, layer.weight, y, bias=layer.bias, reduction="none", strength=0.3)[
        0
    ]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_number_of_items(reduction: str) -> None:
    """The gradients of two batches that share one mean add up to those of the batch of both."""
    layer, criterion = make()
    x, y = batch()
    whole = step(layer, criterion.linear_cross_entropy(x, layer.weight, y, layer.bias), x)
    items = (y != -100).sum()
    criterion.criterion = nn.CrossEntropyLoss(reduction=reduction)
    parts = []
    for k in (slice(0, 1), slice(1, 3)):
        loss = criterion.linear_cross_entropy(x[k], layer.weight, y[k], layer.bias, num_items=items)
        parts.append(step(layer, loss, x))
        torch.testing.assert_close(criterion.last.loss + 0.3 * criterion.last.flatness, loss.detach())
    torch.testing.assert_close([a + b for a, b in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("where", ["criterion", "layer"])
def test_evaluation_is_the_plain_loss(where: str) -> None:
    layer, criterion = make(nn.CrossEntropyLoss(label_smoothing=0.1))
    x, y = batch()
    criterion.linear_cross_entropy(x, layer.weight, y, layer.bias)
    last = criterion.last
    (criterion if where == "criterion" else layer).eval()
    loss = criterion.linear_cross_entropy(x, layer.weight, y, layer.bias)
    torch.testing.assert_close(loss, criterion.criterion(layer(x).movedim(-1, 1), y))
    assert criterion.last is last and criterion.step == 1


def test_works_detached_and_leaves_nothing_captured() -> None:
    layer, criterion = make()
    x, y = batch()
    layer(x)  # a forward that no loss follows
    expected = criterion.linear_cross_entropy(x, layer.weight, y, layer.bias)
    criterion.detach()
    torch.testing.assert_close(criterion.linear_cross_entropy(x, layer.weight, y, layer.bias), expected)


def test_refusals() -> None:
    x, y = batch()
    run = lambda c, **k: c.linear_cross_entropy(x, torch.zeros(40, 5, dtype=torch.float64), y, **k)  # noqa: E731
    expect("criterion must be CrossEntropyLoss, got MSELoss", lambda: run(make(nn.MSELoss())[1]))
    expect("criterion must be CrossEntropyLoss", lambda: run(make(lambda z, t: z.sum())[1]))
    expect("measure must be 'neuronwise', got 'trace'", lambda: run(make(measure="trace")[1]))
    expect("method must be .*'hutchinson'", lambda: run(make(method="hutchinson")[1]))
    layers = [nn.Linear(5, 40), nn.Linear(5, 40)]
    expect("one nn.Linear", lambda: run(FAMLoss(nn.CrossEntropyLoss(), layers, 0.1)))
    expect("one nn.Linear", lambda: run(FAMLoss(nn.CrossEntropyLoss(), nn.Conv1d(5, 40, 1), 0.1)))
    hooked = nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda *a: None)
    expect("forward hooks", lambda: run(make(hooked)[1]))
    weighted = nn.CrossEntropyLoss(torch.ones(40))
    expect("num_items counts terms", lambda: run(make(weighted)[1], num_items=3))
    with pytest.raises(ValueError, match=r"weight must be of the layer's shape \(40, 5\)"):
        make()[1].linear_cross_entropy(x, torch.zeros(41, 5), y)
    with pytest.raises(ValueError, match="reduction of the criterion, with num_items, must be one of"):
        run(make(nn.CrossEntropyLoss(reduction="none"))[1], num_items=3)
    with pytest.raises(TypeError, match=r"^FAMLoss\.linear_cross_entropy: num_items must be a number"):
        run(make()[1], num_items="3")
    layer, criterion = make()
    cases: list[tuple[type[Exception], Tensor, str]] = [
        (ValueError, y[:2], "target must be of shape"),
        (TypeError, y.int(), "target must be class indices"),
    ]
    if y.is_cpu:  # a GPU stops at a device-side assert
        cases.append((IndexError, torch.full_like(y, 40), "target must be a class index from 0 to 39"))
    for bad, wrong, text in cases:
        with pytest.raises(bad, match=rf"^FAMLoss\.linear_cross_entropy: {text}"):
            criterion.linear_cross_entropy(x, layer.weight, wrong)
    assert criterion.step == 0
