"""Lists of draws whose mean over all is exactly what the expectation is, for sums of products of two entries of a, and of b.

Columns of a Hadamard matrix stand for independent signs: the mean of the product of two different ones is 0. With every row's
negative beside it odd powers of a vanish as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fam_ext.hessian import noise_draws
from fam_ext.hessian.noise_draws import Draw
from fam_ext.layers.linear_map import LinearMap


def signs(columns: int, negatives: bool = False) -> Tensor:
    """(N, columns) of +-1."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < columns:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    h = h[:, :columns]
    return torch.cat([h, -h]) if negatives else h


def draws(layer: LinearMap, features: Tensor, shared: bool = False, rank_one: bool = False) -> Iterator[Draw]:
    """All draws of a design for these features; float64."""
    groups, channels = layer.groups, layer.inputs // layer.groups
    samples = 1 if shared else layer.samples(features.shape)
    if noise_draws.one_row(layer, features) and not shared and not rank_one:
        for left in signs(samples * channels, negatives=True):
            yield Draw(left.reshape(samples, 1, channels), None, None)
        return
    lefts = samples if noise_draws.on_input(layer) else min(samples, noise_draws.DIFFERENT)
    of_left = signs(lefts * groups * layer.fan_in, negatives=True).reshape(-1, lefts, groups, layer.fan_in)
    of_channels = signs(samples * groups * channels, negatives=rank_one).reshape(
        -1, samples, groups, channels
    )
    if noise_draws.on_input(layer):
        places: list[Tensor | None] = [None]
    else:
        kernel = layer.module.kernel_size
        size = math.prod(kernel)
        every = size**0.5 * torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, 1, *kernel)
        places = [one.expand(samples, groups, 1, *kernel) for one in every]
    for place in places:
        for right in of_channels:
            for left in of_left:
                yield Draw(left, right, place)
