"""linear_cross_entropy over Triton kernels: the operation's schema, fake kernel and autograd.

One operation, which makes the gradients that its flags ask for: autograd is registered in Python, where the forward pass does not
know what will be differentiated, so the caller says so. triton is imported when the operation first runs.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops._linear_cross_entropy_chunks import NONE, SUM, Options, forward
from fam_ext.ops._registration import register_fake

_OP = "triton_linear_cross_entropy"
_SCHEMA = (
    f"{_OP}(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? row_scale, "
    "int ignore_index, float label_smoothing, int reduction, float strength, bool curvature_grad, int max_bytes, "
    "bool narrow, bool grad_input, bool grad_weight, bool grad_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, flatness), from the arguments of fam_ext::linear_cross_entropy."""
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad and options[2] != NONE
        for t in (input, weight, bias)
    ]
    operator = torch.ops.fam_ext.triton_linear_cross_entropy
    loss, flatness, *_ = operator(input, weight, bias, target, class_weight, None, *options, *needs)
    return loss, flatness


def fake_values(input: Tensor, acc: torch.dtype, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    shape = target.shape if reduction == NONE else ()
    return input.new_empty(shape, dtype=acc), input.new_empty(shape, dtype=acc)


def fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, and contiguous gradients."""
    acc = accumulation_dtype(input, weight, bias)
    dphi, dw = (
        x.new_empty(x.shape if needed else 0)
        for x, needed in zip((input, weight), options[-3:-1], strict=True)
    )
    dtype = acc if bias is None else bias.dtype
    db = weight.new_empty(weight.shape[0] if options[-1] else 0, dtype=dtype)
    return (*fake_values(input, acc, target, reduction), dphi, dw, db)


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    input, weight, bias, target, class_weight, row_scale, *options = arguments
    return forward(input, weight, bias, target, class_weight, row_scale, Options(*options))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[6:-3]
    ctx.later = inputs[8] == NONE  # upstream gradients of rows are not known yet
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(inputs[:5] if ctx.later else output[2:]))


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * 16
    with torch.no_grad():
        if ctx.later:
            ignore_index, label_smoothing, _, *rest = ctx.options
            made = torch.ops.fam_ext.triton_linear_cross_entropy(
                *ctx.saved_tensors, grad, ignore_index, label_smoothing, SUM, *rest, *needs
            )[2:]
        else:
            # no look at the upstream gradient, for which the device would have to be waited for; in float32 whatever dtype
            made = [
                torch.mul(m, grad.reshape(1), out=torch.empty_like(m)) if need else m
                for m, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
    wanted = [m if need else None for m, need in zip(made, needs, strict=True)]
    if (
        torch.is_grad_enabled()
    ):  # create_graph=True: differentiating what is handed out must fail, not miss terms
        once: Any = _Once.apply
        wanted = [None if m is None else once(m, torch.empty(0, requires_grad=True)) for m in wanted]
    return (*wanted, *(None,) * 13)


class _Once(torch.autograd.Function):
    """The identity, without a derivative."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, anchor: Tensor) -> Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            "linear_cross_entropy can be differentiated once only: its gradients were made in the forward pass. For second "
            'derivatives pass backend="reference", which is plain PyTorch.'
        )


_library: Any = torch.library.Library("fam_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(_SCHEMA)
_library.impl(_OP, _run, "CompositeExplicitAutograd")
register_fake(_OP)(fake_forward)
torch.library.register_autograd(f"fam_ext::{_OP}", _backward, setup_context=_setup_context)
