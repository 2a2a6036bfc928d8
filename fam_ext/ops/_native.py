"""What the registrations of the native operations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch


def refuse_double_backward(op: str) -> None:
    """Make differentiating the backward operation `fam_ext::<op>` an error instead of a silently missing term."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"fam_ext::{op} can be differentiated once only: its backward has no derivative. "
            'For second derivatives pass backend="reference", which is plain PyTorch.'
        )

    torch.library.register_autograd(f"fam_ext::{op}", refuse)


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the fake (meta) kernel of `fam_ext::<op>`."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(
        f"fam_ext::{op}"
    )
    return decorator
