"""gram_trace in both of its forms, over Q = 16 … 4096 positions and on convolutions, beside per-sample gradients by torch.func.

bench_positions.py has all problems; here are those that take seconds. The remark under a table says which form `auto` takes, from
counted operations, and which was faster here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from case import Build, Case, Variant
from report import faster_form
from torch import Tensor

from fam_ext.functional import gram_trace
from fam_ext.ops.gram_trace import choose_form

OP = "gram_trace"
SHARE = 0.5
remark = faster_form
FORMS = ("direct", "gram")
BASELINE = "per-sample gradients, vmap(grad)"
# input, weight, padding, factors K: the ggn of 10 classes takes 10
PROBLEMS = {
    **{f"tokens, Q={q}": ((max(1, 1024 // q), q, 128), (128, 128), 0, 1) for q in (16, 64, 256, 1024, 4096)},
    "tokens, Q=64, K=10": ((8, 64, 128), (128, 128), 0, 10),
    "conv 8x8": ((8, 128, 8, 8), (128, 128, 3, 3), 1, 1),
    "conv 16x16": ((8, 64, 16, 16), (64, 64, 3, 3), 1, 1),
    "conv 32x32": ((8, 32, 32, 32), (32, 32, 3, 3), 1, 1),
}
Trace = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, padding=padding)


def by_vmap(x: Tensor, factors: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Gamma of every sample as its weight's gradient, then |W^T Gamma|^2."""

    def share(w: Tensor, phi: Tensor, s: Tensor) -> Tensor:
        return (layer(phi.unsqueeze(0), w, padding) * s.unsqueeze(0)).sum()

    gamma = torch.func.vmap(torch.func.grad(share), (None, 0, 0))
    rows = weight.flatten(1)
    return torch.stack([(rows.T @ gamma(weight, x, s).flatten(2)).square().sum((1, 2)) for s in factors])


def by_operation(form: str, backend: str, padding: int) -> Trace:
    return lambda x, s, w: gram_trace(
        x, s, w, **({"padding": padding} if padding else {}), form=form, backend=backend
    )


def step(trace: Trace, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    value = trace(*tensors)
    return value, *torch.autograd.grad(value.sum(), tensors)


def chosen(x: Tensor, factors: Tensor, weight: Tensor) -> str:
    outputs = factors[0, 0].numel() // weight.shape[0]
    inputs = outputs if weight.dim() == 2 else x[0, 0].numel()
    kernel = weight.shape[2:] or (1,)
    form = choose_form(inputs, outputs, weight.shape[1], kernel, weight.shape[0], len(factors), True)
    return form.split("_")[0]


def case(problem: str, compiled: bool) -> Case:
    shape, weight_shape, padding, count = PROBLEMS[problem]
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(weight_shape)
    factors = torch.randn(count, *layer(x, weight, padding).shape)
    tensors = [t.requires_grad_() for t in (x, factors, weight)]
    exact = step(
        by_operation("direct", "reference", padding), [t.detach().double().requires_grad_() for t in tensors]
    )
    ways: dict[str, Trace] = {}
    taken = chosen(*tensors)
    for backend in ("native", "reference"):
        for form in FORMS:
            mark = " (auto)" if form == taken else ""
            ways[f"{backend} {form}{mark}"] = by_operation(form, backend, padding)
    ways[BASELINE] = lambda x, s, w: by_vmap(x, s, w, padding)
    if compiled:
        auto = by_operation(taken, "reference", padding)
        ways[f"reference {taken}, compiled"] = torch.compile(auto, dynamic=False)
    variants = [
        Variant(name, partial(step, way, tensors), BASELINE, 2e-5, exact) for name, way in ways.items()
    ]
    return Case(problem, variants)


def cases(quick: bool = False) -> list[Build]:
    names = ("tokens, Q=16", "tokens, Q=256", "conv 8x8")
    names += () if quick else ("tokens, Q=1024", "conv 16x16")
    return [partial(case, name) for name in names]
