"""How far one training step travels through the package: python tools/journey.py [head] [hidden] [--order]

Counts, for one warm training step (forward pass, loss, backward pass, optimizer), the Python calls inside fam_ext: how many
calls, of how many functions, in how many files, and in how many stays. A stay is a run of consecutive calls in one file: it ends
when a function of another file of the package is called. Few stays mean that a reader can follow the step file by file.

The steps: `head`, FAMLoss with CrossEntropyLoss on the last Linear layer; `hidden`, one Hutchinson probe on a hidden Linear
layer. With --max-files or --max-stays the exit status is 1 when a step that was asked for exceeds the number.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fam_ext

WARM = 10  # steps before the one that is counted: the first ones choose a method and look whether samples interact
INLINED = (
    "<listcomp>",
    "<dictcomp>",
    "<setcomp>",
    "<genexpr>",
)  # newer Pythons run most of these without a call
STEPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "head": ("FAMLoss(CrossEntropyLoss(), head)", -1, {}),
    "hidden": ("FAMLoss, hidden layer, one Hutchinson probe", 0, {"method": "hutchinson", "probes": 1}),
}


@dataclass(frozen=True)
class Call:
    """A call of a Python function; a generator that goes on is called again."""

    file: str
    function: str


def stays(calls: Sequence[Call]) -> list[str]:
    """The files in the order of the calls, consecutive repetitions left out."""
    return [file for file, _ in itertools.groupby(call.file for call in calls)]


def calls_of(step: Callable[[], object], folder: Path) -> list[Call]:
    """The calls of functions whose source lies in `folder` while `step` runs, in this thread."""
    prefix = f"{folder}/"
    seen: list[Call] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefix) and code.co_name not in INLINED:
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
            seen.append(Call(code.co_filename.removeprefix(prefix), name))

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return seen


def training_step(index: int, options: dict[str, Any]) -> Callable[[], None]:
    """A step of a perceptron 64 -> 32 -> 10 on 16 samples, FAM on its layer number `index`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    x, y = torch.randn(16, 64), torch.randint(10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    criterion = fam_ext.FAMLoss(nn.CrossEntropyLoss(), model[index], 1e-3, **options)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def journey(name: str) -> list[Call]:
    """The calls of one warm step of STEPS."""
    _, index, options = STEPS[name]
    step = training_step(index, options)
    for _ in range(WARM):
        step()
    return calls_of(step, Path(fam_ext.__file__).parent)


def tables(name: str, calls: Sequence[Call]) -> Table:
    """A row for each file in the order of the first visit; the sums are the last row."""
    visits = stays(calls)
    table = Table(title=f"{name}: {STEPS[name][0]}", title_justify="left", show_footer=True)
    files = list(dict.fromkeys(visits))
    functions = {(call.file, call.function) for call in calls}
    table.add_column("file", footer=f"{len(files)} files")
    for title, total in (("stays", len(visits)), ("calls", len(calls)), ("functions", len(functions))):
        table.add_column(title, justify="right", footer=str(total))
    for file in files:
        counts = visits.count(file), sum(c.file == file for c in calls), sum(f == file for f, _ in functions)
        table.add_row(file, *map(str, counts))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Count files, stays and calls of one training step.")
    parser.add_argument("steps", nargs="*", metavar="step", help=f"{', '.join(STEPS)} (default: all)")
    parser.add_argument("--order", action="store_true", help="list the calls, a line for each stay")
    parser.add_argument("--max-files", type=int, help="exit with 1 when a step visits more files")
    parser.add_argument("--max-stays", type=int, help="exit with 1 when a step has more stays")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"step must be one of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    console, failed = Console(), []
    for name in options.steps or STEPS:
        calls = journey(name)
        console.print(tables(name, calls))
        if options.order:
            for file, run in itertools.groupby(calls, lambda call: call.file):
                console.print(
                    f"  {file}: {', '.join(c.function for c in run)}", highlight=False, soft_wrap=True
                )
        visits = stays(calls)
        counted = (
            ("files", len(set(visits)), options.max_files),
            ("stays", len(visits), options.max_stays),
        )
        failed += [
            f"{name}: {n} {what}, at most {most}"
            for what, n, most in counted
            if most is not None and n > most
        ]
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
