"""Closed form of a linear head under tensor parallelism: each process holds some classes of the weight, or some inputs.

With the classes split (colwise), row i's largest logit, its normalizer, U_i = sum_s p~_is w_s and the class sums of the shifted
form (fam_ext.ops.reference.softmax_trace) are summed over the processes; the logits may be split alike, or be whole everywhere.
With the inputs split (rowwise) the trace of a covariance is a sum over inputs, and each process forms its own share.

Gradients of what is communicated: fam_ext.layers.collectives.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype
from fam_ext.errors import UnsupportedError
from fam_ext.head import closed_form
from fam_ext.layers import collectives
from fam_ext.layers.linear_map import LinearMap, squared_norms
from fam_ext.layers.sharding import describe, is_dtensor
from fam_ext.loss_hessians import CrossEntropy, LossHessian
from fam_ext.ops.reference.softmax_trace import at_least_zero
from fam_ext.ops.row_coefficients import clear_rows
from fam_ext.ops.softmax_trace import softmax_trace
from fam_ext.options import Options

_NONE = 2**62  # no class: larger than any


class Split(NamedTuple):
    """What this process holds of a weight (O, I), and with whom it shares the rest."""

    weight: Tensor  # (O_r, I) with the classes split, (O, I_r) with the inputs split
    group: Any
    by_class: bool
    begin: int  # the first class of `weight`
    classes: int

    def total(self, values: Tensor) -> Tensor:
        return collectives.total(values, self.group)

    def shared(self, values: Tensor) -> Tensor:
        return collectives.shared(values, self.group)

    def own(self, logits: Tensor) -> Tensor:
        """The columns of whole logits (N, O) that belong to `weight`."""
        return self.shared(logits)[:, self.begin : self.begin + len(self.weight)]


def split(caller: str, weight: Any) -> Split:
    """This process's share of a weight that is a DTensor on a mesh of one dimension.

    Raises UnsupportedError for another layout.
    """
    mesh, placements = weight.device_mesh, weight.placements
    dim = getattr(placements[0], "dim", None) if placements[0].is_shard() else None
    if mesh.ndim != 1 or dim not in (0, 1) or type(placements[0]).__name__ != "Shard":
        raise UnsupportedError(
            f"{caller}: the head's weight is a DTensor of {describe(weight)}; a closed form is known for Shard(0) "
            "(ColwiseParallel) and Shard(1) (RowwiseParallel) on a mesh of one dimension. Choose one of these, or method='noise'"
        )
    local = weight.to_local()
    size = -(-weight.shape[dim] // mesh.size())  # as torch.chunk cuts
    begin = min(mesh.get_local_rank() * size, weight.shape[dim])
    return Split(local, mesh.get_group(), dim == 0, begin if dim == 0 else 0, weight.shape[0])


def flatness(
    options: Options,
    layer: LinearMap,
    loss_hessian: LossHessian,
    outputs: Tensor,
    class_dim: int | None,
    rows: Tensor | None,
    features: Any,
    weight: Any,
    samples: int,
    per_sample: bool,
) -> Tensor:
    """kappa as fam_ext.head.closed_form.flatness gives it: a plain tensor, the same on every process.

    `weight` is a DTensor, and `features` too. `outputs` are whole, as a plain tensor or a DTensor, or a DTensor whose classes are
    split as the weight's.
    """
    caller = options.caller
    parts = split(caller, weight)
    with torch.autocast(device_type=outputs.device.type, enabled=False):
        norms = _norms(caller, features, rows, loss_hessian, parts)
        whole, logits = _logits(caller, layer, outputs, class_dim, parts)
        row_shape = tuple(s for d, s in enumerate(outputs.shape) if d != class_dim)
        if len(norms) != prod(row_shape):
            raise UnsupportedError(
                f"{caller}: outputs hold {prod(row_shape)} rows, of {len(norms)} that the layer was called with (split over "
                "processes?); give the criterion all of them"
            )
        others = loss_hessian.tensors()
        logits, norms, own = closed_form.prepared(options, logits, norms, parts.weight, *others)
        parts = parts._replace(weight=own)
        if isinstance(loss_hessian, CrossEntropy):
            terms = _softmax_terms(options, loss_hessian, outputs, logits, norms, parts, whole).reshape(
                row_shape
            )
        else:
            terms = _element_terms(options, loss_hessian, outputs, class_dim, norms, parts, whole)
        factor = _weight_factor(options, parts)
        terms = terms if factor is None else terms * factor
        terms = terms if options.normalize is None else terms / layer.fan_in
        return closed_form.reduce_terms(
            terms, loss_hessian, row_shape, class_dim, rows, samples, prod(features.shape[:-1]), per_sample
        )


@torch.no_grad()
def check_unusual(
    caller: str, layer: LinearMap, features: Any, weight: Any, got: Tensor, dtype: torch.dtype
) -> None:
    """As LinearMap.check_unusual: compare the first row of the layer's output, or this process's classes of it."""
    parts = split(caller, weight)
    if not is_dtensor(features):
        return  # refused later
    eps = max(torch.finfo(d).eps for d in (dtype, got.dtype, features.dtype, weight.dtype))
    with torch.autocast(device_type=features.device.type, enabled=False):
        local, w = features.to_local(), parts.weight.double()
        x = local.reshape(-1, local.shape[-1])[:1].double()
        expected, squares = x @ w.t(), torch.stack([w.square().sum(), x.square().sum()])
        if not parts.by_class:  # else nothing is communicated: a process without classes is not here
            expected, squares = parts.total(expected), parts.total(squares)
        expected = expected[0]
        bias = layer.module.bias
        if bias is not None:
            expected = expected + (bias.to_local() if is_dtensor(bias) else bias).double()
        if parts.by_class and len(got) == parts.classes:
            got = got[parts.begin : parts.begin + len(expected)]
        if len(got) == len(expected) and len(got):
            layer.check_row(caller, got, expected, squares.sqrt().prod(), eps)


def _norms(
    caller: str, features: Any, rows: Tensor | None, loss_hessian: LossHessian, parts: Split
) -> Tensor:
    """|phi|^2 of the rows that the criterion sees, (N,)."""
    placement = features.placements[0] if is_dtensor(features) else None
    inputs_split = placement is not None and placement.is_shard(features.dim() - 1)
    if placement is None or not (inputs_split or placement.is_replicate()):
        layout = "a plain tensor" if placement is None else f"a DTensor of {describe(features)}"
        raise UnsupportedError(
            f"{caller}: the head's input is {layout}; it must be the same on every process (Replicate), or split along the "
            "features for RowwiseParallel"
        )
    phi = features.to_local()
    phi = phi.reshape(-1, phi.shape[-1])
    phi = phi if rows is None else phi[rows.flatten()]
    if accumulation_dtype(phi, parts.weight, *loss_hessian.tensors()) == torch.float64:
        phi = phi.double()
    ignored = loss_hessian.ignored()
    if ignored is not None and ignored.numel() == len(phi):  # their gradient is 0 whatever they hold
        phi = torch.where(ignored.reshape(-1, 1), 0.0, phi)
    squares = squared_norms(phi)[:, 0]
    return parts.total(squares) if inputs_split else squares


def _logits(
    caller: str, layer: LinearMap, outputs: Any, class_dim: int | None, parts: Split
) -> tuple[bool, Tensor]:
    """(whether they are whole, the logits of the rows in order, (N, O) or this process's (N, O_r))."""
    local, whole = outputs, True
    if is_dtensor(outputs):
        placement = outputs.placements[0]
        whole = placement.is_replicate()
        by_class = class_dim is not None and placement.is_shard(class_dim)
        if outputs.device_mesh.ndim != 1 or not (whole or (by_class and parts.by_class)):
            raise UnsupportedError(
                f"{caller}: outputs are a DTensor of {describe(outputs)}, where the head's weight is split by "
                f"{'class' if parts.by_class else 'input'}; give it output_layouts=Replicate(), or for ColwiseParallel "
                "Shard(-1) with use_local_output=False under loss_parallel()"
            )
        local = outputs.to_local()
    classes = 1 if class_dim is None else local.shape[class_dim]
    if classes != (layer.outputs if whole else len(parts.weight)):
        raise UnsupportedError(
            f"{caller}: outputs hold {classes} of the head's {layer.outputs} classes, a shard without a layout; give "
            "ColwiseParallel output_layouts=Replicate(), or use_local_output=False under loss_parallel()"
        )
    last = local.unsqueeze(-1) if class_dim is None else local.movedim(class_dim, -1)
    return whole, last.reshape(-1, classes)


def _softmax_terms(
    options: Options,
    loss_hessian: CrossEntropy,
    outputs: Tensor,
    logits: Tensor,
    norms: Tensor,
    parts: Split,
    whole: bool,
) -> Tensor:
    """c_i |phi_i|^2 Tr(W^T (diag(p_i) - p_i p_i^T) W), (N,); without W for the measures that have it in a factor."""
    c = loss_hessian.coefficients(outputs).reshape(-1)
    c = c if options.curvature_grad else c.detach()
    target = loss_hessian.target
    if target is not None and not target.is_floating_point():
        logits, norms = clear_rows(logits, c, -1), clear_rows(norms.unsqueeze(1), c, -1)[:, 0]
    if options.measure != "neuronwise":
        variances = closed_form.softmax_variance(logits).sum(1) if whole else total_variance(logits, parts)
        return c * variances * norms
    if not parts.by_class:
        share = softmax_trace(parts.shared(logits), parts.weight, backend=options.backend)
        return c * parts.total(share) * norms
    return c * trace(parts.own(logits) if whole else logits, parts) * norms


def _element_terms(
    options: Options,
    loss_hessian: LossHessian,
    outputs: Any,
    class_dim: int | None,
    norms: Tensor,
    parts: Split,
    whole: bool,
) -> Tensor:
    """h_is |w_s|^2 |phi_i|^2, (*rows, O), or without the weight."""
    if not whole:
        raise UnsupportedError(
            f"{options.caller}: for outputs that are split over processes ({describe(outputs)}) CrossEntropyLoss alone is "
            "supported; give the head output_layouts=Replicate()"
        )
    plain = outputs.to_local() if is_dtensor(outputs) else outputs
    h = loss_hessian.diagonal(plain if options.curvature_grad else plain.detach())
    h = h.unsqueeze(-1) if class_dim is None else h.movedim(class_dim, -1)
    if options.measure == "neuronwise":
        h = h * _squares(parts)
    return h * norms.reshape(*h.shape[:-1], 1)


def _squares(parts: Split) -> Tensor:
    """|w_s|^2 of every class, (O,)."""
    w = parts.weight
    own = w.to(accumulation_dtype(w)).square().sum(1)
    if parts.by_class:
        own = F.pad(own, (parts.begin, parts.classes - parts.begin - len(own)))
    return parts.total(own)


def _weight_factor(options: Options, parts: Split) -> Tensor | None:
    if not options.measure.startswith("layerwise"):
        return None
    return closed_form.norm_to_power(_squares(parts).sum(), options.norm_power)


def _shifted(logits: Tensor, parts: Split) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(e, rest, y, own) of this process's classes: e_s = exp(z_s - z_y), 0 at y, (N, O_r); the sum of all e but 1, (N, 1).

    y is the likeliest class counted from this process's first one, (N, 1), and own tells whether it is one of its classes.
    """
    size = logits.shape[1]
    columns = logits if size else F.pad(logits, (0, 1), value=-torch.inf)  # a process may have no class
    top, y = columns.detach().max(1, keepdim=True)
    largest = top.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parts.group)
    first = torch.where((top == largest) & (y < size), y + parts.begin, _NONE)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=parts.group)
    y = first - parts.begin
    own = (y >= 0) & (y < size)
    y = torch.where(own, y, 0)
    at_top = parts.shared(parts.total(torch.where(own, columns.gather(1, y), 0.0)))
    e = torch.exp(columns - at_top)
    e = e.scatter(1, y, torch.where(own, 0.0, e.gather(1, y)))[:, :size]
    rest = parts.total(e.sum(1, keepdim=True)) + (
        largest - largest
    )  # nan where the largest logit is not finite
    return e, rest, y, own


def trace(logits: Tensor, parts: Split) -> Tensor:
    """Tr(W^T (diag(p) - p p^T) W) of every row, (N,), for logits (N, O_r) split as the classes of the weight."""
    acc = accumulation_dtype(logits, parts.weight)
    e, rest, y, own = _shifted(logits.to(acc), parts)
    w = parts.weight.to(acc)
    w = (
        w - parts.total(w.detach().sum(0)) / parts.classes
    )  # as the shifted form: a common offset would only cost digits
    squares = w.square().sum(1, keepdim=True)
    p = e / (1 + parts.shared(rest))
    r = rest / (1 + rest)
    rows = torch.cat([w, squares], 1)  # (O_r, I + 1)
    of_top = F.pad(rows, (0, 0, 0, 1))[y.squeeze(1)]
    sums = parts.total(torch.cat([p @ rows, torch.where(own, of_top, 0.0)], 1))
    fan_in = w.shape[1]
    mean, mean_square = sums[:, :fan_in], sums[:, fan_in]
    w_top, square_top = sums[:, fan_in + 1 : -1], sums[:, -1]
    u = mean - r * w_top
    return at_least_zero(mean_square - r[:, 0] * square_top - 2 * (w_top * u).sum(1) - u.square().sum(1))


def total_variance(logits: Tensor, parts: Split) -> Tensor:
    """sum_s p_s (1 - p_s) of every row, (N,), for logits (N, O_r) split by class."""
    e, rest, _, _ = _shifted(logits.to(accumulation_dtype(logits)), parts)
    p = e / (1 + parts.shared(rest))
    return parts.total((p * (1 - p)).sum(1)) + (rest / (1 + rest).square())[:, 0]
