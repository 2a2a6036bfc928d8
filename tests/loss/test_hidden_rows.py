"""Rows that indexing between a layer and the loss takes from one sample or another, which no shape tells."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fam_ext import RelativeFlatness, UnsupportedError

pytestmark = pytest.mark.on_devices


@pytest.mark.parametrize("take", ["mask", "index", "index_select", "masked_select"])
def test_rows_that_indexing_takes_from_other_samples_are_seen(take: str) -> None:
    """Two rows of each of four samples at first, then as many rows of other samples: no shape and no node tells."""
    hidden, head = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    x = torch.randn(4, 4, 3).double()

    def loss(counts: tuple[int, ...]) -> Tensor:
        mask = torch.arange(4) < torch.tensor(counts)[:, None]
        z = head(torch.tanh(hidden(x)))
        if take == "mask":
            rows = z[mask]
        elif take == "index":
            rows = z.flatten(0, 1)[mask.flatten().nonzero()[:, 0]]
        elif take == "index_select":
            rows = z.flatten(0, 1).index_select(0, mask.flatten().nonzero()[:, 0])
        else:
            rows = z.masked_select(mask[:, :, None]).reshape(-1, 3)
        value: Tensor = kappa(rows, torch.zeros(8, dtype=torch.int64))
        return value

    kappa = RelativeFlatness(nn.CrossEntropyLoss(), hidden, curvature="ggn")
    for _ in range(3):
        assert loss((2, 2, 2, 2)) > 0
    for wrong in ((4, 2, 1, 1), (4, 4, 0, 0)):
        with pytest.raises(UnsupportedError, match="samples interact"):
            loss(wrong)
    assert loss((2, 2, 2, 2)) > 0
