"""patch_sqnorm beside other ways to get it from PyTorch.

The bytes that have to move are the input and the output once; in a training step the upstream gradient, the input again and its
gradient, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from case import Build, Case, Variant
from counts import patch_bytes
from torch import Tensor

from fam_ext.functional import patch_sqnorm
from fam_ext.ops import backends

OP = "patch_sqnorm"
# shape, kernel_size, stride, padding, groups, memory format
PROBLEMS = {
    "cnn": ((8, 64, 32, 32), 3, 1, 1, 1, torch.contiguous_format),
    "cnn-nhwc": ((8, 64, 32, 32), 3, 1, 1, 1, torch.channels_last),
    "late": ((16, 512, 7, 7), 3, 1, 1, 1, torch.contiguous_format),
    "depthwise": ((8, 64, 32, 32), 3, 1, 1, 64, torch.contiguous_format),
    "small": ((8, 16, 8, 8), 3, 1, 1, 1, torch.contiguous_format),
}
BASELINE = "reference, eager"
Norms = Callable[[Tensor, int, int, int, int], Tensor]


def by_unfold(x: Tensor, kernel: int, stride: int, padding: int, groups: int) -> Tensor:
    patches = F.unfold(x, kernel, padding=padding, stride=stride)
    out = [(size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:]]
    return patches.square().reshape(len(x), groups, -1, *out).sum(2)


def by_convolution(x: Tensor, kernel: int, stride: int, padding: int, groups: int) -> Tensor:
    ones = x.new_ones(groups, x.shape[1] // groups, kernel, kernel)
    return F.conv2d(x.square(), ones, stride=stride, padding=padding, groups=groups)


def on(backend: str) -> Norms:
    return lambda x, k, s, p, g: patch_sqnorm(x, k, s, p, groups=g, backend=backend)


def forward(norms: Norms, x: Tensor, options: tuple[int, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return (norms(x, *options),)


def training(norms: Norms, x: Tensor, options: tuple[int, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    value = norms(x, *options)
    return value, *torch.autograd.grad(value, x, upstream)


def case(problem: str, train: bool, compiled: bool) -> Case:
    shape, *options, memory_format = PROBLEMS[problem]
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_(train)
    double = x.detach().double().requires_grad_(train)
    with torch.no_grad():
        upstream = torch.rand_like(by_convolution(double, *options), dtype=torch.float32)
    run = training if train else forward
    exact = run(by_convolution, double, options, upstream.double())
    ways = {"native": on("native")} if backends.native_loaded() else {}
    ways |= {BASELINE: on("reference"), "unfold, eager": by_unfold, "convolution, eager": by_convolution}
    if compiled:
        ways["reference, compiled"] = torch.compile(on("reference"), dynamic=False)
    variants = [
        Variant(name, partial(run, way, x, options, upstream), BASELINE, 2e-6, exact)
        for name, way in ways.items()
    ]
    moved = patch_bytes(x.numel(), upstream.numel(), train)
    return Case(f"{problem} {'training' if train else 'forward'}", variants, moved_bytes=moved)


def cases(quick: bool = False) -> list[Build]:
    """Forward alone is measured on one problem: the backward pass of the others contains it."""
    names = ("cnn", "small") if quick else tuple(PROBLEMS)
    return [partial(case, "cnn", False), *(partial(case, name, True) for name in names)]
