"""Relative flatness from its definition, with the full layer Hessian in float64. For tests: O*I squared numbers are held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def layer_hessian(loss: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Hessian of `loss` with respect to one layer's weight, (O, I, O, I) with the trailing weight dimensions flattened."""
    w = weight.detach().double()
    rows = w.shape[0]
    hessian: Tensor = torch.func.hessian(loss)(w)
    return hessian.reshape(rows, w[0].numel(), rows, w[0].numel())


def relative_flatness(
    loss: Callable[[Tensor], Tensor],
    weight: Tensor,
    measure: str = "neuronwise",
    groups: int = 1,
    norm_power: int = 2,
) -> Tensor:
    """kappa = sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'}) and its siblings (Petzka et al. 2021, Definition 3), from the full Hessian.

    `loss` maps a float64 weight of the layer's shape to the scalar the criterion returns. With `groups` > 1 (grouped
    convolution) only neurons of one group are paired.
    """
    hessian = layer_hessian(loss, weight)
    traces = torch.einsum("aibi->ab", hessian)
    return from_traces(traces, weight.detach().double().flatten(1), measure, groups, norm_power)


def from_traces(traces: Tensor, w: Tensor, measure: str, groups: int = 1, norm_power: int = 2) -> Tensor:
    """A measure from Tr(H_{s,s'}), (O, O), and the weight's rows, (O, I); differentiable in both."""
    group = torch.arange(len(w)) // (len(w) // groups)
    gram = (w @ w.T) * (group[:, None] == group[None, :])
    trace: Tensor = traces.diagonal().sum()
    if measure == "neuronwise":
        return (gram * traces).sum()
    if measure == "layerwise":
        return trace * w.square().sum().pow(norm_power / 2)
    if measure == "trace":
        return trace
    raise ValueError(
        f"relative_flatness: measure must be 'neuronwise', 'layerwise' or 'trace', got {measure!r}"
    )
