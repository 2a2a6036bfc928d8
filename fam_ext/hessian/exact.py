"""Exact Tr(A Lambda) of a layer, from Hessian products with a basis: sum_k <A e_k, Lambda e_k>.

Lambda = d^2 L / dz^2 and A = (phi phi^T) kron (W W^T) give kappa; A = (phi phi^T) kron 1 the trace of the weight's Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fam_ext.hessian.products import LayerHessian


def exact_products(hessian: LayerHessian, level: str) -> int:
    """How many products the exact value takes where rows are coupled as `level` says (fam_ext.hessian.coupling)."""
    layer, outputs = hessian.layer, int(hessian.layer.outputs)
    if level == "rows":
        return outputs
    if level == "samples" and layer.linear:
        return outputs * min(int(layer.positions(hessian.calls[0].shape)), int(layer.fan_in))
    return outputs * int(layer.fan_in)


def exact(hessian: LayerHessian, level: str, weighted: bool, chunk: int, backend: str) -> Iterator[Tensor]:
    """Summands of Tr(A Lambda), each the sum over a chunk of products, of z's shape (of the weight's for several calls).

    `weighted`: A = K kron G as in kappa; else K kron 1, for the trace of H.
    """
    layer = hessian.layer
    weight = layer.canonical(hessian.weight).to(hessian.dtype)
    groups, neurons, fan_in = weight.shape
    outputs = groups * neurons
    gram = weight @ weight.transpose(1, 2) if weighted else None

    if level == "rows":
        shape = hessian.calls[0].shape
        norms = layer.spread(layer.norms(hessian.features, backend), outputs)
        columns = _columns(gram, outputs, weight)
        for begin in range(0, outputs, chunk):
            entries = range(begin, min(begin + chunk, outputs))
            products = hessian.matvec(_one_hot(hessian, shape, layer.class_dim, entries))
            column = columns[:, begin : begin + chunk].T  # (K, O)
            column = column.reshape(
                len(entries), *(1,) * (len(shape) - 1 - layer.spatial), -1, *(1,) * layer.spatial
            )
            yield norms * (column * products).sum(0)
        return
    if level == "samples" and layer.linear and layer.positions(hessian.calls[0].shape) < fan_in:
        yield from _by_position(hessian, gram, chunk)
        return
    for begin in range(0, outputs * fan_in, chunk):
        index = torch.arange(begin, min(begin + chunk, outputs * fan_in), device=hessian.device)
        basis = torch.zeros(len(index), outputs * fan_in, device=hessian.device, dtype=hessian.dtype)
        basis[torch.arange(len(index)), index] = 1
        units = basis.reshape(-1, groups, neurons, fan_in)
        directions = torch.stack([hessian.direction(unit) for unit in units])
        products = hessian.matvec(directions)
        mixed = (
            directions if gram is None else torch.stack([hessian.direction(gram @ unit) for unit in units])
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


def _one_hot(hessian: LayerHessian, shape: tuple[int, ...], dim: int, entries: range) -> Tensor:
    basis = torch.zeros(len(entries), *shape, device=hessian.device, dtype=hessian.dtype)
    for k, entry in enumerate(entries):
        basis[k].select(dim, entry).fill_(1)
    return basis


def _by_position(hessian: LayerHessian, gram: Tensor | None, chunk: int) -> Iterator[Tensor]:
    """Samples of few positions of a linear layer: e_(q, s) for all samples at once, weighted by <phi_q, phi_q'>."""
    call = hessian.calls[0]
    samples, outputs = hessian.layer.samples(call.shape), call.shape[-1]
    phi = hessian.features.reshape(samples, -1, hessian.features.shape[-1])
    kernel = phi @ phi.transpose(1, 2)  # (B, Q, Q)
    positions = kernel.shape[1]
    columns = _columns(gram, outputs, phi)
    for begin in range(0, positions * outputs, chunk):
        index = torch.arange(begin, min(begin + chunk, positions * outputs), device=hessian.device)
        q, s = index // outputs, index % outputs
        basis = torch.zeros(
            len(index), samples, positions, outputs, device=hessian.device, dtype=hessian.dtype
        )
        basis[torch.arange(len(index)), :, q, s] = 1
        products = hessian.matvec(basis.reshape(len(index), *call.shape)).reshape(basis.shape)
        along = kernel[:, :, q].permute(2, 0, 1).unsqueeze(-1)  # (K, B, Q, 1)
        yield (along * columns[:, s].T[:, None, None] * products).sum(0).reshape(call.shape)
