"""Noise under which the expected loss is loss + strength * kappa: no second derivative is ever taken.

A weight perturbed by Delta = W eps with E[vec eps vec eps^T] = 2 strength 1 (eps is (I, I), one for every group) has the expected
loss loss + strength kappa + O(strength^2), since kappa = Tr((W W^T x 1) H); and so has its gradient. With
eps = sqrt(2 strength) a b^T, a and b independent, E[a a^T] = E[b b^T] = 1, no matrix of the weight's size is needed:
Delta phi = (W a) (b^T phi).

- Linear layers, and convolutions whose kernel is 1: (W a) (b^T phi) = W (a (b^T phi)), so it is the layer's input that is
  perturbed, phi + sqrt(2 strength) a (b^T phi), and the layer does the rest. a and b are signs.
- A linear layer with one row per sample: phi + sqrt(2 strength) |phi| a, that is b = phi / |phi|.
- Other convolutions: z + sqrt(2 strength) (W a) (b^T phi). a are signs, b = sqrt(K) r u^T with signs r of the input channels and
  u that picks one of the K places of the kernel: b^T phi is a sum over channels, then a shift. A kernel b of independent signs
  takes a whole convolution for it, and the estimates of kappa spread as much.

Every sample has a draw of its own, uncorrelated with the others', or all share one. Where samples interact after the layer
(batch_norm in training mode) own draws give kappa without the terms between different samples, a shared draw all of it.

Sources: feature robustness (Petzka et al. 2021, arXiv 2001.00939); the same for the trace is noise stability optimization
(Zhang et al. 2024, arXiv 2306.08553).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype, without_autocast
from fam_ext.hessian import noise_passes
from fam_ext.hessian.noise_draws import Draw, kernel_places, on_input, signs
from fam_ext.layers.linear_map import LinearMap


def along_a_direction(
    layer: LinearMap, features: Tensor, factors: Tensor, generator: torch.Generator | None
) -> Tensor:
    """sum_q s_iq <b_i, phi_iq>, (S, groups, O/groups), for factors s of the shape of the layer's output; differentiable in both.

    b_i is random with E[b b^T] = 1, drawn for every sample as :func:`fam_ext.hessian.noise_draws.draw` draws it.
    """
    samples, groups = layer.samples(factors.shape), layer.groups
    if features.numel() == 0 or factors.numel() == 0:
        return factors.new_zeros(samples, groups, layer.outputs // groups)
    vector = signs((samples, groups, layer.inputs // groups), features, generator)
    along = _weighted_sum(_rows(layer, features, layer.inputs, samples), vector)  # (S, groups, N)
    if not layer.linear and not _keeps_positions(layer):
        place = kernel_places(layer, samples, features, generator)
        along = layer.apply_each(along.reshape(samples, groups, *features.shape[-layer.spatial :]), place)
    rows = _rows(layer, factors, layer.outputs, samples)
    return _weighted_sum(rows.transpose(2, 3), along.flatten(2))


def _keeps_positions(layer: LinearMap) -> bool:
    """Whether a convolution maps every position alone."""
    m = layer.module
    padding = m.output_padding if layer.transposed else (0,)
    padding = (*padding, *(m.padding if isinstance(m.padding, tuple) else ()))
    return on_input(layer) and all(n == 1 for n in m.stride) and not any(padding)


def perturb_input(layer: LinearMap, drawn: Draw, features: Tensor, strength: float | Tensor) -> Tensor:
    """phi + eps phi for the features phi, a new tensor of their dtype; for layers that are perturbed there (:func:`on_input`).

    `strength` is at least 0; as a 0-d tensor it may change without torch.compile compiling again.
    """
    scale = amplitude(strength)
    if features.numel() == 0:
        return features
    native = _native_perturb_input(layer, drawn, features, scale)
    if native is not None:
        return native
    with without_autocast(features):
        if drawn.channels is None:
            length = torch.linalg.vector_norm(
                features, dim=-1, keepdim=True, dtype=accumulation_dtype(features)
            )
            left = drawn.left.reshape(features.shape)
            return torch.addcmul(features, (length * scale).to(features.dtype), left)
        rows = _rows(layer, features, layer.inputs, len(drawn.left))
        left = (drawn.left * scale).to(features.dtype).expand(*rows.shape[:3])
        right = drawn.channels.to(features.dtype).expand(*rows.shape[:3])
        at = _positions(drawn, features)
        perturbed = (_AddRankOne.forward if right.requires_grad else _add_rank_one)(rows, left, right, at)
        return _whole(layer, perturbed, features.shape)


def _native_perturb_input(
    layer: LinearMap, drawn: Draw, features: Tensor, scale: float | Tensor
) -> Tensor | None:
    """:func:`perturb_input` in C++, None where that does not apply."""
    if drawn.channels is None:
        return noise_passes.with_length(features, drawn.left, scale)
    at = _positions(drawn, features)
    return noise_passes.rank_one(layer, features, drawn.left, drawn.channels, at, scale)


def products(layer: LinearMap, drawn: Draw, features: Tensor) -> tuple[Tensor, Tensor]:
    """(features, <r, x>): the features again, and what :func:`perturb_output` needs of them, (S, groups, N).

    A layer that is called with these instead hands both gradients back at once, and they are added in one pass.
    """
    assert drawn.channels is not None
    native = noise_passes.project(features, drawn.channels)
    if native is not None:
        return native
    with without_autocast(features):
        vector = drawn.channels.to(features.dtype).expand(layer.samples(features.shape), -1, -1)
        if features.requires_grad and torch.is_grad_enabled():
            return _with_inner(features, vector)
        return features, _InnerAside.forward(features, vector)[1]


def perturb_output(
    layer: LinearMap,
    drawn: Draw,
    features: Tensor,
    weight: Tensor,
    output: Tensor,
    strength: float | Tensor,
    inner: Tensor | None = None,
) -> Tensor:
    """z + W eps phi for the layer's output z, a new tensor of its dtype and layout; for the other layers.

    features: phi, (S, C, *spatial). output: z, (S, O, *spatial). weight: the one that the layer used, in the module's layout.
    strength: as in :func:`perturb_input`. inner: <r, x>, (S, groups, N), the second of :func:`products`, where that was called
    before the layer was.
    """
    scale = amplitude(strength)
    if output.numel() == 0:
        return output
    assert drawn.channels is not None and drawn.place is not None
    if inner is None:
        inner = products(layer, drawn, features)[1]
    native = noise_passes.outer(layer, output, weight, inner, drawn.left, drawn.place, scale)
    if native is not None:
        return native
    with without_autocast(output):
        dtype, samples = output.dtype, layer.samples(output.shape)
        place = drawn.place.to(dtype)  # the shift
        inner = inner.to(dtype).reshape(samples, layer.groups, *features.shape[-layer.spatial :])
        inner = layer.apply(inner, place[0]) if len(place) == 1 else layer.apply_each(inner, place)
        canonical = layer.canonical(weight).to(dtype)  # (groups, O/groups, I)
        left = (drawn.left * scale).to(dtype).transpose(0, 1)
        outer = torch.bmm(left, canonical.transpose(1, 2)).transpose(0, 1)  # W a, (S, groups, O/groups)
        z = _rows(layer, output, layer.outputs, samples)
        perturbed = add_outer(z, outer, inner.flatten(2))
        return _whole(layer, perturbed, output.shape)


def amplitude(strength: float | Tensor) -> float | Tensor:
    """sqrt(2 strength), the factor of a b^T in eps."""
    if isinstance(strength, Tensor):
        return (2 * strength.detach()).sqrt()
    if not (math.isfinite(strength) and strength >= 0):
        _checks.bad_value(
            "method='noise'", "strength", "finite and at least 0 (it is the noise's variance)", strength
        )
    return math.sqrt(2 * strength)


def _rows(layer: LinearMap, tensor: Tensor, channels: int, samples: int) -> Tensor:
    """(S, groups, channels/groups, rows): a view, for convolutions in both memory formats."""
    if layer.linear:
        return tensor.reshape(samples, -1, channels).transpose(1, 2).unsqueeze(1)
    return tensor.reshape(layer.samples(tensor.shape), layer.groups, channels // layer.groups, -1)


def _whole(layer: LinearMap, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_rows`."""
    return (rows.squeeze(1).transpose(1, 2) if layer.linear else rows).reshape(shape)


