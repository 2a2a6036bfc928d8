"""Time the CUDA kernels in captured graphs, with CUDA events: python bench/gpu.py [--out FOLDER]

Each step is captured once and replayed; before a replay a buffer larger than the second-level cache is written, so that inputs
come from memory; its time is not counted. Medians over replays that alternate between a step and its baseline. Longer steps
(bench/gpu_steps.py) run without a graph.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_steps
import torch
import torch.nn.functional as F

from fam_ext import functional

REPLAYS = 60
Step = Callable[[], Any]


def capture(step: Step) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def microseconds(steps: dict[str, Step]) -> dict[str, float]:
    """Median time on the GPU of each step, its inputs not in the cache."""
    graphs = {name: capture(step) for name, step in steps.items()}
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(1e3 * start.elapsed_time(end))
    return {name: statistics.median(values[REPLAYS // 6 :]) for name, values in times.items()}


def head(rows: int, fan_in: int, classes: int) -> dict[str, Step]:
    x, w = (torch.randn(n, fan_in, device="cuda", requires_grad=True) for n in (rows, classes))
    z = (x @ w.T).detach().requires_grad_()
    target = torch.randint(0, classes, (rows,), device="cuda")

    def ours() -> Any:
        loss, _ = functional.head_cross_entropy(z, x, w, target, strength=0.1, backend="native")
        return torch.autograd.grad(loss, (z, x, w))

    def reference() -> Any:
        loss, _ = functional.head_cross_entropy(z, x, w, target, strength=0.1, backend="reference")
        return torch.autograd.grad(loss, (z, x, w))

    def plain() -> Any:
        return torch.autograd.grad(F.cross_entropy(z, target), z)

    steps = {"head_cross_entropy": ours, "plain PyTorch": reference, "F.cross_entropy": plain}
    exact = functional.head_cross_entropy(
        z.double(), x.double(), w.double(), target, strength=0.1, backend="reference"
    )[0]
    loss = functional.head_cross_entropy(z, x, w, target, strength=0.1, backend="native")[0]
    error = float((loss.double() - exact).abs() / exact.abs())
    if not error <= 2e-6:  # a step that computes something else is never timed
        raise RuntimeError(f"head_cross_entropy: relative error {error:.1e}")
    return steps


def patches(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Step]:
    x = torch.randn(shape, device="cuda").to(dtype)
    other = torch.empty_like(x)
    half = x.numel() // 2  # reads and writes as many bytes as patch_sqnorm reads
    with torch.no_grad():
        exact = functional.patch_sqnorm(x.double(), 3, padding=1, backend="reference")
        error = float(
            (functional.patch_sqnorm(x, 3, padding=1, backend="native") - exact).norm() / exact.norm()
        )
    if not error <= 2e-6:
        raise RuntimeError(f"patch_sqnorm: relative error {error:.1e}")
    return {
        "patch_sqnorm": lambda: functional.patch_sqnorm(x, 3, padding=1, backend="native"),
        "plain PyTorch": lambda: functional.patch_sqnorm(x, 3, padding=1, backend="reference"),
        "copy of as many bytes": lambda: other.view(-1)[:half].copy_(x.view(-1)[:half]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CUDA kernels of fam_ext.")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    out: Path = parser.parse_args().out
    cases = {
        f"head {shape}": lambda shape=shape: head(*shape)
        for shape in ((64, 64, 10), (128, 512, 10), (128, 512, 100), (256, 2048, 1000), (4096, 768, 1000))
    }
    cases |= {
        f"patches 32x256x56x56 {str(dtype).removeprefix('torch.')}": lambda dtype=dtype: patches(
            (32, 256, 56, 56), dtype
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    rows, failed = [], False
    print(machine)
    for case, build in cases.items():
        for name, time in microseconds(build()).items():
            rows.append((case, name, f"{time:.2f}", "", machine))
            print(f"{case:38} {name:30} {time:10.2f} us")
    for case, build in gpu_steps.CASES.items():
        try:
            found = gpu_steps.milliseconds(build())
        except Exception as error:  # the other cases stand for themselves
            failed = True
            print(f"{case:38} failed: {error}")
            continue
        for name, (time, peak) in found.items():
            rows.append((case, name, f"{1e3 * time:.2f}", f"{peak:.0f}", machine))
            print(f"{case:38} {name:30} {1e3 * time:10.2f} us {peak:8.0f} MB")
        torch.cuda.empty_cache()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "gpu.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case", "step", "microseconds", "peak_mb", "machine"), *rows])
    print(f"written: {out / 'gpu.csv'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
