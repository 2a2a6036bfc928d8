"""Run the study, or the part of it that is not there yet.

    python studies/run.py                      # the core comparison, then the correlation study
    python studies/run.py --quick              # all of its code on a small scale, within a minute
    python studies/run.py --part comparison --grid full --minutes 60
    python studies/run.py --part summary       # tables and plots of what is finished
    python studies/run.py --part course        # kappa while networks are trained
    python studies/run.py --part cost --grid full   # what a step of each method costs, on a machine that does nothing else

Every finished run is a row in studies/results; started again, the study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.append(
    str(Path(__file__).resolve().parents[1])
)  # the package `studies`; an installed fam_ext goes first

from studies import comparison, cost, course, figures, gaps
from studies.data import LOADERS, SERIES, TABLES, load, split
from studies.methods import METHODS
from studies.store import RESULTS, Run, Store, Task, best
from studies.training import Budget, run

BASELINE = "weight_decay"
TUNING_SEED = 10_000  # no seed of the tests
CORE_METHODS = (
    "weight_decay", "dropout", "feature_noise", "sam", "fam_head", "fam_all_fisher", "fam_all_noise", "adamw",
)  # fmt: skip


class Grid(NamedTuple):
    """What is compared: tasks, methods, random configurations for each, and seeds of the tests."""

    tasks: Sequence[Task]
    methods: Sequence[str]
    configurations: int
    seeds: int
    budget: Budget


def grids() -> dict[str, Grid]:
    sets = ("letter", "satimage", "texture", "mnist", "spambase", "penbased")
    core = [Task(data, "mlp", noise, 1000) for data in sets for noise in (0.0, 0.4)]
    tables = [name for name in TABLES if name not in sets]
    full = [
        *core,
        *(Task(data, "mlp", 0.2, 1000) for data in sets),
        *(Task(data, "mlp", noise, 1000) for data in tables for noise in (0.0, 0.2, 0.4)),
        *(Task(data, "mlp", 0.0, 200) for data in sets),
        *(Task(data, "cnn", noise, 500) for data in ("digits", "mnist", *SERIES) for noise in (0.0, 0.4)),
        *(
            Task(data, "transformer", noise, 500)
            for data in ("digits", "JapaneseVowels")
            for noise in (0.0, 0.4)
        ),
    ]
    return {
        "core": Grid(core, CORE_METHODS, 12, 10, Budget()),
        "full": Grid(full, tuple(METHODS), 12, 10, Budget()),
        "quick": Grid(
            [Task("digits", "mlp", 0.0, 200), Task("digits", "cnn", 0.4, 100)],
            ("weight_decay", "sam", "fam_head", "fam_all_fisher"), 2, 2, Budget(40, 20),
        ),
    }  # fmt: skip


def chosen(store: Store, method: str, grid: Grid) -> Mapping[str, float] | None:
    """The configuration that did best on the tuning seed's validation part; None before all of them were tried.

    One whose training failed on a seed of the tests is left for the next best: what a failed training looks like does not take
    test data. Where all of them failed the best one stays.
    """
    tuned = [run for run in store.of(method, "tune") if run.number < grid.configurations]
    if len(tuned) < grid.configurations:
        return None
    failed = store.failed(method, math.log(load(store.task.data).classes))
    return best([run for run in tuned if run.hyper not in failed] or tuned)


def wanted(grid: Grid, folder: Path) -> Iterator[tuple[Store, Task, str, str, int]]:
    """Runs that are not there yet, task after task: first the configurations of a method, then its tests.

    A test of a configuration that is no longer the best one, after more of them were tried or it failed, is wanted again.
    """
    for task in grid.tasks:
        store = Store(folder, task)
        for method in grid.methods:
            for number in range(grid.configurations):
                if store.get(method, "tune", number) is None:
                    yield store, task, method, "tune", number
            yield from ((store, task, method, "test", number) for number in outdated(store, method, grid))


def outdated(store: Store, method: str, grid: Grid) -> Iterator[int]:
    """Seeds whose test is not there, or is of another configuration than the chosen one, which a failure may change."""
    number = 0
    while number < grid.seeds:
        hyper, before = chosen(store, method, grid), len(store.every)
        test = store.get(method, "test", number)
        if test is None or (hyper is not None and test.hyper != hyper):
            yield number
            if len(store.every) > before and chosen(store, method, grid) != hyper:
                number = 0  # the first seeds had the old one
                continue
        number += 1


def take(store: Store, task: Task, name: str, phase: str, number: int, grid: Grid) -> None:
    """One run: of the number-th configuration on the tuning seed, or of the best one on a seed of the tests."""
    method = METHODS[name]
    testing = phase == "test"
    hyper = dict(chosen(store, name, grid) or {}) if testing else method.configuration(number)
    seed = number if testing else TUNING_SEED
    data = split(load(task.data), seed, task.noise, task.samples)
    numbers = run(method, task.network, hyper, data, seed, grid.budget, testing)
    store.add(Run(name, phase, number, hyper, numbers))


def compare(grid: Grid, folder: Path, minutes: float | None) -> bool:
    """Whether all runs of the grid are there; stops between runs when `minutes` are over."""
    start = time.monotonic()
    each = len(grid.methods) * (grid.configurations + grid.seeds)
    left = sum(1 for _ in wanted(grid, folder))
    with tqdm(total=each * len(grid.tasks), initial=each * len(grid.tasks) - left, unit="run") as bar:
        for store, task, name, phase, number in wanted(grid, folder):
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                return False
            bar.set_description(f"{task} {name}")
            take(store, task, name, phase, number, grid)
            bar.update()
    return True


def correlate(folder: Path, quick: bool, minutes: float | None) -> bool:
    start = time.monotonic()
    path = folder / "gaps.csv"
    left, total = len(gaps.missing(path, quick)), len(gaps.grid(quick))
    with tqdm(total=total, initial=total - left, unit="network", desc="correlation") as bar:
        for _ in gaps.trained(path, quick, 60 if quick else 600):
            bar.update()
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                return not gaps.missing(path, quick)
    return True


def summarize(grid: Grid, folder: Path) -> str:
    """Tables and plots of what is finished; returns the text."""
    everything = comparison.collect(folder, grid.tasks, "test_accuracy")
    main_methods = [m for m in CORE_METHODS if m in grid.methods] or list(grid.methods)
    scores = comparison.finished(everything, main_methods, grid.seeds)
    parts = []
    for title, tasks in (
        ("All tasks", list(scores)),
        ("Clean labels", [t for t in scores if t.noise == 0]),
        ("Wrong labels", [t for t in scores if t.noise > 0]),
    ):
        chosen_tasks = {t: scores[t] for t in tasks}
        if chosen_tasks:
            parts.append(f"### {title} ({len(tasks)})\n\n{comparison.table(chosen_tasks, BASELINE)}")
    tried = {m for of_task in everything.values() for m in of_task}
    more = comparison.finished(everything, [m for m in METHODS if m in tried], grid.seeds)
    if len(more) >= 3 and tried - set(main_methods):
        parts.append(f"### All methods ({len(more)} tasks)\n\n{comparison.table(more, BASELINE)}")
    parts.append(f"### Each task\n\n{comparison.by_task(scores)}")
    parts.append(_calibration(main_methods, folder, list(scores)))
    lines = comparison.compare(scores, BASELINE)
    comparison.write_csv(folder / "methods.csv", comparison.Line._fields, lines)
    for number in ("test_accuracy", "test_nll", "test_ece", "train_nll", "kappa_all"):
        header, rows = comparison.means(comparison.collect(folder, grid.tasks, number))
        comparison.write_csv(folder / f"{number}.csv", header, rows)
    figures.rank_plot(scores, folder / "ranks.png")
    figures.difference_plot(scores, BASELINE, folder / "differences.png")
    prices = {c.method: c.ratio for c in cost.read(folder) if c.network == "mlp"}
    if prices:
        figures.cost_plot({x.method: x.mean_difference for x in lines}, prices, folder / "accuracy_cost.png")
    curves = {
        name: comparison.gains(folder, grid.tasks, name, BASELINE)
        for name in tried
        if name.startswith("fam_")
    }
    figures.strength_plot(curves, folder / "strength.png")
    parts.append(gaps.summary(folder / "gaps.csv", folder))
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "summary.md").write_text(text)
    return text


def _calibration(methods: Sequence[str], folder: Path, tasks: Sequence[Task]) -> str:
    """Mean negative log-likelihood and calibration error over tasks, clean | wrong labels."""
    rows = [
        "| method | NLL clean | NLL wrong labels | ECE clean | ECE wrong labels |",
        "|---|---|---|---|---|",
    ]
    numbers = [comparison.collect(folder, tasks, number) for number in ("test_nll", "test_ece")]
    for method in methods:
        cells = []
        for scores in numbers:
            for noisy in (False, True):
                part = {t: s for t, s in scores.items() if (t.noise > 0) is noisy}
                cells.append(f"{comparison.mean_over_tasks(part, method):.3f}")
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "### Negative log-likelihood and calibration error, means over tasks\n\n" + "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid into a folder of its own")
    parser.add_argument(
        "--part", choices=("all", "comparison", "correlation", "cost", "course", "summary"), default="all"
    )
    parser.add_argument("--grid", choices=("core", "full"), default="core")
    parser.add_argument("--sets", nargs="+", choices=LOADERS, help="only tasks on these data sets")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these methods")
    parser.add_argument("--minutes", type=float, help="stop starting runs after this time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: studies/results, with --quick out/study")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    grid = grids()["quick" if options.quick else options.grid]
    if options.sets:
        grid = grid._replace(tasks=[t for t in grid.tasks if t.data in options.sets])
    if options.methods:
        grid = grid._replace(methods=options.methods)
    folder = options.out or (Path("out/study") if options.quick else RESULTS)
    start, finished = time.monotonic(), True
    if options.part in ("all", "comparison"):
        finished = compare(grid, folder, options.minutes)
    if finished and options.part in ("all", "correlation"):
        left = None if options.minutes is None else options.minutes - (time.monotonic() - start) / 60
        finished = correlate(folder, options.quick, left)
    if options.part == "cost":
        networks = (
            [("digits", "mlp")]
            if options.quick
            else [("mnist", "mlp"), ("digits", "cnn"), ("digits", "transformer")]
        )
        costs = [
            c
            for d, n in networks
            for c in cost.measure(d, n, grid.methods, BASELINE, 5 if options.quick else 60)
        ]
        print(cost.table(folder, costs))
        return
    if options.part == "course":
        made = course.courses("digits" if options.quick else "mnist", folder, options.quick)
        figures.course_plot(made, folder / "course.png")
        return
    print(summarize(grid, folder))
    if not finished:
        print("Not finished: run the same command again to go on.")


if __name__ == "__main__":
    main()
