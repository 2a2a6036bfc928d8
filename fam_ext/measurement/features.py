"""The scale of a layer's input channels over a data set, for `measure(normalize_features=True)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext.layers.linear_map import LinearMap


def feature_scale(
    module: nn.Module, layer: LinearMap, go_through: Callable[[], None], dtype: torch.dtype
) -> Tensor:
    """One number for each input channel of `layer`, (channels,): what its features are divided by.

    The standard deviation over the data set; the absolute value of a channel that is constant (to the precision of its dtype)
    and not zero; 0 for a channel that is zero throughout. `go_through` calls the model with every batch.
    """
    moments = Moments()

    def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        # channels lie where neurons do
        moments.add(x.movedim(layer.class_dim, -1).reshape(-1, layer.inputs))

    handle = module.register_forward_pre_hook(collect, with_kwargs=True)
    try:
        with torch.no_grad():
            go_through()
    finally:
        handle.remove()
    return moments.scale().to(dtype)


class Moments:
    """Mean and sum of squared deviations of each column of rows that come in parts (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        self.eps = 0.0

    def add(self, rows: Tensor) -> None:
        """Take in some rows, (rows, columns)."""
        self.eps = max(self.eps, torch.finfo(rows.dtype).eps)
        if len(rows) == 0:
            return
        rows = rows.double()
        mean = rows.mean(0)
        total = self.count + len(rows)
        between = (mean - self.mean) ** 2 * (self.count * len(rows) / total)
        self.squares = self.squares + (rows - mean).square().sum(0) + between
        self.mean = self.mean + (mean - self.mean) * (len(rows) / total)
        self.count = total

    def scale(self) -> Tensor:
        """Standard deviation; where that is rounding only, the size of the mean."""
        deviation: Tensor = (self.squares / self.count) ** 0.5
        size: Tensor = self.mean.abs()
        return torch.where(deviation <= self.eps * size, size, deviation)  # nan stays nan
