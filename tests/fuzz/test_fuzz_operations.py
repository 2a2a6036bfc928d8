"""Random calls of the operations in fam_ext.functional."""

from __future__ import annotations

import fuzz_operations
import fuzz_windows
import pytest
from fuzz_run import check

SHARES = {
    "softmax_trace": 250,
    "patch_sqnorm": 300,
    "head_cross_entropy": 300,
    "linear_cross_entropy": 250,
    "gram_trace": 250,
}


@pytest.mark.parametrize("name", SHARES)
def test_operations(name: str) -> None:
    module = fuzz_operations if hasattr(fuzz_operations, name) else fuzz_windows
    check(name, getattr(module, name), SHARES[name])
