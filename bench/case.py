"""What every benchmark shares: cases and their variants, the check against float64, one result for each variant.

A module bench_<op>.py has OP, its name, and `cases(quick)`, a list of functions compiled -> Case; bench/run.py and
bench/test_steps.py find it by its file name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import ALL_THREADS, ceilings, making_tensors, on_gpu, thread_count
from memory import peak_megabytes
from report import Result, show, write_results
from rich.console import Console
from timing import interleaved, quantiles, ratios
from torch import Tensor

from fam_ext.loss.plan import RECHECKED


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
    only: str = ""  # of `training`: the networks whose names hold this


LEAST_SECONDS = 0.3
QUICK = Settings(True, rounds=7, least=3, seconds=0.5, threads=(ALL_THREADS,), compiled=False)


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    `step` returns tensors, `exact` are the same in float64; `tolerance` bounds the relative L2 error of each. `baseline` names
    the variant that the time is divided by. `flops` replaces the case's where this way owes another count. `scale` multiplies
    the time of a step that is a known part of the whole (probes of an estimator) or a known multiple of it; `thin` lets a slow
    variant sit out rounds.
    """

    name: str
    step: Callable[[], Any]
    baseline: str
    tolerance: float = 2e-6
    exact: Sequence[Tensor] = ()
    flops: float | None = None
    scale: float = 1.0
    thin: bool = False

    def check(self) -> float:
        """The relative error of a step; a variant that computes something else is never timed."""
        return self.error_of(self.step())

    @torch.no_grad()
    def error_of(self, got: Sequence[Tensor]) -> float:
        """The relative error of what a step returned."""
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


Build = Callable[[bool], Case]


def measure(op: str, case: Case, settings: Settings, end: float = math.inf) -> list[Result]:
    """Check every variant, time all in interleaved rounds, relate each to its baseline; then each one's peak memory.

    The rounds end at `end` (of time.perf_counter) if that comes before the settings' seconds.
    """
    errors = {v.name: v.check() for v in case.variants}  # compiles, too
    seconds = min(settings.seconds, max(LEAST_SECONDS, end - time.perf_counter()))
    times = interleaved(case.variants, settings.rounds, case.least or settings.least, seconds)
    return results(op, case, times, errors)


def results(
    op: str, case: Case, times: Mapping[str, Sequence[float]], errors: Mapping[str, float]
) -> list[Result]:
    """One result for each variant, with its share of the machine's ceilings and the peak memory of one more step."""
    threads = torch.get_num_threads()
    bandwidth, peak = ceilings(threads, "cuda" if on_gpu() else "cpu")
    scales = {v.name: v.scale for v in case.variants}
    made = []
    for v in case.variants:
        own = [v.scale * seconds for seconds in times[v.name]]
        p20, median, p80 = quantiles(own)
        r20, ratio, r80 = quantiles(ratios(own, times[v.baseline], 1 / scales[v.baseline]))
        moved = case.moved_bytes / median / 1e9
        work = (case.flops if v.flops is None else v.flops) / median / 1e9
        made.append(
            Result(
                op, case.label, threads, v.name, v.baseline, 1e6 * median, 1e6 * p20, 1e6 * p80, ratio, r20, r80, errors[v.name],
                moved, 100 * moved / bandwidth, work, 100 * work / peak, peak_megabytes(v.step),
            )
        )  # fmt: skip
    return made


def run(
    op: str,
    builds: Sequence[Build],
    settings: Settings,
    console: Console,
    remark: Callable[[Sequence[Result]], str] | None = None,
    deadline: float = math.inf,
) -> None:
    """Measure every case with every number of threads; show one table of the operation and write all results as CSV.

    What is left until `deadline` (of time.perf_counter) is shared equally, compiling and checking included; a case has
    LEAST_SECONDS of rounds in any case. Compiled variants run with the fewest threads only: each has to be compiled anew for
    every number of threads, and a stranger's first run compiles all of them.
    """
    made: list[Result] = []
    remarks = []
    left = len(builds) * len(settings.threads)
    for build in builds:
        rows: list[Result] = []
        for threads in settings.threads:
            with thread_count(threads):
                torch._dynamo.reset()  # compiled code holds the number of threads
                start = time.perf_counter()
                end = start + (deadline - start) / left
                left -= 1
                with making_tensors():
                    case = build(settings.compiled and threads == settings.threads[0])
                rows += measure(op, case, settings, end)
        if remark is not None:
            remarks.append(f"{rows[0].case}\n{remark(rows)}")
        made += rows
    show(console, made)
    for text in remarks:
        console.print(text)
    write_results(settings.out / f"{op}.csv", made)


def settle(criterion: Any) -> None:
    """Let the criterion count as many steps as make the next check of whether samples interact 31 steps away."""
    for term in criterion.terms:
        term.memory.uses = dict.fromkeys(term.memory.uses, RECHECKED + 1)
