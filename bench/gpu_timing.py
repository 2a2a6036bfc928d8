"""Timing on a GPU: captured graphs and CUDA events. On the CPU the same calls run the steps once, as a rehearsal, untimed.

Steps are replayed in turns with their baseline; a buffer larger than the second-level cache is written before each, so that
inputs come from memory, and its time is not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from machine import making_tensors, on_gpu

Step = Callable[[], Any]

REPLAYS, ROUNDS, WARM_UP = 60, 7, 2


def capture(step: Step) -> Step:
    """A call that replays the step's kernels without the work of the host."""
    if not on_gpu():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def elapsed(step: Step) -> float:
    """Milliseconds of one call on the GPU; nan on the CPU."""
    if not on_gpu():
        step()
        return float("nan")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def in_graphs(steps: dict[str, Step]) -> dict[str, tuple[float, float]]:
    """(median microseconds, nan) of each step in a captured graph, its inputs not in the cache."""
    graphs = {name: capture(step) for name, step in steps.items()}
    with making_tensors():
        flush = torch.empty((256 << 20) if on_gpu() else 1, dtype=torch.int8)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS if on_gpu() else 1):
        for name, replay in graphs.items():
            flush.zero_()
            times[name].append(1e3 * elapsed(replay))
    return {
        name: (statistics.median(values[len(values) // 6 :]), float("nan")) for name, values in times.items()
    }


def one_by_one(steps: dict[str, Step]) -> dict[str, tuple[float, float]]:
    """(median microseconds, peak MB beyond what was held before) of each step, without a graph."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, float("nan"))
    for k in range(WARM_UP + ROUNDS if on_gpu() else 1):
        for name, step in steps.items():
            before = 0
            if on_gpu():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            time = 1e3 * elapsed(step)
            if on_gpu():
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if k >= WARM_UP or not on_gpu():
                times[name].append(time)
    return {name: (statistics.median(values), peaks[name]) for name, values in times.items()}
