"""Sums over processes whose gradients are right, for what each of them computes of a loss that is the same on all.

Both maps are those of Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3: g and f).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        result = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.group), None


_total: Callable[..., Tensor] = _Total.apply
_shared: Callable[..., Tensor] = _Shared.apply


def total(values: Tensor, group: Any) -> Tensor:
    """The sum over the processes of `group`. What follows is the same on all of them: its gradient goes back as it is."""
    return _total(values, group)


def shared(values: Tensor, group: Any) -> Tensor:
    """Values that are the same on all processes, of which each computes a share of what follows: the gradients are summed."""
    return _shared(values, group)
