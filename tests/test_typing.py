"""The types that users meet are those of the objects they get."""

from __future__ import annotations

import torch
from torch import nn

import fam_ext
from fam_ext import typing


def test_every_name_is_there_and_is_what_users_get() -> None:
    assert all(hasattr(typing, name) for name in typing.__all__)
    layer = nn.Linear(3, 2)
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), layer, 0.1)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    criterion(layer(x), y)
    assert isinstance(criterion.last, typing.StepRecord) and isinstance(criterion.plan, typing.Plan)
    assert isinstance(fam_ext.info(), typing.Info)
    report = fam_ext.measure(layer, [(x, y)], layer, nn.CrossEntropyLoss(), progress=False)
    assert isinstance(report, typing.Report)
    schedule: typing.Schedule = fam_ext.schedules.Constant(0.5)
    assert schedule(3) == 0.5
