"""What a step is: a call of the criterion, or, with follow, a step of the optimizer."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from inputs import expect
from torch import Tensor, nn

from fam_ext import FAMLoss
from fam_ext.schedules import Warmup


class Setting:
    """A head, a batch, and the strengths that the criterion's calls took."""

    def __init__(self, strength: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.x, self.y = torch.randn(8, 3), torch.randint(0, 2, (8,))
        strength = Warmup(0.8, steps=4) if strength is None else strength
        self.criterion = FAMLoss(nn.CrossEntropyLoss(), self.layer, strength, **options)
        self.strengths: list[float] = []

    def loss(self) -> Tensor:
        loss: Tensor = self.criterion(self.layer(self.x), self.y)
        self.strengths.append(float(self.criterion.last.strength))
        return loss


def test_accumulation() -> None:
    setting = Setting()
    optimizer = torch.optim.SGD(setting.layer.parameters(), lr=0.1)
    setting.criterion.follow(optimizer)
    for _ in range(3):
        for _ in range(4):
            (setting.loss() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert setting.strengths == pytest.approx([0.0] * 4 + [0.2] * 4 + [0.4] * 4)
    assert setting.criterion.step == 3


def test_calls_are_steps_without_follow() -> None:
    setting = Setting()
    for _ in range(3):
        setting.loss().backward()
    assert setting.strengths == pytest.approx([0.0, 0.2, 0.4])


class SAM(torch.optim.Optimizer):
    """Foret et al. 2021, around another optimizer; both passes of a step belong to one update."""

    def __init__(self, parameters: Any, base: torch.optim.Optimizer, rho: float) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base = base

    def step(self, closure: Any = None) -> Any:
        closure().backward()
        moved = []
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    moved.append((p, self.defaults["rho"] * p.grad / p.grad.norm()))
                    p += moved[-1][1]
        self.zero_grad()
        closure().backward()
        with torch.no_grad():
            for p, by in moved:
                p -= by
        self.base.step()
        self.zero_grad()


def test_sam_has_the_term_in_both_passes() -> None:
    setting = Setting(0.5, every=2)
    base = torch.optim.SGD(setting.layer.parameters(), lr=0.1)
    optimizer = SAM(setting.layer.parameters(), base, 0.05)
    setting.criterion.follow(base)
    for _ in range(4):
        optimizer.step(setting.loss)
    assert setting.strengths == [0.5, 0.5, 0.0, 0.0] * 2
    assert setting.criterion.step == 4


def test_lbfgs_closures() -> None:
    setting = Setting()
    optimizer = torch.optim.LBFGS(setting.layer.parameters(), max_iter=5)
    setting.criterion.follow(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = setting.loss()
        loss.backward()
        return loss

    calls = []
    for _ in range(2):
        optimizer.step(closure)
        calls.append(len(setting.strengths))
    assert calls[0] > 1 and setting.criterion.step == 2
    assert set(setting.strengths[: calls[0]]) == {0.0}
    assert setting.strengths[calls[0] :] == pytest.approx([0.2] * (calls[1] - calls[0]))


def test_wrappers_and_by_hand() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    setting = Setting()
    optimizer = torch.optim.SGD(setting.layer.parameters(), lr=0.1)
    expect(r"call follow\(None\) first", setting.criterion.advance)
    setting.criterion.follow(optimizer)
    setting.criterion.follow(Wrapper(Wrapper(optimizer)))  # in place of the first: one update is one step
    setting.loss().backward()
    optimizer.step()
    assert setting.criterion.step == 1
    setting.criterion.follow()
    optimizer.step()
    assert setting.criterion.step == 1
    setting.criterion.advance()
    assert setting.criterion.step == 2
    with pytest.raises(
        TypeError, match=r"FAMLoss\.follow: optimizer must be a torch\.optim\.Optimizer.*got 3"
    ):
        setting.criterion.follow(3)
    with pytest.raises(TypeError, match=r"FAMLoss\.follow: optimizer must be a torch\.optim\.Optimizer"):
        setting.criterion.follow(setting.layer)


def test_noise_takes_the_strength_of_the_step() -> None:
    setting = Setting(method="noise")
    optimizer = torch.optim.SGD(setting.layer.parameters(), lr=0.1)
    setting.criterion.follow(optimizer)
    hook: Any = setting.criterion.terms[0].hook
    values = []
    for _ in range(3):
        for _ in range(2):
            values.append(hook.value)
            setting.loss().backward()
        optimizer.step()
    assert values[:2] == [0.0, 0.0] and values[2] == values[3] > 0 and values[4] == values[5] > values[3]


def test_copies_state_and_lifetime() -> None:
    setting = Setting()
    optimizer = torch.optim.SGD(setting.layer.parameters(), lr=0.1)
    setting.criterion.follow(optimizer)
    setting.loss().backward()
    optimizer.step()
    model = nn.ModuleList([setting.layer])
    model.criterion = setting.criterion
    copied: Any = copy.deepcopy(model)
    copied.criterion(copied[0](setting.x), setting.y)
    assert copied.criterion.step == 2 and setting.criterion.step == 1
    other = Setting()
    other.criterion.load_state_dict(setting.criterion.state_dict())
    assert other.criterion.step == 1
    alive = weakref.ref(setting.criterion)
    del setting, model, copied
    gc.collect()
    assert alive() is None
    optimizer.step()
