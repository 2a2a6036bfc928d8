"""Whether the better methods are the flatter ones: kappa of the trained networks beside what they were trained with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from studies import comparison
from studies.store import Task

NUMBERS = {"kappa_all": "kappa of all layers", "kappa_head": "of the head", "train_nll": "training loss"}


def _means(scores: comparison.Scores) -> dict[Task, dict[str, float]]:
    return {task: {m: statistics.fmean(s.values()) for m, s in by.items()} for task, by in scores.items()}


def ratios(
    means: Mapping[Task, Mapping[str, float]], methods: Sequence[str], baseline: str
) -> dict[str, float]:
    """Geometric means over tasks of each method's number over the baseline's; nan where no task has both."""
    found = {}
    for method in methods:
        logs = [
            math.log(of_task[method] / of_task[baseline])
            for of_task in means.values()
            if of_task.get(method, 0) > 0 and of_task.get(baseline, 0) > 0
        ]
        found[method] = math.exp(statistics.fmean(logs)) if logs else math.nan
    return found


def agreement(
    kappa: Mapping[Task, Mapping[str, float]], accuracy: Mapping[Task, Mapping[str, float]]
) -> list[float]:
    """Kendall's tau-b of kappa and test accuracy over the methods of each task; one whose numbers are all alike is left out."""
    from scipy.stats import kendalltau

    taus = []
    for task, of_task in kappa.items():
        methods = sorted(of_task.keys() & accuracy[task].keys())
        tau = float(kendalltau([of_task[m] for m in methods], [accuracy[task][m] for m in methods]).statistic)
        if not math.isnan(tau):
            taus.append(tau)
    return taus


def table(folder: Path, tasks: Sequence[Task], methods: Sequence[str], baseline: str) -> str:
    """A Markdown table: kappa and training loss over the baseline's, and how kappa goes with accuracy between methods."""
    parts = {
        title: [t for t in tasks if (t.noise > 0) is noisy]
        for title, noisy in (("clean", False), ("wrong labels", True))
    }
    parts = {f"{title} ({len(own)})": own for title, own in parts.items() if own}
    columns, notes = {}, []
    for title, own in parts.items():
        by_number = {n: _means(comparison.collect(folder, own, n)) for n in (*NUMBERS, "test_accuracy")}
        for number, name in NUMBERS.items():
            columns[f"{name}, {title}"] = ratios(by_number[number], methods, baseline)
        taus = agreement(by_number["kappa_all"], by_number["test_accuracy"])
        if taus:
            negative = sum(t < 0 for t in taus)
            notes.append(f"{title}: {statistics.fmean(taus):+.2f} ({negative} of {len(taus)} negative)")
    rows = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows += [f"| {m} | {' | '.join(f'{c[m]:.2f}' for c in columns.values())} |" for m in methods]
    told = (
        f"Mean tau of kappa of all layers and test accuracy over the methods of a task: {'; '.join(notes)}."
    )
    return "\n".join(rows) + (f"\n\n{told}" if notes else "")
