"""Random calls of fam_ext.relative_flatness."""

from __future__ import annotations

import fuzz_losses
from fuzz_run import check


def test_relative_flatness() -> None:
    check("relative_flatness", fuzz_losses.relative_flatness, 200)
