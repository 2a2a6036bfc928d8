"""A model and its data set: batches, each weighted as the criterion counts it, and the modes of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks, criteria
from fam_ext.errors import UnsupportedError
from fam_ext.loss_hessians import LossHessian

NAME = "measure"


class DataSet:
    """What is measured: a model, the batches it is called with, and the criterion."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], criterion: Any, progress: bool) -> None:
        self.model, self.batches, self.criterion, self.progress = model, batches, criterion, progress
        self._passes: Any = None

    @contextmanager
    def counting_passes(self) -> Iterator[None]:
        """A progress bar of the passes that have none of their own, where they take more than two seconds together."""
        tqdm = _tqdm() if self.progress else None
        if tqdm is None:
            yield
            return
        with tqdm(desc="passes over the data", unit="pass", delay=2, leave=False) as self._passes:
            yield
        self._passes = None

    def pairs(self, show: str = "") -> Iterator[tuple[Any, Any]]:
        """(inputs, targets) of every batch; `show` names a progress bar."""
        if not show and self._passes is not None:
            self._passes.update()
        for batch in _shown(self.batches, show) if show and self.progress else self.batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                _checks.bad_type(NAME, "batches", "an iterable of pairs (inputs, targets)", batch)
            yield batch[0], batch[1]

    def call(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        if isinstance(inputs, (tuple, list)):
            return self.model(*inputs)
        return self.model(inputs)

    def loss(self) -> float:
        """The loss over the data set, without gradients."""
        mean = Mean()
        with torch.no_grad():
            for inputs, targets in self.pairs():
                outputs = self.call(inputs)
                mean.add(self.criterion, outputs, targets, float(self.criterion(outputs, targets)))
        return mean.value()

    def gradient(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of the data set's loss, by parameter."""
        sums: list[Any] = [torch.zeros_like(p) for p in parameters]
        mean = Mean()
        for inputs, targets in self.pairs():
            outputs = self.call(inputs)
            loss = self.criterion(outputs, targets)
            weight = mean.add(self.criterion, outputs, targets, 0.0)
            if weight == 0:
                continue
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            sums = [s if g is None else s + weight * g for s, g in zip(sums, gradients, strict=True)]
        return [s / mean.total for s in sums]


class Mean:
    """A number's mean over batches, weighted as the criterion weights their losses; or their sum for reduction="sum"."""

    def __init__(self) -> None:
        self.sum = self.total = 0.0

    def add(self, criterion: Any, outputs: Any, targets: Any, value: float) -> float:
        """Take in a batch's number; returns the batch's weight, 0 where every target is ignored (`value` is not used then)."""
        weight, total = batch_weight(criterion, outputs, targets)
        self.total = self.total + total if total is not None else 1.0
        if weight:
            self.sum += weight * value
        return weight

    def value(self) -> float:
        """nan where nothing counts, as torch has it for the mean over no target."""
        return self.sum / self.total if self.total else float("nan")


def batch_weight(criterion: Any, outputs: Any, targets: Any) -> tuple[float, float | None]:
    """(weight of a batch's loss in the data set's, its share of the total); the total is None for sums, where it is 1."""
    loss_hessian, outputs = bound(criterion, outputs, targets)
    reduction = loss_hessian.reduction if loss_hessian else getattr(criterion, "reduction", "mean")
    if reduction == "sum":
        return 1.0, None
    size = float(loss_hessian.denominator(outputs) if loss_hessian else len(targets))
    return size, size


def bound(criterion: Any, outputs: Any, targets: Any) -> tuple[LossHessian | None, Any]:
    """(the criterion with its targets, None where it is not known; the outputs as it takes them)."""
    inside = criteria.flattened(criterion)
    if inside is not None:
        criterion = inside.func
        outputs, (targets,) = inside.arguments(outputs, (targets,))
    try:
        return criteria.read(NAME, criterion)(targets), outputs
    except UnsupportedError:
        return None, outputs


def _shown(batches: Iterable[Any], name: str) -> Iterable[Any]:
    tqdm = _tqdm()
    if tqdm is None:
        return batches
    shown: Iterable[Any] = tqdm(
        batches, desc=name, total=len(batches) if isinstance(batches, Sized) else None
    )
    return shown


def _tqdm() -> Any:
    """None where it is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in one mode, every module's own restored afterwards; gradients enabled."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, before in modes.items():
            module.training = before
