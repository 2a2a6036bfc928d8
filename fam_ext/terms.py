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
from fam_ext.errors import NotAHead
from fam_ext.heads import EIGENVALUE_MEASURES, MEASURES, Layer, element_traces, row_traces, weight_factor
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
    per_sample_probes: bool | None = None
    max_bytes: int = 2**30
    hold_statistics: bool = False

    def __post_init__(self) -> None:
        caller = self.caller
        _checks.check_choice(caller, "measure", self.measure, MEASURES + EIGENVALUE_MEASURES)
        _checks.check_choice(caller, "curvature", self.curvature, _CURVATURES)
        _checks.check_choice(caller, "method", self.method, _METHODS)
        self._check_combinations()
        if isinstance(self.probes, bool) or not isinstance(self.probes, int):
            _checks.bad_type(caller, "probes", "an integer", self.probes)
        if self.probes < 1:
            _checks.bad_value(caller, "probes", "at least 1", self.probes)
        if self.normalize not in (None, "fan_in"):
            _checks.bad_value(caller, "normalize", "None or 'fan_in'", self.normalize)
        if isinstance(self.norm_power, bool) or self.norm_power not in (1, 2):
            _checks.bad_value(caller, "norm_power", "1 or 2", self.norm_power)
        if self.norm_power == 1 and self.measure not in ("layerwise", "layerwise_eigenvalue"):
            _checks.bad_value(
                caller, "norm_power", f"2 with measure={self.measure!r} (1 is for the layerwise ones)", 1
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
        if self.per_sample_probes not in (None, True, False):
            _checks.bad_type(caller, "per_sample_probes", "None, True or False", self.per_sample_probes)
        if isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int) or self.max_bytes < 1:
            _checks.bad_value(caller, "max_bytes", "a positive integer", self.max_bytes)
        if not isinstance(self.hold_statistics, bool):
            _checks.bad_type(caller, "hold_statistics", "True or False", self.hold_statistics)
        if self.hold_statistics and self.curvature == "hessian":
            _checks.bad_value(caller, "hold_statistics", "False with curvature='hessian'", True)
        _checks.check_choice(caller, "backend", self.backend, BACKENDS)

    def _check_combinations(self) -> None:
        """Refuse a method that has no meaning for the measure or the curvature."""
        eigenvalue = self.measure in EIGENVALUE_MEASURES
        if eigenvalue and self.method not in ("auto", "exact"):
            _checks.bad_value(
                self.caller, "method", f"'auto' or 'exact' with measure={self.measure!r}", self.method
            )
        if self.method == "finite_difference" and not self.curvature_grad:
            _checks.bad_value(self.caller, "curvature_grad", "True with method='finite_difference'", False)
        if self.curvature == "hessian":
            return
        if eigenvalue or self.method not in ("auto", "closed_form"):
            _checks.bad_value(
                self.caller,
                "curvature",
                f"'hessian' with measure={self.measure!r} and method={self.method!r}",
                self.curvature,
            )

    @property
    def closed_form(self) -> bool:
        """Whether a closed form may serve."""
        return self.method in ("auto", "closed_form") and self.measure in MEASURES

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "generator": None,
        }  # generators cannot be pickled: a copy draws from its own

    def check_bound(self, bound: Bound) -> None:
        if self.curvature == "fisher" and not bound.fisher():
            raise NotAHead(
                f"{self.caller}: curvature='fisher' is defined for cross-entropy without class weights and label smoothing, BCE "
                "without weights, and Poisson NLL, where it equals the Hessian; use curvature='hessian'"
            )


def check_class_dim(caller: str, bound: Bound, class_dim: int | None, outputs: Tensor) -> None:
    """Check that cross-entropy's class dimension is the one that holds the layer's neurons."""
    expected = 0 if outputs.dim() == 1 else 1
    if bound.softmax and class_dim != expected:
        raise NotAHead(
            f"{caller}: cross-entropy takes dimension {expected} of its input, of shape {tuple(outputs.shape)}, for the classes, "
            f"but the layer's outputs lie in dimension {class_dim}; flatten the rows to (N, O) or move the classes to dimension 1"
        )


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
