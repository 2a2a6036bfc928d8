"""Strength schedules on their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fam_ext.schedules import Constant, SwitchOff, TargetRatio, Warmup

pytestmark = pytest.mark.on_devices


def test_values() -> None:
    assert [Constant(0.3)(s) for s in (0, 9)] == [0.3, 0.3]
    assert [Warmup(0.4, 4)(s) for s in (0, 1, 4, 9)] == [0.0, 0.1, 0.4, 0.4]
    assert Warmup(0.4, 0)(0) == 0.4
    assert [SwitchOff(0.4, 2)(s) for s in (0, 1, 2, 3)] == [0.4, 0.4, 0.0, 0.0]
    assert Warmup(lambda step: -step, 2)(1) == -0.5


def test_target_ratio_averages_finite_steps_only() -> None:
    schedule = TargetRatio(0.5, momentum=0.75)
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert schedule.update(one, two) == 0.25
    torch.testing.assert_close(schedule.update(two, two), torch.tensor(0.5 * (0.75 + 0.5) / 2))
    before = schedule.averages
    schedule.update(torch.tensor(math.nan), torch.tensor(0.0))
    assert torch.equal(schedule.averages, before)
    assert TargetRatio(0.5).update(one, torch.tensor(0.0)) == 0
    assert TargetRatio(0.5).update(torch.tensor(math.nan), one) == 0


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Constant(math.inf), ValueError),
        (lambda: Constant(lambda step: 1), TypeError),
        (lambda: Warmup(0.1, -1), ValueError),
        (lambda: Warmup(0.1, 1.5), TypeError),
        (lambda: SwitchOff(True, 1), TypeError),
        (lambda: Warmup(TargetRatio(0.1), 3), TypeError),
        (lambda: TargetRatio(0.1, momentum=1.0), ValueError),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


def test_target_ratio_is_bounded_and_keeps_its_sign() -> None:
    ratio = TargetRatio(0.5, momentum=0.0, maximum=2.0)
    assert ratio.update(torch.tensor(1.0), torch.tensor(10.0)) == 0.05
    assert ratio.update(torch.tensor(1.0), torch.tensor(-10.0)) == 0.05
    assert ratio.update(torch.tensor(1.0), torch.tensor(1e-6)) == 2.0
    with pytest.raises(ValueError, match="maximum"):
        TargetRatio(0.5, maximum=0.0)
