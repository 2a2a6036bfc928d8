"""The accumulation rule, and autocast that does not reach it."""

from __future__ import annotations

import pytest
import torch

from fam_ext._dtypes import accumulation_dtype, without_autocast


@pytest.mark.parametrize("low", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_float64_where_any_tensor_is(low: torch.dtype) -> None:
    small, wide = torch.ones(1, dtype=low), torch.ones(1, dtype=torch.float64)
    assert (
        accumulation_dtype(small) == accumulation_dtype(small, None) == accumulation_dtype() == torch.float32
    )
    for tensors in ((small, wide), (wide, small), (None, wide), (wide,)):
        assert accumulation_dtype(*tensors) == torch.float64


def test_autocast_is_off_inside_and_on_again_outside() -> None:
    x = torch.ones(2, 2, device="cpu")
    with torch.autocast("cpu"):
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with without_autocast(x.to("meta")):  # of which torch knows no autocast
        assert (x @ x).dtype == torch.float32
