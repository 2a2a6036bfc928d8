"""Relative flatness of a trained model over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks, loss_hessians
from fam_ext.errors import UnsupportedError
from fam_ext.hessian.eigenvalue import largest_direction
from fam_ext.layers.find import find_layers
from fam_ext.loss.layer_criterion import Part
from fam_ext.loss.relative_flatness import RelativeFlatness
from fam_ext.measurement.features import feature_scale
from fam_ext.options import EIGENVALUE_MEASURES, MEASURES

_NAME = "measure"


@dataclass(frozen=True)
class Report:
    """What `measure` found: numbers by measure, for the loss over the whole data set."""

    values: dict[str, float]
    standard_errors: dict[str, float | None]
    """None where the value is exact."""
    loss: float
    samples: int
    batches: int
    layer: str
    plans: dict[str, str] = field(default_factory=dict)
    """How each measure was computed, and why."""

    def as_dict(self) -> dict[str, float]:
        """Flat, for loggers: loss, samples, each measure, and <measure>_standard_error where it was estimated."""
        errors = {f"{k}_standard_error": e for k, e in self.standard_errors.items() if e is not None}
        return {"loss": self.loss, "samples": float(self.samples), **self.values, **errors}

    def table(self) -> str:
        """A text table."""
        rows = [("measure", "value", "standard error", "computed")]
        for name, value in self.values.items():
            error = self.standard_errors[name]
            rows.append(
                (name, f"{value:.6g}", "exact" if error is None else f"{error:.2g}", self.plans.get(name, ""))
            )
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        head = f"{self.layer}: loss {self.loss:.6g} over {self.samples} samples in {self.batches} batches"
        return f"{head}\n{self.table()}"


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    layer: str | nn.Module | None,
    criterion: Any,
    measures: Sequence[str] = ("neuronwise", "layerwise", "trace"),
    *,
    progress: bool = True,
    training: bool = False,
    normalize_features: bool = False,
    method: str = "auto",
    curvature: str = "hessian",
    probes: int = 8,
    norm_power: int = 2,
    normalize: str | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Report:
    r"""Relative flatness of one layer of a trained model, for the loss over a whole data set.

    The Hessian of the data set's loss is the mean of the batches' Hessians, weighted as the criterion weights their losses (by
    samples, or by the class weights of valid targets; summed for reduction="sum"): unequal batches count right.

    Args:
        model: called as model(inputs), model(*inputs) for a tuple or list, or model(**inputs) for a mapping; it returns what the
            criterion takes (wrap one whose output is an object with logits).
        batches: an iterable of pairs (inputs, targets) on the model's device, a DataLoader say; iterated again for each product
            of an eigenvalue measure and for normalize_features.
        layer: a name, a glob, a module of the model, or None for its last Linear or Conv layer.
        criterion: as for FAMLoss; reduction "mean" or "sum" (one that does not tell its reduction counts as a mean over samples).
        measures: of "neuronwise", "layerwise", "trace", "layerwise_eigenvalue", "neuronwise_eigenvalue" (see FAMLoss).
        progress: show a progress bar where tqdm is installed.
        training: False measures in evaluation mode. Modes are restored; in training mode normalization statistics move.
        normalize_features: measure the layer after its features are divided by a scale (by input channel) and its weight is
            multiplied with it: the same function (Petzka et al. 2021). The scale is the feature's standard deviation over the
            data set. A feature that is constant and not zero is divided by its absolute value. A feature that is zero for every
            sample (a dead ReLU) has scale 0, and its weights count as zero: they do not matter to the function.
        method, curvature, probes, norm_power, normalize, generator, backend: as for FAMLoss.

    Returns:
        Report: values, standard errors where estimated, the loss; as_dict(), table() and repr.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is no batch.
        UnsupportedError: a right number cannot be given.
    """
    names = tuple(measures)
    if not names or isinstance(measures, str):
        _checks.bad_type(_NAME, "measures", "a sequence of names", measures)
    for name in names:
        _checks.check_choice(_NAME, "measures", name, MEASURES + EIGENVALUE_MEASURES)
    again = normalize_features or any(name in EIGENVALUE_MEASURES for name in names)
    if again and isinstance(batches, Iterator):  # the second pass would find nothing
        _checks.bad_value(
            _NAME, "batches", "a collection, not an iterator: it is gone through several times", batches
        )
    (module,) = _one(find_layers(_NAME, model, layer))
    options: dict[str, Any] = {
        "method": method, "curvature": curvature, "probes": probes, "normalize": normalize, "generator": generator,
        "backend": backend,
    }  # fmt: skip
    terms = {
        name: RelativeFlatness(
            criterion,
            module,
            measure=name,
            norm_power=norm_power if name.startswith("layerwise") else 2,
            **options,
        )
        for name in names
    }
    linear = {name: term for name, term in terms.items() if name in MEASURES}
    try:
        with _mode(model, training):
            if normalize_features:
                scale = _feature_scale(model, terms[names[0]].parts[0], batches)
                for term in terms.values():
                    term.parts[0].scale = scale
            sums = _Sums()
            for inputs, targets in _pairs(_shown(batches, progress)):
                sums.add(_call(model, inputs), targets, criterion, linear)
            values, errors = sums.finish()
            for name in names:
                if name in EIGENVALUE_MEASURES:
                    values[name] = _eigenvalue(terms[name], model, batches, criterion)
                    errors[name] = None
    finally:
        for term in terms.values():
            term.detach()
    plans = {name: str(term.plan) for name, term in terms.items() if term.plan is not None}
    return Report(
        {name: values[name] for name in names},
        {name: errors[name] for name in names},
        sums.loss / sums.total,
        sums.samples,
        sums.batches,
        repr(module),
        plans,
    )


def _one(layers: list[nn.Module]) -> list[nn.Module]:
    if len(layers) != 1:
        _checks.bad_value(_NAME, "layer", "one layer", f"{len(layers)} layers")
    return layers


class _Sums:
    """Sums over batches, each weighted as its loss counts in the data set's."""

    def __init__(self) -> None:
        self.loss = self.total = 0.0
        self.samples = self.batches = 0
        self.values: dict[str, float] = {}
        self.variances: dict[str, float | None] = {}

    def add(self, outputs: Any, targets: Any, criterion: Any, terms: Mapping[str, RelativeFlatness]) -> None:
        loss = criterion(outputs, targets)
        if loss.dim() != 0:
            _checks.bad_value(_NAME, "criterion", "one with reduction 'mean' or 'sum'", criterion)
        weight, total = _weight(criterion, outputs, targets)
        self.samples += len(targets)
        self.batches += 1
        self.total = self.total + total if total is not None else 1.0
        if weight == 0:  # every target is ignored: the mean over none is nan
            return
        self.loss += weight * float(loss.detach())
        for name, term in terms.items():
            value = term(outputs, targets)
            self.values[name] = self.values.get(name, 0.0) + weight * float(value.detach())
            if term.standard_error is None:
                self.variances.setdefault(name, None)
                continue
            variance = (weight * float(term.standard_error)) ** 2
            self.variances[name] = (self.variances.get(name) or 0.0) + variance

    def finish(self) -> tuple[dict[str, float], dict[str, float | None]]:
        if self.batches == 0:
            _checks.bad_value(_NAME, "batches", "at least one batch", "none")
        values = {name: value / self.total for name, value in self.values.items()}
        errors = {n: None if v is None else v**0.5 / self.total for n, v in self.variances.items()}
        return values, errors


