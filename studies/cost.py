"""What a training step of each method costs: steps of all methods by turns, each one's ratio to plain training, peak memory."""

from __future__ import annotations

import csv
import functools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

from memory import peak_megabytes

from studies.comparison import write_csv
from studies.data import load, split
from studies.methods import METHODS, Step, Training
from studies.networks import NETWORKS


class Cost(NamedTuple):
    """Milliseconds of a step (median), the median ratio to the baseline's step of the same round, peak memory of a step.

    Memory is what is taken beyond weights, momentum and whatever else stays from step to step.
    """

    network: str
    method: str
    step_ms: float
    ratio: float
    peak_mb: float = math.nan


def measure(
    data: str, network: str, methods: Sequence[str], baseline: str, rounds: int, batch: int = 50
) -> list[Cost]:
    """Time `rounds` rounds, in each of which every method takes a step on the same batch."""
    raw = split(load(data), 0, 0.0, 500)
    steps: dict[str, Step] = {}
    for name in dict.fromkeys((baseline, *methods)):
        method = METHODS[name]
        hyper = {**method.configuration(0), "lr": 1e-3}
        torch.manual_seed(0)
        model = NETWORKS[network](raw.train_x.shape[1:], raw.classes, method.noise(hyper))
        steps[name] = method.build(Training(model, hyper, 0))[1]
    times: dict[str, list[float]] = {name: [] for name in steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in tqdm(range(rounds + 5), desc=f"cost {network}", unit="round"):
            first = turn * batch % (len(raw.train_y) - batch)
            x, y = raw.train_x[first : first + batch], raw.train_y[first : first + batch]
            for name, step in steps.items():
                start = time.perf_counter()
                step(x, y)
                if turn >= 5:  # the first steps build what later ones keep
                    times[name].append(time.perf_counter() - start)
        peaks = {name: peak_megabytes(functools.partial(step, x, y)) for name, step in steps.items()}
    return [
        Cost(
            network,
            name,
            1e3 * statistics.median(values),
            statistics.median(v / b for v, b in zip(values, times[baseline], strict=True)),
            peaks[name],
        )
        for name, values in times.items()
    ]


def read(folder: Path) -> list[Cost]:
    """What `write` has written, if anything."""
    path = folder / "cost.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            Cost(r["network"], r["method"], float(r["step_ms"]), float(r["ratio"]), float(r["peak_mb"]))
            for r in csv.DictReader(file)
        ]


def write(folder: Path, costs: Sequence[Cost]) -> None:
    write_csv(folder / "cost.csv", Cost._fields, costs)


def table(costs: Sequence[Cost]) -> str:
    """A Markdown table."""
    networks = list(dict.fromkeys(cost.network for cost in costs))
    rows = [f"| method | {' | '.join(networks)} |", "|---" * (len(networks) + 1) + "|"]
    for method in dict.fromkeys(cost.method for cost in costs):
        cells = [
            f"{c.ratio:.2f} ({c.step_ms:.2f} ms, {c.peak_mb:.1f} MB)"
            for n in networks
            for c in costs
            if (c.network, c.method) == (n, method)
        ]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "### Time of a step over plain training, and its peak memory\n\n" + "\n".join(rows)
