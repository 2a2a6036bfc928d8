"""One training run: a fixed number of steps, and what is kept of it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fam_ext
from studies.data import Split
from studies.methods import Method, Training, learning_rate
from studies.networks import NETWORKS, layer_names

BINS = 15  # of the expected calibration error


class Budget(NamedTuple):
    steps: int = 800
    batch: int = 50


def criterion_for(data: Split) -> nn.CrossEntropyLoss | nn.MSELoss:
    return nn.MSELoss() if data.train_y.is_floating_point() else nn.CrossEntropyLoss()


def train(
    method: Method, network: str, hyper: Mapping[str, float], data: Split, seed: int, budget: Budget
) -> tuple[nn.Module, float]:
    """(the trained model, milliseconds of a step: the median over the last half of the run).

    The seed decides the initial weights and the batches, the same for every method.
    """
    torch.manual_seed(seed)
    model = NETWORKS[network](data.train_x.shape[1:], data.classes)
    plain = model.state_dict()
    model = NETWORKS[network](data.train_x.shape[1:], data.classes, method.noise(hyper))
    model.load_state_dict(plain)  # dropout and noise have no parameters
    optimizer, step = method.build(Training(model, hyper, seed, criterion_for(data)))
    order = torch.Generator().manual_seed(seed)
    samples = len(data.train_y)
    batch = min(budget.batch, samples)
    times, waiting = [], torch.empty(0, dtype=torch.int64)
    for number in range(budget.steps):
        if len(waiting) < batch:
            waiting = torch.randperm(samples, generator=order)
        chosen, waiting = waiting[:batch], waiting[batch:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(hyper["lr"], number, budget.steps)
        x, y = data.train_x[chosen], data.train_y[chosen]
        start = time.perf_counter()
        step(x, y)
        times.append(time.perf_counter() - start)
    later = sorted(times[len(times) // 2 :])
    return model.eval(), 1e3 * later[len(later) // 2]


@torch.no_grad()
def scores(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood and expected calibration error; nan where the model diverged.

    Of a regression the accuracy is R^2, the share of the variance that is explained (-1 where the model diverged), and the
    likelihood's place has the mean squared error.
    """
    logits = torch.cat([model(part) for part in x.split(1000)])
    if not bool(logits.isfinite().all()):
        return {"accuracy": -1.0 if y.is_floating_point() else math.nan, "nll": math.nan, "ece": math.nan}
    if y.is_floating_point():
        error = F.mse_loss(logits, y)
        return {
            "accuracy": float(1 - error / y.var(correction=0)),
            "nll": float(error),
            "ece": math.nan,
        }
    p, predicted = logits.softmax(1).max(1)
    right = (predicted == y).float()
    bins = (p * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS).index_add(0, bins, right - p)
    return {
        "accuracy": float(right.mean()),
        "nll": float(F.cross_entropy(logits, y)),
        "ece": float(gaps.abs().sum() / len(y)),
    }


def kappas(model: nn.Module, data: Split) -> dict[str, float]:
    """Relative flatness of the head and the sum of its Gauss-Newton form over all layers, on the training data."""
    criterion = criterion_for(data)
    batches = list(zip(data.train_x.split(500), data.train_y.split(500), strict=True))
    names = layer_names(model, "all")
    options: dict[str, Any] = {"progress": False, "generator": torch.Generator().manual_seed(0)}
    head = fam_ext.measure(model, batches, names[-1], criterion, ["neuronwise"], **options)
    every = fam_ext.measure(
        model,
        batches,
        names,
        criterion,
        ["neuronwise"],
        curvature="ggn",
        method="hutchinson",
        probes=4,
        **options,
    )
    return {"kappa_head": head.values["neuronwise"], "kappa_all": sum(every.values.values())}


def run(
    method: Method,
    network: str,
    hyper: Mapping[str, float],
    data: Split,
    seed: int,
    budget: Budget,
    test: bool,
) -> dict[str, float]:
    """Numbers of one run. The test part is looked at only where `test` is set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, milliseconds = train(method, network, hyper, data, seed, budget)
        parts = {"train": (data.train_x, data.train_y), "validation": (data.validation_x, data.validation_y)}
        if test:
            parts["test"] = (data.test_x, data.test_y)
        numbers = {
            f"{part}_{name}": value
            for part, xy in parts.items()
            for name, value in scores(model, *xy).items()
        }
        numbers["step_ms"] = milliseconds
        if test and math.isfinite(numbers["train_nll"]):
            numbers.update(kappas(model, data))
    return numbers
