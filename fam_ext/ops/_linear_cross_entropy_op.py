"""linear_cross_entropy as an operation of torch: its schema, fake kernel and autograd, for every backend but the reference.

One operation, which makes the gradients that its flags ask for: autograd is registered in Python, where the forward pass does not
know what will be differentiated, so the caller says so. With reduction="none" the upstream gradients of the rows are not known in
the forward pass, and the backward pass calls the operation again with them as factors of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops._linear_cross_entropy_chunks import Options, forward, weight_grad_dtype
from fam_ext.ops._linear_cross_entropy_targets import NONE, SUM
from fam_ext.ops._registration import hand_out, made_gradient, register_fake

_OP = "linear_cross_entropy"
_SCHEMA = (
    f"{_OP}(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? row_scale, "
    "int ignore_index, float label_smoothing, int reduction, float strength, bool curvature_grad, int max_bytes, "
    "bool accumulate_in_weight_dtype, bool triton, int parts, bool grad_input, bool grad_weight, bool grad_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_ARGUMENTS = 18


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, flatness); `options` are the operation's from ignore_index to parts."""
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad and options[2] != NONE
        for t in (input, weight, bias)
    ]
    operator = torch.ops.fam_ext.linear_cross_entropy
    loss, flatness, *_ = operator(input, weight, bias, target, class_weight, None, *options, *needs)
    return loss, flatness


def _fake(
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
    acc, shape = accumulation_dtype(input, weight, bias), target.shape if reduction == NONE else ()
    loss, flatness = (input.new_empty(shape, dtype=acc) for _ in range(2))
    grad_input = made_gradient(input, options[-3])
    dtype = weight_grad_dtype(weight, acc, options[-6])
    grad_weight = weight.new_empty(weight.shape if options[-2] else 0, dtype=dtype)
    grad_bias = made_gradient(weight.new_empty(0, dtype=acc) if bias is None else bias, options[-1])
    return loss, flatness, grad_input, grad_weight, grad_bias


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    input, weight, bias, target, class_weight, row_scale, *options = arguments
    check_shapes(input, weight, bias, target, class_weight, row_scale)
    return forward(input, weight, bias, target, class_weight, row_scale, Options(*options))


def check_shapes(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    row_scale: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError unless the tensors fit; the operation asks again, for calls past the public function."""
    for name, value in (("input", input), ("weight", weight)):
        _checks.check_floating(_OP, name, value)
    if weight.dim() != 2 or weight.shape[0] == 0:
        _checks.bad_value(_OP, "weight", "of shape (V, I) with at least one class", weight)
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        _checks.bad_value(_OP, "input", f"of shape (*rows, {weight.shape[1]})", input)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        _checks.bad_type(_OP, "target", "an int64 tensor of class indices", target)
    for name, rows in (("target", target), ("row_scale", row_scale)):
        if rows is not None and rows.shape != input.shape[:-1]:
            _checks.bad_value(_OP, name, f"of shape {tuple(input.shape[:-1])}", rows)
    if row_scale is not None:
        _checks.check_floating(_OP, "row_scale", row_scale)
    _checks.check_by_class(_OP, "bias", bias, weight.shape[0])
    _checks.check_by_class(_OP, "class_weight", class_weight, weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[6:-3]
    ctx.later = inputs[8] == NONE
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(inputs[:5] if ctx.later else output[2:]))


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * _ARGUMENTS
    made, upstream = ctx.saved_tensors, None if ctx.later else grad
    if ctx.later:
        ignore_index, label_smoothing, _, *rest = ctx.options
        with torch.no_grad():
            made = torch.ops.fam_ext.linear_cross_entropy(
                *ctx.saved_tensors, grad, ignore_index, label_smoothing, SUM, *rest, *needs
            )[2:]
    wanted = [m if need else None for m, need in zip(made, needs, strict=True)]
    return (*hand_out(_OP, wanted, ctx.dtypes, upstream), *(None,) * (_ARGUMENTS - 3))


_library: Any = torch.library.Library("fam_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(_SCHEMA, tags=(torch.Tag.cudagraph_unsafe,))  # it waits for how many rows are ignored
_library.impl(_OP, _run, "CompositeExplicitAutograd")
register_fake(_OP)(_fake)
torch.library.register_autograd(f"fam_ext::{_OP}", _backward, setup_context=_setup_context)
