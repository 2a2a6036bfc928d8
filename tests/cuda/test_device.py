"""On a GPU: graphs, streams, launches, synchronisation, repeatability. Values and gradients are tested by the files of the
operations, which run with the GPU as the default device, too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext import functional
from fam_ext.ops import backends

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
needs_kernels = pytest.mark.skipif(
    ("head_cross_entropy", "cuda") not in backends._kernels, reason="no CUDA kernels were compiled"
)
pytestmark = [pytest.mark.gpu, needs_cuda, needs_kernels]


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_()


def head(classes: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    inputs = [leaf(128, classes), leaf(128, 64, seed=1), leaf(classes, 64, seed=2)]
    target = torch.arange(128, device="cuda") % classes
    return lambda: functional.head_cross_entropy(*inputs, target, strength=0.1, backend="native")[0], inputs


def trace(classes: int, form: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    inputs = [leaf(128, classes), leaf(classes, 64, seed=1)]
    return lambda: functional.softmax_trace(*inputs, form=form, backend="native").sum(), inputs


def patches() -> tuple[Callable[[], Tensor], list[Tensor]]:
    inputs = [leaf(4, 32, 14, 14)]
    return lambda: functional.patch_sqnorm(*inputs, 3, padding=1, groups=2, backend="native").sum(), inputs


STEPS = {
    "head 10": lambda: head(10),
    "head 100": lambda: head(100),
    "trace 10": lambda: trace(10, "pairwise"),
    "trace 100": lambda: trace(100, "pairwise"),
    "trace 10 shifted": lambda: trace(10, "shifted"),
    "patches": patches,
}


@pytest.fixture(params=STEPS)
def step(request: Any) -> Callable[[], list[Tensor]]:
    forward, inputs = STEPS[request.param]()

    def run() -> list[Tensor]:
        loss = forward()
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    return run


def test_repeats_to_the_last_bit(step: Callable[[], list[Tensor]]) -> None:
    first = step()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_a_captured_graph_gives_the_same(step: Callable[[], list[Tensor]]) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up on another stream, which tests that as well
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_the_host_never_waits(step: Callable[[], list[Tensor]]) -> None:
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels that a call launches, without those by which the tests fill uninitialized memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    return sum(
        e.device_type() == torch.autograd.DeviceType.CUDA and "mem" not in e.name().lower() for e in events
    )


def test_no_more_launches_than_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, inputs = head(10)
    target = torch.arange(128, device="cuda") % 10
    ours = kernels(lambda: torch.autograd.grad(forward(), inputs), monkeypatch)
    plain = kernels(lambda: torch.autograd.grad(F.cross_entropy(inputs[0], target), inputs[0]), monkeypatch)
    assert 0 < ours <= plain


@pytest.mark.parametrize("library", ["cublas", "cublaslt"])
def test_float32_products_stay_exact_where_the_user_allows_tf32(library: str) -> None:
    forward, _ = trace(100, "shifted")
    expected = forward()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.matmul.allow_tf32 = True
    preferred = torch.backends.cuda.preferred_blas_library(library)
    try:
        assert torch.equal(forward(), expected)
        assert torch.backends.cuda.preferred_blas_library() == preferred
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
        torch.backends.cuda.preferred_blas_library(before[1])


@pytest.mark.parametrize("classes", [4, 40])
def test_class_index_out_of_range_stops_the_kernel(classes: int) -> None:
    code = f"""
import torch, fam_ext
z = torch.zeros(7, {classes}, device="cuda")
target = torch.full((7,), {classes}, device="cuda")
fam_ext.functional.head_cross_entropy(z, z, z.new_zeros({classes}, {classes}), target, backend="native")
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "device-side assert" in done.stderr or "Assertion" in done.stderr