def _weight(criterion: Any, outputs: Any, targets: Any) -> tuple[float, float | None]:
    """(weight of a batch's loss in the data set's, its share of the total); the total is None for sums, where it is 1."""
    try:
        bound: loss_hessians.Bound | None = loss_hessians.read(_NAME, criterion)(targets)
    except UnsupportedError:
        bound = None
    reduction = bound.reduction if bound is not None else getattr(criterion, "reduction", "mean")
    if reduction == "sum":
        return 1.0, None
    if isinstance(bound, loss_hessians.CrossEntropy) and not targets.is_floating_point():
        valid = targets != bound.ignore_index
        count = (
            valid.sum()
            if bound.weight is None
            else bound.weight[torch.where(valid, targets, 0)].mul(valid).sum()
        )
        return float(count), float(count)
    if isinstance(bound, loss_hessians.MeanSquaredError) and bound.weight is not None:
        return float(bound.weight.sum()), float(bound.weight.sum())
    elements = bound is not None and not isinstance(bound, loss_hessians.CrossEntropy)
    size = float(outputs.numel() if elements else len(targets))
    return size, size


def _eigenvalue(term: RelativeFlatness, model: nn.Module, batches: Iterable[Any], criterion: Any) -> float:
    """Of the mean Hessian, not the mean of eigenvalues: every product goes over the data set."""
    part = term.parts[0]
    weight = part.weight()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def product(direction: Tensor) -> Tensor:
        total, result = 0.0, torch.zeros_like(weight)
        for inputs, targets in _pairs(batches):
            outputs = _call(model, inputs)
            share, counted = _weight(criterion, outputs, targets)
            total = total + counted if counted is not None else 1.0
            if share:
                result += share * term.weight_product(criterion(outputs, targets), direction)
        return result / total

    def largest(neuron: int | None = None) -> Tensor:
        direction = largest_direction(product, weight, neuron)
        return (direction * product(direction)).sum()

    if term.options.measure == "layerwise_eigenvalue":
        return float(part.general.finish(largest(), weight))
    squares = weight.square().sum(2).flatten()
    blocks = torch.stack([largest(neuron) for neuron in range(len(squares))])
    return float(part.general.finish((squares * blocks).sum(), weight))


def _pairs(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            _checks.bad_type(_NAME, "batches", "an iterable of pairs (inputs, targets)", batch)
        yield batch[0], batch[1]


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    shown: Iterable[Any] = tqdm(
        batches, desc=_NAME, total=len(batches) if isinstance(batches, Sized) else None
    )
    return shown


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in one mode, every module's own restored afterwards; gradients enabled."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _feature_scale(model: nn.Module, part: Part, batches: Iterable[Any]) -> Tensor:
    seen = 0

    def go_through() -> None:
        nonlocal seen
        for inputs, _ in _pairs(batches):
            _call(model, inputs)
            seen += 1
        if seen == 0:
            _checks.bad_value(_NAME, "batches", "at least one batch", "none")

    return feature_scale(part.module, part.layer, go_through, part.weight().dtype)
