"""The measures of one layer over a data set. What fam_ext.measurement knows of the inside of RelativeFlatness stands here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext.hessian.eigenvalue import largest_direction, neuronwise
from fam_ext.loss.relative_flatness import RelativeFlatness
from fam_ext.measurement.batches import DataSet, Mean
from fam_ext.measurement.features import feature_scale
from fam_ext.measurement.report import LayerRow
from fam_ext.options import EIGENVALUE_MEASURES, MEASURES, WITHOUT_DRAWS

LARGEST = "largest_eigenvalue"
EIGENVALUES = (*EIGENVALUE_MEASURES, LARGEST)
_ESTIMATES = (
    "hutchinson",
    "finite_difference",
    "fisher",
)  # methods of a plan whose values have a standard error


class Term:
    """One measure that is linear in the Hessian, averaged over batches and, for estimates, over rounds of the data set."""

    def __init__(self, flatness: RelativeFlatness) -> None:
        self.flatness = flatness
        self.mean = Mean()
        self.rounds: list[float] = []
        self.variances: list[float] = []
        self._variance = 0.0
        self.estimated = False  # in any batch
        self.plans: dict[str, None] = {}  # of the batches: a set with an order

    def _is_estimate(self) -> bool:
        plan: Any = self.flatness.plan
        if plan is not None and plan.method in ("ggn", "empirical_fisher"):  # exact without draws
            return "random" in plan.reason or (plan.method == "empirical_fisher" and plan.products > 1)
        return plan is not None and plan.method in _ESTIMATES

    def add(self, data: DataSet, inputs: Any, outputs: Any, targets: Any) -> None:
        """Take in a batch. The value is formed without a graph of its own."""
        weight = self.mean.add(data.criterion, outputs, targets, 0.0)
        if not weight:
            return
        arguments = {}
        if self.flatness.options.method == "finite_difference":
            arguments["closure"] = lambda: data.criterion(data.call(inputs), targets)
        with torch.no_grad():
            value = self.flatness(outputs, targets, **arguments)
        error = self.flatness.standard_error
        self.plans[str(self.flatness.plan)] = None
        self.mean.sum += weight * float(value)
        if self._is_estimate():
            self.estimated = True
            self._variance += float("nan") if error is None else (weight * float(error)) ** 2

    def end_round(self) -> None:
        """The data set has been gone through."""
        self.rounds.append(self.mean.value())
        self.variances.append(self._variance / self.mean.total**2 if self.mean.total else float("nan"))
        self.mean, self._variance = Mean(), 0.0

    @property
    def value(self) -> float:
        return sum(self.rounds) / len(self.rounds)

    @property
    def standard_error(self) -> float | None:
        """None where the value is exact, nan for a single probe."""
        return float(sum(self.variances) ** 0.5) / len(self.rounds) if self.estimated else None

    def enough(self, rtol: float) -> bool:
        error = self.standard_error
        return error is None or not error > rtol * abs(self.value)  # nan will not become better


class LayerTerms:
    """All measures of one layer."""

    def __init__(
        self, module: nn.Module, measures: Sequence[str], criterion: Any, norm_power: int, **options: Any
    ) -> None:
        def flatness(name: str) -> RelativeFlatness:
            power = norm_power if name.startswith("layerwise") else 2
            own = {"measure": name, "norm_power": power, **options}
            if options["method"] in WITHOUT_DRAWS:
                del own["probes"]
            return RelativeFlatness(criterion, module, **own)

        self.module, self.measures = module, measures
        self.terms = {name: Term(flatness(name)) for name in measures if name in MEASURES}
        self.eigenvalues = {
            name: flatness("layerwise_eigenvalue" if name == LARGEST else name)
            for name in measures
            if name in EIGENVALUES
        }
        for of_eigenvalue in self.eigenvalues.values():
            of_eigenvalue.detach()  # until its turn
        self.taken_eigenvalues: dict[str, float] = {}

    def _all(self) -> list[RelativeFlatness]:
        return [*(term.flatness for term in self.terms.values()), *self.eigenvalues.values()]

    def detach(self) -> None:
        """Take all hooks off the layer."""
        for flatness in self._all():
            flatness.detach()

    def normalize_features(self, go_through: Callable[[], None]) -> None:
        """Measure for features divided by their scale over the data set."""
        part: Any = self._all()[0].terms[0]
        scale = feature_scale(part.module, part.layer, go_through, part.weight().dtype)
        for flatness in self._all():
            flatness.terms[0].scale = scale

    def unfinished(self, rtol: float | None, max_probes: int, probes: int) -> list[Term]:
        """Terms whose standard error is to become smaller; the hooks of the others are taken off."""
        left = []
        for term in self.terms.values():
            done = rtol is None or term.enough(rtol) or (len(term.rounds) + 1) * probes > max_probes
            if done:
                term.flatness.detach()
            else:
                left.append(term)
        return left

    def take_eigenvalues(self, data: DataSet, counts: bool) -> None:
        """Those of the mean Hessian, not the mean of eigenvalues: every product goes over the data set."""
        for name, flatness in self.eigenvalues.items():
            if not counts:
                self.taken_eigenvalues[name] = float("nan")
                continue
            with flatness:
                self.taken_eigenvalues[name] = _eigenvalue(name, flatness, data)

    def row(self) -> LayerRow:
        values = {**{name: term.value for name, term in self.terms.items()}, **self.taken_eigenvalues}
        errors = {name: term.standard_error for name, term in self.terms.items()}
        plans = {name: "; ".join(term.plans) or "no target counts" for name, term in self.terms.items()}
        plans |= dict.fromkeys(self.eigenvalues, "lanczos, products over the data set")
        for name, term in self.terms.items():
            if len(term.rounds) > 1:
                plans[name] += f" ({len(term.rounds)} rounds)"
        return LayerRow(
            repr(self.module),
            {name: values[name] for name in self.measures},
            {name: errors.get(name) for name in self.measures},
            {name: plans[name] for name in self.measures},
        )


def _eigenvalue(name: str, flatness: RelativeFlatness, data: DataSet) -> float:
    part: Any = flatness.terms[0]
    weight = part.weight()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def product(direction: Tensor) -> Tensor:
        mean, result = Mean(), torch.zeros_like(weight)
        for inputs, targets in data.pairs():
            outputs = data.call(inputs)
            share = mean.add(data.criterion, outputs, targets, 0.0)
            if share:
                result += share * flatness.weight_product(data.criterion(outputs, targets), direction)
        return result / mean.total

    def largest(neuron: int | None = None) -> Tensor:
        direction = largest_direction(product, weight, neuron)
        return (direction * product(direction)).sum()

    if name == LARGEST:
        return float(largest())
    if name == "layerwise_eigenvalue":
        return float(part.scale_to_measure(largest(), weight))
    squares = weight.square().sum(2).flatten()
    blocks = torch.stack([largest(neuron) for neuron in range(len(squares))])
    return float(part.scale_to_measure(neuronwise(squares, blocks), weight))