def _positions(drawn: Draw, features: Tensor) -> Tensor | None:
    """(S, 1, N), where the features are (S, N, I) and some rows get no noise."""
    at = drawn.positions
    if at is None or features.dim() != 3 or at.shape != features.shape[:2]:
        return None
    return at.to(features.dtype).reshape(len(drawn.left), 1, -1)


def _inner(rows: Tensor, vector: Tensor) -> Tensor:
    """<vector, row>: (S, groups, C, N) and (S, groups, C) to (S, groups, N)."""
    samples, groups, channels, count = rows.shape
    if channels == 1:
        return rows[:, :, 0] * vector
    # the vector first: a product of a matrix with one column takes ten times as long on the CPU
    product = torch.bmm(vector.reshape(-1, 1, channels), rows.flatten(0, 1))
    return product.view(samples, groups, count)


class _WeightedSum(torch.autograd.Function):
    """<vector, row> as :func:`_inner` forms it, with gradients for both."""

    @staticmethod
    def forward(rows: Tensor, vector: Tensor) -> Tensor:
        return _inner(rows, vector)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, vector = ctx.saved_tensors
        of_rows = of_vector = None
        if ctx.needs_input_grad[0]:
            if rows.stride(2) == 1 != rows.stride(3):  # in their layout
                of_rows = (grad.unsqueeze(3) * vector.unsqueeze(2)).transpose(2, 3)
            else:
                of_rows = vector.unsqueeze(3) * grad.unsqueeze(2)
        if ctx.needs_input_grad[1]:
            of_vector = _inner(rows.transpose(2, 3), grad)
        return of_rows, of_vector


