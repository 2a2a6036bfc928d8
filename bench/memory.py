"""Peak memory of one step, beyond what is held before it: what torch's allocator hands out, kernels' own scratch not counted.

A run of its own: the profiler that reports every allocation would distort times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from common import Case
from rich.console import Console
from rich.table import Table


def peak_megabytes(step: Callable[[], object]) -> float:
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def show(console: Console, op: str, cases: Sequence[Case]) -> None:
    """A row for each variant, a column for each case. Variants of another form than the first case's get rows of their own."""
    table = Table(title=f"{op}: peak memory of a step, MB", title_justify="left", title_style="bold")
    table.add_column("variant", no_wrap=True)
    for case in cases:
        table.add_column(case.label.split(",")[0], justify="right")
    peaks = [{v.name: peak_megabytes(v.step) for v in case.variants} for case in cases]
    for name in dict.fromkeys(name for column in peaks for name in column):
        table.add_row(name, *(f"{column[name]:.2f}" if name in column else "" for column in peaks))
    console.print(table)
