"""The eigenvalue measures without SciPy. Their values are tested in tests/loss/test_hidden.py."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from fam_ext import RelativeFlatness, UnsupportedError


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 32 unknowns need its solver, and the error says how to get it; fewer do not."""
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    for width, refused in ((4, False), (9, True)):
        net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        criterion = RelativeFlatness(nn.CrossEntropyLoss(), net[0], measure="layerwise_eigenvalue")
        z, y = net(torch.randn(5, 4)), torch.arange(5) % 3
        if refused:
            with pytest.raises(UnsupportedError, match="pip install scipy"):
                criterion(z, y)
        else:
            assert criterion(z, y).isfinite()
