"""Settings of FAMLoss and RelativeFlatness, validated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fam_ext import _checks
from fam_ext.errors import NoClosedForm, UnsupportedError
from fam_ext.loss_hessians import LossHessian
from fam_ext.ops.backends import BACKENDS

MEASURES = ("neuronwise", "layerwise", "trace")
EIGENVALUE_MEASURES = ("layerwise_eigenvalue", "neuronwise_eigenvalue")
_CURVATURES = ("hessian", "ggn", "fisher", "empirical_fisher")

_METHODS = ("auto", "closed_form", "exact", "hutchinson", "finite_difference", "noise")
WITHOUT_DRAWS = ("closed_form", "exact")


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
    hold_statistics: bool | None = None
    closed_form: bool = field(init=False)
    """Whether a closed form may be taken."""

    def __post_init__(self) -> None:
        caller = self.caller
        _checks.check_choice(caller, "measure", self.measure, MEASURES + EIGENVALUE_MEASURES)
        _checks.check_choice(caller, "curvature", self.curvature, _CURVATURES)
        _checks.check_choice(caller, "method", self.method, _METHODS)
        may = self.method in ("auto", "closed_form") and self.measure in MEASURES
        may = may and self.curvature != "empirical_fisher"  # another matrix than the Hessian on a head, too
        object.__setattr__(self, "closed_form", may)
        self._check_combinations()
        _checks.check_positive(caller, "probes", self.probes)
        if self.normalize is not None and not (
            isinstance(self.normalize, str) and self.normalize == "fan_in"
        ):
            _checks.bad_value(caller, "normalize", "None or 'fan_in'", self.normalize)
        number = isinstance(self.norm_power, (int, float)) and not isinstance(self.norm_power, bool)
        if not number or self.norm_power not in (1, 2):
            _checks.bad_value(caller, "norm_power", "1 or 2", self.norm_power)
        if self.norm_power == 1 and self.measure not in ("layerwise", "layerwise_eigenvalue"):
            _checks.bad_value(
                caller, "norm_power", f"2 with measure={self.measure!r} (1 is for the layerwise ones)", 1
            )
        _checks.check_bool(caller, "curvature_grad", self.curvature_grad)
        if not self.curvature_grad and self.measure == "trace":
            _checks.bad_value(
                caller,
                "curvature_grad",
                "True with measure='trace': nothing else depends on the weight",
                False,
            )
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            _checks.bad_type(caller, "generator", "a torch.Generator or None", self.generator)
        for name in ("per_sample_probes", "hold_statistics"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                _checks.bad_type(caller, name, "None, True or False", value)
        _checks.check_positive(caller, "max_bytes", self.max_bytes)
        if self.hold_statistics and self.curvature == "hessian":
            _checks.bad_value(caller, "hold_statistics", "None with curvature='hessian'", True)
        _checks.check_choice(caller, "backend", self.backend, BACKENDS)
        self._check_used()

    def _check_combinations(self) -> None:
        """Refuse a method that has no meaning for the measure or the curvature."""
        eigenvalue = self.measure in EIGENVALUE_MEASURES
        if eigenvalue and self.method not in ("auto", "exact"):
            _checks.bad_value(
                self.caller, "method", f"'auto' or 'exact' with measure={self.measure!r}", self.method
            )
        if self.method == "noise":
            self._check_noise()
        if self.method == "finite_difference" and not self.curvature_grad:
            _checks.bad_value(self.caller, "curvature_grad", "True with method='finite_difference'", False)
        if self.curvature == "hessian" or (self.sampled and self.curvature == "ggn" and not eigenvalue):
            return
        if self.curvature == "empirical_fisher" and self.method == "closed_form":
            _checks.bad_value(self.caller, "method", "'auto' with curvature='empirical_fisher'", self.method)
        if eigenvalue or self.method not in ("auto", "closed_form"):
            _checks.bad_value(
                self.caller,
                "curvature",
                f"'hessian' with measure={self.measure!r} and method={self.method!r}",
                self.curvature,
            )

    def _check_used(self) -> None:
        """Refuse what a method that was asked for cannot use. "auto" may leave an argument unused."""
        if self.probes != 1 and self.method in WITHOUT_DRAWS:
            expected = f"left out with method={self.method!r}, which draws nothing (method='hutchinson' does)"
            _checks.bad_value(self.caller, "probes", expected, self.probes)
        if self.per_sample_probes is not None and self.method == "closed_form":
            expected = "None with method='closed_form', which draws nothing"
            _checks.bad_value(self.caller, "per_sample_probes", expected, self.per_sample_probes)
        if self.per_sample_probes and self.method == "finite_difference":
            expected = "None or False with method='finite_difference', which moves one weight for all samples"
            _checks.bad_value(self.caller, "per_sample_probes", expected, True)
        if self.per_sample_probes is False and self.curvature != "hessian":
            expected = f"None or True with curvature={self.curvature!r}, which is taken by sample"
            _checks.bad_value(self.caller, "per_sample_probes", expected, False)
        if self.backend != "auto" and self.method in ("noise", "finite_difference"):
            expected = f"'auto' with method={self.method!r}, which calls no operation that has backends"
            _checks.bad_value(self.caller, "backend", expected, self.backend)

    @property
    def sampled(self) -> bool:
        """Whether a positive form is estimated from `probes` random factors of the criterion's Hessian."""
        return self.curvature == "fisher" or (self.curvature == "ggn" and self.method == "hutchinson")

    def _check_noise(self) -> None:
        """Refuse what a perturbed loss does not have."""
        if self.caller != "FAMLoss":
            raise UnsupportedError(
                f"{self.caller}: method='noise' perturbs the network so that its expected loss holds the term, and has no value "
                "of kappa; use method='hutchinson' or curvature='fisher'"
            )
        for argument, value, expected, way_out in (
            ("measure", self.measure, "neuronwise", "the noise is that of kappa"),
            ("curvature", self.curvature, "hessian", "the noise's term is the Hessian's"),
            ("curvature_grad", self.curvature_grad, True, "the gradient flows through the perturbed network"),
            ("probes", self.probes, 1, "each step has one draw; a larger batch averages more"),
        ):
            if value != expected:
                _checks.bad_value(
                    self.caller, argument, f"{expected!r} with method='noise' ({way_out})", value
                )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "generator": None,
        }  # generators cannot be pickled: a copy draws from its own

    def check_fisher(self, loss_hessian: LossHessian) -> None:
        if self.curvature in ("fisher", "empirical_fisher") and not loss_hessian.fisher():
            raise NoClosedForm(
                f"{self.caller}: curvature={self.curvature!r} is defined for cross-entropy without class weights and label "
                "smoothing, BCE without weights, and Poisson NLL, where it equals the Hessian; use curvature='ggn' with "
                "method='hutchinson', which costs as much"
            )
