"""Accuracy beside speed.

First table: relative error of the trace v and of its gradients (the larger of dz's and dW's) against float64 on the same inputs:
by dtype, method, and confidence of the predictions, whose most likely class has probability 1 - delta in every row. Gradients are
compared with the nearest numbers of their dtype (float16 has only subnormal ones, or zero, for confident predictions). The
textbook form is what one would write (bench/baselines.py). An error above LIMIT in a method of this package
ends the run.

Second table: relative standard error of estimates by the number of probes, a hidden layer 64 -> 32 on 128 samples after some
training: probes shared by all samples, and of each sample's own. From DRAWS one-probe draws; measured: the error of means of k.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import plots
import torch
from baselines import textbook_trace
from case import Settings, Variant
from machine import making_tensors, thread_count
from report import table, time_text, write_rows
from rich.console import Console
from timing import interleaved, quantiles
from torch import Tensor, nn

import fam_ext
from fam_ext.functional import softmax_trace
from fam_ext.ops import backends

OP = "accuracy"
SHARE = 0.5
SHAPE = (256, 64, 10)  # rows, fan-in, classes
DELTAS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = 2e-5  # of values; and of gradients held in float32
TRAINED = 200  # steps
DRAWS, PROBES = 256, (1, 2, 4, 8, 16, 32)
TEXTBOOK = "textbook"
Trace = Callable[[Tensor, Tensor], Tensor]


def inputs(delta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logits, weight) in `dtype`: the most likely class has probability 1 - delta, up to the rounding of the logits."""
    rows, fan_in, classes = SHAPE
    torch.manual_seed(0)
    with making_tensors():
        z = torch.randn(rows, classes, dtype=torch.float64)
        likely = torch.randint(classes, (rows, 1))
        w = torch.randn(classes, fan_in, dtype=torch.float64) / fan_in**0.5
    others = z.scatter(1, likely, -math.inf).logsumexp(1, keepdim=True)
    z = z.scatter(1, likely, others + math.log((1 - delta) / delta))
    return z.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()


