"""A stand-in for fastai.losses where fastai is not installed: losses that move the classes last and flatten."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class BaseLoss:
    def __init__(
        self,
        kind: type[nn.Module],
        *,
        axis: int = -1,
        flatten: bool = True,
        floatify: bool = False,
        is_2d: bool = True,
        **options: Any,
    ) -> None:
        self.axis, self.flatten, self.floatify, self.is_2d = axis, flatten, floatify, is_2d
        self.func: Any = kind(**options)
        functools.update_wrapper(self, self.func)  # type: ignore[arg-type]

    @property
    def reduction(self) -> str:
        reduction: str = self.func.reduction
        return reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        self.func.reduction = value

    def __call__(self, outputs: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        outputs, target = (t.transpose(self.axis, -1).contiguous() for t in (outputs, target))
        target = target.to(outputs.dtype) if self.floatify else target
        if self.flatten:
            outputs = outputs.reshape(-1, outputs.shape[-1]) if self.is_2d else outputs.reshape(-1)
            target = target.reshape(-1)
        loss: Tensor = self.func(outputs, target, **kwargs)
        return loss


class CrossEntropyLossFlat(BaseLoss):
    y_int = True

    def __init__(self, *, axis: int = -1, **options: Any) -> None:
        super().__init__(nn.CrossEntropyLoss, axis=axis, **options)

    def activation(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(self.axis)

    def decodes(self, probabilities: Tensor) -> Tensor:
        return probabilities.argmax(self.axis)


def MSELossFlat(**options: Any) -> BaseLoss:
    return BaseLoss(nn.MSELoss, floatify=options.pop("floatify", True), is_2d=False, **options)


class BCEWithLogitsLossFlat(BaseLoss):
    def __init__(self, **options: Any) -> None:
        super().__init__(nn.BCEWithLogitsLoss, floatify=True, is_2d=False, **options)

    def activation(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs)


def losses(real: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """fastai.losses, or the stand-in under its name."""
    if real:
        pytest.importorskip("fastai", reason="fastai is not installed")
        return pytest.importorskip("fastai.losses", reason="fastai lacks what it imports")
    standing_in = types.ModuleType("fastai.losses")
    for kind in (BaseLoss, CrossEntropyLossFlat, MSELossFlat, BCEWithLogitsLossFlat):
        setattr(standing_in, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "fastai.losses", standing_in)
    return standing_in
