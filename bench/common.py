"""What every benchmark of an operation shares: cases and variants, the check against float64, one result a line.

The parts: bench/timing.py (interleaved rounds, medians), bench/machine.py (machine line, ceilings), bench/memory.py (peak memory,
in a run of its own), bench/counts.py (FLOPs and bytes), bench/report.py (tables, CSV). A module bench_<op>.py has OP, its name,
and `cases(quick)`, a list of functions compiled -> Case; bench/run.py finds it by its file name.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import ALL_THREADS, ceilings, machine_line, making_tensors, on_gpu, thread_count
from memory import peak_megabytes
from report import Result, show, write_csv
from rich.console import Console
from timing import interleaved, quantiles, ratios, seconds_per_call
from torch import Tensor

__all__ = [
    "ALL_THREADS", "QUICK", "Case", "Result", "Settings", "Variant", "ceilings", "in_pytest", "interleaved", "machine_line",
    "measure", "quantiles", "ratios", "run", "seconds_per_call", "show", "thread_count", "write_csv",
]  # fmt: skip


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


LEAST_SECONDS = 0.3
QUICK = Settings(True, rounds=7, least=3, seconds=0.5, threads=(ALL_THREADS,), compiled=False)


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    `step` returns tensors, `exact` are the same in float64; `tolerance` bounds the relative L2 error of each. `baseline` names
    the variant that the time is divided by. `flops` and `moved_bytes` replace the case's where this way owes another count.
    `scale` multiplies the time of a step that is a known part of the whole (probes of an estimator); `thin` lets a slow
    variant sit out rounds.
    """

    name: str
    step: Callable[[], Any]
    baseline: str
    tolerance: float = 2e-6
    exact: Sequence[Tensor] = ()
    flops: float | None = None
    moved_bytes: float | None = None
    scale: float = 1.0
    thin: bool = False

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
    """Variants that are measured in the same rounds, and the least that the computation takes: bytes moved and FLOPs.

    `least` replaces the settings' number of rounds that are run whatever they take, for cases of seconds a step.
    """

    label: str
    variants: Sequence[Variant]
    moved_bytes: float = 0.0
    flops: float = 0.0
    least: int | None = None


def measure(op: str, case: Case, settings: Settings, errors: dict[str, float] | None = None) -> list[Result]:
    """Check every variant, time all in interleaved rounds, relate each to its baseline; then each one's peak memory.

    `errors`: those of variants that have been checked.
    """
    if errors is None:
        errors = {v.name: v.check() for v in case.variants}
    least = settings.least if case.least is None else case.least
    times = interleaved(case.variants, settings.rounds, least, settings.seconds)
    return results(
        op, case, times, errors, {v.name: peak_megabytes(v.step, warm=True) for v in case.variants}
    )


def results(
    op: str,
    case: Case,
    times: dict[str, list[float]],
    errors: dict[str, float],
    peaks: dict[str, float],
) -> list[Result]:
    """One result for each variant, with its share of the machine's ceilings."""
    threads = torch.get_num_threads()
    bandwidth, peak = ceilings(threads, "cuda" if on_gpu() else "cpu")
    scales = {v.name: v.scale for v in case.variants}
    found = []
    for v in case.variants:
        own = [v.scale * seconds for seconds in times[v.name]]
        p20, median, p80 = quantiles(own)
        r20, ratio, r80 = quantiles(ratios(own, times[v.baseline], 1 / scales[v.baseline]))
        moved = (case.moved_bytes if v.moved_bytes is None else v.moved_bytes) / median / 1e9
        work = (case.flops if v.flops is None else v.flops) / median / 1e9
        found.append(
            Result(
                op, case.label, threads, v.name, v.baseline, 1e6 * median, 1e6 * p20, 1e6 * p80, ratio, r20, r80, errors[v.name],
                moved, 100 * moved / bandwidth, work, 100 * work / peak, peaks[v.name],
            )
        )  # fmt: skip
    return found


def run(
    op: str,
    cases: Iterable[Callable[[bool], Case]],
    settings: Settings,
    console: Console,
    remark: Callable[[Sequence[Result]], str] | None = None,
    deadline: float = math.inf,
) -> list[Result]:
    """Measure every case with every number of threads; show one table of the operation and write all results as CSV.

    What is left until `deadline` (of time.perf_counter) is shared equally, compiling and checking included; a case has
    LEAST_SECONDS of rounds in any case. Compiled variants take part with the fewest threads only: each has to be compiled anew
    for every number of threads, and a stranger's first run compiles all of them.
    """
    found: list[Result] = []
    remarks = []
    cases = list(cases)
    left = len(cases) * len(settings.threads)
    for build in cases:
        rows: list[Result] = []
        for threads in settings.threads:
            with thread_count(threads):
                torch._dynamo.reset()  # compiled code holds the number of threads
                share = (deadline - time.perf_counter()) / left
                left -= 1
                with making_tensors():
                    case = build(settings.compiled and threads == settings.threads[0])
                start = time.perf_counter()
                errors = {v.name: v.check() for v in case.variants}  # compiles, too
                seconds = min(settings.seconds, max(LEAST_SECONDS, share - (time.perf_counter() - start)))
                rows += measure(op, case, dataclasses.replace(settings, seconds=seconds), errors)
        if remark is not None:
            remarks.append(f"{rows[0].case}\n{remark(rows)}")
        found += rows
    show(console, found)
    for text in remarks:
        console.print(text)
    write_csv(settings.out / f"{op}.csv", found)
    return found


def in_pytest(benchmark: Any, op: str, case: Case, name: str) -> None:
    """One variant under pytest-benchmark, grouped with the others of its case."""
    variant = next(v for v in case.variants if v.name == name)
    benchmark.extra_info["error"] = variant.check()
    benchmark.extra_info["machine"] = machine_line()
    benchmark.group = f"{op} {case.label}"
    benchmark(variant.step)
