"""The second derivative of each loss with a closed form, with respect to the loss's input.

A LossHessian holds the arguments of one call of a criterion (`fam_ext.criteria.read` makes it of them), and gives the row
coefficient c_i of cross-entropy, or the diagonal h of an elementwise loss's Hessian, with the reduction included. It checks its
arguments against the outputs: shapes and dtypes always, values (class indices, variances) where nothing else looks at them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops.row_coefficients import cross_entropy_coefficients

REDUCTIONS = ("mean", "sum", "none")


@dataclass
class LossHessian:
    """Arguments of one call of a criterion, after its input; `target` may be None where the Hessian does not depend on it.

    >>> import torch
    >>> from fam_ext import criteria
    >>> bce = criteria.read("example", torch.nn.BCEWithLogitsLoss(reduction="sum"))
    >>> bce(torch.ones(3)).diagonal(torch.zeros(3))
    tensor([0.2500, 0.2500, 0.2500])
    """

    target: Tensor | None
    reduction: str = "mean"
    softmax = False

    @staticmethod
    def of(m: Any) -> Callable[..., LossHessian]:
        """A function of the arguments of the criterion `m`, a torch module, after its input."""
        raise NotImplementedError

    def check(self, caller: str, outputs: Tensor) -> None:
        """Raise TypeError or ValueError unless types, dtypes and shapes are those of one call on `outputs`; reads no values."""
        _checks.check_choice(caller, "reduction", self.reduction, REDUCTIONS)
        target = self.target
        if target is None:
            return
        _checks.check_real(caller, "target", target)
        if target.shape != outputs.shape:
            _checks.bad_value(
                caller,
                "target",
                f"of the shape of the outputs, {tuple(outputs.shape)} (broadcasting would pair every target with every output)",
                target,
            )

    def check_values(self, caller: str, outputs: Tensor) -> None:
        """Refuse values that the loss is not defined for, after `check`. Reads them: on a GPU that waits for it.

        Where nothing can be read (in a compiled graph, under vmap), such values make the Hessian NaN instead.
        """

    def tensors(self) -> list[Tensor]:
        """Its floating arguments, which decide beside the layer's own what dtype kappa is formed in."""
        values = [getattr(self, field.name) for field in fields(self)]
        return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]

    def fisher(self) -> bool:
        """Whether the loss is a negative log-likelihood in its natural parameter, so that Fisher matrix and Hessian agree."""
        return False

    def ignored(self) -> Tensor | None:
        """Rows that the loss leaves out, of the shape of an index target; None where there are none."""
        return None

    def denominator(self, outputs: Tensor) -> Tensor | float:
        """What reduction="mean" divides the sum by: how much this call counts in the mean over a data set."""
        return float(outputs.numel())

    def diagonal(self, outputs: Tensor) -> Tensor:
        """h in the shape of the outputs, reduction included."""
        raise NotImplementedError

    def _reduced(self, h: Tensor, outputs: Tensor) -> Tensor:
        if self.reduction != "mean":
            return h
        total = self.denominator(outputs)
        if isinstance(total, Tensor):
            return h / torch.where(total == 0, 1, total).to(h.dtype)
        return h / max(total, 1.0)


