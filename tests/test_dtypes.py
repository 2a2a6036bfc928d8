"""The accumulation rule."""

from __future__ import annotations

import pytest
import torch

from fam_ext._dtypes import accumulation_dtype


@pytest.mark.parametrize("low", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_float64_where_any_tensor_is(low: torch.dtype) -> None:
    small, wide = torch.ones(1, dtype=low), torch.ones(1, dtype=torch.float64)
    assert (
        accumulation_dtype(small) == accumulation_dtype(small, None) == accumulation_dtype() == torch.float32
    )
    for tensors in ((small, wide), (wide, small), (None, wide), (wide,)):
        assert accumulation_dtype(*tensors) == torch.float64
