"""Factors of the criterion's Hessian: vectors u with sum u u^T that Hessian, exactly, in the mean, or from the labels."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype
from fam_ext.hessian import label_draw
from fam_ext.hessian.hutchinson import rademacher
from fam_ext.loss_hessians import BinaryCrossEntropy, CrossEntropy, LossHessian
from fam_ext.ops.row_coefficients import clear_rows


def output_factors(loss_hessian: LossHessian, outputs: Tensor, samples: int) -> Iterator[Tensor]:
    """u_k, each of the shape of `outputs`, with sum_k u_k u_k^T the criterion's Hessian within every sample.

    Cross-entropy: sqrt(c p_k) (e_k - p); elementwise losses: sqrt(h_k) e_k. A sample's rows (positions) take turns: one factor
    for every row and class.
    """
    if isinstance(loss_hessian, CrossEntropy):
        dim, log_p, root = _softmax(loss_hessian, outputs)
        p = log_p.exp()
        for k in range(outputs.shape[dim]):
            unit = torch.zeros_like(p)
            unit.select(dim, k).fill_(1)
            half = root * (0.5 * log_p.narrow(dim, k, 1)).exp()
            yield from _row_by_row(half * (unit - p), samples, dim)
        return
    yield from _row_by_row(_root(loss_hessian.diagonal(outputs)), samples, None)


def _row_by_row(factor: Tensor, samples: int, keep: int | None) -> Iterator[Tensor]:
    """`factor` restricted to one of every sample's rows at a time; dimension `keep` is whole in a row."""
    shape = list(factor.shape)
    if keep is not None:
        shape[keep] = 1
    turns = prod(shape) // max(samples, 1)
    numbers = torch.arange(prod(shape), device=factor.device).reshape(shape) % max(turns, 1)
    for row in range(turns):
        mask = numbers == row
        yield torch.where(mask, factor, 0.0)


def sampled_factors(
    loss_hessian: LossHessian, outputs: Tensor, probes: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Random u with E[u u^T] the criterion's Hessian over all rows, elements and positions together.

    Cross-entropy: sqrt(c p_y / q_y) (e_y - p) times a random sign, with y drawn from q_y ~ p_y |e_y - p|^2; elementwise: sqrt(h)
    times a random sign. Labels drawn from p itself would have the same mean: but nearly all draws of a confident row are its
    likely label, whose factor is almost zero, and a rare one is huge. Factors of labels from q have one length, the square root
    of the Hessian's trace (importance sampling; Kahn and Marshall 1953). Rows are independent and have mean zero, so cross terms
    vanish in the mean. Derivatives are right in the mean too: q is held constant, p_y is not.
    """
    if not isinstance(loss_hessian, CrossEntropy):
        h = _root(loss_hessian.diagonal(outputs))
        for _ in range(probes):
            yield h * rademacher(h.shape, h, generator)
        return
    dim, z, c = _logits(loss_hessian, outputs)
    drawn = label_draw.factors(z, c, dim)
    rows = [size for d, size in enumerate(z.shape) if d != dim]
    for _ in range(probes):
        share = torch.rand((*rows, 1), generator=generator, device=z.device, dtype=z.dtype)
        yield drawn(share, rademacher(share.shape, share, generator))


def empirical_factors(
    loss_hessian: LossHessian, outputs: Tensor, samples: int, probes: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """sqrt(c) dl/dz of the batch's own labels: the matrix sum c (dl/dz)(dl/dz)^T over the terms l of the loss.

    Where a sample has several terms (positions, elements), each draw gives them random signs, so that their products vanish in
    the mean; else one factor is exact.
    """
    classes: int | None = None  # their dimension: one term for all of them
    target = loss_hessian.target
    if isinstance(loss_hessian, CrossEntropy) and target is not None and not target.is_floating_point():
        yield from _of_own_labels(loss_hessian, outputs, target, samples, probes, generator)
        return
    if isinstance(loss_hessian, CrossEntropy):
        classes, log_p, root = _softmax(loss_hessian, outputs)
        residual = _residual(loss_hessian, log_p)  # softmax and log_softmax of it are those of the outputs
    else:  # an elementwise loss: every element has the same coefficient
        residual = _residual(loss_hessian, outputs)
        total = float(loss_hessian.denominator(outputs)) if loss_hessian.reduction == "mean" else 1.0
        root = residual.new_full((), 1.0 / max(total, 1.0)).sqrt()
    weighted = root * residual
    terms = [1 if d == classes else size for d, size in enumerate(outputs.shape)]
    if prod(terms) <= samples:
        yield weighted
        return
    for _ in range(probes):
        yield weighted * rademacher(terms, weighted, generator)


def _of_own_labels(
    loss_hessian: CrossEntropy,
    outputs: Tensor,
    target: Tensor,
    samples: int,
    probes: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """`empirical_factors` for class indices."""
    dim, z, c = _logits(loss_hessian, outputs)
    of_sign = label_draw.own_factors(z, c, dim, target.long())
    terms = [1 if d == dim else size for d, size in enumerate(z.shape)]
    if prod(terms) <= samples:
        yield of_sign(z.new_ones(()).expand(terms).movedim(dim, -1))
        return
    for _ in range(probes):
        yield of_sign(rademacher(terms, z, generator).movedim(dim, -1))


def _logits(loss_hessian: CrossEntropy, outputs: Tensor) -> tuple[int, Tensor, Tensor]:
    """The dimension of the classes, the logits in the dtype of sums, and c."""
    c = loss_hessian.coefficients(outputs)
    return 0 if outputs.dim() == 1 else 1, outputs.to(torch.promote_types(outputs.dtype, c.dtype)), c


def _softmax(loss_hessian: CrossEntropy, outputs: Tensor) -> tuple[int, Tensor, Tensor]:
    """The dimension of the classes, log p, and sqrt(c) beside it. An ignored row counts nothing, whatever it holds."""
    dim = 0 if outputs.dim() == 1 else 1
    c = loss_hessian.coefficients(outputs)
    z = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if not (z.is_cpu and bool((c != 0).all())):  # a pass over the outputs costs more than a look at c
        z = clear_rows(z, c, dim)
    return dim, torch.log_softmax(z, dim), _root(c).unsqueeze(dim)


def _root(x: Tensor) -> Tensor:
    """sqrt with a derivative of zero, not infinity, at zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _residual(loss_hessian: LossHessian, outputs: Tensor) -> Tensor:
    """dl/dz of every term l of the loss, without its coefficient, in the outputs' shape; for losses with a Fisher matrix.

    Cross-entropy: for class probabilities as targets.
    """
    target, z = loss_hessian.target, outputs.to(accumulation_dtype(outputs))
    assert target is not None
    if isinstance(loss_hessian, CrossEntropy):
        return torch.softmax(z, 0 if outputs.dim() == 1 else 1) - target
    if isinstance(loss_hessian, BinaryCrossEntropy):
        return torch.sigmoid(z) - target
    return torch.exp(z) - target
