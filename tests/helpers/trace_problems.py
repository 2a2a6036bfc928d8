"""Problems of softmax_trace that tests of the CPU and of the CUDA kernels share, and their checks against float64."""

from __future__ import annotations

import math
from typing import Any

import oracle
import torch
from inputs import make_input
from tolerance import assert_accurate
from torch import Tensor

from fam_ext.ops.softmax_trace import softmax_trace

FORMS = ["shifted", "pairwise"]


ROUNDINGS = 8  # exp, division, products with the upstream gradient and the weights


LOGITS = [  # shape, fan-in: one class, tiles up to 32 classes, blocks past them, odd sizes, empty ones
    ((5, 1), 7), ((9, 2), 16), ((33, 3), 1), ((17, 10), 37), ((20, 32), 33), ((16, 31), 64), ((20, 33), 5), ((7, 100), 48),
    ((40, 1000), 3), ((1, 5), 9), ((2, 3, 7), 5), ((3, 34, 2, 5), 18), ((2, 4, 3, 2, 3), 6), ((0, 3), 2), ((0, 40), 2),
    ((2, 3, 0), 4), ((4, 3), 0), ((4, 35), 0),
]  # fmt: skip


def call(form: str, backend: str) -> Any:
    return lambda z, w: softmax_trace(z, w, form=form, backend=backend)


def differentiate(function: Any, logits: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    logits, weight = logits.detach().requires_grad_(), weight.detach().requires_grad_()
    value = function(logits, weight)
    return value.detach(), *torch.autograd.grad(value, (logits, weight), upstream.to(value))


def check(logits: Tensor, weight: Tensor, form: str, backend: str) -> None:
    """Value and gradients, which are no further from float64 than those of the reference."""
    acc = torch.float64 if torch.float64 in (logits.dtype, weight.dtype) else torch.float32
    upstream = torch.rand(logits.shape[0], *logits.shape[2:]) - 0.3
    run = lambda b: differentiate(call(form, b), logits, weight, upstream)  # noqa: E731
    truth = differentiate(oracle.softmax_trace, logits.double(), weight.double(), upstream)
    value, *grads = run(backend)
    base, *base_grads = run("reference")
    assert [t.dtype for t in (value, *grads)] == [acc, logits.dtype, weight.dtype]
    classes, rows, fan_in = logits.shape[1], value.numel(), weight.shape[1]
    p, squares = logits.double().softmax(1).movedim(1, -1), (weight - weight.mean(0)).double().square().sum(1)
    # shifted: sum of p_s |w_s|^2 and p_s |w_y|^2 over s != y, less than which v is where w_y lies far from the others
    rest, far = p.scatter(-1, p.argmax(-1, keepdim=True), 0.0), squares[p.argmax(-1)]
    parts = rest @ squares + rest.sum(-1) * far if form == "shifted" else None
    assert_accurate(value, base, truth[0], classes * fan_in, form == "pairwise", parts, ROUNDINGS)
    # dz = g p (|w_s - u|^2 - v) is 0 where all classes are alike
    parts = ((upstream * truth[0]).unsqueeze(-1) * p).movedim(-1, 1)
    assert_accurate(grads[0], base_grads[0], truth[1], classes * fan_in, False, parts, ROUNDINGS)
    assert_accurate(grads[1], base_grads[1], truth[2], classes * rows, roundings=ROUNDINGS)


def check_masked_class_is_no_class(classes: int, form: str, backend: str) -> None:
    z, weight, upstream = make_input((21, classes)), make_input((classes, 6), seed=1), torch.rand(21)
    run = call(form, backend)
    keep = [s for s in range(classes) if s != 2]
    expected = differentiate(run, z[:, keep], weight[keep], upstream)
    z[:, 2] = -math.inf
    value, dz, dw = differentiate(run, z, weight, upstream)
    torch.testing.assert_close((value, dz[:, keep], dw[keep]), expected, rtol=1e-5, atol=1e-6)
    assert not dz[:, 2].any() and not dw[2].any()


def check_bad_numbers_stay_in_their_rows(bad: float, shape: Any, form: str, backend: str) -> None:
    z, weight = make_input(shape), make_input((shape[1], 5), seed=1)
    z[3, 1] = bad
    z[5] = -math.inf
    z[7, 0] = z[7, 2] = bad
    value, dz, _ = differentiate(call(form, backend), z, weight, torch.ones(20))
    rows = [5] if bad == -math.inf else [3, 5, 7]
    assert [r.isnan().nonzero().flatten().tolist() for r in (value, dz.sum(1))] == [rows] * 2
    weight[1, 2] = math.nan if bad == -math.inf else bad
    assert not softmax_trace(make_input(shape), weight, form=form, backend=backend).isfinite().any()
