"""Random calls of FlatnessNoise, measure, correlation and rescale."""

from __future__ import annotations

import fuzz_tools
import pytest
from fuzz_run import check

SHARES = {"flatness_noise": 60, "measure": 60, "correlation": 50, "rescale": 40}


@pytest.mark.parametrize("name", SHARES)
def test_tools(name: str) -> None:
    check(name, getattr(fuzz_tools, name), SHARES[name])
