"""Random calls of FAMLoss and RelativeFlatness."""

from __future__ import annotations

import fuzz_criteria
from fuzz_run import check


def test_head() -> None:
    check("head", fuzz_criteria.head, 130)


def test_hidden() -> None:
    check("hidden", fuzz_criteria.hidden, 110)
