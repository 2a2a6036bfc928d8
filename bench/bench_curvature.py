"""The price of kappa for a layer inside a network: exact, estimated, Gauss-Newton, finite differences, and the usual ways.

Two layers: the 512 -> 256 hidden layer of a perceptron on 128 samples (rows independent after it), and the last 3x3 convolution,
256 -> 256 at 8x8, of a small residual network on 32 samples with batch_norm in training mode (samples interact); GELU, since
differences of the loss smooth the kinks of ReLU. A step is a training step without the optimizer, its time divided by that of
the plain step; kappa's gradient reaches all parameters. "value only" is a forward pass and kappa, no backward. Estimates are
checked against many probes, exact values against float64.

Baselines: Hutchinson by double backward over all parameters, as PyHessian does it (Yao et al. 2020), here with the same
weighted probes; torch.func.hessian of the layer holds (O I)^2 numbers: 64 GiB for the perceptron, 1.3 TiB for the convolution.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Settings, Variant, interleaved, machine_line, quantiles, thread_count
from memory import peak_megabytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness
from fam_ext.hessian.hutchinson import gram_root

OP = "curvature"
SHARE = 0  # minutes of its own: only when asked for
STRENGTH = 1e-3


class Block(nn.Module):
    """A residual network of one block, whose last convolution is measured."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norms[0](self.stem(x)))
        y = F.gelu(self.norms[1](self.conv1(x)))
        y = F.gelu(self.norms[2](self.conv2(y)) + x)
        result: Tensor = self.fc(y.mean((2, 3)))
        return result


@dataclass(frozen=True)
class Problem:
    """A network, the layer that is measured, and a batch."""

    name: str
    model: nn.Module
    layer: nn.Module
    x: Tensor
    y: Tensor
    ways: dict[str, dict[str, Any]]

    def plain(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)


HUTCHINSON = {
    "hutchinson, 1 probe": {"method": "hutchinson", "probes": 1},
    "hutchinson, 8 probes": {"method": "hutchinson", "probes": 8},
    "finite difference, 1 probe": {"method": "finite_difference", "probes": 1},
}


def perceptron() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 10))
    ways = {
        "exact, 256 products": {"method": "exact", "max_bytes": 2**34},
        **HUTCHINSON,
        "ggn": {"curvature": "ggn"},
    }
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    return Problem("hidden layer 512 -> 256, B=128", model, model[2], x, y, ways)


def residual() -> Problem:
    torch.manual_seed(0)
    model = Block()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    ways = {**HUTCHINSON, "ggn": {"curvature": "ggn", "hold_statistics": True}}
    return Problem("3x3 convolution 256 -> 256 at 8x8, B=32", model, model.conv2, x, y, ways)


def ours(problem: Problem, options: dict[str, Any]) -> Callable[[], list[Tensor]]:
    criterion = FAMLoss(nn.CrossEntropyLoss(), problem.layer, STRENGTH, **options)
    closure = {"closure": problem.plain} if options.get("method") == "finite_difference" else {}

    def step() -> list[Tensor]:
        criterion(problem.model(problem.x), problem.y, **closure).backward()
        problem.model.zero_grad()
        return [criterion.last.flatness]

    return step


