"""Exponents of cost laws: least squares in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(p, standard error) of cost = a size^p, fitted to logarithms; at least three different sizes, all positive."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in costs]
    if len(x) != len(y) or len(set(x)) < 3:
        raise ValueError(
            f"exponent: three different sizes with a cost each are needed, got {sizes} and {costs}"
        )
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((v - mean_x) ** 2 for v in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(residual / (len(x) - 2) / spread)


def larger_half(sizes: Sequence[float], costs: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points of the larger sizes, at least three: where the work outweighs what a call costs at any size."""
    kept = max(3, (len(sizes) + 1) // 2)
    pairs = sorted(zip(sizes, costs, strict=True))[-kept:]
    return [a for a, _ in pairs], [b for _, b in pairs]
