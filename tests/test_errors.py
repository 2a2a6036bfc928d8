"""Exceptions: what users catch holds all the others, and each kind is raised by what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fam_ext
from fam_ext import errors


def test_one_kind_for_users() -> None:
    assert fam_ext.UnsupportedError is errors.UnsupportedError
    assert issubclass(errors.UnsupportedError, RuntimeError)
    for kind in (errors.NoClosedForm, errors.LayerNotCalled):
        assert issubclass(kind, errors.UnsupportedError)
    assert not issubclass(errors.NoClosedForm, errors.LayerNotCalled)


def test_who_raises_them() -> None:
    layer, y = nn.Linear(3, 2), torch.tensor([0, 1])
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), layer, 0.1, method="closed_form")
    with pytest.raises(errors.LayerNotCalled):
        criterion(torch.randn(2, 2, requires_grad=True), y)
    z = layer(torch.randn(2, 3))
    with pytest.raises(errors.NoClosedForm):
        criterion(2 * z, y)
