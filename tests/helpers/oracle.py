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


def log_softmax(logits: Tensor) -> Tensor:
    """log p of (N, O, *positions), by the likeliest class y and rest = sum over s != y of exp(z_s - z_y).

    torch's log(1 + rest) has four digits in float64 where rest is 1e-12, and so has 1 - p_y.
    """
    y = logits.detach().argmax(1, keepdim=True)
    top = logits.gather(1, y)
    zero = (top - top).detach()  # or NaN
    gap = (logits - top).scatter(1, y, zero)  # without the gradient 1 - 1
    rest = gap.exp().scatter(1, y, zero).sum(1, keepdim=True)
    return gap - rest.log1p()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """As torch defines it, with every digit of a small loss."""
    classes, positions = logits.shape[1], (1,) * (logits.dim() - 2)
    weight = logits.new_ones(classes) if class_weight is None else class_weight.to(logits.dtype)
    by_class = weight.reshape(-1, *positions)
    if target.is_floating_point():
        share = (1 - label_smoothing) * target.to(logits.dtype) + label_smoothing / classes
        rows = -(share * by_class * log_softmax(logits)).sum(1)
        total: Tensor | int = rows.numel()
    else:
        valid = target != ignore_index
        index = torch.where(valid, target, 0)
        log_p = log_softmax(torch.where(valid.unsqueeze(1), logits, 0.0))
        rows = -weight[index] * log_p.gather(1, index.unsqueeze(1)).squeeze(1)
        if label_smoothing:
            rows = (1 - label_smoothing) * rows - label_smoothing / classes * (by_class * log_p).sum(1)
        rows = torch.where(valid, rows, 0.0)
        total = weight[index].mul(valid).sum()
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / total
