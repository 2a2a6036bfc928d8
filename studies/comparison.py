"""What the runs say: paired differences with intervals, Wilcoxon's test over tasks, ranks, wins and losses."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from studies.store import Store, Task

Scores = Mapping[Task, Mapping[str, Mapping[int, float]]]
"""By task, method and seed."""


class Difference(NamedTuple):
    """Method minus baseline over paired seeds: the mean and a 95 % interval (Student's t; nan for one seed)."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


class Line(NamedTuple):
    """A method over all tasks that it was finished on."""

    method: str
    tasks: int
    mean_difference: float
    wins: int
    ties: int
    losses: int
    wilcoxon_p: float
    holm_p: float
    mean_rank: float


def collect(folder: Path, tasks: Iterable[Task], number: str) -> dict[Task, dict[str, dict[int, float]]]:
    """The test numbers of finished runs. A classifier that diverged has accuracy 0, and none of the other numbers."""
    scores: dict[Task, dict[str, dict[int, float]]] = {}
    for task in tasks:
        for (method, phase, seed), run in Store(folder, task).rows.items():
            value = run.numbers.get(number, math.nan)
            if phase == "test" and math.isnan(value) and number == "test_accuracy":
                value = 0.0
            if phase == "test" and not math.isnan(value):
                scores.setdefault(task, {}).setdefault(method, {})[seed] = value
    return scores


def finished(
    scores: Scores, methods: Iterable[str], seeds: int
) -> dict[Task, dict[str, Mapping[int, float]]]:
    """Of the tasks on which all of `methods` have so many seeds: those methods alone."""
    names = list(methods)
    return {
        task: {name: of_task[name] for name in names}
        for task, of_task in scores.items()
        if all(len(of_task.get(name, {})) >= seeds for name in names)
    }


def gains(
    folder: Path, tasks: Iterable[Task], method: str, baseline: str
) -> list[tuple[float, float, float]]:
    """(strength, gain in validation accuracy, label noise) of every configuration that was tried.

    The gain is over the baseline's configuration of the same number, whose learning rate and weight decay are the same.
    """
    rows = []
    for task in tasks:
        store = Store(folder, task)
        for run in store.of(method, "tune"):
            other = store.get(baseline, "tune", run.number)
            if other is not None and "strength" in run.hyper:
                values = [x.numbers["validation_accuracy"] for x in (run, other)]
                with_term, without = (0.0 if math.isnan(v) else v for v in values)
                rows.append((run.hyper["strength"], with_term - without, task.noise))
    return rows


def difference(method: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """None where no seed was run with both."""
    from scipy.stats import t

    paired = [method[seed] - baseline[seed] for seed in sorted(method.keys() & baseline.keys())]
    if not paired:
        return None
    mean = statistics.fmean(paired)
    if len(paired) < 2:
        return Difference(mean, math.nan, math.nan, 1)
    half = t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / math.sqrt(len(paired))
    return Difference(mean, mean - half, mean + half, len(paired))


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; nan for fewer than two differences that are not zero."""
    from scipy.stats import wilcoxon as test

    if sum(d != 0 for d in differences) < 2:
        return math.nan
    return float(test(list(differences), zero_method="zsplit").pvalue)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction for several methods; nan stays."""
    known = sorted((value, name) for name, value in p.items() if not math.isnan(value))
    adjusted, largest = dict(p), 0.0
    for k, (value, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - k) * value))
        adjusted[name] = largest
    return adjusted


def mean_ranks(scores: Scores, higher_is_better: bool = True) -> tuple[dict[str, float], int]:
    """Mean rank of every method over the tasks that all of them were finished on (1 is best, ties share), and their number."""
    methods = sorted({method for by_method in scores.values() for method in by_method})
    ranks: dict[str, list[float]] = {method: [] for method in methods}
    tasks = 0
    for by_method in scores.values():
        if set(by_method) != set(methods):
            continue
        tasks += 1
        sign = -1 if higher_is_better else 1
        means = {m: sign * statistics.fmean(by_method[m].values()) for m in methods}
        for m in methods:
            below = sum(v < means[m] for v in means.values())
            equal = sum(v == means[m] for v in means.values())
            ranks[m].append(below + (equal + 1) / 2)
    return {m: statistics.fmean(r) if r else math.nan for m, r in ranks.items()}, tasks


