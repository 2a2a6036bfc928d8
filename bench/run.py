"""Time the operations against their baselines: python bench/run.py [op ...] [--quick] [--compare old.csv]

Tables go to the terminal, CSV files and plots to out/bench. `pytest bench --benchmark-only` times the same steps without compiled
baselines, one after the other instead of interleaved.

Every bench/bench_<op>.py takes part: with `cases(quick)` it is timed by bench/common.py, with `run(console, settings)` it
has a report of its own. `SHARE` (default 1) is its part of the time; 0: only when asked for by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import common
import machine
import memory
from compare import show_moves
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


def weight(module: Any) -> float:
    """Its part of the time when it is measured."""
    return share(module) or 1.0


def arguments(known: dict[str, Any]) -> argparse.Namespace:
    by_default = [op for op, module in known.items() if share(module)]
    asked = [op for op in known if op not in by_default]
    parser = argparse.ArgumentParser(description="Time the operations of fam_ext against their baselines.")
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help=f"{', '.join(by_default)} (default: these); only by name: {', '.join(asked) or 'none'}",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, fewer cases, nothing compiled: a minute or two at most",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile'd baselines")
    parser.add_argument("--memory", action="store_true", help="peak memory of each step instead of its time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (default: 1 and all)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds in all, about (default: %(default).0f)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench"),
        help="folder of CSV files and plots (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="CSV file or folder of an earlier run: say what moved since, last",
    )
    parser.add_argument(
        "--no-run", action="store_true", help="measure nothing: only --compare what is in --out"
    )
    options = parser.parse_args()
    for op in options.ops:
        if op not in known:
            parser.error(f"op must be one of {', '.join(known)}, got {op!r}")
    if options.no_run and options.compare is None:
        parser.error("--no-run needs --compare")
    if options.compare is not None and not options.compare.exists():
        parser.error(f"--compare: {options.compare} does not exist")
    if (
        options.compare is not None
        and not options.no_run
        and options.compare.resolve() == options.out.resolve()
    ):
        parser.error("--compare: the old results lie in --out and would be overwritten; copy them first")
    return options


def settings_of(options: argparse.Namespace) -> common.Settings:
    settings = dataclasses.replace(common.QUICK if options.quick else common.Settings(), out=options.out)
    if options.no_compile:
        settings = dataclasses.replace(settings, compiled=False)
    threads = tuple(sorted(set(options.threads))) if options.threads else settings.threads
    if machine.on_gpu():
        threads = threads[-1:]
    return dataclasses.replace(settings, threads=threads)


def main() -> None:
    known = benchmarks()
    options = arguments(known)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, while it compiles
    logging.getLogger("torch").setLevel(logging.ERROR)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=210)
    if not options.no_run:
        machine.use_device(options.device)
        measure(console, known, options)
    if options.compare is not None:
        show_moves(console, options.compare, options.out)


def measure(console: Console, known: dict[str, Any], options: argparse.Namespace) -> None:
    settings = settings_of(options)
    console.print(common.machine_line(), soft_wrap=True)
    if machine.load_warning():
        console.print(f"[bold red]{machine.load_warning()}[/bold red]", soft_wrap=True)
    start = time.perf_counter()
    ops = options.ops or [op for op, module in known.items() if share(module)]
    for number, op in enumerate(ops):
        module, begin = known[op], time.perf_counter()
        left = options.budget - (begin - start)
        part = max(0.0, left) * weight(module) / sum(weight(known[o]) for o in ops[number:])
        if options.memory and hasattr(module, "cases"):
            with machine.making_tensors():
                built = [build(settings.compiled) for build in module.cases(options.quick)]
            memory.show(console, op, built)
        elif hasattr(module, "cases"):
            remark = getattr(module, "remark", None)
            common.run(op, module.cases(options.quick), settings, console, remark, begin + part)
        else:
            module.run(console, dataclasses.replace(settings, seconds=part))
        console.print(f"{op}: {time.perf_counter() - begin:.0f} s\n")
    seconds = time.perf_counter() - start
    console.print(
        f"{math.ceil(seconds)} s; ratios are medians over interleaved rounds, errors relative to float64; CSV in {options.out}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
