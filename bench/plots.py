"""Cost against size, log-log, from the rows that bench/bench_scaling.py writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine_line

Row = Mapping[str, Any]
COLUMNS = 3


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
    axis.set_title(sweep, fontsize=9)
    axis.set_xlabel(rows[0]["letter"], fontsize=9)
    axis.set_ylabel("µs", fontsize=9)
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=6.5, title="exponent of the larger sizes", title_fontsize=6.5)
