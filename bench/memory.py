"""Peak memory, a run of its own: the profiler that reports every allocation would distort times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from machine import on_gpu


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


def peak_megabytes(step: Callable[[], object]) -> float:
    """Peak memory of one call beyond what is held before it: what torch's allocator hands out, not kernels' own scratch.

    The step has run before, so that what its first call keeps does not count.
    """
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
