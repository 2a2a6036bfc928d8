"""What every benchmark shares: interleaved rounds, ratios, the check against float64, the machine line, tables and CSV.

A round runs every variant once, in shuffled order, so that noise falls on all alike. A ratio is formed within each round and
its median taken: it is far steadier than a quotient of two medians on a machine that others use. Every time is one sample of
several calls, long enough for the clock.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fam_ext import backends

SAMPLE_SECONDS = (
    2e-3  # one sample: some thousand times the clock's resolution, shorter than a scheduler's time slice
)
LONG_STEP = 0.5  # seconds: what takes longer is warm after two calls
ALL_THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class Settings:
    """How long to measure, with how many threads, where to write. A case ends after `seconds`, not before `least` rounds."""

    quick: bool = False
    rounds: int = 41
    least: int = 7
    seconds: float = 2.0
    threads: tuple[int, ...] = tuple(sorted({1, ALL_THREADS}))
    compiled: bool = True
    out: Path = Path("out/bench")


QUICK = Settings(True, rounds=7, least=3, seconds=0.5, threads=(ALL_THREADS,), compiled=False)


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    `step` returns tensors, `exact` are the same in float64; `tolerance` bounds the relative L2 error of each. `baseline` names
    the variant that the time is divided by.
    """

    name: str
    step: Callable[[], Any]
    baseline: str
    tolerance: float = 2e-6
    exact: Sequence[Tensor] = ()

    def check(self) -> float:
        """The relative error; a variant that computes something else is never timed."""
        got = self.step()
        with torch.no_grad():
            pairs = zip(got, self.exact, strict=True)
            error = max(float((g.double() - e).norm() / e.norm()) for g, e in pairs)
        if not error <= self.tolerance:
            raise RuntimeError(f"{self.name}: relative error {error:.1e} exceeds {self.tolerance:.0e}")
        return error


@dataclass(frozen=True)
class Case:
    """Variants that are measured in the same rounds, and the least that the computation takes: bytes moved and FLOPs."""

    label: str
    variants: Sequence[Variant]
    moved_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Result:
    """One variant of one case, over all rounds."""

    op: str
    case: str
    threads: int
    variant: str
    baseline: str
    median_us: float
    p20_us: float
    p80_us: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    error: float
    gigabytes_per_second: float
    percent_of_copy: float
    gigaflops_per_second: float
    percent_of_matmul: float


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(p20, median, p80)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


