"""What a criterion computes: its closed form where it has one, and the loss inside torch.compile's wrapper and fastai's losses.

`read(criterion)` gives a function of the criterion's arguments after its input, which returns their LossHessian; `criterion` is a
module, a function, or a functools.partial of one.

fastai's move the classes last and flatten input and target before they call a torch loss. They are no modules. What the inner
loss is given is asked of fastai's own code, which runs with a recorder in the inner loss's place; so the closed form of the inner
loss is taken on the very tensors that it would get.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.loss_hessians import (
    BinaryCrossEntropy,
    CrossEntropy,
    GaussianNLL,
    LossHessian,
    MeanSquaredError,
    PoissonNLL,
)

SUPPORTED = (
    "CrossEntropyLoss, MSELoss, BCEWithLogitsLoss, PoissonNLLLoss(log_input=True), GaussianNLLLoss, or their functional forms "
    "(keyword arguments by functools.partial)"
)
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


def _legacy(size_average: object, reduce: object) -> None:
    if size_average is not None or reduce is not None:
        raise UnsupportedError("FAMLoss: size_average and reduce are not supported; use reduction")


def _cross_entropy(
    target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> LossHessian:  # fmt: skip
    _legacy(size_average, reduce)
    return CrossEntropy(target, reduction, weight, ignore_index, label_smoothing)


def _mse(
    target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean", weight: Any = None
) -> LossHessian:
    _legacy(size_average, reduce)
    return MeanSquaredError(target, reduction, weight)


def _bce(
    target: Any, weight: Any = None, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    pos_weight: Any = None,
) -> LossHessian:  # fmt: skip
    _legacy(size_average, reduce)
    return BinaryCrossEntropy(target, reduction, weight, pos_weight)


def _poisson(
    target: Any, log_input: bool = True, full: bool = False, size_average: Any = None, eps: float = 1e-8,
    reduce: Any = None, reduction: str = "mean",
) -> LossHessian:  # fmt: skip
    _legacy(size_average, reduce)
    if not log_input:
        raise UnsupportedError("FAMLoss: poisson_nll_loss has a closed form with log_input=True only")
    return PoissonNLL(target, reduction)


def _gaussian(
    target: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> LossHessian:
    return GaussianNLL(target, reduction, var, eps)


_FUNCTIONS: dict[Any, Callable[..., LossHessian]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _bce,
    F.poisson_nll_loss: _poisson,
    F.gaussian_nll_loss: _gaussian,
}
for _torchs, _ours in _FUNCTIONS.items():
    _ours.__qualname__ = _torchs.__name__  # what an error of wrong arguments names
_MODULES: dict[type[nn.Module], Callable[[Any], Callable[..., LossHessian]]] = {
    nn.CrossEntropyLoss: CrossEntropy.of,
    nn.MSELoss: MeanSquaredError.of,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy.of,
    nn.PoissonNLLLoss: PoissonNLL.of,
    nn.GaussianNLLLoss: GaussianNLL.of,
}


def read(caller: str, criterion: object) -> Callable[..., LossHessian]:
    """How to bind the arguments of `criterion` after its input. Raises UnsupportedError for one without a closed form."""
    inner: Any = uncompiled(criterion)
    if isinstance(inner, nn.Module):
        for kind, bind in _MODULES.items():
            own_forward = type(inner).forward is not kind.forward or "forward" in vars(inner)
            if isinstance(inner, kind) and not own_forward:
                if isinstance(inner, nn.PoissonNLLLoss) and not inner.log_input:
                    raise UnsupportedError(
                        f"{caller}: PoissonNLLLoss has a closed form with log_input=True only"
                    )
                call = bind(inner)
                call.__qualname__ = f"{kind.__name__}.forward"  # what an error of wrong arguments names
                return call
        name = type(inner).__name__
    elif callable(inner):
        given: dict[str, Any] = {}
        function: Any = inner
        while isinstance(function, functools.partial):
            if function.args:
                raise UnsupportedError(
                    f"{caller}: a functools.partial criterion may hold keyword arguments only"
                )
            given = {**function.keywords, **given}
            function = function.func
        if function in _FUNCTIONS:
            return functools.partial(_FUNCTIONS[function], **given) if given else _FUNCTIONS[function]
        name = getattr(inner, "__name__", type(inner).__name__)
    else:
        _checks.bad_type(caller, "criterion", "a loss module or function", criterion)
    raise UnsupportedError(f"{caller}: no closed form is known for the criterion {name}; use {SUPPORTED}")
