"""Interleaved rounds and their statistics.

A round runs every variant once, in shuffled order, so that noise falls on all alike. A ratio is formed within each round and
its median taken: far steadier than a quotient of two medians on a machine that others use. A time is one sample of several
calls, long enough for the clock, after a call that does not count: the variant before has left its own data in the caches, and a
first call that pays for that would raise a step of 100 µs by half. On a GPU a time is that between two CUDA events around one
call, with the L2 cache overwritten before it, which also hides the launches that the overwriting outlasts.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy
import torch
from machine import on_gpu

# one sample: some thousand times the clock's resolution, shorter than a scheduler's time slice
SAMPLE_SECONDS = 2e-3
SLOW_SECONDS = 0.05  # a step that is long enough to be measured by itself
VERY_SLOW_SECONDS = 3.0
GPU_CALLS = 8  # a sample on a GPU
Step = Callable[[], Any]


@cache
def _flush_buffer() -> torch.Tensor:
    """Larger than any L2 cache."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def seconds_per_call(step: Step, calls: int) -> float:
    """Mean seconds of `calls` calls; on a GPU, of the device alone, each call with a cold L2 cache."""
    if on_gpu():
        return _gpu_seconds(step, calls)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _gpu_seconds(step: Step, calls: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for first, last in events:
        _flush_buffer().zero_()
        first.record()
        step()
        last.record()
    torch.cuda.synchronize()
    return sum(first.elapsed_time(last) for first, last in events) / calls / 1e3


def warm_up(step: Step) -> tuple[int, float]:
    """(calls that make a sample, seconds of one call) of a step that has run before: its check compiled what it compiles."""
    seconds = seconds_per_call(step, 1)
    if seconds < SLOW_SECONDS:
        seconds = min(seconds_per_call(step, 1) for _ in range(4))
    return GPU_CALLS if on_gpu() else max(1, round(SAMPLE_SECONDS / seconds)), seconds


def strides(costs: Mapping[str, float], seconds: float, rounds: int) -> dict[str, int]:
    """Run a variant in every k-th round only: k for each, from the cost of a sample of each.

    Variants share `seconds` so that a slow one does not leave the fast ones with a few rounds: each may take an equal part of
    the time, and what costs more than its part over all `rounds` is thinned.
    """
    if not math.isfinite(seconds):
        return dict.fromkeys(costs, 1)
    part = max(seconds, 1e-9) / len(costs)
    return {name: max(1, math.ceil(min(cost * rounds / part, rounds))) for name, cost in costs.items()}


def _shown(rounds: int) -> Iterable[int]:
    """The rounds, with a progress bar on a terminal after two seconds, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return range(rounds)
    tqdm.monitor_interval = 0  # no thread of its own beside what is timed
    shown: Iterable[int] = tqdm(range(rounds), unit="round", delay=2, leave=False, disable=None)
    return shown


def interleaved(
    variants: Sequence[Any], rounds: int, least: int = 1, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds per call of every variant (an object with `name`, `step` and `thin`) in every round.

    `rounds` rounds, or `least` and as many as begin within `seconds`. A variant whose `thin` is True may be left out of rounds
    when it is slow (nan there), but for the first two, or the first one where a call takes more than VERY_SLOW_SECONDS.
    """
    steps = {v.name: v.step for v in variants}
    warm = {name: warm_up(step) for name, step in steps.items()}
    every = strides({name: calls * cost for name, (calls, cost) in warm.items()}, seconds, rounds)
    thinned = {v.name for v in variants if v.thin}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()  # a collection would fall on whichever variant happens to run
    try:
        for done in _shown(rounds):
            if done >= least and time.perf_counter() > end:
                break
            shuffle.shuffle(order)
            for name in order:
                calls, cost = warm[name]
                if name in thinned and done >= (2 if cost < VERY_SLOW_SECONDS else 1) and done % every[name]:
                    times[name].append(math.nan)
                    continue
                if cost < VERY_SLOW_SECONDS:
                    steps[
                        name
                    ]()  # in training a step follows one of its own kind, in the memory that this has left
                times[name].append(seconds_per_call(steps[name], calls))
    finally:
        gc.enable()
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(p20, median, p80); nan is left out."""
    low, median, high = numpy.nanquantile(values, (0.2, 0.5, 0.8))
    return float(low), float(median), float(high)


def ratios(own: Sequence[float], baseline: Sequence[float], scale: float = 1.0) -> list[float]:
    """scale * own / baseline of every round; nan where one of them did not run."""
    return [scale * a / b for a, b in zip(own, baseline, strict=True)]
