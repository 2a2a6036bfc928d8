"""Hidden layers in a step whose numbers are not finite, and in the steps after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fam_ext import FAMLoss


@pytest.mark.parametrize(
    "options",
    [
        {"method": "exact"},
        {"method": "hutchinson"},
        {"curvature": "ggn"},
        {"curvature": "fisher"},
        {"curvature": "empirical_fisher"},
        {"measure": "layerwise_eigenvalue"},
        {"method": "noise"},
    ],
    ids=lambda options: next(iter(options.values())),
)
@pytest.mark.parametrize("bad_steps", [(0,), (1, 2)])
def test_a_batch_of_nan_gives_nan_and_leaves_the_next_step_alone(
    options: dict[str, Any], bad_steps: tuple[int, ...]
) -> None:
    """What a loss scaler skips: neither an error, nor another coupling of the samples from then on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    criterion = FAMLoss(
        nn.CrossEntropyLoss(), model[0], 0.1, generator=torch.Generator().manual_seed(1), **options
    )
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    for step in range(4):
        bad = step in bad_steps
        loss = criterion(model(x * torch.nan if bad else x), y)
        assert bool(loss.isnan()) is bad
        loss.backward()
        assert bool(model[0].weight.grad.isnan().any()) is bad
        model.zero_grad()
    if "measure" not in options and options.get("method") != "noise":
        assert criterion.plan.level == ("rows" if "method" in options else "samples")