def value_only(problem: Problem, options: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """kappa without its gradient, after a forward pass, and no training step."""
    measure = RelativeFlatness(nn.CrossEntropyLoss(), problem.layer, curvature_grad=False, **options)

    def step() -> list[Tensor]:
        return [measure(problem.model(problem.x), problem.y).detach()]

    return step


def double_backward(problem: Problem) -> Callable[[], list[Tensor]]:
    """PyHessian's procedure: the gradient of every parameter with its graph, then a product with the probe."""
    parameters = list(problem.model.parameters())
    index = next(k for k, p in enumerate(parameters) if p is problem.layer.weight)

    def step() -> list[Tensor]:
        loss = problem.plain()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        weight = parameters[index].flatten(1)
        root = gram_root(weight.unsqueeze(0), weight.shape[1])[0]
        noise = torch.randint(0, 2, (root.shape[1], weight.shape[1])).mul_(2).sub_(1).to(weight)
        direction = (root @ noise).reshape(parameters[index].shape)
        zeros = [torch.zeros_like(p) for p in parameters]
        zeros[index] = direction
        products = torch.autograd.grad(gradients, parameters, zeros, create_graph=True)
        kappa = (direction * products[index]).sum()
        (loss + STRENGTH * kappa).backward()
        problem.model.zero_grad()
        return [kappa.detach()]

    return step


def plain_step(problem: Problem) -> list[Tensor]:
    loss = problem.plain()
    loss.backward()
    problem.model.zero_grad()
    return [loss.detach()]


def spread(step: Callable[[], list[Tensor]], draws: int) -> tuple[float, float]:
    """(mean, standard deviation) of an estimate over repeated steps."""
    values = torch.stack([step()[0] for _ in range(draws)]).double()
    return float(values.mean()), float(values.std())


def run(console: Console, settings: Settings) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for make in (perceptron, residual):
        problem = make()
        steps: dict[str, Callable[[], list[Tensor]]] = {"plain": lambda problem=problem: plain_step(problem)}
        for name, options in problem.ways.items():
            steps[name] = ours(problem, options)
        for name, options in problem.ways.items():
            if options.get("method") != "finite_difference":  # holds nothing constant
                steps[f"value only: {name}"] = value_only(problem, options)
        steps["double backward, 1 probe"] = double_backward(problem)
        draws = 12 if settings.quick else 60
        reference, error = _reference(problem, draws)
        with thread_count(settings.threads[-1]):
            for name, step in steps.items():
                rows.append(_describe(problem, name, step, draws, reference, error))
            variants = [Variant(name, step, "plain", math.inf) for name, step in steps.items()]
            times = interleaved(variants, 5 if settings.quick else 15)
        for row in rows:
            if row["case"] == problem.name:
                _add_times(row, times)
        _show(console, problem.name, [r for r in rows if r["case"] == problem.name])
    _write(settings, rows)
    return rows


def _reference(problem: Problem, draws: int) -> tuple[float, float]:
    """kappa of the float64 network, exact where that is possible, and its standard error."""
    exact = any(o.get("method") == "exact" for o in problem.ways.values())
    options: dict[str, Any] = (
        {"method": "exact", "max_bytes": 2**36} if exact else {"method": "hutchinson", "probes": 1}
    )
    criterion = FAMLoss(nn.CrossEntropyLoss(), problem.layer, STRENGTH, **options)
    model, x = problem.model.double(), problem.x.double()
    values = []
    for _ in range(1 if exact else 2 * draws):
        criterion(model(x), problem.y)
        values.append(float(criterion.last.flatness))
    problem.model.float()
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def _describe(
    problem: Problem, name: str, step: Callable[[], list[Tensor]], draws: int, reference: float, error: float
) -> dict[str, Any]:
    """Checked against the reference before any time is taken; with the memory of a run of its own."""
    row: dict[str, Any] = {"case": problem.name, "variant": name, "peak_mb": peak_megabytes(step)}
    if name == "plain":
        return row
    estimate = not name.removeprefix("value only: ").startswith(("exact", "ggn"))
    mean, deviation = spread(step, draws if estimate else 1)
    if not name.endswith("ggn"):  # another quantity where the tail is not linear
        allowed = 5 * math.hypot(deviation / math.sqrt(draws), error) if estimate else 1e-4 * abs(reference)
        if not abs(mean - reference) <= allowed + 2e-3 * abs(reference):
            raise RuntimeError(
                f"{problem.name}, {name}: {mean:.6g} instead of {reference:.6g} within {allowed:.2g}"
            )
    row["relative_std"] = deviation / abs(reference) if estimate else 0.0
    return row


def _add_times(row: dict[str, Any], times: dict[str, list[float]]) -> None:
    own = times[row["variant"]]
    ratios = [a / b for a, b in zip(own, times["plain"], strict=True)]
    p20, median, p80 = quantiles(own)
    row.update(median_ms=1e3 * median, p20_ms=1e3 * p20, p80_ms=1e3 * p80, ratio=quantiles(ratios)[1])
    if row.get("relative_std"):
        row["relative_error_after_1s"] = row["relative_std"] * math.sqrt(median)


def _show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("step", "ms (p20-p80)", "x plain", "peak MB", "relative std", "relative error after 1 s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for r in rows:
        std = r.get("relative_std")
        table.add_row(
            r["variant"],
            f"{r['median_ms']:.2f} ({r['p20_ms']:.1f}-{r['p80_ms']:.1f})",
            f"{r['ratio']:.2f}",
            f"{r['peak_mb']:.0f}",
            "" if std is None else f"{std:.2f}" if std else "exact",
            f"{r['relative_error_after_1s']:.3f}" if std else "",
        )
    console.print(table)


def _write(settings: Settings, rows: list[dict[str, Any]]) -> None:
    path = settings.out / f"{OP}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, "machine"])
        writer.writeheader()
        writer.writerows({**row, "machine": machine_line()} for row in rows)
