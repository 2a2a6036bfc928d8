"""Fake kernels and autograd of gram_trace's operations; a Triton backend has schemas of its own, on the same arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fam_ext.ops import backends
from fam_ext.ops._registration import refuse_double_backward, register_fake


def register(op: str, keeps: bool) -> None:
    """Fake kernels and autograd of `fam_ext::<op>` and `fam_ext::<op>_backward`; `keeps`: what the forward pass hands on."""

    @register_fake(op)
    def _(
        input: Tensor, factors: Tensor, gram: Tensor | None, kernel: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        form, _, keep = rest[-3:]
        acc = _accumulation(input, factors, gram)
        values = input.new_empty(factors.shape[:2], dtype=acc)
        if not (keep and keeps):
            return values, input.new_empty((0,), dtype=acc)
        last = 1
        for size in (input.shape[2], *kernel) if form == "direct" else factors.shape[4:]:
            last *= size
        return values, input.new_empty((*factors.shape[:4], last), dtype=acc)

    @register_fake(f"{op}_backward")
    def _(
        grad: Tensor, input: Tensor, factors: Tensor, gram: Tensor | None, saved: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        acc = _accumulation(input, factors, gram)
        shape = (factors.shape[2], factors.shape[3], factors.shape[3]) if rest[-1] else (0,)
        return (
            torch.empty_like(input) if rest[-3] else input.new_empty((0,)),
            torch.empty_like(factors) if rest[-2] else factors.new_empty((0,)),
            input.new_empty(shape, dtype=acc if gram is None else gram.dtype),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, factors, gram, *rest = inputs
        ctx.save_for_backward(input, factors, gram, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.rest = rest[:-1]

    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        operator = getattr(torch.ops.fam_ext, f"{op}_backward")
        grads = operator(grad, *ctx.saved_tensors, *ctx.rest, *needs)
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*wanted, *(None,) * 7)

    torch.library.register_autograd(f"fam_ext::{op}", backward, setup_context=setup_context)
    refuse_double_backward(f"{op}_backward")


def _accumulation(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if torch.float64 in {t.dtype for t in tensors if t is not None} else torch.float32


if backends.native_loaded():
    register("gram_trace", keeps=True)
