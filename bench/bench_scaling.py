"""Cost against N, I, O, V, Q, the number of layers and of probes, with fitted exponents beside the counted law.

Each sweep changes one size. The exponent is a least-squares fit in logarithms over the larger half of the sizes; at small sizes
what a call costs at any size (dispatch, Python) flattens the curve. The law is the count of bench/counts.py at the same sizes,
fitted the same way. For layers and probes, both are of what is added to the plain step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import bench_head_cross_entropy as head
import bench_patch_sqnorm as patches
import numpy
import plots
import torch
from case import Settings, Variant
from counts import gram_direct, gram_gram, head_step, linear_cross_entropy_step, linear_step, patch_bytes
from machine import making_tensors, thread_count
from report import table, time_text, write_rows
from rich.console import Console
from timing import interleaved, quantiles, ratios
from torch import Tensor, nn

import fam_ext
from fam_ext.ops import backends

OP = "scaling"
SHARE = 1.5
STRENGTH = 1e-3
PLAIN = "plain"
HEAD_FUNCTIONS = (head.FUNCTIONS, "head_cross_entropy", "textbook, eager")


@dataclass(frozen=True)
class Sweep:
    """A size that changes, and cases of it: `build(size)` gives variants, `law(size)` the count of each by name.

    `added`: fit what a variant adds to the first one.
    """

    title: str
    letter: str
    sizes: Sequence[int]
    build: Callable[[int], list[Variant]]
    law: Callable[[int], dict[str, float]]
    added: bool = False


def head_variants(shape: Callable[[int], head.Shape], size: int) -> list[Variant]:
    variants = head.case(shape(size), compiled=False, others=False).variants
    return [v for v in variants if v.name in HEAD_FUNCTIONS]


def head_law(shape: Callable[[int], head.Shape], size: int) -> dict[str, float]:
    plain, added = linear_step(*shape(size)), head_step(*shape(size))
    three_products = 2 * plain  # the textbook form's, whatever the number of classes
    return dict(zip(HEAD_FUNCTIONS, (plain, added, three_products), strict=True))


def vocabulary_variants(shape: Callable[[int], head.Shape], size: int) -> list[Variant]:
    """As above, with linear_cross_entropy."""

    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return fam_ext.functional.linear_cross_entropy(x, w, t, bias=b, strength=head.STRENGTH)[0]

    variants = head_variants(shape, size)
    layer, x, t = head.inputs(shape(size))
    step = partial(head.step, loss, x, layer.weight, layer.bias, t)
    exact = next(v.exact for v in variants if v.name == "head_cross_entropy")
    return [*variants, Variant("linear_cross_entropy", step, head.FUNCTIONS, 1e-4, exact)]


def vocabulary_law(shape: Callable[[int], head.Shape], size: int) -> dict[str, float]:
    return {**head_law(shape, size), "linear_cross_entropy": linear_cross_entropy_step(*shape(size))}


def patch_variants(size: int) -> list[Variant]:
    """Images of size x size positions, 3x3 kernels."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, size, size, requires_grad=True)
    double, options = x.detach().double().requires_grad_(), (3, 1, 1, 1)
    upstream = torch.rand(4, 1, size, size)
    exact = patches.training(patches.by_convolution, double, options, upstream.double())
    names = ("native", "reference") if backends.native_loaded() else ("reference",)
    return [
        Variant(n, partial(patches.training, patches.on(n), x, options, upstream), "reference", 2e-6, exact)
        for n in names
    ]


def patch_law(size: int) -> dict[str, float]:
    moved = patch_bytes(4 * 32 * size * size, 4 * size * size, train=True)
    return {"native": moved, "reference": moved}


class Tokens(nn.Module):
    """A token layer, a nonlinearity, the mean over tokens, a head."""

    def __init__(self, width: int, outputs: int, classes: int) -> None:
        super().__init__()
        self.layer, self.fc = nn.Linear(width, outputs), nn.Linear(outputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.layer(x)).mean(1))


def perceptron(depth: int, width: int) -> nn.Sequential:
    blocks = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*blocks, nn.Linear(width, 10))


