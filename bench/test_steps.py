"""The steps of the quick cases under pytest-benchmark, which keeps its runs and compares them:

pytest bench --benchmark-only --benchmark-autosave, then pytest-benchmark compare --group-by=group,param. Steps run one after the
other here, so their ratios are less steady than those of bench/run.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import run


def steps() -> Iterator[Any]:
    """(operation, case, variant) of every step."""
    for op, module in run.benchmarks().items():
        for build in getattr(module, "cases", lambda quick: [])(True):
            case = build(False)
            for variant in case.variants:
                if variant.scale == 1:  # else its time is one of a part of the whole
                    yield pytest.param(op, case.label, variant, id=f"{op}: {case.label}: {variant.name}")


@pytest.mark.parametrize(("op", "label", "variant"), steps())
def test_step(benchmark: Any, op: str, label: str, variant: Any) -> None:
    """Checked first, as in bench/run.py."""
    benchmark.extra_info["error"] = variant.check()
    benchmark.group = f"{op}: {label}"
    benchmark(variant.step)
