"""linear_cross_entropy at the size of whole language models' heads: minutes and gigabytes, so only when asked for by name."""

from __future__ import annotations

from functools import partial

from bench_linear_cross_entropy import case
from case import Build

OP = "vocabulary"
SHARE = 0
SHAPES = ((4096, 512, 8192), (2048, 768, 50257), (512, 1024, 151936))  # rows N, fan-in I, vocabulary V
QUICK_SHAPES = ((128, 64, 4096),)

__all__ = ["OP", "SHARE", "cases"]


def cases(quick: bool = False) -> list[Build]:
    return [partial(case, shape) for shape in (QUICK_SHAPES if quick else SHAPES)]
