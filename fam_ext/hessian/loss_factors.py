"""Factors of the criterion's Hessian: vectors u with sum u u^T that Hessian, exactly, in the mean, or from the labels."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from fam_ext.hessian.hutchinson import rademacher
from fam_ext.loss_hessians import CrossEntropy, LossHessian


def output_factors(loss_hessian: LossHessian, outputs: Tensor, samples: int) -> Iterator[Tensor]:
    """u_k, each of the shape of `outputs`, with sum_k u_k u_k^T the criterion's Hessian within every sample.

    Cross-entropy: sqrt(c p_k) (e_k - p); elementwise losses: sqrt(h_k) e_k. A sample's rows (positions) take turns: one factor
    for every row and class.
    """
    if isinstance(loss_hessian, CrossEntropy):
        dim = 0 if outputs.dim() == 1 else 1
        log_p = torch.log_softmax(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim)
        c = loss_hessian.coefficients(outputs).unsqueeze(dim)
        p = log_p.exp()
        for k in range(outputs.shape[dim]):
            unit = torch.zeros_like(p)
            unit.select(dim, k).fill_(1)
            half = _root(c) * (0.5 * log_p.narrow(dim, k, 1)).exp()
            # an ignored row takes no part even where its numbers are not finite
            yield from _row_by_row(torch.where(c == 0, 0.0, half * (unit - p)), samples, dim)
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

    Cross-entropy: sqrt(c) (e_y - p) with y drawn from p; elementwise: sqrt(h) times a random sign. Rows are independent and have
    mean zero, so cross terms vanish in the mean.
    """
    if not isinstance(loss_hessian, CrossEntropy):
        h = _root(loss_hessian.diagonal(outputs))
        for _ in range(probes):
            yield h * rademacher(h.shape, h, generator)
        return
    dim = 0 if outputs.dim() == 1 else 1
    p = torch.softmax(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim)
    root = _root(loss_hessian.coefficients(outputs)).unsqueeze(dim)
    rows = p.detach().movedim(dim, -1).reshape(-1, p.shape[dim])
    for _ in range(probes):
        drawn = torch.multinomial(rows, 1, generator=generator)
        one_hot = (
            torch.zeros_like(rows).scatter_(1, drawn, 1).reshape(p.movedim(dim, -1).shape).movedim(-1, dim)
        )
        yield torch.where(root == 0, 0.0, root * (one_hot - p))


def empirical_factors(
    loss_hessian: LossHessian, outputs: Tensor, samples: int, probes: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """sqrt(c) dl/dz of the batch's own labels: the matrix sum c (dl/dz)(dl/dz)^T over the terms l of the loss.

    Where a sample has several terms (positions, elements), each draw gives them random signs, so that their products vanish in
    the mean; else one factor is exact.
    """
    classes: int | None = None  # their dimension: one term for all of them
    residual = loss_hessian.residual(outputs)
    if isinstance(loss_hessian, CrossEntropy):
        classes = 0 if outputs.dim() == 1 else 1
        root = _root(loss_hessian.coefficients(outputs)).unsqueeze(classes)
    else:  # an elementwise loss: every element has the same coefficient
        root = residual.new_full((), 1.0 / float(loss_hessian.denominator(outputs))).sqrt()
    weighted = torch.where(
        root == 0, 0.0, root * residual
    )  # an ignored row counts nothing, whatever it holds
    terms = [1 if d == classes else size for d, size in enumerate(outputs.shape)]
    if prod(terms) <= samples:
        yield weighted
        return
    for _ in range(probes):
        yield weighted * rademacher(terms, weighted, generator)


def _root(x: Tensor) -> Tensor:
    """sqrt with a derivative of zero, not infinity, at zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
