"""The rows that count, their shares of the loss and their coefficients, against torch's losses in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.ops._linear_cross_entropy_targets import MEAN, NONE, SUM, Targets
from fam_ext.ops.row_coefficients import cross_entropy_coefficients

pytestmark = pytest.mark.on_devices

LABELS = torch.tensor([0, -100, 3, 3, 1])
OMEGA = torch.tensor([0.5, 1.0, 2.0, 3.0])
NAMES = {NONE: "none", MEAN: "mean", SUM: "sum"}


def targets(labels: Tensor = LABELS, classes: int = 4, **options: Any) -> Targets:
    chosen: dict[str, Any] = {
        "omega": None, "scale": None, "acc": torch.float64, "ignore_index": -100, "label_smoothing": 0.0, "reduction": MEAN
    }  # fmt: skip
    return Targets(labels, classes, **chosen | options)


@pytest.mark.parametrize("reduction", NAMES)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_shares_and_coefficients(reduction: int, smoothing: float, weighted: bool) -> None:
    """q_s = hard [s = t] + soft omega_s gives torch's loss as sum q_s (lse - z_s), and c its Hessian's coefficient."""
    omega = OMEGA.double() if weighted else None
    t = targets(omega=omega, label_smoothing=smoothing, reduction=reduction)
    kept = LABELS != -100
    assert t.count == 4 and t.total == 5 and torch.equal(t.kept, kept.nonzero().squeeze(1))
    assert torch.equal(t.index, LABELS[kept])
    z = torch.randn(5, 4, dtype=torch.float64)
    options: dict[str, Any] = {"reduction": NAMES[reduction], "label_smoothing": smoothing}
    q = F.one_hot(t.index, 4) * t.hard[:, None] + t.soft[:, None] * (OMEGA.double() if weighted else 1.0)
    losses = -(q * z[kept].log_softmax(1)).sum(1)
    expected = F.cross_entropy(z, LABELS, omega, **options)
    torch.testing.assert_close(
        losses if reduction == NONE else losses.sum(), expected[kept] if reduction == NONE else expected
    )
    c = cross_entropy_coefficients(z, LABELS, omega, **options)
    torch.testing.assert_close(t.coefficient, c[kept])
    best = z[kept].argmax(1)
    others = q.sum(1) - q.gather(1, best[:, None]).squeeze(1)
    torch.testing.assert_close(t.others(slice(1, 3), best[1:3]), others[1:3])


def test_factors_of_the_rows() -> None:
    scale = torch.arange(1.0, 6.0)
    t = targets(scale=scale, reduction=SUM)
    torch.testing.assert_close(t.coefficient, scale[LABELS != -100].double())
    assert t.may_be_zero and targets(omega=OMEGA).may_be_zero and not targets().may_be_zero


def test_rows_there_and_back() -> None:
    t, source = targets(), torch.arange(10.0).reshape(5, 2)
    part = slice(1, 3)
    assert torch.equal(t.gather(source, part), source[[2, 3]])
    assert t.scatter(torch.ones(4)).tolist() == [1, 0, 1, 1, 1]
    every = targets(torch.tensor([0, 1]))
    assert every.kept is None and torch.equal(every.gather(source[:2], slice(1, 2)), source[1:2])
    values = torch.ones(2)
    assert every.scatter(values) is values


def test_nothing_that_counts() -> None:
    t = targets(torch.full((3,), -100))
    assert (
        t.count == 0
        and t.mean_of_nothing
        and not targets(torch.full((3,), -100), reduction=SUM).mean_of_nothing
    )
    assert targets(torch.empty(0, dtype=torch.int64)).count == 0
    zero = targets(torch.tensor([0, 0]), omega=torch.tensor([0.0, 1, 1, 1]))
    assert not zero.coefficient.isfinite().any()  # the mean divides by 0, as torch's


@pytest.mark.parametrize("wrong", [4, -1, -101])
def test_classes_that_there_are_not(wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"a class index from 0 to 3 or ignore_index \(-100\), got {wrong}"):
        targets(torch.tensor([0, wrong, -100]))
    assert targets(torch.tensor([0, wrong]), ignore_index=wrong).count == 1
