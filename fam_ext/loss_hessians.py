"""Criteria with a closed form: what each one's second derivative with respect to its input is.

`read(criterion)` tells how to bind a criterion's arguments, module or function (also a functools.partial of it). Bound
arguments give the row coefficient c_i of cross-entropy, or the Hessian's diagonal h of an elementwise loss, with the
reduction included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.errors import UnsupportedError
from fam_ext.ops.row_coefficients import cross_entropy_coefficients

SUPPORTED = (
    "CrossEntropyLoss, MSELoss, BCEWithLogitsLoss, PoissonNLLLoss(log_input=True), GaussianNLLLoss, or their functional forms "
    "(keyword arguments by functools.partial)"
)


@dataclass
class Bound:
    """Arguments of one call of a criterion, after its input."""

    target: Tensor | None
    reduction: str = "mean"
    softmax = False

    def check(self, caller: str, logits: Tensor) -> None:
        _checks.check_choice(caller, "reduction", self.reduction, ("mean", "sum", "none"))
        if self.target is not None and self.target.shape != logits.shape:
            _checks.bad_value(
                caller,
                "target",
                f"of the shape of the outputs, {tuple(logits.shape)} (broadcasting would pair every target with every output)",
                self.target,
            )

    def fisher(self) -> bool:
        """Whether the loss is a negative log-likelihood in its natural parameter, so that Fisher matrix and Hessian agree."""
        return False

    def _reduced(self, h: Tensor, total: Tensor | float) -> Tensor:
        return h / total if self.reduction == "mean" else h

    def diagonal(self, logits: Tensor) -> Tensor:
        """h in the shape of the logits, reduction included."""
        raise NotImplementedError


@dataclass
class CrossEntropy(Bound):
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softmax = True

    def check(self, caller: str, logits: Tensor) -> None:
        _checks.check_choice(caller, "reduction", self.reduction, ("mean", "sum", "none"))
        if logits.dim() == 0:
            _checks.bad_value(caller, "outputs", "of shape (O,), (B, O) or (B, O, *positions)", logits)
        rows = logits.shape[1:] if logits.dim() == 1 else (logits.shape[0], *logits.shape[2:])
        if not isinstance(self.target, Tensor):
            _checks.bad_type(caller, "target", "a tensor", self.target)
        expected = logits.shape if self.target.is_floating_point() else rows
        if self.target.shape != expected:
            _checks.bad_value(caller, "target", f"of shape {tuple(expected)}", self.target)

    def fisher(self) -> bool:
        return self.weight is None and self.label_smoothing == 0

    def coefficients(self, logits: Tensor) -> Tensor:
        """c_i, of the shape of an index target."""
        if self.target is None:  # every row counts alike
            rows = logits.shape[1:] if logits.dim() == 1 else (logits.shape[0], *logits.shape[2:])
            alike = torch.zeros(rows, dtype=torch.int64, device=logits.device)
            return cross_entropy_coefficients(logits, alike, reduction=self.reduction)
        target = self.target if self.target.is_floating_point() else self.target.long()
        return cross_entropy_coefficients(
            logits, target, self.weight, self.ignore_index, self.label_smoothing, self.reduction
        )


@dataclass
class MeanSquaredError(Bound):
    weight: Tensor | None = None

    def diagonal(self, logits: Tensor) -> Tensor:
        acc = accumulation_dtype(logits, self.target, self.weight)
        if self.weight is not None:
            weight = self.weight.to(acc)
            total = weight.sum()
            return self._reduced(2 * weight, torch.where(total == 0, 1, total))
        return self._reduced(
            torch.full((), 2.0, dtype=acc, device=logits.device).expand(logits.shape), max(logits.numel(), 1)
        )


@dataclass
class BinaryCrossEntropy(Bound):
    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def fisher(self) -> bool:
        return self.weight is None and self.pos_weight is None

    def diagonal(self, logits: Tensor) -> Tensor:
        z = logits.to(accumulation_dtype(logits, self.target, self.weight, self.pos_weight))
        h = torch.sigmoid(z) * torch.sigmoid(-z)
        if self.pos_weight is not None:
            if self.target is None:
                _checks.bad_value("relative_flatness", "target", "given where pos_weight is", None)
            h = h * (1 + (self.pos_weight - 1) * self.target)
        if self.weight is not None:
            h = h * self.weight
        return self._reduced(h, max(logits.numel(), 1))


@dataclass
class PoissonNLL(Bound):
    def fisher(self) -> bool:
        return True

    def diagonal(self, logits: Tensor) -> Tensor:
        return self._reduced(
            torch.exp(logits.to(accumulation_dtype(logits, self.target))), max(logits.numel(), 1)
        )


@dataclass
class GaussianNLL(Bound):
    var: Tensor | float | None = None
    eps: float = 1e-6

    def diagonal(self, logits: Tensor) -> Tensor:
        var = self.var
        if not isinstance(var, Tensor):
            if var is None:
                _checks.bad_type("gaussian_nll_loss", "var", "a tensor or a number", var)
            var = torch.full((), float(var), dtype=accumulation_dtype(logits), device=logits.device)
        elif var.shape != logits.shape and var.shape == logits.shape[:-1]:
            var = var.unsqueeze(-1)
        var = var.to(accumulation_dtype(logits, self.target, var)).clone()
        with torch.no_grad():
            var.clamp_(min=self.eps)  # like the criterion: its gradient ignores the clamp too
        return self._reduced((1 / var).expand(logits.shape), max(logits.numel(), 1))


def _legacy(size_average: object, reduce: object) -> None:
    if size_average is not None or reduce is not None:
        raise UnsupportedError("FAMLoss: size_average and reduce are not supported; use reduction")


def _cross_entropy(
    target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Bound:  # fmt: skip
    _legacy(size_average, reduce)
    return CrossEntropy(target, reduction, weight, ignore_index, label_smoothing)


def _mse(
    target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean", weight: Any = None
) -> Bound:
    _legacy(size_average, reduce)
    return MeanSquaredError(target, reduction, weight)


def _bce(
    target: Any, weight: Any = None, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    pos_weight: Any = None,
) -> Bound:  # fmt: skip
    _legacy(size_average, reduce)
    return BinaryCrossEntropy(target, reduction, weight, pos_weight)


def _poisson(
    target: Any, log_input: bool = True, full: bool = False, size_average: Any = None, eps: float = 1e-8,
    reduce: Any = None, reduction: str = "mean",
) -> Bound:  # fmt: skip
    _legacy(size_average, reduce)
    if not log_input:
        raise UnsupportedError("FAMLoss: poisson_nll_loss has a closed form with log_input=True only")
    return PoissonNLL(target, reduction)


def _gaussian(target: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> Bound:
    return GaussianNLL(target, reduction, var, eps)


_FUNCTIONS: dict[Any, Callable[..., Bound]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _bce,
    F.poisson_nll_loss: _poisson,
    F.gaussian_nll_loss: _gaussian,
}
_MODULES: dict[type[nn.Module], Callable[[Any], Callable[..., Bound]]] = {
    nn.CrossEntropyLoss: lambda m: (
        lambda target: CrossEntropy(target, m.reduction, m.weight, m.ignore_index, m.label_smoothing)
    ),
    nn.MSELoss: lambda m: lambda target: MeanSquaredError(target, m.reduction),
    nn.BCEWithLogitsLoss: lambda m: (
        lambda target: BinaryCrossEntropy(target, m.reduction, m.weight, m.pos_weight)
    ),
    nn.PoissonNLLLoss: lambda m: lambda target: PoissonNLL(target, m.reduction),
    nn.GaussianNLLLoss: lambda m: lambda target, var: GaussianNLL(target, m.reduction, var, m.eps),
}


def read(caller: str, criterion: object) -> Callable[..., Bound]:
    """How to bind the arguments of `criterion` after its input. Raises UnsupportedError for one without a closed form."""
    inner = getattr(criterion, "_orig_mod", criterion)  # torch.compile(criterion)
    if isinstance(inner, nn.Module):
        for kind, bind in _MODULES.items():
            if (
                isinstance(inner, kind)
                and type(inner).forward is kind.forward
                and "forward" not in vars(inner)
            ):
                if isinstance(inner, nn.PoissonNLLLoss) and not inner.log_input:
                    raise UnsupportedError(
                        f"{caller}: PoissonNLLLoss has a closed form with log_input=True only"
                    )
                return bind(inner)
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
