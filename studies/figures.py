"""Plots of the study, by matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.comparison import Scores, critical_difference, difference, mean_ranks

BLUE, GRAY, RED = "#4477aa", "#888888", "#cc6677"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _color(method: str) -> str:
    return RED if method.startswith("fam") else BLUE


def rank_plot(scores: Scores, path: Path) -> None:
    """Mean ranks, best on top; the bar on top is as long as ranks must be apart to differ at the 5 % level (Nemenyi)."""
    ranks, tasks = mean_ranks(scores)
    known = sorted(((r, m) for m, r in ranks.items() if not math.isnan(r)), reverse=True)
    if not known:
        return
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(known)), layout="constrained")
    axis = figure.subplots()
    axis.hlines(range(len(known)), 1, [r for r, _ in known], color="#dddddd")
    axis.scatter([r for r, _ in known], range(len(known)), color=[_color(m) for _, m in known], zorder=3)
    axis.set_yticks(range(len(known)), [m for _, m in known], fontsize=8)
    apart = critical_difference(len(known), tasks)
    if not math.isnan(apart):
        best = known[-1][0]
        axis.plot([best, best + apart], [len(known) - 0.4] * 2, color="#222222", linewidth=2)
        axis.text(best, len(known) - 0.3, f"critical difference {apart:.2f}", va="bottom", fontsize=7)
    axis.set_ylim(-0.6, len(known) + 0.4)
    axis.set_xlabel(f"mean rank of test accuracy over {tasks} tasks (1 is best)", fontsize=8)
    _save(figure, path)


def difference_plot(scores: Scores, baseline: str, path: Path) -> None:
    """A panel for each task: accuracy over the baseline's with 95 % intervals over paired seeds."""
    tasks = [task for task, of_task in scores.items() if baseline in of_task]
    methods = sorted({m for task in tasks for m in scores[task]} - {baseline})
    if not tasks or not methods:
        return
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(
        figsize=(1.6 + 2.2 * columns, 0.6 + lines * (0.5 + 0.18 * len(methods))), layout="constrained"
    )
    axes: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, tasks, strict=False):
        axis.axvline(0, color=GRAY, linewidth=0.8)
        for k, method in enumerate(methods):
            d = difference(scores[task].get(method, {}), scores[task][baseline])
            if d is None:
                continue
            if not math.isnan(d.low):
                axis.plot([100 * d.low, 100 * d.high], [k, k], color=_color(method), linewidth=1)
            axis.plot(100 * d.mean, k, "o", color=_color(method), markersize=3)
        axis.set_title(str(task), fontsize=7)
        axis.tick_params(labelsize=6)
    axes[0, 0].set_yticks(range(len(methods)), methods, fontsize=6)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(f"test accuracy over {baseline}, points", fontsize=8)
    _save(figure, path)


def gap_plot(measures: dict[str, list[float]], gaps: list[float], groups: list[str], path: Path) -> None:
    """Each measure against the gap, networks of one group in one colour."""
    names = list(measures)
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.3 * lines), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    known = sorted(set(groups))
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for k, group in enumerate(known):
            chosen = [i for i, g in enumerate(groups) if g == group]
            x, y = [measures[name][i] for i in chosen], [gaps[i] for i in chosen]
            axis.scatter(x, y, s=8, color=f"C{k}", label=group)
        axis.set_xscale("symlog", linthresh=max(min(map(abs, measures[name])), 1e-12))
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
    axes[0, 0].legend(fontsize=5)
    figure.supylabel("test loss minus training loss", fontsize=8)
    _save(figure, path)


def strength_plot(curves: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> None:
    """A panel for each method: what a strength gains over the same configuration without the term, and medians."""
    names = sorted(name for name, points in curves.items() if points)
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.4 + 2.2 * lines), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for noisy, color, label in ((False, BLUE, "clean"), (True, RED, "wrong labels")):
            points = [(s, 100 * gain) for s, gain, noise in curves[name] if (noise > 0) is noisy]
            axis.scatter([s for s, _ in points], [g for _, g in points], s=5, color=color, alpha=0.35)
            bins: dict[int, list[float]] = {}
            for strength, gain in points:
                bins.setdefault(math.floor(3 * math.log10(strength)), []).append(gain)
            known = sorted(bins)
            axis.plot(
                [10 ** ((k + 0.5) / 3) for k in known], [statistics.median(bins[k]) for k in known],
                color=color, linewidth=1.5, label=label,
            )  # fmt: skip
        axis.axhline(0, color=GRAY, linewidth=0.8)
        axis.set_xscale("log")
        axis.set_ylim(-25, 25)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("strength", fontsize=8)
    figure.supylabel("validation accuracy gained, points", fontsize=8)
    _save(figure, path)


def loss_plot(losses: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """Test loss (solid) and training loss (dotted) of each method on the way: (share of the steps, test, training)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for k, (method, points) in enumerate(losses.items()):
        shares, test, train = zip(*points, strict=True)
        axis.plot(shares, test, color=f"C{k}", linewidth=1.5, label=method)
        axis.plot(shares, train, ":", color=f"C{k}", linewidth=1)
    axis.set_xlabel("share of the steps", fontsize=8)
    axis.set_ylabel("cross-entropy: test (solid), training (dotted)", fontsize=8)
    axis.legend(fontsize=7)
    _save(figure, path)


def loss_by_strength_plot(points: list[tuple[float, float, float]], path: Path) -> None:
    """(strength, test loss at the best checkpoint, at the last step); strength 0 is drawn as lines across."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    known = [point for point in points if point[0] > 0]
    for column, color, label in ((1, BLUE, "lowest validation loss"), (2, RED, "last step")):
        axis.plot(
            [p[0] for p in known], [p[column] for p in known], "o-", color=color, label=label, markersize=3
        )
        for p in points:
            if p[0] == 0:
                axis.axhline(p[column], color=color, linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("strength of FAM noise (dotted: none)", fontsize=8)
    axis.set_ylabel("test loss", fontsize=8)
    axis.legend(fontsize=7)
    _save(figure, path)


def course_plot(courses: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """kappa against the step, a line for each method."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for k, (method, points) in enumerate(courses.items()):
        axis.plot([s for s, _ in points], [kappa for _, kappa in points], color=f"C{k}", label=method)
    axis.set_yscale("log")
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("kappa of all layers, training data", fontsize=8)
    axis.legend(fontsize=7)
    _save(figure, path)


def cost_plot(gains: Mapping[str, float], costs: Mapping[str, float], path: Path) -> None:
    """Mean accuracy over the baseline's against the price of a step, for methods with both."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for method in gains.keys() & costs.keys():
        axis.plot(costs[method], 100 * gains[method], "o", color=_color(method), markersize=5)
        axis.annotate(
            method, (costs[method], 100 * gains[method]), (4, 3), textcoords="offset points", fontsize=7
        )
    axis.axhline(0, color=GRAY, linewidth=0.8)
    axis.set_xlabel("price of a step, in plain steps (MLP)", fontsize=8)
    axis.set_ylabel("mean test accuracy gained, points", fontsize=8)
    _save(figure, path)
