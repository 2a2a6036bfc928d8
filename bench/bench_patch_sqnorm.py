"""patch_sqnorm beside other ways to get it from PyTorch: pytest bench/bench_patch_sqnorm.py --benchmark-only

A round runs every variant once, in turn, so that noise falls on all alike. `extra_info` holds each variant's
median, its ratio to the native one, the bytes that have to move (input and output once; in a training step the
upstream gradient, the input again and its gradient, too) and the rate at which they moved. Numbers are checked
before a time is taken.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext import backends
from fam_ext.ops.patch_sqnorm import patch_sqnorm

ROUNDS = 11
# shape, kernel_size, stride, padding, groups, memory format
PROBLEMS = {
    "cnn": ((8, 64, 32, 32), 3, 1, 1, 1, torch.contiguous_format),
    "cnn-nhwc": ((8, 64, 32, 32), 3, 1, 1, 1, torch.channels_last),
    "late": ((16, 512, 7, 7), 3, 1, 1, 1, torch.contiguous_format),
    "depthwise": ((8, 64, 32, 32), 3, 1, 1, 64, torch.contiguous_format),
    "small": ((8, 16, 8, 8), 3, 1, 1, 1, torch.contiguous_format),
}
VARIANTS = ("native", "reference", "reference-compiled", "unfold", "conv", "conv-compiled")


def by_unfold(x: Tensor, kernel: int, stride: int, padding: int, groups: int) -> Tensor:
    patches = F.unfold(x, kernel, padding=padding, stride=stride)
    out = [(size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:]]
    return patches.square().reshape(len(x), groups, -1, *out).sum(2)


def by_convolution(x: Tensor, kernel: int, stride: int, padding: int, groups: int) -> Tensor:
    ones = x.new_ones(groups, x.shape[1] // groups, kernel, kernel)
    return F.conv2d(x.square(), ones, stride=stride, padding=padding, groups=groups)


def on(backend: str) -> Callable[..., Tensor]:
    return lambda x, k, s, p, g: patch_sqnorm(x, k, s, p, groups=g, backend=backend)


def variants() -> dict[str, Callable[..., Tensor]]:
    functions = {
        "native": on("native"),
        "reference": on("reference"),
        "reference-compiled": torch.compile(on("reference"), dynamic=False),
        "unfold": by_unfold,
        "conv": by_convolution,
        "conv-compiled": torch.compile(by_convolution, dynamic=False),
    }
    return functions if backends.native_loaded() else {n: f for n, f in functions.items() if n != "native"}


def median_times(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each step over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(f: Callable[..., Tensor], x: Tensor, case: tuple[int, ...], upstream: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(f(x, *case), x, upstream)
    return gradient


@pytest.fixture(scope="module", params=itertools.product(PROBLEMS, ("forward", "training")), ids="-".join)
def problem(request):
    """Steps to time, their interleaved medians and the bytes moved, for one problem."""
    name, kind = request.param
    shape, *case, memory_format = PROBLEMS[name]
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_(kind == "training")
    with torch.no_grad():
        exact = by_convolution(x.double(), *case)
    upstream = torch.rand_like(exact, dtype=torch.float32)
    exact_grad = None
    if kind == "training":
        exact_grad = training_step(
            by_convolution, x.detach().double().requires_grad_(), case, upstream.double()
        )

    def step(f):
        return (lambda: training_step(f, x, case, upstream)) if kind == "training" else (lambda: f(x, *case))

    torch._dynamo.reset()
    steps = {variant: step(f) for variant, f in variants().items()}
    for variant, run in steps.items():
        expected = exact if exact_grad is None else exact_grad
        torch.testing.assert_close(run().double(), expected, rtol=1e-5, atol=1e-6, msg=variant)
    moved = 4 * (
        x.numel() * (3 if kind == "training" else 1) + exact.numel() * (2 if kind == "training" else 1)
    )
    return steps, median_times(steps), moved


@pytest.mark.parametrize("variant", VARIANTS)
def test_patch_sqnorm(benchmark, problem, variant):
    steps, medians, moved = problem
    if variant not in steps:
        pytest.skip("the compiled library is not loaded")
    benchmark.extra_info["median_us"] = round(1e6 * medians[variant], 1)
    benchmark.extra_info["ratio_to_native"] = round(
        medians[variant] / medians.get("native", medians["reference"]), 2
    )
    benchmark.extra_info["megabytes"] = round(moved / 1e6, 2)
    benchmark.extra_info["gigabytes_per_second"] = round(moved / medians[variant] / 1e9, 1)
    benchmark.pedantic(steps[variant], rounds=ROUNDS)
