"""Time the CUDA and Triton kernels: python bench/gpu.py [--out FOLDER] [--rehearse]

Short steps run in captured graphs (bench/gpu_timing.py), longer ones (bench/gpu_steps.py) without. A case that fails is named,
the others are measured and written; the exit status is then 1. --rehearse runs every case small on the CPU, timing nothing.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import gpu_steps
import machine
import torch
import torch.nn.functional as F
from gpu_timing import Step, in_graphs, one_by_one

from fam_ext import functional

TOLERANCE = 2e-6  # a step that computes something else is never timed


def ours() -> str:
    """The backend that is timed: on a CPU without the compiled library a rehearsal takes what there is."""
    return "native" if machine.on_gpu() else "auto"


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.detach().double() - exact.detach()).norm() / exact.detach().norm())


def head(rows: int, fan_in: int, classes: int) -> dict[str, Step]:
    x, w = (torch.randn(n, fan_in).requires_grad_() for n in (rows, classes))
    z = (x @ w.T).detach().requires_grad_()
    target = torch.randint(0, classes, (rows,))

    def loss(backend: str, *inputs: torch.Tensor) -> torch.Tensor:
        return functional.head_cross_entropy(*inputs, target, strength=0.1, backend=backend)[0]

    error = relative_error(loss(ours(), z, x, w), loss("reference", z.double(), x.double(), w.double()))
    if not error <= TOLERANCE:
        raise RuntimeError(f"head_cross_entropy: relative error {error:.1e}")
    return {
        "head_cross_entropy": lambda: torch.autograd.grad(loss(ours(), z, x, w), (z, x, w)),
        "plain PyTorch": lambda: torch.autograd.grad(loss("reference", z, x, w), (z, x, w)),
        "F.cross_entropy": lambda: torch.autograd.grad(F.cross_entropy(z, target), z),
    }


def patches(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Step]:
    """Forward alone, and with the backward pass; a copy moves as many bytes as the forward pass reads."""
    x = torch.randn(shape).to(dtype)
    other, leaf = torch.empty_like(x), x.clone().requires_grad_()
    half = x.numel() // 2
    exact = functional.patch_sqnorm(x.double(), 3, padding=1, backend="reference")
    upstream = torch.rand(exact.shape).to(functional.patch_sqnorm(x, 3, padding=1, backend=ours()).dtype)

    def forward(backend: str) -> torch.Tensor:
        return functional.patch_sqnorm(x, 3, padding=1, backend=backend)

    def both(backend: str, x: torch.Tensor) -> torch.Tensor:
        out = functional.patch_sqnorm(x, 3, padding=1, backend=backend)
        return torch.autograd.grad(out, x, upstream.to(out.dtype))[0]

    double = x.double().requires_grad_()
    errors = (
        relative_error(forward(ours()), exact),
        relative_error(both(ours(), leaf), both("reference", double)),
    )
    # the gradient is rounded to the dtype of the input
    if not (errors[0] <= TOLERANCE and errors[1] <= max(TOLERANCE, torch.finfo(dtype).eps)):
        raise RuntimeError(f"patch_sqnorm: relative errors {errors[0]:.1e} and {errors[1]:.1e}")
    return {
        "patch_sqnorm": lambda: forward(ours()),
        "plain PyTorch": lambda: forward("reference"),
        "patch_sqnorm, forward and backward": lambda: both(ours(), leaf),
        "plain PyTorch, forward and backward": lambda: both("reference", leaf),
        "copy of as many bytes": lambda: other.view(-1)[:half].copy_(x.view(-1)[:half]),
    }


Case = tuple[Callable[[], dict[str, Step]], Callable[[dict[str, Step]], dict[str, tuple[float, float]]]]


def cases(small: bool) -> dict[str, Case]:
    """Name -> (what makes the steps, what times them)."""
    heads = ((64, 64, 10), (128, 512, 10), (128, 512, 100), (256, 2048, 1000), (4096, 768, 1000))
    image = (2, 4, 6, 6) if small else (32, 256, 56, 56)
    found: dict[str, Case] = {
        f"head {shape}": (lambda shape=shape: head(*shape), in_graphs)
        for shape in (heads[:1] if small else heads)
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = f"patches {'x'.join(map(str, image))} {str(dtype).removeprefix('torch.')}"
        found[name] = (lambda dtype=dtype: patches(image, dtype), in_graphs)
    return found | {name: (build, one_by_one) for name, build in gpu_steps.cases(small).items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the CUDA and Triton kernels of fam_ext.")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument(
        "--rehearse", action="store_true", help="every case small and on the CPU, nothing timed"
    )
    given = parser.parse_args(arguments)
    machine.use_device("cpu" if given.rehearse else "cuda")
    name = "rehearsal on the CPU" if given.rehearse else torch.cuda.get_device_name()
    where = f"{name}, torch {torch.__version__}"
    print(where)
    given.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with (given.out / "gpu.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("case", "step", "microseconds", "peak_mb", "machine"))
        for case, (build, timed) in cases(given.rehearse).items():
            try:
                with machine.making_tensors():
                    steps = build()
                found = timed(steps)
            except Exception as error:  # the other cases stand for themselves
                failed.append(case)
                print(f"{case:38} failed: {type(error).__name__}: {error}")
                continue
            for step, (time, peak) in found.items():
                rows.writerow((case, step, f"{time:.2f}", f"{peak:.0f}", where))
                print(f"{case:38} {step:38} {time:10.2f} us {peak:8.0f} MB")
            file.flush()  # what has been measured stays when the time is over
            del steps
            if machine.on_gpu():
                torch.cuda.empty_cache()
    print(f"written: {given.out / 'gpu.csv'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
