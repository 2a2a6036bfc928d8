"""softmax_trace in both of its forms beside the plain PyTorch of fam_ext.reference, forward and backward.

The remark under each table says which form `auto` takes, from counted operations, and which was faster here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from case import Build, Case, Variant
from counts import trace_step
from report import faster_form
from torch import Tensor

from fam_ext.functional import softmax_trace
from fam_ext.ops import backends
from fam_ext.ops.softmax_trace import choose_form

OP = "softmax_trace"
SHAPES = ((128, 512, 10), (128, 512, 100), (1024, 128, 100), (256, 512, 1000))  # rows N, fan-in I, classes O
FORMS = ("shifted", "pairwise")
remark = faster_form
Shape = tuple[int, int, int]
Trace = Callable[[Tensor, Tensor], Tensor]


def step(trace: Trace, z: Tensor, w: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    value = trace(z, w)
    return value, *torch.autograd.grad(value, (z, w), upstream)


def case(shape: Shape, compiled: bool) -> Case:
    rows, fan_in, classes = shape
    torch.manual_seed(0)
    z, w = (
        torch.randn(rows, classes, requires_grad=True),
        torch.rand(classes, fan_in).sub(0.5).div(fan_in**0.5),
    )
    w.requires_grad_()
    upstream = torch.rand(rows) / rows
    double = [a.detach().double().requires_grad_() for a in (z, w)]
    exact = step(partial(softmax_trace, form="pairwise", backend="reference"), *double, upstream.double())
    form = choose_form(*shape)
    baseline = f"reference {form}, eager"

    def variant(name: str, trace: Trace, tolerance: float) -> Variant:
        return Variant(name, partial(step, trace, z, w, upstream), baseline, tolerance, exact)

    def on(form: str, backend: str) -> Trace:
        return partial(softmax_trace, form=form, backend=backend)

    # at random weights the gradient of the logits, g p (q - 2v), is a difference of nearly equal numbers
    native = [
        variant(f"native {f}{' (auto)' * (f == form)}", on(f, "native"), 1e-5)
        for f in FORMS
        if backends.native_loaded()
    ]
    variants = native + [variant(f"reference {f}, eager", on(f, "reference"), 1e-4) for f in FORMS]
    if compiled:
        compiled_trace = torch.compile(on(form, "reference"), dynamic=False)
        variants.append(variant(f"reference {form}, compiled", compiled_trace, 1e-4))
    return Case(f"N={rows} I={fan_in} O={classes}, forward + backward", variants, flops=trace_step(*shape))


def cases(quick: bool = False) -> list[Build]:
    return [partial(case, shape) for shape in (SHAPES[:2] if quick else SHAPES)]
