"""Closed form of relative flatness where the layer's output is what the criterion receives.

z is linear in the weight there, so for a loss that is a sum over rows of l_i(z_i), with Lambda_i the Hessian of l_i,
kappa = sum_i |phi_i|^2 Tr(W^T Lambda_i W). `summands` forms the terms of this sum from the squared norms of the features, the
weight and the loss's Hessian (fam_ext.loss_hessians); `flatness` applies it to a layer's call and sums as the criterion does.

Shapes: rows (*rows), channel-first logits (B, O, *positions), norms |phi|^2 (*rows, groups), weight (O, I) with a
convolution's kernel flattened into I.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from fam_ext._dtypes import accumulation_dtype, without_autocast
from fam_ext.errors import NoClosedForm
from fam_ext.layers.linear_map import LinearMap, squared_norms
from fam_ext.loss_hessians import CrossEntropy, LossHessian
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
    return norm_to_power(weight.to(accumulation_dtype(weight)).square().sum(), norm_power)


def norm_to_power(square: Tensor, norm_power: int) -> Tensor:
    """|W|_F^norm_power from |W|_F^2."""
    return square if norm_power == 2 else square.sqrt()


def check_class_dim(caller: str, loss_hessian: LossHessian, class_dim: int | None, outputs: Tensor) -> None:
    """Check that cross-entropy's class dimension is the one that holds the layer's neurons."""
    expected = 0 if outputs.dim() == 1 else 1
    if loss_hessian.softmax and class_dim != expected:
        raise NoClosedForm(
            f"{caller}: cross-entropy takes dimension {expected} of its input, of shape {tuple(outputs.shape)}, for the classes, "
            f"but the layer's outputs lie in dimension {class_dim}; flatten the rows to (N, O) or move the classes to dimension 1"
        )


def row_norms(features: Tensor, loss_hessian: LossHessian, backend: str) -> Tensor:
    """|phi|^2 of the rows (N, I) of a linear layer, (N, 1). Ignored rows give 0, and a zero gradient whatever they hold."""
    ignored = loss_hessian.ignored()
    if ignored is not None:
        features = torch.where(ignored.reshape(-1, 1), 0.0, features)
    return squared_norms(features, backend)


def prepared(
    options: Options, outputs: Tensor, norms: Tensor, weight: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and |phi|^2 without gradient where the Hessian is held; all in float64 where one of them, or of `others`, is."""
    if not options.curvature_grad:
        outputs, norms = outputs.detach(), norms.detach()
    if (
        accumulation_dtype(outputs, norms, weight, *others) == torch.float64
    ):  # no part may be formed in float32
        outputs, norms, weight = outputs.double(), norms.double(), weight.double()
    return outputs, norms, weight


def summands(
    options: Options,
    loss_hessian: LossHessian,
    outputs: Tensor,
    class_dim: int | None,
    norms: Tensor,
    weight: Tensor,
    fan_in: int,
) -> Tensor:
    """The terms that kappa sums: (*rows) of cross-entropy, (*rows, O) of the other losses; scaled to the measure.

    `outputs` is what the criterion received and `class_dim` its dimension of neurons (None: squeezed). `norms` are |phi|^2,
    (*rows, groups), rows the other dimensions of `outputs`.
    """
    held = not options.curvature_grad
    outputs, norms, weight = prepared(options, outputs, norms, weight, *loss_hessian.tensors())
    if isinstance(loss_hessian, CrossEntropy):
        c = loss_hessian.coefficients(outputs)
        c = c.detach() if held else c
        target = loss_hessian.target
        if target is not None and not target.is_floating_point():
            outputs, norms = clear_rows(outputs, c, class_dim or 0), clear_rows(norms, c, -1)
        if outputs.dim() == 1:
            outputs, norms = outputs.unsqueeze(0), norms.unsqueeze(0)
        traces = row_traces(outputs, weight, norms, options.measure, options.backend)
        terms = c * traces.reshape(c.shape)
    else:
        h = loss_hessian.diagonal(outputs)
        h = h.detach() if held else h
        h = h.unsqueeze(-1) if class_dim is None else h.movedim(class_dim, -1)
        terms = element_traces(h, weight, norms, options.measure)
    factor = weight_factor(weight, options.measure, options.norm_power)
    if factor is not None:
        terms = terms * factor
    return terms if options.normalize is None else terms / max(fan_in, 1)


def flatness(
    options: Options,
    layer: LinearMap,
    loss_hessian: LossHessian,
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
    with without_autocast(outputs):
        if accumulation_dtype(outputs, features, weight, *loss_hessian.tensors()) == torch.float64:
            features = features.double()
        if layer.linear:
            phi = features.reshape(prod(features.shape[:-1]), features.shape[-1])  # of no feature, too
            layer_rows = phi.shape[0]
            norms = row_norms(phi if rows is None else phi[rows.flatten()], loss_hessian, options.backend)
        else:
            norms = layer.row_norms(features, options.backend)
            layer_rows = norms.shape[0]
            norms = norms if rows is None else norms[rows.flatten()]
        if layer.input_first:
            weight = layer.canonical(weight).flatten(0, 1)  # (O, I), as the other layers have it
        row_shape = tuple(s for d, s in enumerate(outputs.shape) if d != class_dim)
        norms = norms.reshape(*row_shape, layer.groups)
        terms = summands(options, loss_hessian, outputs, class_dim, norms, weight, layer.fan_in)
        return reduce_terms(terms, loss_hessian, row_shape, class_dim, rows, samples, layer_rows, per_sample)


def reduce_terms(
    terms: Tensor,
    loss_hessian: LossHessian,
    row_shape: tuple[int, ...],
    class_dim: int | None,
    rows: Tensor | None,
    samples: int,
    layer_rows: int,
    per_sample: bool,
) -> Tensor:
    """What `flatness` returns of the terms that `summands` gives; `layer_rows` is how many rows the layer's call had."""
    if per_sample:
        by_row = terms.reshape(prod(row_shape), -1).sum(1)
        if rows is None:
            return by_row.reshape(samples, -1).sum(1) if by_row.numel() else by_row.new_zeros(samples)
        sample = rows.flatten() // max(layer_rows // max(samples, 1), 1)
        return by_row.new_zeros(samples).index_add(0, sample, by_row)
    if loss_hessian.reduction != "none":
        return terms.sum()
    if isinstance(loss_hessian, CrossEntropy):
        return terms.reshape(row_shape)
    return terms.squeeze(-1) if class_dim is None else terms.movedim(-1, class_dim)