@contextmanager
def thread_count(threads: int):
    """torch runs on `threads` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_per_call(step: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def interleaved(
    variants: Iterable[Variant], rounds: int, least: int = 1, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds per call of every variant in every round: `rounds`, or `least` and as many as begin within `seconds`."""
    steps = {v.name: v.step for v in variants}
    calls = {}
    for name, step in steps.items():  # warm-up: caches, allocator, compiled code
        first = seconds_per_call(step, 1)
        warm = [first] if min(first, seconds_per_call(step, 1)) > LONG_STEP else []
        for _ in range(0 if warm else 2):
            step()
        warm = warm or [seconds_per_call(step, 1) for _ in range(3)]
        calls[name] = max(1, round(SAMPLE_SECONDS / min(warm)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()  # a collection would fall on whichever variant happens to run
    try:
        for done in range(rounds):
            if done >= least and time.perf_counter() > end:
                break
            shuffle.shuffle(order)
            for name in order:
                times[name].append(seconds_per_call(steps[name], calls[name]))
    finally:
        gc.enable()
    return times


def measure(op: str, case: Case, settings: Settings) -> list[Result]:
    """Check every variant, time all in interleaved rounds, and relate each to its baseline."""
    errors = {v.name: v.check() for v in case.variants}
    times = interleaved(case.variants, settings.rounds, settings.least, settings.seconds)
    bandwidth, peak = ceilings(torch.get_num_threads())
    results = []
    for v in case.variants:
        ratios = [a / b for a, b in zip(times[v.name], times[v.baseline], strict=True)]
        (p20, median, p80), (r20, ratio, r80) = quantiles(times[v.name]), quantiles(ratios)
        moved, work = case.moved_bytes / median / 1e9, case.flops / median / 1e9
        results.append(
            Result(
                op, case.label, torch.get_num_threads(), v.name, v.baseline, 1e6 * median, 1e6 * p20, 1e6 * p80, ratio, r20, r80,
                errors[v.name], moved, 100 * moved / bandwidth, work, 100 * work / peak,
            )
        )  # fmt: skip
    return results


def run(
    op: str,
    cases: Iterable[Callable[[bool], Case]],
    settings: Settings,
    console: Console,
    remark: Callable[[Sequence[Result]], str] | None = None,
) -> None:
    """Measure every case with every number of threads; show a table of each and write all results as CSV."""
    results: list[Result] = []
    for build in cases:
        rows: list[Result] = []
        for threads in settings.threads:
            with thread_count(threads):
                torch._dynamo.reset()  # compiled code holds the number of threads
                rows += measure(op, build(settings.compiled), settings)
        show(console, rows)
        if remark is not None:
            console.print(remark(rows))
        results += rows
    write_csv(settings.out / f"{op}.csv", results)


def in_pytest(benchmark: object, op: str, case: Case, name: str) -> None:
    """One variant under pytest-benchmark, grouped with the others of its case."""
    variant = next(v for v in case.variants if v.name == name)
    benchmark.extra_info["error"] = variant.check()
    benchmark.group = f"{op} {case.label}"
    benchmark(variant.step)


@cache
def machine_line() -> str:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
    build = backends.info().build
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    commit = described.stdout.strip() or "unknown"
    compiler = build.get("compiler", "nothing compiled")
    return (
        f"{model}, {os.cpu_count()} CPUs, {ALL_THREADS} threads; torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}; {compiler} ({build.get('simd', '-')}); commit {commit}"
    )


@cache
def ceilings(threads: int) -> tuple[float, float]:
    """(GB/s of a large copy, read and written bytes counted; GFLOP/s of a large float32 matrix product) with `threads`."""
    with thread_count(threads):
        source, target = torch.rand(1 << 24), torch.empty(1 << 24)
        a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
        product = torch.empty(1024, 1024)
        copy = min(seconds_per_call(lambda: target.copy_(source), 1) for _ in range(9))
        matmul = min(seconds_per_call(lambda: torch.mm(a, b, out=product), 1) for _ in range(9))
    return 2 * 4 * (1 << 24) / copy / 1e9, 2 * 1024**3 / matmul / 1e9


def show(console: Console, rows: Sequence[Result]) -> None:
    """A table of one case: a row for each variant, columns for each number of threads."""
    threads = sorted({r.threads for r in rows})
    table = Table(title=f"{rows[0].op}, {rows[0].case}", title_justify="left", title_style="bold")
    table.add_column("variant", no_wrap=True)
    rates = [
        (name, label)
        for name, label in (("percent_of_matmul", "% of\nmatmul"), ("percent_of_copy", "% of\ncopy"))
        if getattr(rows[0], name)
    ]
    for count in threads:
        label = f"{count} thread{'s' * (count > 1)}"
        table.add_column(f"{label}: µs\n(p20-p80)", justify="right", no_wrap=True)
        table.add_column("ratio\n(p20-p80)", justify="right", no_wrap=True)
        for _, rate_label in rates:
            table.add_column(rate_label, justify="right", no_wrap=True)
    table.add_column("ratio to", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for name in dict.fromkeys(r.variant for r in rows):
        of_name = [r for r in rows if r.variant == name]
        cells = [name]
        for r in sorted(of_name, key=lambda r: r.threads):
            cells.append(f"{r.median_us:.0f} ({r.p20_us:.0f}-{r.p80_us:.0f})")
            own = r.baseline == r.variant
            cells.append("" if own else f"[bold]{r.ratio:.2f}[/bold] ({r.ratio_p20:.2f}-{r.ratio_p80:.2f})")
            cells += [f"{getattr(r, rate):.0f}" for rate, _ in rates]
        baseline = of_name[0].baseline
        cells += ["" if baseline == name else baseline, f"{max(r.error for r in of_name):.0e}"]
        table.add_row(*cells)
    console.print(table)


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """All results of one operation, one line each, with the machine line in the last column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(Result.__dataclass_fields__)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, "machine"])
        for r in results:
            values = [getattr(r, name) for name in fields]
            writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in values] + [machine_line()])
