"""Random calls of FAMLoss and RelativeFlatness: positive forms, noise, shares by sample, several layers."""

from __future__ import annotations

import fuzz_forms
import pytest
from fuzz_run import check

SHARES = {"positive": 40, "noise": 30, "per_sample": 25, "several": 10}


@pytest.mark.parametrize("name", SHARES)
def test_forms(name: str) -> None:
    check(name, getattr(fuzz_forms, name), SHARES[name])
