"""Run the study, or the part of it that is not there yet.

    python studies/run.py                      # the core comparison, then the correlation study
    python studies/run.py --quick              # all of its code on a small scale, within a minute
    python studies/run.py --part comparison --grid full --minutes 60
    python studies/run.py --part summary       # tables and plots of what is finished
    python studies/run.py --part page          # the tables and plots of docs/results.md and README
    python studies/run.py --part course        # kappa while networks are trained
    python studies/run.py --part cost --grid full   # what a step of each method costs, on a machine that does nothing else

Every finished run is a row in studies/results; started again, the study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(
    str(Path(__file__).resolve().parents[1])
)  # the package `studies`; an installed fam_ext goes first

from studies import cost, course, figures, gaps, summary
from studies.data import LOADERS, load, split
from studies.grids import BASELINE, Grid, grids
from studies.methods import METHODS
from studies.store import RESULTS, Run, Store, Task, best
from studies.training import run

TUNING_SEED = 10_000  # no seed of the tests


def chosen(store: Store, method: str, grid: Grid) -> Mapping[str, float] | None:
    """The configuration that did best on the tuning seed's validation part; None before all of them were tried.

    One whose training failed on a seed of the tests is left for the next best: what a failed training looks like does not take
    test data. Where all of them failed the best one stays.
    """
    tuned = [run for run in store.of(method, "tune") if run.number < grid.configurations]
    if len(tuned) < grid.configurations:
        return None
    failed = store.failed(method, load(store.task.data).guessing)
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid into a folder of its own")
    parser.add_argument(
        "--part",
        choices=("all", "comparison", "correlation", "cost", "course", "summary", "page"),
        default="all",
    )
    parser.add_argument("--grid", choices=[name for name in grids() if name != "quick"], default="core")
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
        cost.write(folder, costs)
        print(cost.table(costs))
        return
    if options.part == "course":
        made = course.courses("digits" if options.quick else "mnist", folder, options.quick)
        figures.course_plot(made, folder / "course.png")
        return
    if options.part == "page":
        summary.fill_pages(grids()["full"])
        return
    print(summary.write(grids()["quick" if options.quick else "full"], folder))
    if not finished:
        print("Not finished: run the same command again to go on.")


if __name__ == "__main__":
    main()
