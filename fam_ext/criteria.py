"""The loss inside a criterion: of torch.compile's wrapper, and of fastai's losses.

fastai's move the classes last and flatten input and target before they call a torch loss. They are no modules. What the inner
loss is given is asked of fastai's own code, which runs with a recorder in the inner loss's place; so the closed form of the inner
loss is taken on the very tensors that it would get.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

_ELEMENTWISE = (nn.MSELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss)


class Flattened:
    """A fastai loss: `func` is the torch loss inside it."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion
        self.func: nn.Module = criterion.func

    def arguments(self, outputs: Any, targets: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """(outputs, targets) of `func`, as plain tensors.

        An elementwise mean or sum keeps the shape of the outputs: flattening would hide which neuron each element belongs to, and
        does not change the loss.
        """
        recording = copy.copy(self.criterion)
        recording.func = _record
        inner: Any = self.func
        shaped = isinstance(inner, _ELEMENTWISE) and inner.reduction != "none"
        shaped = shaped and getattr(inner, "weight", None) is None
        if shaped:
            recording.flatten = False
        with torch.enable_grad():  # the graph between them tells which row is which
            given, target = (_plain(value) for value in recording(outputs, *targets))
        if shaped and target.numel() == given.numel():
            target = target.reshape(given.shape)
        return given, (target,)


def uncompiled(criterion: Any) -> Any:
    """What torch.compile has wrapped, which is a submodule of its wrapper; else `criterion`."""
    return (getattr(criterion, "_modules", None) or {}).get("_orig_mod", criterion)


def flattened(criterion: object) -> Flattened | None:
    """`criterion` as a flattened loss; None for every other one, and for a subclass that calls its inner loss in its own way.

    >>> flattened(nn.CrossEntropyLoss()) is None
    True
    """
    base = getattr(sys.modules.get("fastai.losses"), "BaseLoss", None)
    if base is None or not isinstance(criterion, base) or type(criterion).__call__ is not base.__call__:
        return None
    return Flattened(criterion)


def _record(outputs: Any, target: Any) -> tuple[Any, Any]:
    return outputs, target


def _plain(value: Any) -> Any:
    """Without fastai's subclass of Tensor; the graph stays."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value
