"""Positive forms of relative flatness: generalized Gauss-Newton and Fisher matrices in place of the Hessian.

With f the criterion's input and Lambda_i = sum_k u_ik u_ik^T the Hessian of sample i's loss with respect to f_i, the Gauss-Newton
matrix of the layer is sum_ik Gamma_ik Gamma_ik^T with Gamma_ik = sum_q s_ikq phi_iq^T, s_ik = (df/dz)^T u_ik, and
kappa = sum_ik |W^T Gamma_ik|_F^2, the operation gram_trace: never negative but for rounding, and its gradient needs second
derivatives only. The Fisher matrix is the same for a negative log-likelihood in its natural parameter; curvature="fisher" draws
labels instead of summing over k.

Samples must not interact after the layer: that is checked, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from fam_ext.errors import UnsupportedError
from fam_ext.hessian import noise
from fam_ext.hessian.products import LayerCall
from fam_ext.layers.linear_map import LinearMap
from fam_ext.ops import backends
from fam_ext.ops.gram_trace import gram_trace

_native: Any = backends.native_function("row_trace")
_TOGETHER = 2**27  # bytes of factors that are stacked for one call


class FactoredLayer(NamedTuple):
    """A layer called once: what its share of the matrix is made from.

    own_input: nothing else takes the call's input, so that W^T s is the gradient by the input, which the backward pass forms on
    its way to earlier layers.
    """

    layer: LinearMap
    weight: Tensor
    call: LayerCall
    own_input: bool = False

    @property
    def input_edge(self) -> GradientEdge:
        node: Any = self.call.features.grad_fn
        return GradientEdge(node, self.call.features.output_nr)

    @property
    def one_row(self) -> bool:
        """Whether a sample has one row: |W^T s phi^T|^2 = |phi|^2 |W^T s|^2 then."""
        shape = self.call.shape
        return self.layer.linear and (len(shape) <= 2 or self.layer.positions(shape) == 1)


def factor_traces(
    layers: Sequence[FactoredLayer],
    outputs: Tensor,
    factors: Iterable[Tensor],
    *,
    weighted: bool,
    detached: bool,
    backend: str,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """|W^T Gamma_i|_F^2 (or |Gamma_i|_F^2) of every factor u and sample, (K, B) for each layer.

    One backward pass pulls a factor back to all of them. With a generator the traces of samples with several rows are estimated:
    |W^T Gamma_i b_i|^2 for a random sign vector b_i, at the price of a layer with one output.
    """
    ways = [_way(layer, weighted, detached, generator) for layer in layers]
    edges = [
        layer.input_edge if way is _by_input else layer.call.edge
        for layer, way in zip(layers, ways, strict=True)
    ]
    pulled: list[list[Tensor]] = [[] for _ in layers]  # factors that wait for gram_trace
    values: list[list[Tensor]] = [[] for _ in layers]
    together = [max(1, _TOGETHER // max(1, 4 * prod(layer.call.shape))) for layer in layers]
    for u in factors:
        gradients = torch.autograd.grad(
            outputs,
            edges,
            u.to(outputs.dtype),
            create_graph=not detached,
            retain_graph=True,
            allow_unused=True,
        )
        for k, s in enumerate(gradients):
            layer, way = layers[k], ways[k]
            if s is None:
                _flush(layer, pulled[k], values[k], weighted, detached, backend)
                values[k].append(_zeros(layer))
            elif way is not None:
                values[k].append(way(layer, s, weighted, detached, generator).unsqueeze(0))
            else:
                pulled[k].append(s.detach() if detached else s)
                if len(pulled[k]) == together[k]:
                    _flush(layer, pulled[k], values[k], weighted, detached, backend)
    for k, layer in enumerate(layers):
        _flush(layer, pulled[k], values[k], weighted, detached, backend)
    if not any(values):  # no rows, no factors
        return [_zeros(layer) for layer in layers]
    return [torch.cat(of_layer) for of_layer in values]


def _way(layer: FactoredLayer, weighted: bool, detached: bool, generator: torch.Generator | None) -> Any:
    """How a factor's trace is formed; None: by gram_trace, several factors at once."""
    if generator is None:
        return None
    if not layer.one_row:
        return _along_a_direction
    # with the Hessian held, the gradient flows through W alone, which the gradient by the input does not show
    return _by_input if layer.own_input and weighted and not detached else _by_output


def _features(layer: FactoredLayer, detached: bool) -> Tensor:
    features = layer.call.features.to(torch.promote_types(layer.weight.dtype, torch.float32))
    return features.detach() if detached else features


def _by_input(
    layer: FactoredLayer, t: Tensor, weighted: bool, detached: bool, generator: torch.Generator | None
) -> Tensor:
    """|phi|^2 |t|^2, (B,), with t = W^T s the gradient by the layer's input."""
    phi = _features(layer, detached)
    return _row_trace(phi, t.to(phi.dtype))


def _row_trace(phi: Tensor, t: Tensor) -> Tensor:
    """|phi|^2 |t|^2 of every row, (B,)."""
    phi, t = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) for x in (phi, t))
    result: Tensor | None = None if _native is None else _native(phi, t)
    if result is None:
        result = _RowTrace.apply(phi, t)  # type: ignore[no-untyped-call]
    return result