def step(trace: Trace, z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    value = trace(z, w)
    return value, *torch.autograd.grad(value.sum(), (z, w))


def exact(z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """In float64, by positive terms only."""
    double = [t.detach().double().requires_grad_() for t in (z, w)]
    return step(partial(softmax_trace, form="pairwise", backend="reference"), *double)


def methods() -> dict[str, Trace]:
    names = ("native", "reference") if backends.native_loaded() else ("reference",)
    ours = {
        f"{n} {f}": partial(softmax_trace, form=f, backend=n) for n in names for f in ("pairwise", "shifted")
    }
    return {**ours, TEXTBOOK: textbook_trace}


@torch.no_grad()
def relative(got: Tensor, exact: Tensor) -> float:
    """Relative L2 error; 0 where both are zero."""
    error, size = (got.double() - exact.double()).norm(), exact.double().norm()
    return float(error / size) if size else 0.0 if not error else math.inf


def errors(trace: Trace, delta: float, dtype: torch.dtype) -> tuple[float, float]:
    """(of the value, of the gradients), relative L2."""
    z, w = inputs(delta, dtype)
    got, truth = step(trace, z, w), exact(z, w)
    value, *gradients = [
        relative(g, e) for g, e in zip(got, (truth[0], *(t.to(dtype) for t in truth[1:])), strict=True)
    ]
    return value, max(gradients)


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """Bounds on the errors of a method of this package: gradients are rounded to the dtype of the inputs."""
    return LIMIT, LIMIT + torch.finfo(dtype).eps


def check(method: str, dtype: torch.dtype, delta: float, pair: tuple[float, float]) -> None:
    if method == TEXTBOOK:
        return
    if not all(error <= limit for error, limit in zip(pair, limits(dtype), strict=True)):
        raise RuntimeError(
            f"{method}, {dtype}, delta={delta:g}: relative errors {pair} exceed {limits(dtype)}"
        )


def by_confidence(dtypes: Sequence[torch.dtype], seconds: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for dtype in dtypes:
        own: dict[str, dict[float, tuple[float, float]]] = {}
        for name, trace in methods().items():
            own[name] = {delta: errors(trace, delta, dtype) for delta in DELTAS}
            for delta, pair in own[name].items():
                check(name, dtype, delta, pair)
        z, w = inputs(DELTAS[0], dtype)
        timed = [Variant(name, partial(step, trace, z, w), TEXTBOOK) for name, trace in methods().items()]
        times = interleaved(timed, 15, 3, seconds / len(dtypes))
        for name, by_delta in own.items():
            micros = 1e6 * quantiles(times[name])[1]
            rows += [
                {
                    "table": "confidence", "dtype": str(dtype).removeprefix("torch."), "method": name, "delta": delta,
                    "value_error": value, "gradient_error": gradient, "time_us": micros,
                }
                for delta, (value, gradient) in by_delta.items()
            ]  # fmt: skip
    return rows


def hidden(seed: int, probes: int, per_sample: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(an estimate of a hidden layer's kappa in a training step, the exact one)."""
    torch.manual_seed(0)
    with making_tensors():
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        x = torch.randn(128, 64).relu()  # as a layer before would give them: with a common mean
        y = (x @ torch.randn(64, 10)).argmax(1)
        generator = torch.Generator(x.device).manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(TRAINED):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    double = copy.deepcopy(model).double()
    own = {"generator": generator, "per_sample_probes": None if per_sample else False}
    criterion = fam_ext.FAMLoss(
        nn.CrossEntropyLoss(), model[0], 1.0, method="hutchinson", probes=probes, **own
    )
    truth = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), double[0], method="exact")

    def estimate() -> Tensor:
        model.zero_grad()
        criterion(model(x), y).backward()
        return criterion.last.flatness

    return estimate, lambda: truth(double(x.double()), y).detach()


def by_probes(draws: int, probes: Sequence[int], seconds: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for per_sample in (False, True):
        one, truth = hidden(1, 1, per_sample)
        kappa = float(truth())
        values = torch.stack([one() for _ in range(draws)]).double()
        deviation = float(values.std()) / abs(kappa)
        off = abs(float(values.mean()) / kappa - 1)
        if not off <= 5 * deviation / draws**0.5:
            raise RuntimeError(
                f"mean of {draws} draws is {off:.2g} off, {deviation:.2g} is one draw's deviation"
            )
        estimates = {k: hidden(1, k, per_sample)[0] for k in probes}
        variants = [Variant(str(k), step, str(probes[0])) for k, step in estimates.items()]
        times = interleaved(variants, 9, 3, seconds / 2)
        for k in probes:
            groups = values[: draws // k * k].reshape(-1, k).mean(1)
            measured = float((groups / kappa - 1).square().mean().sqrt())
            rows.append(
                {
                    "table": "probes", "method": "of each sample" if per_sample else "shared", "probes": k,
                    "standard_error": deviation / k**0.5, "measured_error": measured,
                    "time_us": 1e6 * quantiles(times[str(k)])[1],
                }
            )  # fmt: skip
    return rows


def run(console: Console, settings: Settings) -> list[dict[str, object]]:
    with thread_count(settings.threads[0]):
        rows = by_confidence(DTYPES[:1] if settings.quick else DTYPES, settings.seconds / 2)
    _show_confidence(console, rows)
    draws = DRAWS // 4 if settings.quick else DRAWS
    with thread_count(settings.threads[0]):
        estimates = by_probes(draws, PROBES[:3] if settings.quick else PROBES, settings.seconds / 2)
    _show_probes(console, estimates)
    write_rows(settings.out / f"{OP}.csv", [*rows, *estimates])
    plots.accuracy(rows, estimates, settings.out / f"{OP}.png")
    return rows


def _show_confidence(console: Console, rows: Sequence[dict[str, object]]) -> None:
    lines: list[list[str] | None] = []
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        lines.append(None)
        for method in dict.fromkeys(r["method"] for r in rows):
            own = [r for r in rows if (r["dtype"], r["method"]) == (dtype, method)]
            cells = [f"{r['value_error']:.0e} / {r['gradient_error']:.0e}" for r in own]
            lines.append([dtype, method, time_text(own[0]["time_us"]), *cells])
    columns = ["time", *(f"max p = 1 - {delta:g}" for delta in DELTAS)]
    title = "accuracy: relative error of value / gradients"
    console.print(table(title, ["dtype", "method"], columns, lines))


def _show_probes(console: Console, rows: Sequence[dict[str, object]]) -> None:
    lines = []
    for k in dict.fromkeys(r["probes"] for r in rows):
        cells = [str(k)]
        for r in (r for r in rows if r["probes"] == k):
            cells += [f"{r['standard_error']:.3f}", f"{r['measured_error']:.3f}", time_text(r["time_us"])]
        lines.append(cells)
    columns = [
        f"{kind}{what}"
        for kind in ("shared", "each sample's own")
        for what in (", std / sqrt(k)", ": measured", ": time")
    ]
    title = "accuracy: relative standard error of one training step's estimate, hidden layer 64 -> 32, B=128"
    console.print(table(title, ["probes"], columns, lines))
