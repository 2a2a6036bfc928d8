"""Hutchinson's estimator of Tr(A Lambda): random directions d with E[d d^T] = A, and their products.

No root of a matrix is differentiated: with G = W W^T = R R^T, R is W itself, or Cholesky's factor where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fam_ext.hessian.products import LayerHessian, matvec


def rademacher(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal probability, of the device and dtype of `like`."""
    bits = torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


def probe_root(weight: Tensor, columns: int, weighted: bool) -> Tensor:
    """What `columns` columns of signs are multiplied with: :func:`gram_root`, or for the trace the identity."""
    if weighted:
        return gram_root(weight, columns)
    return torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype).expand(len(weight), -1, -1)


def gram_root(weight: Tensor, columns: int) -> Tensor:
    """R with R R^T = W W^T for every group, (groups, n, r), to be multiplied with `columns` columns.

    W itself, or the Gram matrix's Cholesky factor where that makes fewer operations. Cholesky needs W to have full row rank with
    room to spare; otherwise it is W, which is always right.
    """
    _, neurons, fan_in = weight.shape
    # products of the columns with W; or the Gram matrix, its factor with the factor's derivative, and products with that
    if columns * fan_in <= neurons * fan_in + 4 * neurons**2 + columns * neurons:
        return weight
    gram = weight @ weight.transpose(1, 2)
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.detach().diagonal(dim1=1, dim2=2)
    # of a pivot at eps^(1/2) all digits are rounding, and its derivative is divided by it
    floor = torch.finfo(weight.dtype).eps ** 0.25 * diagonal.amax(1)
    safe = (info == 0) & (diagonal.amin(1) > floor)
    return factor if bool(safe.all()) else weight  # the one number of a step that the host waits for


class Probe(NamedTuple):
    """A layer's share of an estimate: random directions (K, *shape), and what their products are to be multiplied with."""

    hessian: LayerHessian
    directions: Tensor
    scale: Tensor | None


def draw(
    hessian: LayerHessian, level: str, weighted: bool, probes: int, generator: torch.Generator, backend: str
) -> Probe:
    """`probes` random directions d with E[scale d d^T] = A where rows or samples that `level` holds independent do not meet."""
    layer = hessian.layer
    weight = layer.canonical(hessian.weight).to(hessian.dtype)
    groups, neurons, fan_in = weight.shape
    rows = prod(hessian.calls[0].shape) // (groups * neurons) if level == "rows" else fan_in
    root = probe_root(weight, probes * rows, weighted)
    rank = root.shape[2]
    if level == "rows":
        shape = list(hessian.calls[0].shape)
        shape[layer.class_dim] = groups * rank
        noise = rademacher((probes, *shape), weight, generator)
        directions = torch.stack([layer.mix(root, e) for e in noise])
        return Probe(
            hessian, directions, layer.spread(layer.norms(hessian.features, backend), groups * neurons)
        )
    if level == "samples":
        samples = layer.samples(hessian.calls[0].shape)
        noise = rademacher((probes, samples, groups, rank, fan_in), weight, generator)
        return Probe(hessian, torch.stack([_apply_each(hessian, root, e) for e in noise]), None)
    noise = rademacher((probes, groups, rank, fan_in), weight, generator)
    return Probe(hessian, torch.stack([hessian.direction(root @ e) for e in noise]), None)


def hutchinson(probes: Sequence[Probe]) -> list[Tensor]:
    """Summands of the estimates of Tr(A Lambda) of every layer, (K, *z's shape or the weight's), with the same products for all.

    One product is enough for all layers: directions of different layers are independent with mean zero, and
    so their mixed terms are.
    """
    products = matvec([probe.hessian for probe in probes], [probe.directions for probe in probes])
    result = []
    for probe, product in zip(probes, products, strict=True):
        summands = probe.directions * product
        if probe.hessian.detached:  # both factors d still move: the gradient is twice that of the first
            summands = 2 * summands - summands.detach()
        result.append(summands if probe.scale is None else probe.scale * summands)
    return result


def _apply_each(hessian: LayerHessian, root: Tensor, noise: Tensor) -> Tensor:
    shape = hessian.weight.shape
    weights = torch.stack([hessian.layer.to_module(root @ e, shape) for e in noise])
    features = hessian.features
    return hessian.layer.apply_each(features, weights.to(features.dtype))