@dataclass
class CrossEntropy(LossHessian):
    """Class indices (int64, or uint8 as in torch) of the rows' shape, or probabilities (floating) of the shape of the outputs.

    The outputs are (O,), (N, O) or (B, O, *positions). `weight` has the dtype of the outputs unless autocast is on, as in torch.
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softmax = True

    @staticmethod
    def of(m: Any) -> Callable[[Any], LossHessian]:
        return lambda target: CrossEntropy(target, m.reduction, m.weight, m.ignore_index, m.label_smoothing)

    def __post_init__(self) -> None:
        if isinstance(self.target, Tensor) and self.target.dtype is torch.uint8:
            self.target = self.target.long()  # in uint8 -100 is class 156

    def check(self, caller: str, outputs: Tensor) -> None:
        if outputs.dim() == 0:
            _checks.bad_value(caller, "outputs", "of shape (O,), (B, O) or (B, O, *positions)", outputs)
        if self.target is None:
            _checks.bad_type(caller, "target", "a tensor", None)
        self.check_rows(caller, outputs, _rows(outputs), _classes(outputs))
        self._check_weight_dtype(caller, outputs)

    def check_rows(self, caller: str, outputs: Tensor, rows: tuple[int, ...], classes: int) -> None:
        """As `check`, for outputs whose classes may lie in any dimension; a missing target and any weight dtype are allowed."""
        _checks.check_choice(caller, "reduction", self.reduction, REDUCTIONS)
        _checks.check_integer(caller, "ignore_index", self.ignore_index)
        _checks.check_between(caller, "label_smoothing", self.label_smoothing, 0.0, 1.0)
        _checks.check_by_class(caller, "class_weight", self.weight, classes)
        if self.target is None:
            return
        soft = _checks.check_class_target(caller, "target", self.target)
        expected = tuple(outputs.shape) if soft else tuple(rows)
        if self.target.shape != expected:
            _checks.bad_value(caller, "target", f"of shape {expected}", self.target)
        if soft and self.ignore_index >= 0:
            _checks.bad_value(caller, "ignore_index", "left out with class probabilities", self.ignore_index)

    def _check_weight_dtype(self, caller: str, outputs: Tensor) -> None:
        """torch's rule: it multiplies class indices' losses with weights of their own dtype."""
        weight = self.weight
        if weight is None or weight.dtype == outputs.dtype or _soft(self.target):
            return
        dtypes = weight.dtype, outputs.dtype
        if torch.is_autocast_enabled(outputs.device.type) and torch.float64 not in dtypes:
            return
        way_out = "torch's cross_entropy takes no other; convert the criterion with .to(dtype)"
        expected = f"of the dtype of the outputs, {outputs.dtype} ({way_out})"
        _checks.bad_type(caller, "class_weight", expected, weight)

    def check_values(self, caller: str, outputs: Tensor) -> None:
        if self.target is not None and not _soft(self.target):
            _checks.check_class_indices(caller, self.target, _classes(outputs), self.ignore_index)

    def fisher(self) -> bool:
        return self.weight is None and self.label_smoothing == 0

    def ignored(self) -> Tensor | None:
        if self.target is None or _soft(self.target):
            return None
        return self.target == self.ignore_index

    def denominator(self, outputs: Tensor) -> Tensor | float:
        target = self.target
        if target is None or _soft(target):
            return float(outputs.numel() // max(_classes(outputs), 1))
        valid = target != self.ignore_index
        if self.weight is None:
            return valid.sum()
        return self.weight[torch.where(valid, target, 0)].mul(valid).sum()

    def coefficients(self, outputs: Tensor) -> Tensor:
        """c_i, of the shape of an index target."""
        target = self.target
        if target is None:  # every row counts alike
            alike = torch.zeros(_rows(outputs), dtype=torch.int64, device=outputs.device)
            return cross_entropy_coefficients(outputs, alike, reduction=self.reduction)
        options = (self.weight, self.ignore_index, self.label_smoothing, self.reduction)
        if _soft(target):
            return cross_entropy_coefficients(outputs, target, *options)
        if _checks.readable(target):
            return cross_entropy_coefficients(outputs, target, *options)
        invalid = ((target < 0) | (target >= _classes(outputs))) & (target != self.ignore_index)
        return cross_entropy_coefficients(outputs, target.masked_fill(invalid, 0), *options).masked_fill(
            invalid, torch.nan
        )


@dataclass
class MeanSquaredError(LossHessian):
    weight: Tensor | None = None

    @staticmethod
    def of(m: Any) -> Callable[[Any], LossHessian]:
        return lambda target: MeanSquaredError(target, m.reduction)

    def check(self, caller: str, outputs: Tensor) -> None:
        super().check(caller, outputs)
        if self.weight is not None:
            _checks.check_floating(caller, "element_weight", self.weight)
            if self.weight.shape != outputs.shape:
                expected = f"of the shape of the outputs, {tuple(outputs.shape)}"
                _checks.bad_value(caller, "element_weight", expected, self.weight)

    def denominator(self, outputs: Tensor) -> Tensor | float:
        return float(outputs.numel()) if self.weight is None else self.weight.sum()

    def diagonal(self, outputs: Tensor) -> Tensor:
        acc = accumulation_dtype(outputs, self.target, self.weight)
        if self.weight is not None:
            exact = MeanSquaredError(self.target, self.reduction, self.weight.to(acc))
            return exact._reduced(2 * self.weight.to(acc), outputs)
        two = torch.full((), 2.0, dtype=acc, device=outputs.device)
        return self._reduced(two.expand(outputs.shape), outputs)


@dataclass
class BinaryCrossEntropy(LossHessian):
    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    @staticmethod
    def of(m: Any) -> Callable[[Any], LossHessian]:
        return lambda target: BinaryCrossEntropy(target, m.reduction, m.weight, m.pos_weight)

    def check(self, caller: str, outputs: Tensor) -> None:
        super().check(caller, outputs)
        if self.target is not None:
            _checks.check_floating(caller, "target", self.target)
        for argument, value in (("element_weight", self.weight), ("pos_weight", self.pos_weight)):
            if value is not None:
                _checks.check_floating(caller, argument, value)
                _checks.check_broadcasts(caller, argument, value, outputs.shape)
        if self.pos_weight is not None and self.target is None:
            _checks.bad_value(caller, "target", "given where pos_weight is", None)

    def fisher(self) -> bool:
        return self.weight is None and self.pos_weight is None

    def diagonal(self, outputs: Tensor) -> Tensor:
        acc = accumulation_dtype(outputs, self.target, self.weight, self.pos_weight)
        z = outputs.to(acc)
        h = torch.sigmoid(z) * torch.sigmoid(-z)
        if self.pos_weight is not None and self.target is not None:
            h = h * (1 + (self.pos_weight.to(acc) - 1) * self.target.to(acc))
        if self.weight is not None:
            h = h * self.weight.to(acc)
        return self._reduced(h, outputs)


@dataclass
class PoissonNLL(LossHessian):
    @staticmethod
    def of(m: Any) -> Callable[[Any], LossHessian]:
        return lambda target: PoissonNLL(target, m.reduction)

    def fisher(self) -> bool:
        return True

    def diagonal(self, outputs: Tensor) -> Tensor:
        return self._reduced(torch.exp(outputs.to(accumulation_dtype(outputs, self.target))), outputs)


@dataclass
class GaussianNLL(LossHessian):
    """`var` is a number, or of the outputs' shape, of that without its last dimension, or broadcasts to it."""

    var: Tensor | float | None = None
    eps: float = 1e-6

    @staticmethod
    def of(m: Any) -> Callable[[Any, Any], LossHessian]:
        return lambda target, var: GaussianNLL(target, m.reduction, var, m.eps)

    def check(self, caller: str, outputs: Tensor) -> None:
        super().check(caller, outputs)
        _checks.check_between(caller, "eps", self.eps, 0.0, float("inf"))
        var, shape = self.var, outputs.shape
        if isinstance(var, Tensor):
            _checks.check_floating(caller, "variance", var)
            if var.shape != shape[:-1]:
                _checks.check_broadcasts(caller, "variance", var, shape)
        else:
            _checks.check_between(caller, "variance", var, 0.0, float("inf"))

    def check_values(self, caller: str, outputs: Tensor) -> None:
        var = self.var
        if isinstance(var, Tensor) and _checks.readable(var) and bool((var < 0).any()):
            _checks.bad_value(caller, "variance", "at least 0 everywhere", float(var.min()))

    def diagonal(self, outputs: Tensor) -> Tensor:
        var = self.var
        if not isinstance(var, Tensor):
            if var is None:
                _checks.bad_type("gaussian_nll_loss", "var", "a tensor or a number", var)
            var = torch.full((), float(var), dtype=accumulation_dtype(outputs), device=outputs.device)
        elif var.shape != outputs.shape and var.shape == outputs.shape[:-1]:
            var = var.unsqueeze(-1)
        given = var
        var = var.to(accumulation_dtype(outputs, self.target, var)).clone()
        with torch.no_grad():
            var.clamp_(min=self.eps)  # like the criterion: its gradient ignores the clamp too
        h = 1 / var
        if not _checks.readable(given):  # check_values could not refuse a negative one
            h = h.masked_fill(given < 0, torch.nan)
        return self._reduced(h.expand(outputs.shape), outputs)


def _classes(outputs: Tensor) -> int:
    return outputs.shape[0 if outputs.dim() == 1 else 1]


def _rows(outputs: Tensor) -> tuple[int, ...]:
    """Shape of an index target."""
    return tuple(outputs.shape[1:]) if outputs.dim() == 1 else (outputs.shape[0], *outputs.shape[2:])


def _soft(target: Tensor | None) -> bool:
    return target is not None and target.is_floating_point()
