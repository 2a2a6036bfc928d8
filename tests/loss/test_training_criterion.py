"""From step to step: the strength of each step, what is saved and comes back, and when noise is on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import batch, network
from torch import nn

from fam_ext import FAMLoss, schedules
from fam_ext.loss.noise_hook import NoiseHook

CE = nn.CrossEntropyLoss()


def steps(criterion: FAMLoss, net: nn.Module, count: int) -> list[Any]:
    x, y = torch.linspace(-1, 1, 40).reshape(8, 5), torch.arange(8) % 4
    taken = []
    for _ in range(count):
        criterion(net(x), y)
        taken.append(float(criterion.last.strength))
    return taken


def test_the_strength_of_each_step() -> None:
    net = network()
    assert steps(FAMLoss(CE, net[2], 0.5), net, 2) == [0.5, 0.5]
    assert steps(FAMLoss(CE, net[2], 0.5, every=3), net, 7) == [0.5, 0, 0, 0.5, 0, 0, 0.5]
    assert steps(FAMLoss(CE, net[2], schedules.Warmup(0.5, 2)), net, 4) == [0.0, 0.25, 0.5, 0.5]
    assert steps(FAMLoss(CE, net[2], lambda step: step), net, 3) == [0, 1, 2]
    assert steps(FAMLoss(CE, net[2], lambda step: step, every=2), net, 4) == [0, 0, 2, 0]


def test_a_strength_that_is_set() -> None:
    net = network()
    criterion = FAMLoss(CE, net[2], 0.5)
    criterion.strength = schedules.Constant(0.25)
    assert steps(criterion, net, 1) == [0.25]
    with pytest.raises(TypeError, match="FAMLoss: strength must be a number or a callable"):
        criterion.strength = "0.5"
    assert criterion.strength(0) == 0.25


@pytest.mark.parametrize(
    ("value", "message"),
    [(lambda step: "x", "the value of the strength schedule must be a number"), (lambda step: float("nan"), "finite"),
     (lambda step: lambda: 0, "must be a number")],
)  # fmt: skip
def test_a_schedule_that_gives_no_number(value: Any, message: str) -> None:
    net = network()
    with pytest.raises((TypeError, ValueError), match=message):
        steps(FAMLoss(CE, net[2], value), net, 1)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_every(every: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="FAMLoss: every must be"):
        FAMLoss(CE, nn.Linear(2, 2), 0.5, every=every)
    net = network()
    for method in ("auto", "noise"):
        criterion = FAMLoss(CE, net[2], 0.5, every=2, method=method)
        with pytest.raises(error, match="FAMLoss: every must be"):
            criterion.every = every
        assert criterion.every == 2 and steps(criterion, net, 4) == [0.5, 0, 0.5, 0]
        criterion.every = 3
        assert steps(criterion, net, 3) == [0, 0, 0.5]
        criterion.detach()


def test_the_state_comes_back() -> None:
    """Step, averages of the schedule, random numbers: training goes on as if nothing had happened."""
    torch.manual_seed(1)
    net, (x, y) = network(), batch()
    ratio = {"strength": schedules.TargetRatio(0.1, maximum=1.0), "method": "hutchinson"}
    saved = FAMLoss(CE, net[0], **ratio)
    other = FAMLoss(CE, net[0], strength=schedules.TargetRatio(0.1, maximum=1.0), method="hutchinson")
    for _ in range(3):
        saved(net(x), y)
        other.reset()
    other.load_state_dict(saved.state_dict())
    z = net(x)
    assert saved(z, y) == other(z, y) and saved.step == other.step == 4
    fresh = FAMLoss(CE, net[0], strength=schedules.TargetRatio(0.1, maximum=1.0), method="hutchinson")
    assert fresh(net(x), y) != saved.last.total


def test_a_state_that_does_not_fit_leaves_the_step() -> None:
    class Strict(schedules.Warmup):
        def load_state_dict(self, state: Any) -> None:
            raise KeyError("averages")

    net = network()
    criterion = FAMLoss(CE, net[2], Strict(0.1, 3))
    steps(criterion, net, 2)
    with pytest.raises(KeyError):
        criterion.set_extra_state({"step": 77, "schedule": {}, "generators": []})
    assert criterion.step == 2


def test_a_state_without_ours_lacks_nothing() -> None:
    module = nn.ModuleDict({"net": network(), "loss": CE})
    state = module.state_dict()
    module["loss"] = FAMLoss(nn.CrossEntropyLoss(weight=torch.ones(4)), module["net"][2], 0.5)
    assert set(module.load_state_dict(state, strict=False).missing_keys) == {"loss.criterion.weight"}
    module["loss"] = FAMLoss(CE, module["net"][2], 0.5)
    module.load_state_dict(state)


def test_copies_start_with_an_empty_record() -> None:
    net = network()
    criterion = FAMLoss(CE, net[2], 0.5)
    steps(criterion, net, 2)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied.last.total is None and copied.step == 2 and copied.strength == 0.5


def hook(criterion: FAMLoss) -> NoiseHook:
    found = criterion.terms[0].hook
    assert isinstance(found, NoiseHook)
    return found


def test_noise_has_the_strength_of_the_step_to_come() -> None:
    net = network()
    criterion = FAMLoss(CE, net[2], schedules.SwitchOff(0.5, 2), method="noise", every=2, normalize="fan_in")
    seen = []
    for _ in range(5):
        seen.append((hook(criterion).value, hook(criterion).active))
        steps(criterion, net, 1)
    assert seen == [(0.5 / 6, True), (0.0, False), (0.0, False), (0.0, False), (0.0, False)]
    criterion.strength = 0.25
    criterion.step = 0
    criterion.attach()
    assert (hook(criterion).value, hook(criterion).active) == (0.25 / 6, True)
    criterion.eval()
    assert not hook(criterion).active


def test_noise_cannot_be_negative_or_follow_kappa() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="FAMLoss: strength must be at least 0 with method='noise'"):
        FAMLoss(CE, layer, -0.1, method="noise")
    with pytest.raises(TypeError, match=r"a number or a schedule of steps with method='noise'"):
        FAMLoss(CE, layer, schedules.TargetRatio(0.1), method="noise")


@pytest.mark.parametrize(
    "wrong", [-1.0, lambda step: -1.0, lambda step: "x", "x", schedules.TargetRatio(0.1)]
)
def test_a_refused_strength_of_noise_leaves_the_old_one(wrong: Any) -> None:
    net = network()
    criterion = FAMLoss(CE, net[2], 0.5, method="noise")
    with pytest.raises((TypeError, ValueError), match=r"FAMLoss: .*strength"):
        criterion.strength = wrong
    assert criterion.strength == 0.5 and hook(criterion).value == 0.5
    copy.deepcopy(criterion)
    assert steps(criterion, net, 1) == [0.5]
    with pytest.raises((TypeError, ValueError), match=r"FAMLoss: .*strength") as kept:
        FAMLoss(CE, net[0], wrong, method="noise")
    assert kept.value is not None and not net[0]._forward_pre_hooks  # although the error is alive


def test_a_refused_strength_leaves_no_hook() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="FAMLoss: strength must be a number") as kept:
        FAMLoss(CE, layer, "x")  # type: ignore[arg-type]
    assert kept.value is not None and not layer._forward_hooks


def test_a_state_whose_strength_is_refused_leaves_the_step() -> None:
    net = network()
    criterion = FAMLoss(CE, net[2], lambda step: 0.5 if step < 9 else -0.5, method="noise")
    with pytest.raises(ValueError, match="the value of the strength schedule must be at least 0"):
        criterion.set_extra_state({"step": 9, "schedule": None, "generators": []})
    assert criterion.step == 0 and steps(criterion, net, 1) == [0.5]


def test_a_loss_ends_the_noise_s_step() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(CE, net[2], 0.5, method="noise")
    first = net(x)
    torch.testing.assert_close(first, net(x))  # one draw until the loss
    total = criterion(first, y)
    torch.testing.assert_close(total, F.cross_entropy(first, y))
    assert not torch.equal(first, net(x))
    second = net(x)
    criterion.reset()
    assert not torch.equal(second, net(x))
