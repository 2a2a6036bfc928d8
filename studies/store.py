"""Finished runs, one CSV row each in a file for each task; what is there is not run again."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
NUMBERS = (
    "train_accuracy", "train_nll", "train_ece", "validation_accuracy", "validation_nll", "validation_ece", "test_accuracy",
    "test_nll", "test_ece", "kappa_head", "kappa_all", "step_ms",
)  # fmt: skip
COLUMNS = ("method", "phase", "number", "hyper")


class Task(NamedTuple):
    """What methods are compared on."""

    data: str
    network: str
    noise: float
    samples: int

    def __str__(self) -> str:
        return f"{self.data}-{self.network}-{round(100 * self.noise)}-{self.samples}"


class Run(NamedTuple):
    """A row: `number` is the configuration of phase "tune", the seed of phase "test"."""

    method: str
    phase: str
    number: int
    hyper: dict[str, float]
    numbers: dict[str, float]


class Store:
    """The runs of one task; `columns` are the numbers that a row has, the last of them always.

    A later row replaces an earlier one of the same method, phase and number.
    """

    def __init__(self, folder: Path, task: Task | str, columns: Sequence[str] = NUMBERS) -> None:
        self.task = task
        self.columns = columns
        self.path = folder / "runs" / f"{task}.csv"
        self.rows: dict[tuple[str, str, int], Run] = {}
        self.every: list[Run] = []  # also those that were replaced
        if self.path.exists():
            with open(self.path, newline="") as file:
                for row in csv.DictReader(file):
                    if row[columns[-1]]:  # a line that was cut off lacks its end
                        numbers = {name: float(row[name]) for name in columns if row[name]}
                        self._keep(
                            Run(
                                row["method"],
                                row["phase"],
                                int(row["number"]),
                                json.loads(row["hyper"]),
                                numbers,
                            )
                        )

    def _keep(self, run: Run) -> None:
        self.rows[run.method, run.phase, run.number] = run
        self.every.append(run)

    def get(self, method: str, phase: str, number: int) -> Run | None:
        return self.rows.get((method, phase, number))

    def of(self, method: str, phase: str) -> list[Run]:
        return [run for run in self.rows.values() if (run.method, run.phase) == (method, phase)]

    def failed(self, method: str, guessing: float) -> list[Mapping[str, float]]:
        """Configurations that on some seed ended no better than guessing on their own training labels, or diverged."""
        runs = [run for run in self.every if run.method == method]
        return [run.hyper for run in runs if not run.numbers["train_nll"] < 0.95 * guessing]

    def add(self, run: Run) -> None:
        """Append a row; the file is complete after every run. It is kept as the file has it, so a later start agrees."""
        cells = {name: f"{run.numbers[name]:.6g}" for name in self.columns if name in run.numbers}
        self._keep(run._replace(numbers={name: float(cell) for name, cell in cells.items()}))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow((*COLUMNS, *self.columns))
            row = (run.method, run.phase, run.number, json.dumps(run.hyper))
            writer.writerow((*row, *(cells.get(name, "") for name in self.columns)))


def best(runs: list[Run]) -> Mapping[str, float]:
    """The configuration with the highest validation accuracy; the lower validation loss decides between equals."""

    def rank(run: Run) -> tuple[float, float]:
        accuracy, nll = run.numbers["validation_accuracy"], run.numbers["validation_nll"]
        return (accuracy, -nll) if accuracy == accuracy and nll == nll else (-1.0, 0.0)

    return max(runs, key=rank).hyper
