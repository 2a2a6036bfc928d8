"""Positive forms of relative flatness: generalized Gauss-Newton and Fisher matrices in place of the Hessian.

With f the criterion's input and Lambda_i = sum_k u_ik u_ik^T the Hessian of sample i's loss with respect to f_i, the Gauss-Newton
matrix of the layer is sum_ik Gamma_ik Gamma_ik^T with Gamma_ik = sum_q s_ikq phi_iq^T, s_ik = (df/dz)^T u_ik, and
kappa = sum_ik |W^T Gamma_ik|_F^2, the operation gram_trace: never negative but for rounding, and its gradient needs second
derivatives only. The Fisher matrix is the same for a negative log-likelihood in its natural parameter; curvature="fisher" draws
labels instead of summing over k.

Samples must not interact after the layer: that is checked, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fam_ext.errors import UnsupportedError
from fam_ext.hessian.estimate import rademacher
from fam_ext.hessian.products import LayerCall
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss_hessians import CrossEntropy, LossHessian
from fam_ext.ops.gram_trace import gram_trace

_TOGETHER = 2**27  # bytes of factors that are stacked for one call


def output_factors(bound: LossHessian, outputs: Tensor, samples: int) -> Iterator[Tensor]:
    """u_k, each of the shape of `outputs`, with sum_k u_k u_k^T the criterion's Hessian within every sample.

    Cross-entropy: sqrt(c p_k) (e_k - p); elementwise losses: sqrt(h_k) e_k. A sample's rows (positions) take turns: one factor
    for every row and class.
    """
    if isinstance(bound, CrossEntropy):
        dim = 0 if outputs.dim() == 1 else 1
        log_p = torch.log_softmax(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim)
        c = bound.coefficients(outputs).unsqueeze(dim)
        p = log_p.exp()
        for k in range(outputs.shape[dim]):
            unit = torch.zeros_like(p)
            unit.select(dim, k).fill_(1)
            half = _root(c) * (0.5 * log_p.narrow(dim, k, 1)).exp()
            # an ignored row takes no part even where its numbers are not finite
            yield from _by_turns(torch.where(c == 0, 0.0, half * (unit - p)), samples, dim)
        return
    yield from _by_turns(_root(bound.diagonal(outputs)), samples, None)


def _by_turns(factor: Tensor, samples: int, keep: int | None) -> Iterator[Tensor]:
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
    bound: LossHessian, outputs: Tensor, probes: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Random u with E[u u^T] the criterion's Hessian over all rows, elements and positions together.

    Cross-entropy: sqrt(c) (e_y - p) with y drawn from p; elementwise: sqrt(h) times a random sign. Rows are independent and have
    mean zero, so cross terms vanish in the mean.
    """
    if not isinstance(bound, CrossEntropy):
        h = _root(bound.diagonal(outputs))
        for _ in range(probes):
            yield h * rademacher(h.shape, h, generator)
        return
    dim = 0 if outputs.dim() == 1 else 1
    p = torch.softmax(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim)
    root = _root(bound.coefficients(outputs)).unsqueeze(dim)
    rows = p.detach().movedim(dim, -1).reshape(-1, p.shape[dim])
    for _ in range(probes):
        drawn = torch.multinomial(rows, 1, generator=generator)
        one_hot = (
            torch.zeros_like(rows).scatter_(1, drawn, 1).reshape(p.movedim(dim, -1).shape).movedim(-1, dim)
        )
        yield torch.where(root == 0, 0.0, root * (one_hot - p))


