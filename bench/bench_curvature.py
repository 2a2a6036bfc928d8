"""The price of kappa for a layer inside a network: exact, estimated, Gauss-Newton, Fisher, noise, differences, the usual ways.

Two layers: the 512 -> 256 hidden layer of a perceptron on 128 samples (rows independent after it), and the last 3x3 convolution,
256 -> 256 at 8x8, of a small residual network on 32 samples with batch_norm in training mode (samples interact); GELU, since
differences of the loss smooth the kinks of ReLU. A step is a training step without the optimizer, its time divided by that of
the plain step; kappa's gradient reaches all parameters. "value only" is a forward pass and kappa, no backward.

Checked before any time is taken: exact values and the batch's own labels against float64; estimates of the Hessian's kappa
against many probes; draws of labels against Gauss-Newton's value, which is their mean; noise, where samples do not interact, by
the mean of (loss - plain loss) / strength, whose spread the table shows. A way that this version of the package cannot take is
named, with the reason.

Baselines: Hutchinson by double backward over all parameters, as PyHessian does it (Yao et al. 2020), here with the same
weighted probes; torch.func.hessian of the layer holds (O I)^2 numbers: 64 GiB for the perceptron, 1.3 TiB for the convolution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from case import Build, Case, Settings, Variant, results
from machine import making_tensors, thread_count
from report import ratio_text, table, time_text, write_rows
from rich.console import Console
from timing import interleaved
from torch import Tensor, nn

import fam_ext
from fam_ext.hessian.hutchinson import gram_root

OP = "curvature"
SHARE = 0  # minutes of its own: only when asked for
STRENGTH = 1e-3
DRAWS = 60
PLAIN = "plain"
Step = Callable[[], tuple[Tensor, ...]]


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
    """A network, the layer that is measured, a batch, and whether samples interact after the layer."""

    name: str
    model: nn.Module
    layer: nn.Module
    x: Tensor
    y: Tensor
    interact: bool

    def copy(self, dtype: torch.dtype = torch.float32) -> Problem:
        """With a network of its own: noise in one way's layer must not reach another way."""
        model, layer = copy.deepcopy((self.model, self.layer))
        return replace(self, model=model.to(dtype), layer=layer, x=self.x.to(dtype))

    def plain(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)


HUTCHINSON = "hutchinson, 1 probe"
GGN, FISHER, EMPIRICAL, NOISE = "ggn", "fisher, 1 draw", "empirical fisher", "noise"
EXACT = "exact, 256 products"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {"method": "exact", "max_bytes": 2**34},
    HUTCHINSON: {"method": "hutchinson", "probes": 1},
    "hutchinson, 8 probes": {"method": "hutchinson", "probes": 8},
    "finite difference, 1 probe": {"method": "finite_difference", "probes": 1},
    GGN: {"curvature": "ggn"},
    FISHER: {"curvature": "fisher", "probes": 1},
    EMPIRICAL: {"curvature": "empirical_fisher"},
    NOISE: {"method": "noise"},
}
DETERMINISTIC = (EXACT, GGN, EMPIRICAL)


def perceptron() -> Problem:
    torch.manual_seed(0)
    with making_tensors():
        model = nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 10)
        )
        x, y = torch.randn(128, 784), torch.randint(10, (128,))
    return Problem("hidden layer 512 -> 256, B=128", model, model[2], x, y, False)


def residual() -> Problem:
    torch.manual_seed(0)
    with making_tensors():
        model = Block()
        x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Problem("3x3 convolution 256 -> 256 at 8x8, B=32", model, model.conv2, x, y, True)


def options_of(problem: Problem, way: str) -> dict[str, Any]:
    """Where samples interact, Gauss-Newton's forms take the batch statistics as constants."""
    held = {"hold_statistics": True} if problem.interact and "curvature" in WAYS[way] else {}
    return {**WAYS[way], **held}


def ours(problem: Problem, way: str) -> Step:
    """A training step; returns kappa, or for noise what it adds to the loss, over strength."""
    without = problem.plain().detach() if way == NOISE else torch.zeros(())  # before the layer has its noise
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), problem.layer, STRENGTH, **options_of(problem, way))
    closure = {"closure": problem.plain} if WAYS[way].get("method") == "finite_difference" else {}

    def step() -> tuple[Tensor, ...]:
        loss = criterion(problem.model(problem.x), problem.y, **closure)
        loss.backward()
        problem.model.zero_grad()
        return ((loss.detach() - without) / STRENGTH if way == NOISE else criterion.last.flatness,)

    return step


def value_only(problem: Problem, way: str) -> Step:
    """kappa without its gradient, after a forward pass, and no training step."""
    options = options_of(problem, way)
    measure = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), problem.layer, curvature_grad=False, **options)
    return lambda: (measure(problem.model(problem.x), problem.y).detach(),)


def double_backward(problem: Problem) -> Step:
    """PyHessian's procedure: the gradient of every parameter with its graph, then a product with the probe."""
    parameters = list(problem.model.parameters())
    index = next(k for k, p in enumerate(parameters) if p is problem.layer.weight)

    def step() -> tuple[Tensor, ...]:
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
        return (kappa.detach(),)

    return step


def plain_step(problem: Problem) -> tuple[Tensor, ...]:
    loss = problem.plain()
    loss.backward()
    problem.model.zero_grad()
    return (loss.detach(),)


