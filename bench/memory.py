"""Peak memory, a run of its own: the profiler that reports every allocation would distort times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from machine import on_gpu
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from common import Case


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Nothing reaches the terminal's error stream inside, C++ included: the profiler reports its own starts and stops there."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def peak_megabytes(step: Callable[[], object], warm: bool = False) -> float:
    """Peak memory of one call beyond what is held before it: what torch's allocator hands out, not kernels' own scratch.

    `warm`: the step has run before, so that what its first call keeps does not count already.
    """
    if not warm:
        step()
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
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