class _RowTrace(torch.autograd.Function):
    """The same in plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, phi: Tensor, t: Tensor) -> Tensor:
        squares = [x.square().sum(-1) for x in (phi, t)]
        ctx.save_for_backward(phi, t, *squares)
        return squares[0] * squares[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        phi, t, of_phi, of_t = ctx.saved_tensors
        twice = 2 * grad
        by_phi = phi * (twice * of_t).unsqueeze(-1) if ctx.needs_input_grad[0] else None
        by_t = t * (twice * of_phi).unsqueeze(-1) if ctx.needs_input_grad[1] else None
        return by_phi, by_t


def _by_output(
    layer: FactoredLayer, s: Tensor, weighted: bool, detached: bool, generator: torch.Generator | None
) -> Tensor:
    """|phi|^2 |W^T s|^2 (or |phi|^2 |s|^2), (B,)."""
    phi = _features(layer, detached)
    s = (s.detach() if detached else s).to(phi.dtype)
    if weighted:
        s = s @ layer.weight.to(phi.dtype)
    return _row_trace(phi, s)


def _along_a_direction(
    layer: FactoredLayer, s: Tensor, weighted: bool, detached: bool, generator: torch.Generator | None
) -> Tensor:
    """|W^T Gamma_i b_i|^2 (or |Gamma_i b_i|^2), (B,): Gamma_i b = sum_q s_iq <b, phi_iq>, b_i as noise draws it."""
    phi = _features(layer, detached)
    s = (s.detach() if detached else s).to(phi.dtype)
    gamma = noise.along_a_direction(layer.layer, phi, s, generator)  # (B, groups, O/groups)
    if weighted:
        weight = layer.layer.canonical(layer.weight).to(phi.dtype)
        gamma = gamma.transpose(0, 1).bmm(weight)
        return gamma.square().sum((0, 2))
    return gamma.square().sum((1, 2))


def _flush(
    layer: FactoredLayer,
    pulled: list[Tensor],
    values: list[Tensor],
    weighted: bool,
    detached: bool,
    backend: str,
) -> None:
    if pulled:
        values.append(_of_several(layer, torch.stack(pulled), weighted, detached, backend))
        pulled.clear()


def _zeros(factored: FactoredLayer) -> Tensor:
    """(1, B), what a factor that does not reach the layer gives."""
    dtype = torch.promote_types(factored.weight.dtype, torch.float32)
    return torch.zeros(
        1, factored.layer.samples(factored.call.shape), dtype=dtype, device=factored.weight.device
    )


def _of_several(factored: FactoredLayer, s: Tensor, weighted: bool, detached: bool, backend: str) -> Tensor:
    """(K, B) for factors s, (K, *shape of z)."""
    layer, weight, call, _ = factored
    features = call.features.detach() if detached else call.features
    if layer.transposed:
        return torch.stack([_transposed(layer, weight, call, features, t, weighted, detached) for t in s])
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
    detached: bool,
) -> Tensor:
    """(B,) for one factor of a transposed convolution: Gamma of every sample by autograd."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = layer.canonical(weight).to(dtype)
    gamma = _by_sample(layer, features.to(dtype), s.to(dtype), layer.samples(call.shape), weight.shape)
    if detached:
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


def check_samples_apart(
    caller: str, layers: Sequence[tuple[LinearMap, LayerCall]], outputs: Tensor, again: int = 0
) -> list[bool]:
    """Refuse where one sample's output depends on another one's z (batch_norm in training, contrastive losses).

    The layers, called with the same number of samples, share the backward passes: two for each bit of the samples' numbers, as
    any two samples are on different sides in one of them. A check that is made `again`, for the k-th time, takes two passes only,
    with random halves that depend on k. For each layer: False where nothing reached z, or NaN or inf, which tells nothing: a
    weight may be zero yet, a batch bad, a step diverged.
    """
    samples = layers[0][0].samples(layers[0][1].shape)
    if samples < 2:
        return [True] * len(layers)
    if outputs.shape[0] % samples:
        raise UnsupportedError(
            f"{caller}: curvature='ggn' needs the criterion's input to hold whole samples along its first dimension; "
            f"it has {outputs.shape[0]} rows for {samples} samples"
        )
    generator = torch.Generator().manual_seed(again)
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    number, bits = torch.arange(samples, device=outputs.device), (samples - 1).bit_length()
    if again:
        number, bits = torch.randperm(samples, generator=generator).to(outputs.device), 1
    anything, finite = [False] * len(layers), [True] * len(layers)
    for bit in range(bits):
        for value in (0, 1):
            given = (number >> bit) & 1 == value
            rows = given.repeat_interleave(outputs.shape[0] // samples)
            directions = torch.where(rows.reshape(-1, *(1,) * (outputs.dim() - 1)), noise, 0.0)
            reached = torch.autograd.grad(
                outputs, [call.edge for _, call in layers], directions, retain_graph=True, allow_unused=True
            )
            for k, z in enumerate(reached):
                reaches = False if z is None else _reaches(caller, z, ~given)
                anything[k] |= bool(reaches)
                finite[k] &= reaches is not None
    return [told and whole for told, whole in zip(anything, finite, strict=True)]


def _reaches(caller: str, z: Tensor, others: Tensor) -> bool | None:
    """Whether the derivative by z (B, ...) is other than zero; None: not finite. Refused where it is so at `others`, (B,)."""
    numbers = z.reshape(len(others), -1)
    finite = numbers.isfinite()
    by_sample = ((numbers != 0) & finite).any(1)
    reached, crossed, whole = torch.stack(
        [by_sample.any(), (by_sample & others).any(), finite.all()]
    ).tolist()
    if crossed:
        raise UnsupportedError(
            f"{caller}: samples interact after the layer (batch_norm in training mode?), where curvature='ggn' and "
            "'fisher' have no per-sample form; pass hold_statistics=True, put those layers in eval() mode or use "
            "curvature='hessian'"
        )
    return bool(reached) if whole else None