def _root(x: Tensor) -> Tensor:
    """sqrt with a derivative of zero, not infinity, at zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


class Place(NamedTuple):
    """A layer called once: what its share of the matrix is made from."""

    layer: LinearMap
    weight: Tensor
    call: LayerCall


def squares(
    places: Sequence[Place],
    outputs: Tensor,
    factors: Iterable[Tensor],
    weighted: bool,
    hold: bool,
    backend: str,
) -> list[Tensor]:
    """|W^T Gamma_i|_F^2 (or |Gamma_i|_F^2) of every factor u and sample, (K, B) for each place.

    One backward pass pulls a factor back to all of them.
    """
    values: list[list[Tensor]] = [[] for _ in places]
    waiting: list[list[Tensor]] = [[] for _ in places]

    def flush(k: int) -> None:
        if waiting[k]:
            values[k].append(_of_several(places[k], torch.stack(waiting[k]), weighted, hold, backend))
            waiting[k].clear()

    together = [max(1, _TOGETHER // max(1, 4 * prod(place.call.shape))) for place in places]
    edges = [place.call.edge for place in places]
    for u in factors:
        pulled = torch.autograd.grad(
            outputs, edges, u.to(outputs.dtype), create_graph=not hold, retain_graph=True, allow_unused=True
        )
        for k, s in enumerate(pulled):
            if s is None:
                flush(k)
                values[k].append(_zeros(places[k]))
                continue
            waiting[k].append(s.detach() if hold else s)
            if len(waiting[k]) == together[k]:
                flush(k)
    for k in range(len(places)):
        flush(k)
    if not any(values):  # no rows, no factors
        return [_zeros(place) for place in places]
    return [torch.cat(of_place) for of_place in values]


def _zeros(place: Place) -> Tensor:
    """(1, B), what a factor that does not reach the layer gives."""
    dtype = torch.promote_types(place.weight.dtype, torch.float32)
    return torch.zeros(1, place.layer.samples(place.call.shape), dtype=dtype, device=place.weight.device)


def _of_several(place: Place, s: Tensor, weighted: bool, hold: bool, backend: str) -> Tensor:
    """(K, B) for factors s, (K, *shape of z)."""
    layer, weight, call = place
    features = call.features.detach() if hold else call.features
    if layer.transposed:
        return torch.stack([_transposed(layer, weight, call, features, t, weighted, hold) for t in s])
    if len(call.shape) == 1 + layer.spatial:
        features, s = features.unsqueeze(0), s.unsqueeze(1)
    if layer.input_first:
        weight = weight.t()
    m = layer.module
    window = () if layer.linear else (m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
    return gram_trace(features, s, weight, *window, weighted=weighted, backend=backend)


def _transposed(
    layer: LinearMap,
    weight: Tensor,
    call: LayerCall,
    features: Tensor,
    s: Tensor,
    weighted: bool,
    hold: bool,
) -> Tensor:
    """(B,) for one factor of a transposed convolution: Gamma of every sample by autograd."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = layer.canonical(weight).to(dtype)
    gamma = _by_sample(layer, features.to(dtype), s.to(dtype), layer.samples(call.shape), weight.shape)
    if hold:
        gamma = gamma.detach()
    by_group = torch.stack([layer.canonical(g) for g in gamma.unbind(0)])  # (B, groups, O/groups, I)
    if not weighted:
        return by_group.square().flatten(1).sum(1)
    if w.shape[1] < w.shape[2]:
        return (by_group * (w @ w.transpose(1, 2) @ by_group)).flatten(1).sum(1)
    return (w.transpose(1, 2) @ by_group).square().flatten(1).sum(1)


def _by_sample(layer: LinearMap, features: Tensor, s: Tensor, samples: int, shape: torch.Size) -> Tensor:
    """Gamma_i of every sample in the module's layout: the gradient of sample i's weight."""
    own = torch.zeros(samples, *shape, dtype=features.dtype, device=features.device, requires_grad=True)
    with torch.enable_grad():
        z = layer.apply_each(features, own)
        (gamma,) = torch.autograd.grad(z, own, s, create_graph=True)
    result: Tensor = gamma
    return result


def check_samples_apart(caller: str, layer: LinearMap, call: LayerCall, outputs: Tensor) -> bool:
    """Refuse where one sample's output depends on another one's z (batch_norm in training, contrastive losses).

    False where nothing reached z, which tells nothing: a weight may be zero yet.
    """
    samples = layer.samples(call.shape)
    if samples < 2:
        return True
    if outputs.shape[0] % samples:
        raise UnsupportedError(
            f"{caller}: curvature='ggn' needs the criterion's input to hold whole samples along its first dimension; "
            f"it has {outputs.shape[0]} rows for {samples} samples"
        )
    half = samples // 2
    rows = half * (outputs.shape[0] // samples)
    noise = torch.Generator().manual_seed(0)
    directions = torch.zeros_like(outputs)
    directions[:rows] = torch.randn(directions[:rows].shape, generator=noise).to(directions)
    (reached,) = torch.autograd.grad(outputs, call.edge, directions, retain_graph=True, allow_unused=True)
    if reached is not None and bool((reached[half:] != 0).any()):
        raise UnsupportedError(
            f"{caller}: samples interact after the layer (batch_norm in training mode?), where curvature='ggn' and 'fisher' have "
            "no per-sample form; pass hold_statistics=True, put those layers in eval() mode or use curvature='hessian'"
        )
    return reached is not None and bool((reached != 0).any())
