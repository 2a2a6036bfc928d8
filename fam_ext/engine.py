"""Relative flatness of any layer under any twice differentiable loss, from Hessian products (fam_ext.curvature).

With G = W W^T per group, Lambda = d^2 L / dz^2 and A = (phi phi^T) kron G, kappa = sum_{i,j} Tr(A_ij Lambda_ij) over samples.
How far rows of z interact after the layer decides what is cheapest; `interaction` finds out with one product:

- "rows": Lambda is block-diagonal in rows (samples x positions): O exact products, or independent probes for every row;
- "samples": block-diagonal in samples: independent probes for every sample;
- "batch": anything may interact (batch_norm in training, contrastive losses, several calls): one probe for all.

No root of a matrix is differentiated: exact sums use the basis, sum_k <A e_k, Lambda e_k>, and probes use G = R R^T with R = W,
or with Cholesky's factor where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fam_ext.curvature import Curvature, apply
from fam_ext.layers import LayerMap

LEVELS = ("rows", "samples", "batch")


class Estimate(NamedTuple):
    """kappa (0-d, or by sample), and the standard error of the estimate over probes (None: exact, or a single probe)."""

    value: Tensor
    standard_error: Tensor | None

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of independent estimates along the first dimension."""
        several = len(values) > 1
        return cls(values.mean(0), values.detach().std(0) / len(values) ** 0.5 if several else None)

    @classmethod
    def total(cls, terms: Sequence[Estimate]) -> Estimate:
        """The sum of independent estimates."""
        if len(terms) == 1:
            return terms[0]
        value: Any = sum(term.value for term in terms)
        errors = [term.standard_error for term in terms if term.standard_error is not None]
        return cls(value, torch.stack(errors).square().sum(0).sqrt() if errors else None)


