"""What the registrations of the operations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from fam_ext._dtypes import without_autocast


def refuse_double_backward(op: str) -> None:
    """Make differentiating the backward operation `fam_ext::<op>` an error instead of a silently missing term."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"fam_ext::{op} can be differentiated once only: its backward has no derivative. "
            'For second derivatives pass backend="reference", which is plain PyTorch.'
        )

    torch.library.register_autograd(f"fam_ext::{op}", refuse)


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a gradient that is made in the forward pass, before the loss scale is known.

    float32 in place of float16, whose range is too small for it, and of bfloat16, which would be rounded twice: the backward pass
    multiplies by the upstream gradient and rounds then, once. csrc/gradient_dtype.h is the same rule.
    """
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def made_gradient(tensor: Tensor, wanted: bool) -> Tensor:
    """A contiguous gradient of `tensor` as a forward pass makes it, not filled; an empty tensor where it is not wanted."""
    return tensor.new_empty(tensor.shape if wanted else 0, dtype=gradient_dtype(tensor))


def hand_out(
    op: str, made: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], upstream: Tensor | None
) -> list[Tensor | None]:
    """Gradients made earlier times the upstream gradient (None: that is in them already), rounded to `dtypes` once.

    On the CPU an upstream gradient of exactly 1, what a training loss has almost always, hands them out as they are. On a GPU
    nobody knows without waiting for it.
    """
    with torch.no_grad():
        if (
            upstream is not None
            and type(upstream) is Tensor
            and upstream.device.type == "cpu"
            and upstream.item() == 1
        ):
            upstream = None
        handed = [
            None
            if m is None or dtype is None
            else m.to(dtype)
            if upstream is None
            else _scaled(m, upstream, dtype)
            for m, dtype in zip(made, dtypes, strict=True)
        ]
    if not torch.is_grad_enabled():
        return handed
    # create_graph=True: differentiating what is handed out must fail, not miss terms
    once: Any = _Once.apply
    return [None if m is None else once(m, torch.empty(0, requires_grad=True), op) for m in handed]


def _scaled(made: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32 whatever the dtypes: on the CPU a factor without dimensions keeps its digits, a GPU would round it first."""
    if made.device.type == "cpu":
        return (made * upstream).to(dtype)
    return torch.mul(made, upstream.reshape(1), out=torch.empty_like(made, dtype=dtype))


class _Once(torch.autograd.Function):
    """The identity, without a derivative."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, anchor: Tensor, op: str) -> Tensor:
        ctx.op = op
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{ctx.op} can be differentiated once only: its gradients were made in the forward pass. For second "
            'derivatives pass backend="reference", which is plain PyTorch.'
        )


@contextmanager
def triton_launches(tensor: Tensor) -> Iterator[None]:
    """Where Triton kernels run: they launch on the current device, and products between them keep their dtype."""
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with device, without_autocast(tensor):
        yield


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the fake (meta) kernel of `fam_ext::<op>`."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(
        f"fam_ext::{op}"
    )
    return decorator