def critical_difference(methods: int, tasks: int) -> float:
    """Nemenyi's: mean ranks further apart differ at the 5 % level (Demsar 2006)."""
    from scipy.stats import studentized_range

    if tasks == 0 or methods < 2:
        return math.nan
    q = studentized_range.ppf(0.95, methods, math.inf) / math.sqrt(2)
    return float(q * math.sqrt(methods * (methods + 1) / (6 * tasks)))


def compare(scores: Scores, baseline: str) -> list[Line]:
    """A line for each method, best mean rank first."""
    ranks, _ = mean_ranks(scores)
    by_method: dict[str, list[Difference]] = {method: [] for method in ranks}
    for of_task in scores.values():
        for method in of_task:
            d = difference(of_task[method], of_task.get(baseline, {}))
            if d is not None:
                by_method[method].append(d)
    p = {m: wilcoxon([d.mean for d in ds]) for m, ds in by_method.items() if m != baseline}
    corrected = holm(p)
    lines = []
    for method, ds in by_method.items():
        verdicts = [d.verdict for d in ds]
        lines.append(
            Line(
                method, len(ds), statistics.fmean(d.mean for d in ds) if ds else math.nan, verdicts.count("win"),
                verdicts.count("tie"), verdicts.count("loss"), p.get(method, math.nan), corrected.get(method, math.nan),
                ranks[method],
            )
        )  # fmt: skip
    return sorted(lines, key=lambda line: (math.isnan(line.mean_rank), line.mean_rank))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in rows)


def means(scores: Scores) -> tuple[list[str], list[list[object]]]:
    """(header, rows): the mean number of each task and method."""
    methods = sorted({method for of_task in scores.values() for method in of_task})
    rows: list[list[object]] = []
    for task, of_task in scores.items():
        values = [statistics.fmean(of_task[m].values()) if m in of_task else "" for m in methods]
        rows.append([str(task), *values])
    return ["task", *methods], rows


def mean_over_tasks(scores: Scores, method: str) -> float:
    """The mean over tasks of the mean over seeds; nan for no task."""
    values = [
        statistics.fmean(of_task[method].values()) for of_task in scores.values() if of_task.get(method)
    ]
    return statistics.fmean(values) if values else math.nan


def table(scores: Scores, baseline: str, number: str = "accuracy") -> str:
    """A Markdown table of a test number, accuracy or another share, in percent, best mean rank first."""
    head = (
        f"| method | mean {number} | over {baseline} | wins / ties / losses | Wilcoxon p (Holm) | mean rank |"
    )
    rows = []
    for x in compare(scores, baseline):
        of_baseline = x.method == baseline
        p = "" if of_baseline else f"{x.wilcoxon_p:.3f} ({x.holm_p:.3f})"
        counts = "" if of_baseline else f"{x.wins} / {x.ties} / {x.losses}"
        over = "" if of_baseline else f"{100 * x.mean_difference:+.2f}"
        mean = 100 * mean_over_tasks(scores, x.method)
        rows.append(f"| {x.method} | {mean:.2f} | {over} | {counts} | {p} | {x.mean_rank:.2f} |")
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def ranks_by_kind(kinds: Mapping[str, Scores]) -> str:
    """A Markdown table of mean ranks, a column for each kind of task; the best in bold."""
    ranks = {f"{kind} ({len(scores)})": mean_ranks(scores)[0] for kind, scores in kinds.items() if scores}
    methods = sorted(
        {m for of_kind in ranks.values() for m in of_kind}, key=lambda m: [r[m] for r in ranks.values()]
    )
    rows = [f"| method | {' | '.join(ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for method in methods:
        cells = [
            f"**{r[method]:.2f}**" if r[method] == min(r.values()) else f"{r[method]:.2f}"
            for r in ranks.values()
        ]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def by_task(scores: Scores) -> str:
    """A Markdown table of mean test accuracy in percent with its standard deviation over seeds; the best in bold."""
    names = sorted({method for of_task in scores.values() for method in of_task})
    rows = [f"| task | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for task, of_task in scores.items():
        means_ = {m: statistics.fmean(of_task[m].values()) for m in names if m in of_task}
        cells = []
        for m in names:
            if m not in means_:
                cells.append("")
                continue
            spread = statistics.stdev(of_task[m].values()) if len(of_task[m]) > 1 else math.nan
            text = f"{100 * means_[m]:.1f} ± {100 * spread:.1f}"
            cells.append(f"**{text}**" if means_[m] == max(means_.values()) else text)
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(rows)
