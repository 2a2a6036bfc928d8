"""What the registrations of the operations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_double_backward(op: str) -> None:
    """Make differentiating the backward operation `fam_ext::<op>` an error instead of a silently missing term."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"fam_ext::{op} can be differentiated once only: its backward has no derivative. "
            'For second derivatives pass backend="reference", which is plain PyTorch.'
        )

    torch.library.register_autograd(f"fam_ext::{op}", refuse)


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a gradient that is made in the forward pass, before the loss scale is known: float32 for float16, whose range is
    too small for it. The backward pass multiplies by the upstream gradient and rounds then, once. csrc/gradient_dtype.h is the same.
    """
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def made_gradient(tensor: Tensor, wanted: bool) -> Tensor:
    """A gradient of `tensor` as the forward pass makes it, not filled; an empty tensor where it is not wanted."""
    dtype = gradient_dtype(tensor)
    return torch.empty_like(tensor, dtype=dtype) if wanted else tensor.new_empty(0, dtype=dtype)


@contextmanager
def triton_launches(tensor: Tensor) -> Iterator[None]:
    """Where Triton kernels run: they launch on the current device, and products between them keep their dtype."""
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with device, torch.autocast(tensor.device.type, enabled=False):
        yield


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the fake (meta) kernel of `fam_ext::<op>`."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(
        f"fam_ext::{op}"
    )
    return decorator
