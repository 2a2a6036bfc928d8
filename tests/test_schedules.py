"""Strength schedules on their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fam_ext import FAMLoss
from fam_ext.schedules import Constant, SwitchOff, TargetRatio, Warmup

pytestmark = pytest.mark.on_devices


def test_values() -> None:
    assert [Constant(0.3)(s) for s in (0, 9)] == [0.3, 0.3]
    assert [Warmup(0.4, 4)(s) for s in (0, 1, 4, 9)] == [0.0, 0.1, 0.4, 0.4]
    assert Warmup(0.4, 0)(0) == 0.4
    assert [SwitchOff(0.4, 2)(s) for s in (0, 1, 2, 3)] == [0.4, 0.4, 0.0, 0.0]
    assert Warmup(lambda step: -step, 2)(1) == -0.5


def test_target_ratio_averages_finite_steps_only() -> None:
    schedule = TargetRatio(0.5, momentum=0.75, maximum=math.inf)
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert schedule.update(one, two) == 0.25
    torch.testing.assert_close(schedule.update(two, two), torch.tensor(0.5 * (0.75 + 0.5) / 2))
    before = schedule.averages
    schedule.update(torch.tensor(math.nan), torch.tensor(0.0))
    assert torch.equal(schedule.averages, before)
    for maximum in (None, math.inf):
        assert TargetRatio(0.5, maximum=maximum).update(one, torch.tensor(0.0)) == 0
        assert TargetRatio(0.5, maximum=maximum).update(torch.tensor(math.nan), one) == 0


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
        (lambda: Constant(10**400), ValueError),
        (lambda: Warmup(-(10**400), 3), ValueError),
        (lambda: TargetRatio(0.1, maximum="a"), ValueError),
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
    assert ratio.update(torch.tensor(-1.0), torch.tensor(10.0)) == 0.05
    assert TargetRatio(-0.5, maximum=2.0).update(torch.tensor(1.0), torch.tensor(10.0)) == -0.05
    for huge in (1e300, 10**400):
        assert TargetRatio(0.5, maximum=huge).update(torch.tensor(1.0), torch.tensor(2.0)) == 0.25
    with pytest.raises(ValueError, match="maximum"):
        TargetRatio(0.5, maximum=0.0)


def test_target_ratio_stays_below_a_tenth_of_what_the_loss_has_fallen_by() -> None:
    ratio, kappa = TargetRatio(0.5, momentum=0.0), torch.tensor(4.0)
    # 2.0: nothing has fallen yet; 1.0 has fallen by 1, a tenth of which is less than half the loss; 0.1: half the loss is less
    for loss, size in ((2.0, 0.0), (1.0, 0.1), (3.0, 0.0), (0.1, 0.05), (-1.0, 0.3)):
        torch.testing.assert_close(ratio.update(torch.tensor(loss), kappa), torch.tensor(size / 4))
        torch.testing.assert_close(ratio.update(torch.tensor(loss), -kappa), torch.tensor(size / 4))
    again = TargetRatio(0.5, momentum=0.0)
    again.load_state_dict(ratio.state_dict())
    torch.testing.assert_close(again.update(torch.tensor(1.0), kappa), torch.tensor(0.1 / 4))


def train(strength: TargetRatio, layer: int, zero: bool) -> float:
    """Share of the first loss that is left after 150 steps on three clusters."""
    centers = 2 * torch.eye(3, 8)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    if zero:
        nn.init.zeros_(net[4].weight)
    criterion = FAMLoss(
        nn.CrossEntropyLoss(), net[layer], strength, curvature="hessian" if layer == 4 else "fisher"
    )
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), []
    for _ in range(150):
        y = torch.randint(0, 3, (32,))
        optimizer.zero_grad()
        criterion(net(centers[y] + 0.3 * torch.randn(32, 8)), y).backward()
        optimizer.step()
        losses.append(float(criterion.last.loss))
    return sum(losses[-10:]) / 10 / losses[0]


@pytest.mark.parametrize("zero", [False, True], ids=["", "head of zeros"])
@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_target_ratio_destroys_no_training(ratio: float, layer: int, zero: bool) -> None:
    assert train(TargetRatio(ratio), layer, zero) < 0.2


def test_without_its_bound_target_ratio_would() -> None:
    assert train(TargetRatio(1.0, maximum=math.inf), 4, False) > 0.9
