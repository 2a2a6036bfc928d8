"""The correlation study: many networks, their measures, and their generalization gaps; the rescaling attack."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fam_ext
from studies import figures
from studies.data import load, split
from studies.methods import METHODS
from studies.networks import layer_names
from studies.training import Budget, scores, train

LAYER_MEASURES = ("neuronwise", "layerwise", "trace", "largest_eigenvalue")
NETWORK_MEASURES = (
    "fisher_rao",
    "pac_bayes_sharpness",
    "sam_sharpness",
    "adaptive_sam_sharpness",
    "weight_norm",
)
NUMBERS = (*LAYER_MEASURES, *NETWORK_MEASURES, "train_loss", "gap", "train_accuracy", "test_accuracy")
FACTOR = 5.0  # of the rescaling attack
SETS = ("mnist", "satimage")
OWN = {"dropout": {"rate": 0.3}, "sam": {"rho": 0.1}, "fam_all_fisher": {"strength": 0.03}}
SAMPLES = 500
FITTED = 0.8  # training accuracy of a network that counts


def grid(quick: bool) -> list[dict[str, Any]]:
    """Every network's hyper-parameters: 2 sets x 4 methods x 2 batch sizes x 3 rates x 3 weight decays."""
    values: dict[str, tuple[Any, ...]] = {
        "data": ("digits",) if quick else SETS,
        "method": ("weight_decay", "fam_all_fisher") if quick else ("weight_decay", *OWN),
        "batch": (25, 100),
        "lr": (0.1,) if quick else (0.02, 0.05, 0.1),
        "weight_decay": (0.0,) if quick else (0.0, 1e-3, 1e-2),
    }
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def measured(model: nn.Module, data: Any) -> dict[str, float]:
    """Measures of the hidden layer before the head, and of the network, on the training data."""
    batches = [(data.train_x, data.train_y)]
    layer = layer_names(model, "all")[-2]
    names = (*LAYER_MEASURES, *NETWORK_MEASURES)
    generator = torch.Generator().manual_seed(0)
    report = fam_ext.measure(
        model, batches, layer, nn.CrossEntropyLoss(), names, progress=False, probes=8, generator=generator
    )
    return report.values


def one(setting: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train one network; its measures, its gap, and how its measures change when its layers are rescaled."""
    data = split(load(setting["data"]), 0, 0.0, SAMPLES)
    hyper = {
        "lr": setting["lr"], "weight_decay": setting["weight_decay"], **OWN.get(setting["method"], {}),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = train(
            METHODS[setting["method"]], "mlp", hyper, data, 0, Budget(steps, int(setting["batch"]))
        )
        train_scores = scores(model, data.train_x, data.train_y)
        test_scores = scores(model, data.test_x, data.test_y)
        numbers = dict.fromkeys((*LAYER_MEASURES, *NETWORK_MEASURES), math.nan)
        attacked = dict(numbers)
        if math.isfinite(train_scores["nll"]):  # a network that diverged has no measures
            numbers = measured(model, data)
            pairs = list(itertools.pairwise(layer_names(model, "all")))
            attacked = measured(fam_ext.rescale(model, pairs[-1:], FACTOR, inputs=data.train_x[:10]), data)
    return {
        **setting,
        **numbers,
        "train_loss": train_scores["nll"],
        "gap": test_scores["nll"] - train_scores["nll"],
        "train_accuracy": train_scores["accuracy"],
        "test_accuracy": test_scores["accuracy"],
        **{f"rescaled_{name}": value for name, value in attacked.items()},
    }


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["data"], row["method"], float(row["batch"]), float(row["lr"]), float(row["weight_decay"]))


def missing(path: Path, quick: bool) -> list[dict[str, Any]]:
    """Settings that have no row yet."""
    done = {_key(row) for row in read(path)}
    return [setting for setting in grid(quick) if _key(setting) not in done]


def add(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def trained(path: Path, quick: bool, steps: int) -> Iterator[None]:
    """Train what is missing, one network a turn."""
    for setting in missing(path, quick):
        add(path, one(setting, steps))
        yield


def _learnt(row: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether all numbers are there, and the training data were fitted: gaps compare networks of like training loss."""
    return float(row["train_accuracy"]) >= FITTED and not any(
        math.isnan(float(row[n])) for n in (*names, "gap")
    )


def _correlations(rows: list[dict[str, Any]]) -> dict[str, tuple[list[dict[str, Any]], int, Any]]:
    """By set: the networks that learnt, the number of all, and fam_ext.correlation's result; sets with few are left out."""
    names, by_set = (*LAYER_MEASURES, *NETWORK_MEASURES), {}
    for data in sorted({row["data"] for row in rows}):
        trained_here = [row for row in rows if row["data"] == data]
        chosen = [row for row in trained_here if _learnt(row, names)]
        if len(chosen) >= 3:
            measures = {name: [float(row[name]) for row in chosen] for name in names}
            of_gap, groups = [float(row["gap"]) for row in chosen], [row["method"] for row in chosen]
            by_set[data] = (chosen, len(trained_here), fam_ext.correlation(measures, of_gap, groups))
    return by_set


def _changes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The median ratio of each measure after the attack to before."""
    return {
        name: statistics.median(
            float(row[f"rescaled_{name}"]) / float(row[name])
            for row in rows
            if float(row[name]) and not math.isnan(float(row[name]))
        )
        for name in (*LAYER_MEASURES, *NETWORK_MEASURES)
    }


def summary(path: Path, folder: Path) -> str:
    """Correlations by set, within methods, written as CSV and plot; and what the attack does to each measure."""
    rows = read(path)
    text = []
    for data, (chosen, trained_here, result) in _correlations(rows).items():
        result.to_csv(folder / f"correlation_{data}.csv")
        measures = {
            name: [float(row[name]) for row in chosen] for name in (*LAYER_MEASURES, *NETWORK_MEASURES)
        }
        groups = [row["method"] for row in chosen]
        figures.gap_plot(measures, [float(r["gap"]) for r in chosen], groups, folder / f"gaps_{data}.png")
        text.append(
            f"{data}, {len(chosen)} networks ({trained_here - len(chosen)} that did not learn are left out)\n\n```\n"
            f"{result.table()}\n```"
        )
    if rows:
        lines = "\n".join(f"  {name:24s} {value:10.4g}" for name, value in _changes(rows).items())
        text.append(f"layers rescaled by {FACTOR:g}, median ratio of each measure\n\n```\n{lines}\n```")
    return "\n\n".join(text)


def table(path: Path) -> str:
    """A Markdown table: Kendall's tau of each measure with its interval, by set and within methods, and the attack's ratio."""
    rows = read(path)
    results = {data: result for data, (_, _, result) in _correlations(rows).items()}
    heads = [f"{data}{within}" for data in results for within in (", tau", ", within methods")]
    lines = [f"| measure | {' | '.join(heads)} | after rescaling |", "|---" * (len(heads) + 2) + "|"]
    for name, ratio in _changes(rows).items():
        cells = []
        for result in results.values():
            row = result[name]
            cells += [
                "" if c is None else f"{c.value:+.2f} [{c.low:+.2f}, {c.high:+.2f}]"
                for c in (row.kendall, row.kendall_within)
            ]
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.3g} |")
    return "\n".join(lines)