def network_variants(
    name: str, model: nn.Module, layers: Sequence[nn.Module], x: Tensor, y: Tensor, **options: object
) -> list[Variant]:
    """The plain step and FAM's, kappa checked against a float64 copy of the network that draws the same probes."""
    double = _double(model)
    index = {id(m): k for k, m in enumerate(model.modules())}
    twins = [list(double.modules())[index[id(m)]] for m in layers]

    def fam(own: nn.Module, chosen: Sequence[nn.Module], batch: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        generator = torch.Generator(batch.device).manual_seed(0)
        criterion = fam_ext.FAMLoss(
            nn.CrossEntropyLoss(), list(chosen), STRENGTH, generator=generator, **options
        )

        def step() -> tuple[Tensor, ...]:
            own.zero_grad()
            criterion(own(batch), y).backward()
            return (criterion.last.flatness,)

        return step

    def plain() -> tuple[Tensor, ...]:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return (loss.detach(),)

    exact = (nn.functional.cross_entropy(double(x.double()), y),)
    kappa = fam(double, twins, x.double())()
    return [
        Variant(PLAIN, plain, PLAIN, 1e-5, exact),
        Variant(name, fam(model, layers, x), PLAIN, 1e-3, kappa),
    ]


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def token_variants(size: int) -> list[Variant]:
    torch.manual_seed(0)
    model = Tokens(64, 64, 10)
    x, y = torch.randn(16, size, 64), torch.randint(10, (16,))
    return network_variants("FAMLoss, curvature='ggn'", model, [model.layer], x, y, curvature="ggn")


def token_law(size: int) -> dict[str, float]:
    plain = 16 * 4 * size * 64 * 64  # no gradient of the input
    factor = min(10 * gram_direct(size, 64, 64), gram_gram(size, 64, 64, 10))
    return {PLAIN: plain, "FAMLoss, curvature='ggn'": 16 * factor}


def layer_variants(size: int) -> list[Variant]:
    torch.manual_seed(0)
    model = perceptron(8, 128)
    x, y = torch.randn(128, 128), torch.randint(10, (128,))
    hidden = [m for m in model if isinstance(m, nn.Linear)][:-1]
    options = {"method": "hutchinson", "per_sample_probes": False}
    return network_variants("FAMLoss, last layers", model, hidden[-size:], x, y, **options)


def layer_law(size: int) -> dict[str, float]:
    """One first gradient and one product through the last n layers serve all of them."""
    return {PLAIN: 1.0, "FAMLoss, last layers": size}


def probe_variants(size: int) -> list[Variant]:
    torch.manual_seed(0)
    model = perceptron(2, 256)
    x, y = torch.randn(128, 256), torch.randint(10, (128,))
    options = {"method": "hutchinson", "probes": size, "per_sample_probes": False}
    return network_variants("FAMLoss, hidden layer", model, [model[0]], x, y, **options)


def probe_law(size: int) -> dict[str, float]:
    return {PLAIN: 1.0, "FAMLoss, hidden layer": float(size)}


def _head_sweep(title: str, letter: str, sizes: Sequence[int], shape: Callable[[int], head.Shape]) -> Sweep:
    return Sweep(title, letter, sizes, partial(head_variants, shape), partial(head_law, shape))


def _vocabulary(size: int) -> head.Shape:
    return 64, 64, size


SWEEPS = (
    _head_sweep("head, I=256, O=10", "N", (64, 256, 1024, 4096, 16384), lambda n: (n, 256, 10)),
    _head_sweep("head, N=128, O=10", "I", (64, 256, 1024, 4096, 16384), lambda n: (128, n, 10)),
    _head_sweep("head, N=128, I=512", "O", (10, 30, 100, 300, 1000), lambda n: (128, 512, n)),
    Sweep(
        "vocabulary, N=64, I=64", "V", (1024, 4096, 16384, 65536),
        partial(vocabulary_variants, _vocabulary), partial(vocabulary_law, _vocabulary),
    ),
    Sweep("patch_sqnorm, 3x3, B=4, C=32", "side (Q = side²)", (8, 16, 32, 64, 128), patch_variants, patch_law),
    Sweep("tokens, B=16, I=O=64, 10 classes", "Q", (16, 64, 256, 1024), token_variants, token_law),
    Sweep("8 hidden layers of 128, B=128", "layers", (1, 2, 4, 8), layer_variants, layer_law, added=True),
    Sweep("hidden layer 256 -> 256, B=128", "probes", (1, 2, 4, 8, 16), probe_variants, probe_law, added=True),
)  # fmt: skip


def run(console: Console, settings: Settings) -> list[dict[str, object]]:
    sweeps = SWEEPS[:3] if settings.quick else SWEEPS
    seconds = settings.seconds / sum(len(s.sizes) for s in sweeps)
    rows = []
    for sweep in sweeps:
        rows += measure(sweep, settings, seconds)
    _show(console, rows)
    write_rows(settings.out / f"{OP}.csv", rows)
    plots.scaling(rows, settings.out / f"{OP}.png")
    return rows


def measure(sweep: Sweep, settings: Settings, seconds: float) -> list[dict[str, object]]:
    sizes = sweep.sizes[:3] if settings.quick else sweep.sizes
    rows: list[dict[str, object]] = []
    with thread_count(settings.threads[0]):
        for size in sizes:
            with making_tensors():
                variants = sweep.build(size)
            errors = {v.name: v.check() for v in variants}
            times = interleaved(variants, 15, 3, seconds)
            law = sweep.law(size)
            for v in variants:
                p20, median, p80 = (1e6 * q for q in quantiles(times[v.name]))
                r20, ratio, r80 = quantiles(ratios(times[v.name], times[v.baseline]))
                added = sweep.added and v is not variants[0]
                cost = median - 1e6 * quantiles(times[variants[0].name])[1] if added else median
                rows.append(
                    {
                        "op": OP, "sweep": sweep.title, "letter": sweep.letter, "size": size,
                        "case": f"{sweep.title}: {sweep.letter} = {size}", "threads": settings.threads[0], "variant": v.name,
                        "baseline": v.baseline, "median_us": median, "p20_us": p20, "p80_us": p80, "ratio": ratio,
                        "ratio_p20": r20, "ratio_p80": r80, "error": errors[v.name], "cost_us": cost, "law": law[v.name],
                    }
                )  # fmt: skip
    for name in dict.fromkeys(r["variant"] for r in rows):
        own = [r for r in rows if r["variant"] == name]
        sizes = [r["size"] for r in own]
        fitted, error = exponent(sizes, [r["cost_us"] for r in own])
        law_exponent = exponent(sizes, [r["law"] for r in own])[0]
        for r in own:
            r.update(exponent=fitted, exponent_error=error, law_exponent=law_exponent)
    return rows


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(p, its standard error) of cost = a size^p: least squares in logarithms over the larger half of the sizes.

    At least three sizes are taken, since a line through two says nothing about its error. nan where noise made a difference of
    times negative.
    """
    points = sorted(zip(sizes, costs, strict=True))[-max(3, (len(sizes) + 1) // 2) :]
    if min(cost for _, cost in points) <= 0:
        return math.nan, math.nan
    (slope, _), covariance = numpy.polyfit(*numpy.log(points).T, 1, cov=True)
    return float(slope), float(covariance[0, 0]) ** 0.5


def _show(console: Console, rows: Sequence[dict[str, object]]) -> None:
    lines: list[list[str] | None] = []
    for sweep in dict.fromkeys(r["sweep"] for r in rows):
        of_sweep = [r for r in rows if r["sweep"] == sweep]
        lines.append(None)
        for name in dict.fromkeys(r["variant"] for r in of_sweep):
            own = [r for r in of_sweep if r["variant"] == name]
            first, last = own[0], own[-1]
            lines.append([
                sweep, f"{last['letter']} {first['size']}-{last['size']}", name, time_text(first["median_us"]),
                time_text(last["median_us"]), f"{last['ratio']:.2f}",
                f"{last['exponent']:.2f} ± {last['exponent_error']:.2f}", f"{last['law_exponent']:.2f}",
            ])  # fmt: skip
    columns = ["smallest", "largest", "x plain there", "exponent", "law"]
    console.print(table("scaling", ["sweep", "size", "variant"], columns, lines))
