"""Factors of softmax cross-entropy's Hessian from a label in every row: drawn, such that all labels' factors have one length, or
given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fam_ext.ops import backends
from fam_ext.ops.row_coefficients import clear_rows

_VANISHES = 1e-30  # a sum of weights below which a row has no curvature to speak of
_native: Any = backends.native_function("differentiable_factors")


def factors(z: Tensor, c: Tensor, dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (share, sign) that returns u = sign sqrt(c p_y / q_y) (e_y - p), of the shape of the logits z.

    Classes lie in dimension `dim` of z; c >= 0 is of the rows' shape, share in [0, 1) and sign of that and 1. Labels are those of
    `draw`. The mean of u u^T over uniform shares is c (diag(p) - p p^T), and its derivative that of the mean: q and the
    denominator of sqrt(p_y / p_y), which stands in u as well, are held constant. A row with c = 0 has zeros, whatever it holds.
    """
    if not _compiled(z, dim):
        return in_torch(z, c, dim)
    return lambda share, sign: _natively(z, c, dim, share, sign, None)


def own_factors(z: Tensor, c: Tensor, dim: int, label: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of sign, of the rows' shape and 1, that returns sign sqrt(c) (e_y - p) for labels y of the rows' shape."""
    if _compiled(z, dim):
        return lambda sign: _natively(z, c, dim, sign, sign, label)
    p = torch.softmax(clear_rows(z, c, dim), dim)
    valid = torch.where(c == 0, 0, label).unsqueeze(dim)  # an ignored row has any label
    residual = torch.zeros_like(p).scatter_(dim, valid, 1.0) - p
    root = c.detach().sqrt().unsqueeze(dim)
    return lambda sign: residual * (root * sign.movedim(-1, dim))


def _compiled(z: Tensor, dim: int) -> bool:
    return _native is not None and z.device.type == "cpu" and type(z) is Tensor and z.shape[dim] > 0


def _natively(z: Tensor, c: Tensor, dim: int, share: Tensor, sign: Tensor, label: Tensor | None) -> Tensor:
    rows = z.movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    numbers = [t.detach().to(z.dtype).reshape(-1).contiguous() for t in (c, share, sign)]
    u: Tensor = _native(flat, *numbers, None if label is None else label.reshape(-1).contiguous())
    return u.view(rows.shape).movedim(-1, dim)


def in_torch(z: Tensor, c: Tensor, dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    """`factors` in plain PyTorch."""
    log_p = torch.log_softmax(clear_rows(z, c, dim), dim)
    p = log_p.detach().exp()
    root = c.detach().sqrt().unsqueeze(dim)

    def drawn(share: Tensor, sign: Tensor) -> Tensor:
        label, stretch = draw(p.movedim(dim, -1), share)
        scale = root * (stretch * sign).movedim(-1, dim)
        u: Tensor = _Score.apply(log_p, p, label.movedim(-1, dim), scale, dim)  # type: ignore[no-untyped-call]
        return u

    return drawn


def draw(p: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Labels y from q_y ~ p_y |e_y - p|^2 and sqrt(p_y / q_y), both (..., 1), for probabilities p (..., O) without a graph.

    y is the first label at which the sum of these weights exceeds `share` (..., 1) of their total, so shares that are uniform
    on [0, 1) draw from q. A row without curvature has its most likely label and 1; one with NaN has NaN in place of the root.
    """
    top = p.argmax(-1, keepdim=True)
    others, likely = p.scatter(-1, top, 0.0), p.gather(-1, top)
    rest, squares = others.sum(-1, keepdim=True), others.square().sum(-1, keepdim=True)
    norm = squares + likely * likely
    of_top = rest * rest + squares  # |e_y - p|^2 without the difference 1 - p
    weights = others * (1 + norm - 2 * others)
    until = weights.scatter_(-1, top, likely * of_top).cumsum(-1)
    total = until[..., -1:]
    labels = torch.searchsorted(until, share.to(p.dtype) * total, right=True).clamp_(max=p.shape[-1] - 1)
    distance = torch.where(labels == top, of_top, 1 + norm - 2 * p.gather(-1, labels))
    vanishes = total <= _VANISHES
    return torch.where(vanishes, top, labels), torch.where(vanishes, 1.0, (total / distance).sqrt())


class _Score(torch.autograd.Function):
    """scale (e_y - p) sqrt(p_y / p_y), of which the denominator and scale are constants; for log p that is a log_softmax."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, p: Tensor, label: Tensor, scale: Tensor, dim: int) -> Tensor:
        others = p.scatter(dim, label, 0.0)
        score = (
            others.neg().scatter_(dim, label, others.sum(dim, keepdim=True)).mul_(scale)
        )  # 1 - p_y would cancel
        ctx.save_for_backward(p, label, scale, score)
        ctx.dim = dim
        return score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, label, scale, score = ctx.saved_tensors
        along = 0.5 * (grad * score).sum(ctx.dim, keepdim=True)  # by log p_y
        return (grad * p).mul_(-scale).scatter_add_(ctx.dim, label, along), None, None, None, None
