"""Tables and plots of the language study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from studies import figures
from studies.comparison import difference, write_csv
from studies.language_training import CHECKPOINTS, METHODS
from studies.store import Run, Store

BASELINE = "adamw"
TOLERANCE = 1.05  # of equal time
HEADER = (
    "method", "seeds", "test loss", "over adamw", "95 % low", "95 % high", "test - train", "last step", "equal time",
    "accuracy", "ms per step",
)  # fmt: skip


def tests(store: Store, method: str) -> dict[int, Run]:
    """By seed."""
    return {run.number: run for run in store.of(method, "test")}


def _names(store: Store) -> list[str]:
    return list(dict.fromkeys(run.method for run in store.rows.values() if run.phase == "test"))


def _share(name: str) -> float:
    """Of the steps that the other methods take."""
    return METHODS[name].share if name in METHODS else 1.0


def _column(runs: Mapping[int, Run], name: str) -> dict[int, float]:
    return {seed: run.numbers[name] for seed, run in runs.items()}


def within(run: Run, share: float, limit: float) -> float:
    """The test loss at the checkpoint with the lowest validation loss, of those reached within `limit` ms.

    `share` is the method's share of the steps; times are in milliseconds of a step, for as many steps as the baseline has.
    nan where the first checkpoint comes too late.
    """
    reached = [
        k for k in range(1, CHECKPOINTS + 1) if run.numbers["step_ms"] * share * k / CHECKPOINTS <= limit
    ]
    if not reached:
        return float("nan")
    return run.numbers[f"test_{min(reached, key=lambda k: run.numbers[f'validation_{k}'])}"]


def rows(store: Store) -> list[list[object]]:
    """A line for each method, lowest test loss first; columns as HEADER."""
    baseline = tests(store, BASELINE)
    limit = TOLERANCE * statistics.median(_column(baseline, "step_ms").values()) if baseline else float("inf")
    lines: list[list[object]] = []
    for name in _names(store):
        runs = tests(store, name)
        mean = {
            key: statistics.fmean(_column(runs, key).values())
            for key in ("test", "train", "final_test", "accuracy")
        }
        step = statistics.median(_column(runs, "step_ms").values())
        d = difference(_column(runs, "test"), _column(baseline, "test"))
        # the median time, not each run's own, which others on the machine disturb
        timed = [run._replace(numbers={**run.numbers, "step_ms": step}) for run in runs.values()]
        lines.append(
            [
                name, len(runs), mean["test"], *((d.mean, d.low, d.high) if d else ("", "", "")),
                mean["test"] - mean["train"], mean["final_test"],
                statistics.fmean(within(run, _share(name), limit) for run in timed), mean["accuracy"], step,
            ]
        )  # fmt: skip
    return sorted(lines, key=lambda line: float(str(line[2])))


def table(lines: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Markdown, numbers with three decimals."""
    text = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(header), ["---"] * len(header), *text])


def curve(store: Store) -> list[list[object]]:
    """(strength, seeds, mean test loss, mean loss of the last step) of FAM noise."""
    names = sorted({run.method for run in store.rows.values()}, key=float)
    lines: list[list[object]] = []
    for name in names:
        runs = tests(store, name)
        losses = [statistics.fmean(_column(runs, key).values()) for key in ("test", "final_test")]
        lines.append([name, len(runs), *losses])
    return lines


def write(stores: Mapping[str, Store], folder: Path, versions: str) -> str:
    """summary.md, a CSV file of each part, and plots; returns the text."""
    sections = [f"Measured with {versions}. Losses in nats, of a token or a window."]
    for part, store in stores.items():
        if part == "strength":
            lines, header = curve(store), ["strength", "seeds", "test loss", "last step"]
        else:
            lines, header = rows(store), list(HEADER)
        if not lines:
            continue
        write_csv(folder / f"{part}.csv", header, lines)
        sections.append(f"## {part}\n\n{table(lines, header)}")
        if part == "strength":
            own = [(float(str(line[0])), float(str(line[2])), float(str(line[3]))) for line in lines]
            figures.loss_by_strength_plot(own, folder / "strength.png")
        else:
            figures.loss_plot(_losses(store), folder / f"{part}.png")
    text = "\n\n".join(sections) + "\n"
    (folder / "summary.md").write_text(text)
    return text


def _losses(store: Store) -> dict[str, list[tuple[float, float, float]]]:
    """By method: (share of the steps, mean test loss, mean training loss) at each checkpoint."""
    losses = {}
    for name in _names(store):
        runs = tests(store, name)
        losses[name] = [
            (
                _share(name) * k / CHECKPOINTS,
                statistics.fmean(_column(runs, f"test_{k}").values()),
                statistics.fmean(_column(runs, f"train_{k}").values()),
            )
            for k in range(1, CHECKPOINTS + 1)
        ]
    return losses
