"""What is finished, as tables and plots in a folder of results; those of the committed results in docs/results.md and README."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from studies import comparison, cost, figures, flatness, gaps
from studies.grids import BASELINE, CORE_METHODS, Grid, grids
from studies.store import RESULTS, Task

ROOT = Path(__file__).parents[1]
PAGES, PLOTS = (ROOT / "docs" / "results.md", ROOT / "README.md"), ROOT / "docs" / "plots"
SHORT = {
    "weight_decay": "SGD", "sam": "SAM", "dropout": "dropout", "fam_head": "FAM, last layer",
    "fam_all_noise": "**FAM, all layers, noise**", "fam_all_fisher": "**FAM, all layers, Fisher**",
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- study: (\w+) -->\n\n).*?(\n\n<!-- study: end -->)", flags=re.DOTALL)
_PLOT = re.compile(rf"\({PLOTS.name}/study_(\w+\.png)\)")


def sections(grid: Grid, folder: Path) -> dict[str, str]:
    """Markdown of the comparison by name; what is not finished is left out."""
    everything = comparison.collect(folder, grid.tasks, "test_accuracy")
    methods = _main_methods(grid)
    scores = comparison.finished(everything, methods, grid.seeds)
    made = {}
    for name, title, noisy in (
        ("all", "All tasks", (False, True)),
        ("clean", "Clean labels", (False,)),
        ("wrong", "Wrong labels", (True,)),
    ):
        part = {task: of_task for task, of_task in scores.items() if (task.noise > 0) in noisy}
        if part:
            made[name] = f"### {title} ({len(part)})\n\n{comparison.table(part, BASELINE)}"
    made["kinds"] = "### Mean ranks by kind of task\n\n" + comparison.ranks_by_kind(_kinds(scores))
    more = comparison.finished(everything, grid.methods, grid.seeds)
    if len(more) >= 3 and set(grid.methods) - set(methods):
        made["more"] = f"### All methods ({len(more)} tasks)\n\n{comparison.table(more, BASELINE)}"
    of_kappa = flatness.table(folder, list(scores), methods, BASELINE)
    made["flatness"] = f"### Kappa and training loss over those of {BASELINE}\n\n{of_kappa}"
    made["short"] = _short(scores)
    made["each"] = f"### Each task\n\n{comparison.by_task(scores)}"
    made["calibration"] = _calibration(methods, folder, list(scores))
    return made


def others(folder: Path) -> dict[str, str]:
    """Markdown of the smaller grids: what a choice in FAM changes, the paper's bottleneck, a regression."""
    made = {}
    for name, title, number in (
        ("choices", "Choices in FAM", "accuracy"),
        ("bottleneck", "With the paper's bottleneck", "accuracy"),
        ("regression", "Regression", "R²"),
    ):
        grid = grids()[name]
        every = comparison.collect(folder, grid.tasks, "test_accuracy")
        scores = comparison.finished(every, grid.methods, grid.seeds)
        if scores:
            table = comparison.table(scores, BASELINE, number)
            each = f"\n\n{comparison.by_task(scores)}" if len(scores) > 1 else ""
            made[name] = f"### {title} ({len(scores)} task{'s' if each else ''})\n\n{table}{each}"
    return made


def _kinds(scores: comparison.Scores) -> dict[str, comparison.Scores]:
    """Tasks by what is special about them; those of the MLP by wrong labels, those of little data apart."""

    def those(which: Callable[[Task], bool]) -> comparison.Scores:
        return {task: of_task for task, of_task in scores.items() if which(task)}

    def wrong(percent: int) -> comparison.Scores:
        return those(lambda t: t.network == "mlp" and t.samples > 200 and round(100 * t.noise) == percent)

    return {
        **{f"MLP, {percent} % wrong": wrong(percent) for percent in (0, 20, 40)},
        "MLP, 200 samples": those(lambda t: t.network == "mlp" and t.samples <= 200),
        "CNN": those(lambda t: t.network == "cnn"),
        "transformer": those(lambda t: t.network == "transformer"),
    }


def write(grid: Grid, folder: Path) -> str:
    """Tables and plots of what is finished; returns the text."""
    everything = comparison.collect(folder, grid.tasks, "test_accuracy")
    scores = comparison.finished(everything, _main_methods(grid), grid.seeds)
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
    tried = {m for of_task in everything.values() for m in of_task}
    curves = {
        name: comparison.gains(folder, grid.tasks, name, BASELINE)
        for name in tried
        if name.startswith("fam_")
    }
    figures.strength_plot(curves, folder / "strength.png")
    parts = [
        *sections(grid, folder).values(),
        *others(folder).values(),
        gaps.summary(folder / "gaps.csv", folder),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "summary.md").write_text(text)
    return text


def filled(page: str, grid: Grid, folder: Path) -> str:
    """`page` with the tables of a folder of results between its marks `<!-- study: name -->` and `<!-- study: end -->`."""
    made: Mapping[str, str] = {
        **sections(grid, folder),
        **others(folder),
        "cost": cost.table(cost.read(folder)),
        "correlation": gaps.table(folder / "gaps.csv"),
    }
    return _BLOCK.sub(lambda block: block[1] + made[block[2]] + block[3], page)


def fill_pages(grid: Grid) -> None:
    """The tables of docs/results.md and README, and their plots in docs/plots, from the committed results."""
    for path in PAGES:
        page = filled(path.read_text(), grid, RESULTS)
        path.write_text(page)
        for name in _PLOT.findall(page):
            shutil.copyfile(RESULTS / name, PLOTS / f"study_{name}")


def _short(scores: comparison.Scores) -> str:
    """Mean test accuracy by label noise, and wins over the baseline, of the methods in SHORT."""
    noises = sorted({round(100 * task.noise) for task in scores})
    parts = [{t: s for t, s in scores.items() if round(100 * t.noise) == noise} for noise in noises]
    titles = [
        f"{f'{n} % wrong labels' if n else 'clean'} ({len(p)})" for n, p in zip(noises, parts, strict=True)
    ]
    lines = {line.method: line for line in comparison.compare(scores, BASELINE)}
    rows = [f"| | {' | '.join(titles)} | wins / ties / losses |", "|---" * (len(parts) + 2) + "|"]
    for method, title in SHORT.items():
        if method in lines:
            line = lines[method]
            counts = "" if method == BASELINE else f"{line.wins} / {line.ties} / {line.losses}"
            cells = [f"{100 * comparison.mean_over_tasks(part, method):.2f}" for part in parts]
            rows.append(f"| {' | '.join([title, *cells, counts])} |")
    return "\n".join(rows)


def _main_methods(grid: Grid) -> list[str]:
    return [m for m in CORE_METHODS if m in grid.methods] or list(grid.methods)


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
