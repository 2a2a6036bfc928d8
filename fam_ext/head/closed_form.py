"""Closed form of relative flatness where the layer's output is what the criterion receives.

z is linear in the weight there, so for a loss that is a sum over rows of l_i(z_i), with Lambda_i the Hessian of l_i,
kappa = sum_i |phi_i|^2 Tr(W^T Lambda_i W). Layers are read here (features -> |phi|^2, fan-in, groups) and each measure is
formed from a criterion's row coefficients or Hessian diagonal, which fam_ext.criteria provides.

Shapes: rows (*rows), channel-first logits (B, O, *positions), norms |phi|^2 (*rows, groups), weight (O, I) with a
convolution's kernel flattened into I.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from fam_ext._dtypes import accumulation_dtype
from fam_ext.errors import NoClosedForm
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss_hessians import Bound, CrossEntropy
from fam_ext.ops.row_coefficients import clear_rows
from fam_ext.ops.softmax_trace import softmax_trace
from fam_ext.options import Options


def softmax_variance(logits: Tensor) -> Tensor:
    """p_s (1 - p_s) for channel-first logits, every term formed from positive numbers (no 1 - p near p = 1)."""
    z = logits.to(accumulation_dtype(logits))
    if z.numel() == 0:
        return z * 0
    y = z.detach().argmax(1, keepdim=True)
    e = torch.exp(z - z.gather(1, y)).scatter(1, y, 0.0)
    rest = e.sum(1, keepdim=True)
    total = 1 + rest
    p = e / total
    # the likeliest class: (1 - r) r with r = rest / total
    return (p * (1 - p)).scatter(1, y, rest / total.square())


def row_traces(logits: Tensor, weight: Tensor, norms: Tensor, measure: str, backend: str) -> Tensor:
    """|phi_i|^2 Tr(W^T (diag(p) - p p^T) W) of every row ("neuronwise"), or without the weight: its share of Tr(H).

    logits (B, O, *positions), norms (B, *positions, groups). In a grouped convolution neurons pair within their group: the
    covariance of a weight that is zero outside the group, under the full distribution.
    """
    groups = norms.shape[-1]
    if measure != "neuronwise":
        variance = softmax_variance(logits).movedim(1, -1)
        by_group = variance.reshape(*norms.shape, weight.shape[0] // groups).sum(-1)
        return (by_group * norms).sum(-1)
    w = weight.flatten(1)
    if groups == 1:
        return softmax_trace(logits, w, backend=backend) * norms[..., 0]
    size = w.shape[0] // groups
    total = torch.zeros_like(norms[..., 0])
    for g in range(groups):
        outside = w.shape[0] - (g + 1) * size
        own = nn.functional.pad(w[g * size : (g + 1) * size], (0, 0, g * size, outside))
        total = total + softmax_trace(logits, own, backend=backend) * norms[..., g]
    return total


def element_traces(diagonal: Tensor, weight: Tensor, norms: Tensor, measure: str) -> Tensor:
    """h_is |w_s|^2 |phi_i|^2 of every element ("neuronwise"), or h_is |phi_i|^2; diagonal (*rows, O), norms (*rows, groups)."""
    groups = norms.shape[-1]
    h = diagonal
    if measure == "neuronwise":
        h = h * weight.flatten(1).to(accumulation_dtype(weight, diagonal)).square().sum(1)
    if groups == 1:
        return h * norms
    return (h.reshape(*norms.shape, weight.shape[0] // groups) * norms.unsqueeze(-1)).flatten(-2)


def weight_factor(weight: Tensor, measure: str, norm_power: int) -> Tensor | None:
    """|W|_F^norm_power for the layerwise measures, which the curvature is multiplied with."""
    if not measure.startswith("layerwise"):
        return None
    square = weight.to(accumulation_dtype(weight)).square().sum()
    return square if norm_power == 2 else square.sqrt()


def check_class_dim(caller: str, bound: Bound, class_dim: int | None, outputs: Tensor) -> None:
    """Check that cross-entropy's class dimension is the one that holds the layer's neurons."""
    expected = 0 if outputs.dim() == 1 else 1
    if bound.softmax and class_dim != expected:
        raise NoClosedForm(
            f"{caller}: cross-entropy takes dimension {expected} of its input, of shape {tuple(outputs.shape)}, for the classes, "
            f"but the layer's outputs lie in dimension {class_dim}; flatten the rows to (N, O) or move the classes to dimension 1"
        )


def flatness(
    options: Options,
    layer: LinearMap,
    bound: Bound,
    outputs: Tensor,
    class_dim: int | None,
    rows: Tensor | None,
    features: Tensor,
    weight: Tensor,
    samples: int,
    per_sample: bool,
) -> Tensor:
    """kappa (0-d), per sample (samples,), or per row or element of `outputs` when the criterion's reduction is "none".

    `outputs` is what the criterion received, `class_dim` its dimension of neurons (None: squeezed), `rows` the layer rows it
    consists of (None: all, in order).
    """
    if torch.is_autocast_enabled(outputs.device.type):
        with torch.autocast(device_type=outputs.device.type, enabled=False):
            return flatness(
                options, layer, bound, outputs, class_dim, rows, features, weight, samples, per_sample
            )  # fmt: skip
    if not options.curvature_grad:
        outputs, features = outputs.detach(), features.detach()
    norms = layer.row_norms(features, options.backend)
    factor = weight_factor(weight, options.measure, options.norm_power)
    if layer.transposed:
        weight = layer.canonical(weight).flatten(0, 1)  # (O, I), as the other layers have it
    row_shape = tuple(s for d, s in enumerate(outputs.shape) if d != class_dim)
    layer_rows = norms.shape[0]
    if rows is not None:
        norms = norms[rows.flatten()]
    terms = _terms(
        options, bound, outputs, class_dim, norms.reshape(*row_shape, layer.groups), weight
    )  # (*row_shape[, O])
    if factor is not None:
        terms = terms * factor
    if options.normalize is not None:
        terms = terms / layer.fan_in
    if per_sample:
        by_row = terms.reshape(prod(row_shape), -1).sum(1)
        if rows is None:
            return by_row.reshape(samples, -1).sum(1) if by_row.numel() else by_row.new_zeros(samples)
        sample = rows.flatten() // max(layer_rows // max(samples, 1), 1)
        return by_row.new_zeros(samples).index_add(0, sample, by_row)
    if bound.reduction != "none":
        return terms.sum()
    if isinstance(bound, CrossEntropy):
        return terms.reshape(row_shape)
    return terms.squeeze(-1) if class_dim is None else terms.movedim(-1, class_dim)


def _terms(
    options: Options, bound: Bound, outputs: Tensor, class_dim: int | None, norms: Tensor, weight: Tensor
) -> Tensor:
    if isinstance(bound, CrossEntropy):
        c = bound.coefficients(outputs)
        if not options.curvature_grad:
            c = c.detach()
        if bound.target is not None and not bound.target.is_floating_point():
            outputs, norms = clear_rows(outputs, c, class_dim or 0), clear_rows(norms, c, -1)
        logits = outputs if outputs.dim() > 1 else outputs.unsqueeze(0)
        by_row = row_traces(
            logits,
            weight,
            norms if outputs.dim() > 1 else norms.unsqueeze(0),
            options.measure,
            options.backend,
        )
        return c * by_row.reshape(c.shape)
    h = bound.diagonal(outputs)
    if not options.curvature_grad:
        h = h.detach()
    h = h.unsqueeze(-1) if class_dim is None else h.movedim(class_dim, -1)
    return element_traces(h, weight, norms, options.measure)
