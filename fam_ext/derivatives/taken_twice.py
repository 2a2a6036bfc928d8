"""Gradients that are differentiated once more, and no further: what Gauss-Newton and Fisher forms of curvature need.

torch's second derivatives of these operations are right, and wasteful: that of a convolution forms the weight's gradient as a
convolution with a kernel of the image's size; that of ReLU fills and adds a tensor of zeros; those of GELU, SiLU and layer_norm
are a dozen passes each; flash attention has none. While a positive form is taken, a hook on each such autograd node puts the
same gradient in place of torch's, with a derivative of its own. batch_norm in training mode, whose statistics are to be held,
gets another gradient: that of its input with constant statistics, which keeps samples apart. A derivative of these derivatives
raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fam_ext.derivatives import twice_smooth
from fam_ext.derivatives.corrections import hooked
from fam_ext.derivatives.nodes import signed

_PAYS = 2**15  # numbers of a gradient from which a hook in Python costs less than what it saves
_LONG = 64  # numbers of a row from which products by row pay
Formula = Callable[[Sequence[Any], Tensor], tuple[Any, ...]]
_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")


class _Convolution(torch.autograd.Function):
    """The gradient of a convolution's input, whose value is at hand."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, value: Tensor, arguments: Sequence[Any]) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.arguments = arguments
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        of_grad = of_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_grad = torch.ops.aten.convolution(upstream, weight, None, *ctx.arguments)
            if ctx.needs_input_grad[1]:
                mask = [False, True, False]
                of_weight = torch.ops.aten.convolution_backward(
                    grad, upstream, weight, None, *ctx.arguments, mask
                )[1]
        return of_grad, of_weight, None, None


class _Relu(torch.autograd.Function):
    """The gradient of ReLU's input, whose value is at hand; it does not depend on the input."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, result: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(result)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(upstream, result, 0), None, None


class _HeldBatchNorm(torch.autograd.Function):
    """weight / std(x) * grad, (B, C, *), with the statistics of x, (C,), at hand: their dependence on x counts in derivatives."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        ctx.save_for_backward(grad, x, weight, mean, rstd)
        scale = rstd if weight is None else rstd * weight
        return grad * _by_channel(scale, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, rstd = ctx.saved_tensors
        scale = rstd if weight is None else rstd * weight
        of_grad = of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_grad = upstream * _by_channel(scale, x)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            along = _products_by_channel(upstream, grad)
            if ctx.needs_input_grad[2]:
                of_weight = along * rstd
            if ctx.needs_input_grad[1]:
                count = x.numel() // max(x.shape[1], 1)
                factor = along * scale * rstd.square() / -count
                of_x = (x - _by_channel(mean, x)).mul_(_by_channel(factor, x))
        return of_grad, of_x, of_weight, None, None


def _by_channel(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *(1,) * (like.dim() - 2))


def _products_by_channel(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b over all but the channels, (C,), for two tensors (B, C, *)."""
    samples, channels, count = a.shape[0], a.shape[1], prod(a.shape[2:])
    if count < _LONG or not (a.is_contiguous() and b.is_contiguous()):
        return (a * b).sum([d for d in range(a.dim()) if d != 1])
    rows = a.view(samples * channels, 1, count).bmm(b.view(samples * channels, count, 1))
    return rows.view(samples, channels).sum(0)


def holds(node: Any) -> bool:
    """Whether this autograd node is a batch_norm in training mode, of several samples, whose statistics can be held."""
    trains = node.name() in _BATCH_NORMS and bool(getattr(node, "_saved_training", True))
    return trains and node._saved_input.shape[0] > 1  # instance_norm is batch_norm of one sample


def _convolution(node: Any) -> Formula:
    weight, transposed = node._saved_weight, node._saved_transposed
    numbers = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_output_padding)
    stride, padding, dilation, output_padding = ([signed(n) for n in of_axes] for of_axes in numbers)
    arguments = (stride, padding, dilation, transposed, output_padding, node._saved_groups)

    def formula(values: Sequence[Any], grad: Tensor) -> tuple[Any, ...]:
        return (_Convolution.apply(grad, weight, values[0].detach(), arguments),)  # type: ignore[no-untyped-call]

    return formula


def _relu(node: Any) -> Formula:
    result = node._saved_result

    def formula(values: Sequence[Any], grad: Tensor) -> tuple[Any, ...]:
        return (_Relu.apply(grad, result, values[0].detach()),)  # type: ignore[no-untyped-call]

    return formula


def _batch_norm(node: Any) -> Formula:
    x, weight = node._saved_input, node._saved_weight
    mean, rstd = node._saved_result1.detach(), node._saved_result2.detach()
    acc = torch.promote_types(x.dtype, torch.float32)

    def formula(values: Sequence[Any], grad: Tensor) -> tuple[Any, ...]:
        wide = [None if t is None else t.to(acc) for t in (grad, x, weight, mean, rstd)]
        return (_HeldBatchNorm.apply(*wide).to(values[0].dtype),)  # type: ignore[no-untyped-call]

    return formula


class _Rule(NamedTuple):
    """How a node's gradients are replaced.

    make: of a node, the function of its inputs' gradients and of its output's that returns them anew.
    large: only where a gradient is large; torch's derivative is as right, and quicker on a small one.
    inputs: the number of inputs, the first ones, whose gradients are replaced.
    other_value: the gradient itself is another one, not its derivative alone.
    """

    make: Callable[[Any], Formula]
    large: bool
    inputs: int = 1
    other_value: bool = False


_HELD = _Rule(_batch_norm, large=False, other_value=True)
_RULES = {
    "ConvolutionBackward0": _Rule(_convolution, large=True),
    "ReluBackward0": _Rule(_relu, large=True),
    "GeluBackward0": _Rule(twice_smooth.activation, large=True),
    "SiluBackward0": _Rule(twice_smooth.activation, large=True),
    "NativeLayerNormBackward0": _Rule(twice_smooth.layer_norm, large=False),
    "ScaledDotProductFlashAttentionForCpuBackward0": _Rule(twice_smooth.attention, large=False, inputs=3),
}


def _rule(node: Any, hold_statistics: bool) -> _Rule | None:
    if hold_statistics and holds(node):
        return _HELD
    rule = _RULES.get(node.name())
    return None if rule is not None and getattr(node, "_saved_dropout_p", 0) > 0 else rule


def needs_no_correction(node: Any, hold_statistics: bool) -> bool:
    """Whether every gradient through this autograd node has its derivative here, so that torch's is not used."""
    rule = _rule(node, hold_statistics)
    return rule is not None and not rule.large


def replaced(nodes: Iterable[Any], hold_statistics: bool) -> AbstractContextManager[None]:
    """Within the block, gradients through those of these autograd nodes that are known here have the derivatives given here.

    `hold_statistics`: the gradient of batch_norm in training mode is that of its input with constant statistics.
    """
    rules = [(node, _rule(node, hold_statistics)) for node in nodes]
    return hooked([(node, _hook(rule, rule.make(node))) for node, rule in rules if rule is not None])


def _hook(rule: _Rule, formula: Formula) -> Callable[..., Any]:
    def replace(inputs: Sequence[Any], grads: Sequence[Any]) -> Any:
        values = inputs[: rule.inputs]
        size = max((t.numel() for t in values if t is not None), default=0)
        if grads[0] is None or not size or (rule.large and size < _PAYS):
            return None
        if not rule.other_value and not torch.is_grad_enabled():
            return None
        return (*formula(values, grads[0]), *inputs[rule.inputs :])

    return replace
