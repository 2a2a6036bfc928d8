"""Memory of tensors on the CPU, as the profiler reports it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def allocations(f: Callable[[], object]) -> list[int]:
    """Bytes of every block that `f` takes, negative where it gives one back, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        f()
    events = profile.profiler.kineto_results.events()
    return [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]


def peak(sizes: list[int]) -> int:
    """Most bytes held at a time, beyond what was there before."""
    return max(itertools.accumulate(sizes, initial=0))


def peak_memory(f: Callable[[], object]) -> int:
    """Most bytes of tensors that `f` holds at a time."""
    return peak(allocations(f))
