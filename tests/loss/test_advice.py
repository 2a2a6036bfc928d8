"""Warnings about the term's sign and size: when they come, what they name, that they come once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from inputs import batch, network
from torch import nn

from fam_ext import FAMLoss, schedules
from fam_ext.loss.advice import Advice
from fam_ext.loss.step_record import StepRecord


def record(loss: float, kappa: float, strength: float) -> StepRecord:
    return StepRecord(torch.tensor(loss + strength * kappa), torch.tensor(kappa), strength)


def told(records: list[StepRecord], inside: bool = True, chosen: bool = True) -> list[str]:
    """What is said in these steps."""
    advice = Advice()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for last in records:
            advice.steps += 1
            if advice.steps.bit_count() == 1:
                advice.look(last, inside, chosen)
    assert all(w.category is UserWarning for w in caught)
    return [str(w.message) for w in caught]


def test_looked_at_in_steps_1_2_4_8() -> None:
    layer = nn.Linear(2, 2)
    criterion, steps = FAMLoss(nn.CrossEntropyLoss(), layer, 0.1), []
    criterion._advise = lambda last: steps.append(criterion._advice.steps)  # type: ignore[method-assign]
    for _ in range(20):
        criterion(layer(torch.ones(1, 2)), torch.tensor([0]))
    assert steps == [1, 2, 4, 8, 16]


def test_a_negative_kappa_inside_the_network() -> None:
    (text,) = told([record(2.0, -0.5, 0.1)] * 20)
    for part in ("negative", "curvature='fisher'", "method='noise'", "smaller strength", "-0.5", "2"):
        assert part in text
    assert (
        len(told([record(2.0, 0.5, 0.1)] * 100 + [record(2.0, -0.5, 0.1)] * 100)) == 1
    )  # it turned negative


def test_no_word_about_the_sign() -> None:
    assert not told([record(2.0, 0.5, 0.1)] * 20)
    assert not told([record(2.0, -1e-9, 0.1)] * 20, inside=False, chosen=False)  # rounding, on a head
    assert not told([record(2.0, -0.5, -0.1)] * 20)  # a negative strength: on purpose


@pytest.mark.parametrize(("kappa", "strength"), [(30.0, 0.1), (30.0, -0.1), (-30.0, -0.1)])
def test_a_term_that_outweighs_the_loss(kappa: float, strength: float) -> None:
    (text,) = told([record(2.0, kappa, strength)] * 20)
    for part in ("outweighs", "curvature='fisher'", "method='noise'", "smaller strength"):
        assert part in text
    (head,) = told([record(2.0, kappa, strength)] * 20, inside=False)
    assert "outweighs" in head and "smaller strength" in head and "fisher" not in head


def test_a_term_that_outweighs_the_loss_late() -> None:
    """A head's term may when the loss is nearly zero; inside the network that is worth a word at any time."""
    late = [record(2.0, 1.0, 0.1)] * 15 + [record(0.01, 1.0, 0.1)] * 20
    assert len(told(late)) == 1 and not told(late, inside=False)


def test_a_strength_that_changes_nothing() -> None:
    weak = [record(2.0, 0.5, 1e-7)] * 20
    (text,) = told(weak, inside=False)
    assert "larger strength" in text
    assert not told(weak, chosen=False)  # a schedule may start so
    assert not told([record(2.0, 0.0, 0.1)] * 20)  # nothing to be regularized
    assert not told([record(2.0, 0.5, 1e-5)] * 20)
    assert not told([record(2.0, 0.5, 0.1)] * 15 + [record(2.0, 1e-9, 0.1)] * 20)  # what it is there for


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_went_wrong(value: float) -> None:
    assert not told([record(2.0, value, 0.1)] * 20)
    assert not told([record(value, 1.0, 0.1)] * 20)


def losses(criterion: Any, net: nn.Module, steps: int = 3) -> list[str]:
    x, y = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            criterion(net(x), y)
    return [str(w.message) for w in caught if "FAMLoss:" in str(w.message)]


def test_in_training() -> None:
    """Inside the network and on the head, with each form, with a schedule."""
    net, ce = network(), nn.CrossEntropyLoss()
    (inside,) = losses(FAMLoss(ce, net[0], 1e4), net)
    assert "fisher" in inside
    (head,) = losses(FAMLoss(ce, net[2], 1e4), net)
    assert "fisher" not in head
    (positive,) = losses(FAMLoss(ce, net[0], 1e4, curvature="ggn"), net)
    assert "outweighs" in positive and "fisher" not in positive
    (weak,) = losses(FAMLoss(ce, net[2], 1e-12), net)
    assert "larger" in weak
    assert not losses(FAMLoss(ce, net[2], schedules.Constant(1e-12)), net)
    assert not losses(FAMLoss(ce, net[2], 1e-3), net)
    assert not losses(FAMLoss(ce, net[2], 1e4, method="noise"), net)  # has no value
    assert not losses(FAMLoss(ce, net[2], schedules.TargetRatio(0.1)), net)


def test_a_loss_that_is_concave_in_the_layer() -> None:
    """Its kappa is negative: with a negative strength that is meant."""
    net = network()

    def concave(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 10 - 1e-3 * outputs.square().mean()

    (text,) = losses(FAMLoss(concave, net[2], 1e-2), net)
    assert "negative" in text
    assert not losses(FAMLoss(concave, net[2], -1.0), net)
