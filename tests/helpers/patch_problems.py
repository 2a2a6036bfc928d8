"""Problems of patch_sqnorm that tests of the CPU and of the CUDA kernels share, and their checks against explicit loops."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from inputs import DTYPES, LAYOUTS, make_input
from tolerance import assert_accurate

from fam_ext.ops.patch_sqnorm import patch_sqnorm

# shape, kernel_size, stride, padding, dilation, groups
CASES = {
    "1d": ((2, 4, 11), (3,), (1,), (1,), (1,), 1),
    "1d-stride-dilation": ((2, 6, 23), (3,), (2,), (4,), (3,), 2),
    "1d-long": ((1, 3, 20000), (5,), (1,), (2,), (1,), 1),
    "1d-skips-inputs": ((2, 3, 17), (2,), (5,), (0,), (1,), 1),
    "2d": ((3, 5, 7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d-all": ((2, 6, 9, 11), (3, 2), (2, 3), (2, 0), (2, 3), 3),
    "2d-depthwise": ((2, 7, 8, 9), (3, 3), (1, 1), (1, 1), (1, 1), 7),
    "2d-depthwise-stride": ((2, 20, 8, 9), (2, 3), (2, 2), (1, 1), (1, 1), 20),
    "2d-pointwise": ((3, 37, 5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "2d-pointwise-groups": ((3, 36, 5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 4),
    "2d-pointwise-stride": ((2, 5, 7, 8), (1, 1), (2, 3), (0, 0), (1, 1), 1),
    "2d-whole-input": ((4, 6, 5, 5), (5, 5), (1, 1), (0, 0), (1, 1), 2),
    "2d-more-padding-than-kernel": ((2, 3, 4, 5), (2, 1), (1, 2), (5, 4), (1, 1), 1),
    "2d-one-position": ((2, 70, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3d": ((2, 4, 4, 5, 6), (3, 2, 3), (1, 1, 1), (1, 0, 1), (1, 1, 1), 1),
    "3d-all": ((2, 6, 7, 8, 6), (2, 3, 2), (2, 1, 3), (1, 2, 0), (3, 2, 1), 2),
    "rows": ((9, 70), (), (), (), (), 1),
    "rows-groups": ((5, 12), (), (), (), (), 3),
    "no-samples": ((0, 4, 6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "no-rows": ((0, 4), (), (), (), (), 1),
    "no-channels": ((2, 0, 5), (3,), (1,), (0,), (1,), 1),
}


def oracle(x, kernel_size, stride, padding, dilation, groups, upstream=None):
    """Values in float64 by one loop over the kernel's offsets, and the gradient of sum(upstream * values)."""
    squares = x.detach().double().square()
    padded = F.pad(squares, [p for p in reversed(padding) for _ in (0, 1)]) if padding else squares
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel_size, stride, dilation, strict=True)
    ]
    values = torch.zeros(x.shape[0], groups, *sizes, dtype=torch.float64)
    weights = torch.zeros_like(padded)  # sum of upstream over the outputs that see a position
    for offset in itertools.product(*(range(k) for k in kernel_size)):
        taps = tuple(
            slice(j * d, j * d + s * (n - 1) + 1, s)
            for j, d, s, n in zip(offset, dilation, stride, sizes, strict=True)
        )
        seen = padded[(..., *taps)]
        values += seen.reshape(x.shape[0], groups, x.shape[1] // groups, *sizes).sum(2)
        if upstream is not None:
            weights[(..., *taps)] += upstream.double().repeat_interleave(x.shape[1] // groups, 1)
    inner = tuple(slice(p, p + size) for p, size in zip(padding, x.shape[2:], strict=True))
    return values, 2 * x.detach().double() * weights[(..., *inner)]


def run(x, case, backend, upstream=None, **kwargs):
    x = x.detach().requires_grad_()
    out = patch_sqnorm(x, *case, backend=backend, **kwargs)
    out.backward(torch.ones_like(out) if upstream is None else upstream)
    return out.detach(), x.grad


def check(x, case, backend):
    """Value and gradient of one case."""
    kernel_size, groups = case[0], case[-1]
    values, _ = oracle(x, *case)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    upstream = make_input(
        tuple(values.shape), acc, seed=1
    ).abs()  # of one sign: errors are relative to each entry
    values, gradient = oracle(x, *case, upstream)
    out, grad = run(x, case, backend, upstream)
    base, base_grad = run(x, case, "reference", upstream)
    assert (out.dtype, grad.dtype) == (acc, x.dtype)
    volume = math.prod(kernel_size)
    assert_accurate(out, base, values, volume * max(1, x.shape[1] // groups), elementwise=True)
    assert_accurate(grad, base_grad, gradient, volume, elementwise=True)


@st.composite
def problems(draw):
    rank = draw(st.integers(0, 3))
    ints = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel_size, stride, padding, dilation = ints(1, 4), ints(1, 3), ints(0, 4), ints(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    smallest = (
        max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel_size, padding, dilation, strict=True)
    )
    sizes = (draw(st.integers(least, least + (40 if rank == 1 else 7))) for least in smallest)
    shape = (draw(st.integers(0, 3)), groups * draw(st.sampled_from([0, 1, 2, 3, 7, 18, 33])), *sizes)
    x = make_input(
        shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 99))
    )
    return x, (kernel_size, stride, padding, dilation, groups)