def steps(problem: Problem) -> tuple[dict[str, Step], dict[str, str]]:
    """(a step of every way, why others are not available)."""
    made: dict[str, Step] = {PLAIN: lambda: plain_step(problem)}
    missing: dict[str, str] = {}
    for name in WAYS:
        if name == EXACT and problem.interact:
            continue  # 2304 x 256 products
        forms = [(name, ours)]
        if name not in (
            NOISE,
            "finite difference, 1 probe",
        ):  # no value without a step; holds nothing constant
            forms.append((f"value only: {name}", value_only))
        for title, make in forms:
            try:
                step = make(problem.copy(), name)
                step()
            except (ValueError, fam_ext.UnsupportedError) as error:
                missing[title] = str(error)
                continue
            made[title] = step
    made["double backward, 1 probe"] = double_backward(problem)
    return made, missing


def cases(quick: bool = False) -> list[Build]:
    def build(make: Callable[[], Problem]) -> Case:
        problem = make()
        own = steps(problem)[0].items()
        return Case(problem.name, [Variant(n, s, PLAIN, math.inf, s(), thin=n == EXACT) for n, s in own])

    return [
        lambda compiled, make=make: build(make)
        for make in ((perceptron,) if quick else (perceptron, residual))
    ]


def spread(step: Step, draws: int) -> tuple[float, float]:
    """(mean, standard deviation) of what repeated steps return."""
    values = torch.stack([step()[0] for _ in range(draws)]).double()
    return float(values.mean()), float(values.std()) if draws > 1 else 0.0


def references(problem: Problem, draws: int) -> dict[str, tuple[float, float]]:
    """(value, standard error) of each kind of kappa in float64: the Hessian's, exact where samples do not interact."""
    double = problem.copy(torch.float64)
    mean, deviation = spread(
        ours(double, HUTCHINSON if problem.interact else EXACT), 2 * draws if problem.interact else 1
    )
    values = {
        "hessian": (mean, deviation / math.sqrt(2 * draws)),
        GGN: (float(ours(double, GGN)()[0]), 0.0),
    }
    if not problem.interact:
        values[EMPIRICAL] = (own_labels(double), 0.0)
    return values


def own_labels(problem: Problem) -> float:
    """1/B sum_i |phi_i|^2 |W^T g_i|^2 with g_i the gradient of sample i's loss at the output: one row for each sample."""
    kept: dict[str, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        kept.update(phi=args[0], z=output)

    with problem.layer.register_forward_hook(keep):
        loss = F.cross_entropy(problem.model(problem.x), problem.y, reduction="sum")
    (g,) = torch.autograd.grad(loss, kept["z"])
    shares = kept["phi"].square().sum(1) * (g @ problem.layer.weight).square().sum(1)
    return float(shares.detach().mean())


def check(
    problem: Problem, name: str, step: Step, values: dict[str, tuple[float, float]], draws: int
) -> float:
    """Relative standard deviation of a step's number, once its mean agrees with float64."""
    way = name.removeprefix("value only: ")
    kind = {GGN: GGN, FISHER: GGN, EMPIRICAL: EMPIRICAL}.get(way, "hessian")
    checked = kind in values and not (way == NOISE and problem.interact)
    if way in DETERMINISTIC:
        draws = 1
    elif way == NOISE and checked:
        draws *= 20  # one draw's deviation is more than the value
    mean, deviation = spread(step, draws)
    if checked:
        reference, error = values[kind]
        allowed = 5 * math.hypot(deviation / math.sqrt(draws), error) + 2e-3 * abs(reference)
        if not abs(mean - reference) <= allowed:
            raise RuntimeError(
                f"{problem.name}, {name}: {mean:.6g} instead of {reference:.6g} within {allowed:.2g}"
            )
    return deviation / abs(values["hessian"][0])


def run(console: Console, settings: Settings) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    draws = DRAWS // 5 if settings.quick else DRAWS
    for make in (perceptron, residual):
        problem = make()
        values = references(problem, draws)
        made, missing = steps(problem)
        with thread_count(settings.threads[-1]):
            stds = {
                name: check(problem, name, step, values, draws)
                for name, step in made.items()
                if name != PLAIN
            }
            variants = [Variant(name, step, PLAIN) for name, step in made.items()]
            times = interleaved(variants, 5 if settings.quick else 15)
            own = [
                vars(r) for r in results(OP, Case(problem.name, variants), times, dict.fromkeys(made, 0.0))
            ]
        for r in own:
            std = r["relative_std"] = stds.get(r["variant"], 0.0)
            r["relative_error_after_1s"] = std * math.sqrt(1e-6 * r["median_us"])
        _show(console, problem.name, own)
        for name, why in missing.items():
            console.print(f"{problem.name}: {name}: not available: {why}", soft_wrap=True)
        rows += own
    write_rows(settings.out / f"{OP}.csv", rows)
    return rows


def _show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    lines = []
    for r in rows:
        std, span = r["relative_std"], f"{time_text(r['p20_us'])}-{time_text(r['p80_us'])}"
        lines.append([
            r["variant"], f"{time_text(r['median_us'])} ({span})", ratio_text(r["ratio"]), f"{r['peak_mb']:.0f}",
            f"{std:.2g}" if std else "", f"{r['relative_error_after_1s']:.2g}" if std else "",
        ])  # fmt: skip
    columns = ["time (p20-p80)", "x plain", "peak MB", "relative std", "relative error after 1 s"]
    console.print(table(title, ["step"], columns, lines))
