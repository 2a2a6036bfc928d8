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
