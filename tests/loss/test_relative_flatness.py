"""RelativeFlatness: the term by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import batch, network
from torch import nn

from fam_ext import RelativeFlatness

pytestmark = pytest.mark.on_devices


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.MSELoss])
def test_the_flatness_of_each_sample(index: int, criterion: Any) -> None:
    """per_sample=True with reduction="sum" gives every sample's own kappa; with "mean" its share of the batch's."""
    net, (x, y) = network().double(), batch()
    x, y = x.double(), y if criterion is nn.CrossEntropyLoss else torch.randn(8, 4, dtype=torch.float64)
    own = RelativeFlatness(criterion(), net[index], method="auto" if index else "exact")
    each = torch.stack([own(net(x[i : i + 1]), y[i : i + 1]) for i in range(8)])
    share = own(net(x), y, per_sample=True)
    total = own(net(x), y)
    own.detach()
    summed = RelativeFlatness(criterion(reduction="sum"), net[index], method="auto" if index else "exact")
    scale = 1 if criterion is nn.CrossEntropyLoss else 4  # MSE's mean is over a sample's outputs too
    torch.testing.assert_close(summed(net(x), y, per_sample=True), scale * each, rtol=1e-9, atol=0)
    torch.testing.assert_close(8 * share, each, rtol=1e-9, atol=0)
    torch.testing.assert_close(share.sum(), total, rtol=1e-9, atol=0)


def test_per_sample_is_true_or_false() -> None:
    net, (x, y) = network(), batch()
    with pytest.raises(TypeError, match="RelativeFlatness: per_sample must be True or False, got 'yes'"):
        RelativeFlatness(nn.CrossEntropyLoss(), net[2])(net(x), y, per_sample="yes")
