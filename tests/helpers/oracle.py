"""What the tests of heads and losses share: kappa from the full float64 Hessian, as a function of the model's parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from full_hessian import from_traces
from torch import Tensor


def kappa(
    loss: Callable[[Tensor], Tensor],
    weight: Tensor,
    measure: str = "neuronwise",
    groups: int = 1,
    norm_power: int = 2,
) -> Tensor:
    """kappa by autograd's second derivatives, one weight at a time, differentiable itself. `loss` maps a weight to a scalar."""
    shape, (rows, fan_in) = weight.shape, weight.flatten(1).shape
    point = weight.flatten(1).clone()
    (grad,) = torch.autograd.grad(loss(point.reshape(shape)), point, create_graph=True)
    traces = torch.zeros(rows, rows, dtype=weight.dtype)
    for s in range(rows):
        for t in range(fan_in):
            if not grad.requires_grad:
                continue
            (row,) = torch.autograd.grad(grad[s, t], point, create_graph=True, allow_unused=True)
            if row is not None:
                unit = torch.zeros(rows, rows, dtype=weight.dtype)
                unit[s] = 1
                traces = traces + unit * row[:, t]
    return from_traces(traces, weight.flatten(1), measure, groups, norm_power)


def softmax_trace(logits: Tensor, weight: Tensor) -> Tensor:
    """1/2 sum_st p_s p_t |w_s - w_t|^2, or for many classes sum_s p_s |w_s - u|^2: float64 has digits to spare."""
    p, w = logits.movedim(1, -1).softmax(-1), weight - weight.detach().mean(0)
    if len(w) <= 100:
        return 0.5 * ((p @ (w[:, None] - w).square().sum(-1)) * p).sum(-1)
    return (p * (w - (p @ w).unsqueeze(-2)).square().sum(-1)).sum(-1)
