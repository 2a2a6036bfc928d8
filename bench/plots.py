"""Plots, log-log: cost against size (rows of bench/bench_scaling.py), error against confidence and probes (bench_accuracy.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine_line

Row = Mapping[str, Any]
COLUMNS = 3
SMALLEST = 1e-8  # of errors: below it float32 says nothing


def scaling(rows: Sequence[Row], path: Path) -> None:
    """A panel for each sweep: times of each variant with their p20-p80 band, and the counted law through its last point."""
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(r["sweep"] for r in rows))
    height = math.ceil(len(sweeps) / COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.9 * height), layout="constrained")
    axes = figure.subplots(height, COLUMNS, squeeze=False).flatten()
    for axis, sweep in zip(axes, sweeps, strict=False):
        _panel(axis, sweep, [r for r in rows if r["sweep"] == sweep])
    for axis in axes[len(sweeps) :]:
        axis.set_visible(False)
    _save(figure, path)


def accuracy(confidence: Sequence[Row], probes: Sequence[Row], path: Path) -> None:
    """A panel for each dtype, error of value (solid) and gradients (dashed) against 1 - max p; then error against probes."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(r["dtype"] for r in confidence))
    figure = Figure(figsize=(4.4 * (len(dtypes) + 1), 3.9), layout="constrained")
    *axes, last = figure.subplots(1, len(dtypes) + 1, squeeze=False).flatten()
    for axis, dtype in zip(axes, dtypes, strict=True):
        own = [r for r in confidence if r["dtype"] == dtype]
        for number, method in enumerate(dict.fromkeys(r["method"] for r in own)):
            rows = [r for r in own if r["method"] == method]
            deltas = [float(r["delta"]) for r in rows]
            for name, style in (("value_error", "o-"), ("gradient_error", "o--")):
                errors = [max(float(r[name]), SMALLEST) for r in rows]
                label = method if style == "o-" else None
                axis.loglog(deltas, errors, style, color=f"C{number}", markersize=3, linewidth=1, label=label)
        _label(
            axis,
            f"{dtype}: value (solid), gradients (dashed)",
            "1 - max p",
            f"relative error (at least {SMALLEST:g})",
        )
        axis.invert_xaxis()
        axis.set_ylim(SMALLEST / 2, None)
        axis.legend(fontsize=6.5)
    for number, method in enumerate(dict.fromkeys(r["method"] for r in probes)):
        rows = [r for r in probes if r["method"] == method]
        counts = [int(r["probes"]) for r in rows]
        for name, style, what in (
            ("measured_error", "o", "measured"),
            ("standard_error", "-", "std / sqrt(k)"),
        ):
            errors = [float(r[name]) for r in rows]
            last.loglog(counts, errors, style, color=f"C{number}", label=f"{method}, {what}")
    _label(last, "a hidden layer's estimate in one step", "probes k", "relative standard error")
    last.legend(fontsize=6.5)
    _save(figure, path)


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.grid(True, which="both", alpha=0.2)


def _save(figure: Any, path: Path) -> None:
    """With the machine below."""
    figure.supxlabel(machine_line(), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axis: Any, sweep: str, rows: Sequence[Row]) -> None:
    for number, variant in enumerate(dict.fromkeys(r["variant"] for r in rows)):
        own = sorted((r for r in rows if r["variant"] == variant), key=lambda r: float(r["size"]))
        sizes = [float(r["size"]) for r in own]
        times, low, high = ([float(r[name]) for r in own] for name in ("median_us", "p20_us", "p80_us"))
        color = f"C{number}"
        exponent, law_exponent = (float(own[0][name]) for name in ("exponent", "law_exponent"))
        label = f"{variant}: {exponent:.2f} (law {law_exponent:.2f})" if law_exponent else variant
        axis.loglog(sizes, times, "o-", color=color, markersize=3, linewidth=1.2, label=label)
        axis.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
        law = [float(r["law"]) for r in own]
        axis.loglog(sizes, [v * times[-1] / law[-1] for v in law], ":", color=color, linewidth=1)
    _label(axis, sweep, rows[0]["letter"], "µs")
    axis.legend(fontsize=6.5, title="exponent of the larger sizes", title_fontsize=6.5)
