"""gram_trace over all problems of bench_gram_trace.py, up to 4096 positions: minutes, so only when asked for by name."""

from __future__ import annotations

from functools import partial

from bench_gram_trace import PROBLEMS, case, remark
from case import Build

OP = "positions"
SHARE = 0

__all__ = ["OP", "SHARE", "cases", "remark"]


def cases(quick: bool = False) -> list[Build]:
    return [partial(case, name) for name in (list(PROBLEMS)[:1] if quick else PROBLEMS)]
