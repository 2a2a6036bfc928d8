"""The machine that is measured: its description, its ceilings, the number of threads, the device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fam_ext.ops import backends

ALL_THREADS = torch.get_num_threads()
_device = "cpu"


def use_device(name: str) -> None:
    """Make the tensors of all later cases on this device."""
    global _device
    _device = name


def making_tensors() -> torch.device:
    """A context for building a case. Only for that: while it is active every call into torch from Python takes longer."""
    return torch.device(_device)


def on_gpu() -> bool:
    return _device.startswith("cuda")


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """torch runs on `threads` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def machine_line() -> str:
    """What the numbers were measured on; "-dirty" with changes on top of the commit."""
    import cpuinfo  # here: a machine with a GPU need not have what only this line wants
    from pytest_benchmark.utils import get_commit_info

    build, commit = backends.info().build, get_commit_info()
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; " if on_gpu() else ""
    return (
        f"{gpu}{cpuinfo.get_cpu_info()['brand_raw']}, {os.cpu_count()} CPUs, {ALL_THREADS} threads; torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}; {build.get('compiler', 'nothing compiled')} ({build.get('simd', '-')}); "
        f"commit {commit['id'][:10]}{'-dirty' * bool(commit['dirty'])}"
    )


def load_warning() -> str:
    """Why times may be noise: other processes compete for the cores. Empty on a quiet machine, or where that is not known."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cpus:
        return ""
    return f"load average {load:.1f} on {cpus} CPUs: other processes compete for the cores, the times below are no reference"


@cache
def ceilings(threads: int, device: str = "cpu") -> tuple[float, float]:
    """(GB/s of a large copy, read and written bytes counted; GFLOP/s of a large float32 matrix product) with `threads`.

    What one and the same run reaches at best, not what a data sheet says.
    """
    size, side = (1 << 28, 8192) if device == "cuda" else (1 << 24, 1024)
    with thread_count(threads):
        source, target = torch.rand(size, device=device), torch.empty(size, device=device)
        a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
        product = torch.empty(side, side, device=device)
        copy = _fastest(lambda: target.copy_(source), device)
        matmul = _fastest(lambda: torch.mm(a, b, out=product), device)
    return 2 * 4 * size / copy / 1e9, 2 * side**3 / matmul / 1e9


def _fastest(step: Callable[[], object], device: str) -> float:
    times: list[float] = []
    end = time.perf_counter() + 0.5
    while len(times) < 9 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
