"""Time the operations against their baselines: python bench/run.py [op ...] [--quick]

Tables go to the terminal and CSV files to out/bench. `pytest bench --benchmark-only` times the same steps without compiled
baselines, one after the other instead of interleaved.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
import warnings
from pathlib import Path

import bench_curvature
import bench_gram_trace
import bench_head_cross_entropy
import bench_patch_sqnorm
import bench_softmax_trace
import common
import memory
from rich.console import Console

BENCHMARKS = {
    b.OP: b for b in (bench_head_cross_entropy, bench_softmax_trace, bench_patch_sqnorm, bench_gram_trace)
}
CHOICES = (*BENCHMARKS, bench_curvature.OP)  # the last one only when asked for: it takes minutes of its own


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operations of fam_ext against their baselines.")
    parser.add_argument(
        "ops", nargs="*", metavar="op", help=f"{', '.join(CHOICES)} (default: all but the last)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, fewer cases, nothing compiled: a minute at most"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile'd baselines")
    parser.add_argument("--memory", action="store_true", help="peak memory of each step instead of its time")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder of the CSV files (default: %(default)s)"
    )
    options = parser.parse_args()
    for op in options.ops:
        if op not in CHOICES:
            parser.error(f"op must be one of {', '.join(CHOICES)}, got {op!r}")

    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, while it compiles
    logging.getLogger("torch").setLevel(logging.ERROR)
    settings = dataclasses.replace(common.QUICK if options.quick else common.Settings(), out=options.out)
    if options.no_compile:
        settings = dataclasses.replace(settings, compiled=False)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=190)
    console.print(common.machine_line(), soft_wrap=True)
    start = time.perf_counter()
    for op in options.ops or BENCHMARKS:
        if op == bench_curvature.OP:
            bench_curvature.run(console, settings)  # reports memory, too
            continue
        benchmark = BENCHMARKS[op]
        cases = benchmark.cases(options.quick)
        if options.memory:
            memory.show(console, op, [build(settings.compiled) for build in cases])
        else:
            common.run(op, cases, settings, console, getattr(benchmark, "remark", None))
    console.print(
        f"{time.perf_counter() - start:.0f} s; ratios are medians over interleaved rounds, errors relative to float64"
    )


if __name__ == "__main__":
    main()
