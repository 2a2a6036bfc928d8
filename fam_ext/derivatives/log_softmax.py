"""Derivatives of log_softmax over a vocabulary that pass over the (rows, classes) matrix as seldom as they can.

torch's second and third derivatives are right, but each elementary operation of theirs reads and writes the whole matrix: some
forty passes for one Hessian product and its gradient. Here blocks of rows stay in the cache from one operation to the next, and
no matrix is written that the result does not need. With l = log p, s = sum(g) and <,> the sum over a row's classes:

    gradient      g - s p
    its gradient  -s p u  towards l,   u - <p, u>  towards g        (and l is log_softmax again)

Writing into blocks has no rule for vmap, so that fam_ext.hessian takes several products one after the other: at these sizes
their matrices together would leave the cache, and perhaps the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fam_ext.derivatives.nodes import signed

LEAST = 1 << 20  # numbers of the matrix: smaller ones stay in the cache anyway
_BLOCK = 1 << 17  # numbers a block


def pays(node: Any) -> bool:
    """Whether this LogSoftmaxBackward0 is of a matrix that large, classes last. What it saved is not touched.

    Half precision is left to torch, which rounds once where the blocks would round three times.
    """
    shape, dtype = node._input_metadata[0].shape, node._input_metadata[0].dtype
    last = signed(node._saved_dim) in (-1, len(shape) - 1)
    return last and prod(shape) >= LEAST and dtype in (torch.float32, torch.float64)


def gradient(saved: Any, grad: Tensor) -> tuple[Tensor]:
    """The gradient of log_softmax's input, for fam_ext.derivatives.corrections."""
    return (_Gradient.apply(saved.result, grad),)  # type: ignore[no-untyped-call]


def _blocks(matrix: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of the same rows of all tensors; a GPU takes all rows at once."""
    tensors = [t.reshape(-1, t.shape[-1]) for t in (matrix, *others)]
    rows = max(1, _BLOCK // matrix.shape[-1]) if matrix.is_cpu else len(tensors[0])
    return zip(*(torch.split(t, rows) for t in tensors), strict=True)


class _Gradient(Function):
    """g - s p."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(logs, grad)
        result = torch.empty_like(logs, memory_format=torch.contiguous_format)
        for out, log, g in _blocks(result, logs, grad):
            torch.exp(log, out=out).mul_(g.sum(-1, keepdim=True).neg_()).add_(g)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logs, grad = ctx.saved_tensors
        towards_logs, towards_grad = ctx.needs_input_grad
        total = grad.sum(-1, keepdim=True)
        return (
            _Weighted.apply(logs, total, upstream) if towards_logs else None,  # type: ignore[no-untyped-call]
            upstream - _Mean.apply(logs, upstream) if towards_grad else None,  # type: ignore[no-untyped-call]
        )


class _Weighted(Function):
    """-s p u."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, total: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(logs, total, u)
        result = torch.empty_like(logs, memory_format=torch.contiguous_format)
        for out, log, s, x in _blocks(result, logs, total, u):
            torch.exp(log, out=out).mul_(x).mul_(-s)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logs, total, u = ctx.saved_tensors
        if torch.is_grad_enabled():  # a fourth derivative is asked for
            weighted = -logs.exp() * upstream
            return total * weighted * u, (weighted * u).sum(-1, keepdim=True), total * weighted
        contiguous = torch.contiguous_format
        towards_logs, towards_u = (torch.empty_like(logs, memory_format=contiguous) for _ in range(2))
        towards_total = torch.empty_like(total, memory_format=contiguous)
        inputs = (logs, total, u, upstream)
        for log, s, x, g, out_logs, out_total, out_u in _blocks(
            *inputs, towards_logs, towards_total, towards_u
        ):
            torch.exp(log, out=out_logs).mul_(g).neg_()
            torch.mul(out_logs, s, out=out_u)
            torch.sum(out_logs.mul_(x), -1, keepdim=True, out=out_total)
            out_logs.mul_(s)
        return towards_logs, towards_total, towards_u


class _Mean(Function):
    """<p, u>, a number for each row."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(logs, u)
        result = logs.new_empty((*logs.shape[:-1], 1))
        for log, x, out in _blocks(logs, u, result):
            torch.sum(torch.exp(log).mul_(x), -1, keepdim=True, out=out)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logs, u = ctx.saved_tensors
        weighted = logs.exp() * upstream
        return weighted * u, weighted