class _InnerAside(torch.autograd.Function):
    """(x, <vector, x>): x (S, C, *spatial), vector (S, groups, C/groups) without a gradient, the products (S, groups, N)."""

    @staticmethod
    def forward(x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _inner(x.reshape(*vector.shape, -1), vector)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.set_materialize_grads(False)
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_inner: Tensor | None) -> tuple[Tensor | None, None]:
        (vector,) = ctx.saved_tensors
        if of_inner is None:
            return grad, None
        with without_autocast(of_inner):
            left, right = vector.unsqueeze(3), of_inner.unsqueeze(2)
            if grad is None:
                return (left * right).reshape(ctx.shape), None
            rows = grad.reshape(*vector.shape, -1)
            return torch.addcmul(rows, left, right).reshape(ctx.shape), None


class _AddRankOne(torch.autograd.Function):
    """rows + left <right, row> at; rows (S, groups, C, N), at (S, 1, N) or None for all 1. The rows are not kept."""

    @staticmethod
    def forward(rows: Tensor, left: Tensor, right: Tensor, at: Tensor | None = None) -> Tensor:
        inner = _inner(rows, right)
        return torch.addcmul(rows, left.unsqueeze(3), (inner if at is None else inner * at).unsqueeze(2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, at = ctx.saved_tensors
        with without_autocast(grad):
            return _add_rank_one(grad, right, left, at), None, None, None


class _AddOuter(torch.autograd.Function):
    """z + outer inner^T; z (S, groups, O, N), inner (S, groups, N), outer (D, groups, O): sample i has its row i % D."""

    @staticmethod
    def forward(z: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
        return torch.addcmul(z, _for_samples(outer, len(z)).unsqueeze(3), inner.unsqueeze(2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outer, inner = ctx.saved_tensors
        with without_autocast(grad):
            of_outer = _inner(grad.transpose(2, 3), inner)
            if len(outer) < len(grad):
                more = -len(grad) % len(outer)
                whole = of_outer if not more else F.pad(of_outer, (0, 0, 0, 0, 0, more))
                of_outer = whole.view(-1, *outer.shape).sum(0)
            return grad, of_outer, _inner(grad, _for_samples(outer, len(grad)))


def _for_samples(outer: Tensor, samples: int) -> Tensor:
    """Row i % D of `outer` (D, groups, O) for every sample i."""
    if len(outer) == samples or len(outer) == 1:
        return outer.expand(samples, -1, -1)
    return outer.repeat(-(-samples // len(outer)), 1, 1)[:samples]


_weighted_sum: Callable[..., Tensor] = _WeightedSum.apply
_add_rank_one: Callable[..., Tensor] = _AddRankOne.apply
add_outer: Callable[..., Tensor] = _AddOuter.apply
_with_inner: Callable[..., tuple[Tensor, Tensor]] = _InnerAside.apply
