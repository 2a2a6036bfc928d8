"""What a row of the table of verified operations is, and the parts that rows are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """An operation between the output z of a linear layer, of shape `shape`, and the loss.

    `build` makes it, with its parameters, from torch's default dtype and generator. Its result is wrapped in a smooth loss that
    is not quadratic, or with `is_loss` is the loss. With `float32` it is also held against its double in float32, where torch
    takes another kernel. `needs` is the function of torch.nn.functional that not every supported torch has.
    """

    op: str
    build: Callable[[], Function]
    shape: tuple[int, ...] = (4, 4)
    variant: str = ""
    is_loss: bool = False
    float32: bool = False
    needs: str = ""

    @property
    def missing(self) -> bool:
        return self.needs != "" and not hasattr(torch.nn.functional, self.needs)

    @property
    def id(self) -> str:
        return f"{self.op} {self.variant}".strip().replace(" ", "_")


@dataclass(frozen=True)
class Refused:
    """An operation that kappa is refused for: the key of verdicts.REFUSED, and the case that the error's way out is."""

    case: Case
    node: str
    instead: str = ""


class Tail(nn.Module):
    """forward(z) = function(self, z) with the given modules, parameters and constants as attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self, z)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def positive(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape)


def smooth(out: Tensor) -> Tensor:
    """A loss with derivatives of every order that treats no two entries alike."""
    phase = torch.linspace(0.3, 2.1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return (out + phase).sin().sum()


def of(op: str, function: Function, shape: tuple[int, ...] = (4, 4), variant: str = "") -> Case:
    return Case(op, lambda: function, shape, variant)


def with_other(
    op: str,
    function: Callable[[Tensor, Any], Tensor],
    other: Callable[[], Any],
    shape: tuple[int, ...] = (4, 4),
    variant: str = "",
) -> Case:
    """A function of z and of something else, a parameter unless it is a constant."""
    return Case(op, lambda: Tail(lambda m, z: function(z, m.other), other=other()), shape, variant)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: param(*shape)
