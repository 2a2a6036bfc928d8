"""fam_ext.measure: relative flatness and companion measures of a trained model over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fam_ext import _checks
from fam_ext.layers.find import find_layers
from fam_ext.measurement import companions
from fam_ext.measurement.batches import NAME, DataSet, Mean, mode
from fam_ext.measurement.layer_terms import EIGENVALUES, LARGEST, LayerTerms
from fam_ext.measurement.report import Report
from fam_ext.options import MEASURES, WITHOUT_DRAWS, Options


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    layer: str | nn.Module | Sequence[str | nn.Module] | None,
    criterion: Any,
    measures: Sequence[str] = ("neuronwise", "layerwise", "trace"),
    *,
    progress: bool = True,
    training: bool = False,
    normalize_features: bool = False,
    method: str = "auto",
    curvature: str = "hessian",
    probes: int = 8,
    rtol: float | None = None,
    max_probes: int = 1024,
    norm_power: int = 2,
    normalize: str | None = None,
    radius: float = 0.05,
    adaptive_radius: float = 0.5,
    max_bytes: int = 2**30,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Report:
    r"""Relative flatness of layers of a trained model, and companion measures, for the loss over a whole data set.

    The Hessian of the data set's loss is the mean of the batches' Hessians, weighted as the criterion weights their losses (by
    samples, or by the class weights of valid targets; summed for reduction="sum"): unequal batches count right. Where every
    target is ignored the mean is over nothing, and all numbers are nan, as torch's mean loss is.

    Args:
        model: called as model(inputs), model(*inputs) for a tuple or list, or model(**inputs) for a mapping; it returns what the
            criterion takes (wrap one whose output is an object with logits).
        batches: an iterable of pairs (inputs, targets) on the model's device, a DataLoader say; iterated again for each product
            of an eigenvalue, for normalize_features, with rtol, and for the measures of the whole network.
        layer: a name, a glob, a module of the model, several of these, or None for its head. Each layer that they match
            has a row in the report.
        criterion: as for FAMLoss; reduction "mean" or "sum" (one that does not tell its reduction counts as a mean over samples).
        measures: of each layer "neuronwise", "layerwise", "trace", "layerwise_eigenvalue", "neuronwise_eigenvalue" (see FAMLoss)
            and "largest_eigenvalue", lambda_max of the layer's Hessian; of the whole network "fisher_rao", "pac_bayes_sharpness",
            "sam_sharpness", "adaptive_sam_sharpness" and "weight_norm" (definitions: fam_ext.measurement.companions).
        progress: show a progress bar where tqdm is installed.
        training: False measures in evaluation mode. Modes are restored; in training mode normalization statistics move.
        normalize_features: measure a layer after its features are divided by a scale (by input channel) and its weight is
            multiplied with it: the same function (Petzka et al. 2021). The scale is the feature's standard deviation over the
            data set. A feature that is constant and not zero is divided by its absolute value. A feature that is zero for every
            sample (a dead ReLU) has scale 0, and its weights count as zero: they do not matter to the function.
        probes: random draws per batch for an estimate; also the draws of "pac_bayes_sharpness".
        rtol: go through the data set again, with new draws, until an estimate's standard error is at most rtol times its value,
            or `max_probes` draws per batch are used up. Needs probes of 2 or more.
        radius, adaptive_radius: the ball's radius of "sam_sharpness" and "adaptive_sam_sharpness".
        max_bytes: bound on what Hessian products take at a time, beside the forward pass and its gradient. Products leave no
            graph here; as many are formed together as fit.
        method, curvature, norm_power, normalize, generator, backend: as for FAMLoss.

    Returns:
        Report: a row of values and standard errors for each layer, the network's measures, the loss; as_dict(), table(),
        to_csv(), plot() and repr.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is no batch.
        UnsupportedError: a right number cannot be given, or one Hessian product takes more than max_bytes.
        MemoryError (on a GPU torch.OutOfMemoryError): the machine's memory did not do.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> data = [(torch.randn(16, 4), torch.randint(0, 3, (16,))) for _ in range(2)]
    >>> report = measure(model, data, "*", nn.CrossEntropyLoss(), ["neuronwise", "weight_norm"], progress=False)
    >>> list(report.values)
    ['0/neuronwise', '2/neuronwise', 'weight_norm']
    """
    names = _checked(measures)
    own = [name for name in names if name not in companions.NETWORK]
    _checks.check_positive(NAME, "probes", probes)
    for name in own or ["layerwise"]:  # all of them before anything is computed
        measured = "layerwise_eigenvalue" if name == LARGEST else name
        power = norm_power if measured.startswith("layerwise") else 2
        draws = 1 if method in WITHOUT_DRAWS else probes
        Options(
            NAME, measured, curvature, method, draws, normalize, power, True, generator, backend, None, max_bytes
        )  # fmt: skip
    if isinstance(norm_power, bool) or norm_power not in (1, 2):
        _checks.bad_value(NAME, "norm_power", "1 or 2", norm_power)
    for argument, flag in (
        ("progress", progress),
        ("training", training),
        ("normalize_features", normalize_features),
    ):
        _checks.check_bool(NAME, argument, flag)
    if rtol is not None and not (isinstance(rtol, float) and rtol > 0):
        _checks.bad_value(NAME, "rtol", "None or a positive float", rtol)
    if rtol is not None and probes < 2:
        _checks.bad_value(NAME, "probes", "2 or more with rtol (one draw has no standard error)", probes)
    _checks.check_positive(NAME, "max_probes", max_probes)
    companions.check_radius(NAME, radius=radius, adaptive_radius=adaptive_radius)
    if not callable(criterion):
        _checks.bad_type(NAME, "criterion", "a loss module or function", criterion)
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        _checks.bad_type(NAME, "batches", "an iterable of pairs (inputs, targets)", batches)
    again = normalize_features or rtol is not None or any(name not in MEASURES for name in names)
    if again and isinstance(batches, Iterator):  # the second pass would meet nothing
        _checks.bad_value(
            NAME, "batches", "a collection, not an iterator: it is gone through several times", batches
        )
    data = DataSet(model, batches, criterion, progress)
    chosen = set(find_layers(NAME, model, layer))
    modules = {name: module for name, module in model.named_modules() if module in chosen}
    options: dict[str, Any] = {
        "method": method, "curvature": curvature, "probes": probes, "normalize": normalize, "generator": generator,
        "backend": backend, "max_bytes": max_bytes,
    }  # fmt: skip
    layers: dict[str, LayerTerms] = {}
    try:
        for name, module in modules.items():
            layers[name] = LayerTerms(module, own, criterion, norm_power, **options)
        with mode(model, training), data.counting_passes(), _memory(method, probes, max_bytes):
            totals = _by_layer(data, layers, own, normalize_features, rtol, max_probes, probes)
            network = {
                name: companions.NETWORK[name](data, radius, adaptive_radius, probes, generator)
                if totals.counts or name == "weight_norm"
                else float("nan")
                for name in names
                if name in companions.NETWORK
            }
    finally:
        for terms in layers.values():
            terms.detach()
    rows = {name: terms.row() for name, terms in layers.items()} if own else {}
    return Report(rows, network, totals.loss, totals.samples, totals.batches)


def _checked(measures: Sequence[str]) -> tuple[str, ...]:
    names = tuple(measures) if isinstance(measures, Iterable) and not isinstance(measures, str) else ()
    if not names:
        _checks.bad_type(NAME, "measures", "a sequence of names", measures)
    for name in names:
        _checks.check_choice(NAME, "measures", name, (*MEASURES, *EIGENVALUES, *companions.NETWORK))
    return names


class _Totals:
    """Loss, samples and batches of the data set."""

    def __init__(self) -> None:
        self.mean = Mean()
        self.samples = self.batches = 0

    def add(self, criterion: Any, outputs: Any, targets: Any) -> None:
        loss = criterion(outputs, targets)
        if loss.dim() != 0:
            _checks.bad_value(NAME, "criterion", "one with reduction 'mean' or 'sum'", criterion)
        self.mean.add(criterion, outputs, targets, float(loss.detach()))
        self.samples += len(targets)
        self.batches += 1

    @property
    def counts(self) -> bool:
        """Whether any target does."""
        return self.mean.total != 0

    @property
    def loss(self) -> float:
        return self.mean.value()


def _by_layer(
    data: DataSet,
    layers: dict[str, LayerTerms],
    own: Sequence[str],
    normalize_features: bool,
    rtol: float | None,
    max_probes: int,
    probes: int,
) -> _Totals:
    """Take the measures of all layers, with shared passes over the data set."""

    def go_through() -> None:
        for inputs, _ in data.pairs():
            data.call(inputs)

    totals = _Totals()
    if normalize_features and own:
        for terms in layers.values():
            terms.normalize_features(go_through)
    first = True
    active = [term for terms in layers.values() for term in terms.terms.values()]
    while True:
        for inputs, targets in data.pairs(NAME if first else f"{NAME}, more probes"):
            outputs = data.call(inputs)
            if first:
                totals.add(data.criterion, outputs, targets)
            for term in active:
                term.add(data, inputs, outputs, targets)
        if totals.batches == 0:
            _checks.bad_value(NAME, "batches", "at least one batch", "none")
        for term in active:
            term.end_round()
        active = [t for terms in layers.values() for t in terms.unfinished(rtol, max_probes, probes)]
        if not active:
            break
        first = False
    for terms in layers.values():
        terms.take_eigenvalues(data, totals.counts)
    return totals


@contextmanager
def _memory(method: str, probes: int, max_bytes: int) -> Iterator[None]:
    """Name the settings that decide about memory where there was not enough of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_device = isinstance(error, torch.OutOfMemoryError)
        if not (on_device or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        kind = torch.OutOfMemoryError if on_device else MemoryError
        raise kind(
            f"{NAME}: out of memory with method={method!r}, probes={probes} and max_bytes={max_bytes}: lower max_bytes (Hessian "
            "products are taken in smaller chunks) or probes, use smaller batches, or method='hutchinson' in place of 'exact'. "
            f"The allocator said: {error}"
        ) from error
