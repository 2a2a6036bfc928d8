"""Time the operations against their baselines: python bench/run.py [op ...] [--quick]

Tables go to the terminal, CSV files and plots to out/bench. `pytest bench --benchmark-only` times the quick cases one after the
other, keeps its runs and compares them (bench/test_steps.py).

Every bench/bench_<op>.py is a benchmark: with `run(console, settings)` it has a report of its own, else its `cases(quick)` are
timed by bench/case.py. `SHARE` (default 1) is its part of the time; 0: only when asked for by name.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import case
import machine
from rich.console import Console

ORDER = ("head_cross_entropy", "softmax_trace", "patch_sqnorm")  # then the others by name, then reports
BUDGET = 180.0  # seconds of rounds in all; compiling, checks and slow steps come on top


def benchmarks() -> dict[str, Any]:
    """The modules bench_<op>.py by their OP: operations first, reports last."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    modules = [importlib.import_module(name) for name in names]

    def place(module: Any) -> tuple[bool, int, str]:
        known = ORDER.index(module.OP) if module.OP in ORDER else len(ORDER)
        return hasattr(module, "run"), known, module.OP

    return {m.OP: m for m in sorted(modules, key=place)}


def share(module: Any) -> float:
    return getattr(module, "SHARE", 1.0)


def arguments(known: dict[str, Any]) -> argparse.Namespace:
    by_default = [op for op, module in known.items() if share(module)]
    asked = ", ".join(op for op in known if op not in by_default)
    parser = argparse.ArgumentParser(description="Time the operations of fam_ext against their baselines.")
    parser.add_argument(
        "ops", nargs="*", metavar="op", help=f"{', '.join(by_default)} (default: these); by name: {asked}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, fewer cases, nothing compiled: a minute or two"
    )
    parser.add_argument(
        "--only",
        default="",
        help="training: the networks whose names hold this; the others' lines of the CSV file stay",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (default: 1 and all)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds in all, about (default: %(default).0f)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=case.Settings.out,
        help="folder of CSV files and plots (default: %(default)s)",
    )
    options = parser.parse_args()
    options.ops = options.ops or by_default
    if unknown := [op for op in options.ops if op not in known]:
        parser.error(f"op must be one of {', '.join(known)}, got {', '.join(unknown)}")
    return options


def settings_of(options: argparse.Namespace) -> case.Settings:
    settings = replace(case.QUICK if options.quick else case.Settings(), out=options.out, only=options.only)
    threads = tuple(sorted(set(options.threads or settings.threads)))
    return replace(settings, threads=threads[-1:] if machine.on_gpu() else threads)


def main() -> None:
    known = benchmarks()
    options = arguments(known)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, while it compiles
    logging.getLogger("torch").setLevel(logging.ERROR)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=210)
    machine.use_device(options.device)
    settings = settings_of(options)
    console.print(machine.machine_line(), soft_wrap=True)
    if machine.load_warning():
        console.print(f"[bold red]{machine.load_warning()}[/bold red]", soft_wrap=True)
    start = time.perf_counter()
    for number, op in enumerate(options.ops):
        module, begin = known[op], time.perf_counter()
        weights = [share(known[o]) or 1.0 for o in options.ops[number:]]
        part = max(0.0, options.budget - (begin - start)) * weights[0] / sum(weights)
        if hasattr(module, "run"):
            module.run(console, replace(settings, seconds=part))
        else:
            remark = getattr(module, "remark", None)
            case.run(op, module.cases(options.quick), settings, console, remark, begin + part)
        console.print(f"{op}: {time.perf_counter() - begin:.0f} s\n")
    console.print(
        f"{math.ceil(time.perf_counter() - start)} s; ratios are medians over interleaved rounds, errors relative to float64; "
        f"CSV in {options.out}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
