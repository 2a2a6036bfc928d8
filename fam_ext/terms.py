"""The flatness term of one loss call: which numbers of which rows, reduced as the criterion reduces."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext.backends import BACKENDS
from fam_ext.criteria import Bound, CrossEntropy
from fam_ext.errors import UnsupportedError
from fam_ext.heads import LATER_MEASURES, MEASURES, Layer, element_traces, row_traces, weight_factor
from fam_ext.reference.coefficients import clear_rows

_CURVATURES = ("hessian", "ggn", "fisher")
_METHODS = ("auto", "closed_form", "exact", "hutchinson", "finite_difference")


@dataclass(frozen=True)
class Options:
    """What is measured and how; checked on construction."""

    caller: str
    measure: str = "neuronwise"
    curvature: str = "hessian"
    method: str = "auto"
    probes: int = 1
    normalize: str | None = None
    norm_power: int = 2
    curvature_grad: bool = True
    generator: torch.Generator | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        caller = self.caller
        _checks.check_choice(caller, "measure", self.measure, MEASURES + LATER_MEASURES)
        if self.measure in LATER_MEASURES:
            raise UnsupportedError(
                f"{caller}: measure={self.measure!r} is not available yet; use one of {', '.join(MEASURES)}"
            )
        _checks.check_choice(caller, "curvature", self.curvature, _CURVATURES)
        _checks.check_choice(caller, "method", self.method, _METHODS)
        if self.method not in ("auto", "closed_form"):
            raise UnsupportedError(
                f"{caller}: method={self.method!r} is not available yet; use 'auto' on a head"
            )
        if isinstance(self.probes, bool) or not isinstance(self.probes, int):
            _checks.bad_type(caller, "probes", "an integer", self.probes)
        if self.probes < 1:
            _checks.bad_value(caller, "probes", "at least 1", self.probes)
        if self.normalize not in (None, "fan_in"):
            _checks.bad_value(caller, "normalize", "None or 'fan_in'", self.normalize)
        if isinstance(self.norm_power, bool) or self.norm_power not in (1, 2):
            _checks.bad_value(caller, "norm_power", "1 or 2", self.norm_power)
        if self.norm_power == 1 and self.measure != "layerwise":
            _checks.bad_value(
                caller, "norm_power", f"2 with measure={self.measure!r} (1 is for 'layerwise')", 1
            )
        if not isinstance(self.curvature_grad, bool):
            _checks.bad_type(caller, "curvature_grad", "True or False", self.curvature_grad)
        if not self.curvature_grad and self.measure == "trace":
            _checks.bad_value(
                caller,
                "curvature_grad",
                "True with measure='trace': nothing else depends on the weight",
                False,
            )
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            _checks.bad_type(caller, "generator", "a torch.Generator or None", self.generator)
        _checks.check_choice(caller, "backend", self.backend, BACKENDS)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "generator": None,
        }  # generators cannot be pickled; the closed form draws nothing

    def check_bound(self, bound: Bound) -> None:
        if self.curvature == "fisher" and not bound.fisher():
            raise UnsupportedError(
                f"{self.caller}: curvature='fisher' is defined for cross-entropy without class weights and label smoothing, BCE "
                "without weights, and Poisson NLL, where it equals the Hessian; use curvature='hessian'"
            )


def outer_class_dim(caller: str, bound: Bound, class_dim: int | None, outputs: Tensor) -> int | None:
    """Check that cross-entropy's class dimension is the one that holds the layer's neurons."""
    expected = 0 if outputs.dim() == 1 else 1
    if bound.softmax and class_dim != expected:
        raise UnsupportedError(
            f"{caller}: cross-entropy takes dimension {expected} of its input, of shape {tuple(outputs.shape)}, for the classes, "
            f"but the layer's outputs lie in dimension {class_dim}; flatten the rows to (N, O) or move the classes to dimension 1"
        )
    return class_dim


def flatness(
    options: Options,
    layer: Layer,
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
    norms = layer.norms(features, options.backend)
    row_shape = tuple(s for d, s in enumerate(outputs.shape) if d != class_dim)
    layer_rows = norms.shape[0]
    if rows is not None:
        norms = norms[rows.flatten()]
    terms = _terms(
        options, bound, outputs, class_dim, norms.reshape(*row_shape, layer.groups), weight
    )  # (*row_shape[, O])
    factor = weight_factor(weight, options.measure, options.norm_power)
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
