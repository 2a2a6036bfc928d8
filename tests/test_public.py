"""The public names: what `dir(fam_ext)` shows, where types come from, and the version's one source."""

from __future__ import annotations

import torch
from torch import nn

import fam_ext
from fam_ext import FAMLoss, typing


def test_dir_shows_the_public_names_alone() -> None:
    assert set(dir(fam_ext)) == set(fam_ext.__all__)
    assert all(hasattr(fam_ext, name) for name in fam_ext.__all__)


def test_types_that_users_meet() -> None:
    layer = nn.Linear(3, 2)
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.1)
    criterion(layer(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0]))
    assert isinstance(criterion.last, typing.StepRecord) and isinstance(criterion.plan, typing.Plan)
    assert isinstance(fam_ext.info(), typing.Info)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))]
    report = fam_ext.measure(nn.Sequential(layer), batches, None, nn.CrossEntropyLoss(), progress=False)
    assert isinstance(report, typing.Report)