def interaction(curvature: Curvature, generator: torch.Generator) -> str | None:
    """How far rows of z interact after the layer: "rows", "samples" or "batch".

    A random direction on half of the rows (then: of the samples) must leave the products at the others at exactly zero. None
    where all products are zero, or there are no rows: such numbers tell nothing.
    """
    if curvature.on_weight:
        return "batch"
    call, layer = curvature.calls[0], curvature.layer
    samples, positions = layer.samples(call.shape), layer.positions(call.shape)
    row_shape = list(call.shape)
    row_shape[layer.class_dim] = 1
    if samples * positions == 0:
        return None
    direction = torch.randn(call.shape, generator=generator, device=curvature.device, dtype=curvature.dtype)
    for level, count in (("rows", samples * positions), ("samples", samples)):
        if count == 1:
            return level
        chosen = torch.zeros(count, dtype=torch.bool, device=curvature.device)
        order = torch.randperm(count, generator=generator, device=curvature.device)
        chosen[order[: (count + 1) // 2]] = True
        mask = chosen.repeat_interleave(samples * positions // count).reshape(row_shape)
        products = curvature.apply((direction * mask).unsqueeze(0))[0].detach()
        if not bool((products * ~mask != 0).any()):  # NaN counts as reached
            return level if bool((products != 0).any()) else None
    return "batch"


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
    room to spare; otherwise W serves, which is always right.
    """
    _, neurons, fan_in = weight.shape
    # products of the columns with W; or the Gram matrix, its factor with the factor's derivative, and products with that
    if columns * fan_in <= neurons * fan_in + 4 * neurons**2 + columns * neurons:
        return weight
    gram = weight @ weight.transpose(1, 2)
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.detach().diagonal(dim1=1, dim2=2)
    floor = torch.finfo(weight.dtype).eps ** 0.5 * diagonal.amax(1)
    safe = (info == 0) & (diagonal.amin(1) > floor)
    return factor if bool(safe.all()) else weight  # the one number of a step that the host waits for


def exact_products(layer: LayerMap, curvature: Curvature, level: str) -> int:
    """How many products the exact value takes."""
    groups, neurons, fan_in = layer.canonical(curvature.weight).shape
    outputs = groups * neurons
    if level == "rows":
        return outputs
    if level == "samples" and layer.linear:
        return outputs * min(layer.positions(curvature.calls[0].shape), fan_in)
    return outputs * fan_in


def exact(curvature: Curvature, level: str, weighted: bool, chunk: int, backend: str) -> Iterator[Tensor]:
    """Summands of Tr(A Lambda), each the sum over a chunk of products, of z's shape (of the weight's for several calls).

    `weighted`: A = K kron G as in kappa; else K kron 1, for the trace of H.
    """
    layer = curvature.layer
    weight = layer.canonical(curvature.weight).to(curvature.dtype)
    groups, neurons, fan_in = weight.shape
    outputs = groups * neurons
    gram = weight @ weight.transpose(1, 2) if weighted else None

    if level == "rows":
        shape = curvature.calls[0].shape
        norms = layer.spread(layer.norms(curvature.features, backend), outputs)
        columns = _columns(gram, outputs, weight)
        for begin in range(0, outputs, chunk):
            entries = range(begin, min(begin + chunk, outputs))
            products = curvature.apply(_one_hot(curvature, shape, layer.class_dim, entries))
            column = columns[:, begin : begin + chunk].T  # (K, O)
            column = column.reshape(
                len(entries), *(1,) * (len(shape) - 1 - layer.spatial), -1, *(1,) * layer.spatial
            )
            yield norms * (column * products).sum(0)
        return
    if level == "samples" and layer.linear and layer.positions(curvature.calls[0].shape) < fan_in:
        yield from _by_position(curvature, gram, chunk)
        return
    for begin in range(0, outputs * fan_in, chunk):
        index = torch.arange(begin, min(begin + chunk, outputs * fan_in), device=curvature.device)
        basis = torch.zeros(len(index), outputs * fan_in, device=curvature.device, dtype=curvature.dtype)
        basis[torch.arange(len(index)), index] = 1
        units = basis.reshape(-1, groups, neurons, fan_in)
        directions = torch.stack([curvature.direction(unit) for unit in units])
        products = curvature.apply(directions)
        mixed = (
            directions if gram is None else torch.stack([curvature.direction(gram @ unit) for unit in units])
        )
        yield (mixed * products).sum(0)


def _columns(gram: Tensor | None, outputs: int, like: Tensor) -> Tensor:
    """The groups' Gram matrices as one block-diagonal matrix, (O, O); the identity without."""
    if gram is None:
        return torch.eye(outputs, device=like.device, dtype=like.dtype)
    if len(gram) == 1:
        return gram[0]
    blocks: Tensor = torch.block_diag(*gram)  # type: ignore[no-untyped-call]
    return blocks


def _one_hot(curvature: Curvature, shape: tuple[int, ...], dim: int, entries: range) -> Tensor:
    basis = torch.zeros(len(entries), *shape, device=curvature.device, dtype=curvature.dtype)
    for k, entry in enumerate(entries):
        basis[k].select(dim, entry).fill_(1)
    return basis


def _by_position(curvature: Curvature, gram: Tensor | None, chunk: int) -> Iterator[Tensor]:
    """Samples of few positions of a linear layer: e_(q, s) for all samples at once, weighted by <phi_q, phi_q'>."""
    call = curvature.calls[0]
    samples, outputs = curvature.layer.samples(call.shape), call.shape[-1]
    phi = curvature.features.reshape(samples, -1, curvature.features.shape[-1])
    kernel = phi @ phi.transpose(1, 2)  # (B, Q, Q)
    positions = kernel.shape[1]
    columns = _columns(gram, outputs, phi)
    for begin in range(0, positions * outputs, chunk):
        index = torch.arange(begin, min(begin + chunk, positions * outputs), device=curvature.device)
        q, s = index // outputs, index % outputs
        basis = torch.zeros(
            len(index), samples, positions, outputs, device=curvature.device, dtype=curvature.dtype
        )
        basis[torch.arange(len(index)), :, q, s] = 1
        products = curvature.apply(basis.reshape(len(index), *call.shape)).reshape(basis.shape)
        along = kernel[:, :, q].permute(2, 0, 1).unsqueeze(-1)  # (K, B, Q, 1)
        yield (along * columns[:, s].T[:, None, None] * products).sum(0).reshape(call.shape)


class Probe(NamedTuple):
    """A layer's share of an estimate: random directions (K, *shape), and what their products are to be multiplied with."""

    curvature: Curvature
    directions: Tensor
    scale: Tensor | None


def draw(
    curvature: Curvature, level: str, weighted: bool, probes: int, generator: torch.Generator, backend: str
) -> Probe:
    """`probes` random directions d with E[scale d d^T] = A where rows or samples that `level` holds independent do not meet."""
    layer = curvature.layer
    weight = layer.canonical(curvature.weight).to(curvature.dtype)
    groups, neurons, fan_in = weight.shape
    rows = prod(curvature.calls[0].shape) // (groups * neurons) if level == "rows" else fan_in
    root = probe_root(weight, probes * rows, weighted)
    rank = root.shape[2]
    if level == "rows":
        shape = list(curvature.calls[0].shape)
        shape[layer.class_dim] = groups * rank
        noise = rademacher((probes, *shape), weight, generator)
        directions = torch.stack([layer.mix(root, e) for e in noise])
        return Probe(
            curvature, directions, layer.spread(layer.norms(curvature.features, backend), groups * neurons)
        )
    if level == "samples":
        samples = layer.samples(curvature.calls[0].shape)
        noise = rademacher((probes, samples, groups, rank, fan_in), weight, generator)
        return Probe(curvature, torch.stack([_apply_each(curvature, root, e) for e in noise]), None)
    noise = rademacher((probes, groups, rank, fan_in), weight, generator)
    return Probe(curvature, torch.stack([curvature.direction(root @ e) for e in noise]), None)


def hutchinson(probes: Sequence[Probe]) -> list[Tensor]:
    """Summands of the estimates of Tr(A Lambda) of every layer, (K, *z's shape or the weight's), with the same products for all.

    One product serves all layers: directions of different layers are independent with mean zero, and so their mixed terms are.
    """
    products = apply([probe.curvature for probe in probes], [probe.directions for probe in probes])
    result = []
    for probe, product in zip(probes, products, strict=True):
        summands = probe.directions * product
        if probe.curvature.hold:  # both factors d still move: the gradient is twice that of the first
            summands = 2 * summands - summands.detach()
        result.append(summands if probe.scale is None else probe.scale * summands)
    return result


def _apply_each(curvature: Curvature, root: Tensor, noise: Tensor) -> Tensor:
    shape = curvature.weight.shape
    weights = torch.stack([curvature.layer.to_module(root @ e, shape) for e in noise])
    features = curvature.features
    return curvature.layer.apply_each(features, weights.to(features.dtype))
