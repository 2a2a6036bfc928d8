"""Loss and kappa of a linear head under cross-entropy in one operation: from the logits, or from the features alone.

`ordinary_step` is the short way. Most training steps hand the criterion the very tensor that the layer returned, of shape (N, O),
with one call since the last loss. A few comparisons recognize that, and the operation's entry in C++ checks shapes, dtypes and
devices anyway. Everything else takes the long way (fam_ext.loss.one_call, then `from_logits`), which asks the same in Python,
takes as long as a small head itself, and has an error message for every case that is not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext.capture.calls import CapturedCalls
from fam_ext.errors import UnsupportedError
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss_hessians import CrossEntropy, LossHessian
from fam_ext.ops.head_cross_entropy import head_cross_entropy, ordinary_call
from fam_ext.ops.linear_cross_entropy import linear_cross_entropy
from fam_ext.options import Options

NAME = "FAMLoss.linear_cross_entropy"
_REFUSALS = (IndexError, TypeError, ValueError, UnsupportedError)


def _of(caller: str, error: Exception) -> Exception:
    """The operation's refusal in the name of what was called."""
    operation, _, text = str(error).partition(": ")
    ours = operation in ("head_cross_entropy", "linear_cross_entropy")
    return type(error)(f"{caller}: {text}") if ours else error


def has_hooks(criterion: Any) -> bool:
    """Whether hooks stand on the criterion, which see its calls and may change its loss; a function has none."""
    return bool(getattr(criterion, "_forward_hooks", None) or getattr(criterion, "_forward_pre_hooks", None))


def applies(criterion: Any, loss_hessian: object, outputs: object) -> bool:
    """Whether the operation stands for criterion and term; a hook on the criterion (None: a function) would miss its call."""
    if has_hooks(criterion):
        return False
    if not isinstance(loss_hessian, CrossEntropy) or not isinstance(outputs, Tensor) or outputs.dim() < 2:
        return False
    target, weight = loss_hessian.target, loss_hessian.weight
    if not isinstance(target, Tensor) or target.requires_grad:
        return False
    if target.dtype != torch.int64 and (target.dtype != outputs.dtype or loss_hessian.ignore_index >= 0):
        return False
    if weight is None:
        return True
    # another dtype is what the criterion alone does not take either
    return not weight.requires_grad and (
        weight.dtype == outputs.dtype or torch.is_autocast_enabled(outputs.device.type)
    )


def ordinary_step(
    options: Options,
    layer: LinearMap,
    captures: CapturedCalls,
    outputs: Tensor,
    ce: CrossEntropy,
    strength: float,
    factor: float,
) -> tuple[Tensor, Tensor] | None:
    """(total, kappa) of an ordinary step; None, and nothing has happened, where the long way must look.

    `factor` scales kappa, and is part of the term.
    """
    if outputs.dim() != 2:
        return None  # of more dimensions, the second one need not be the neurons'
    call = captures.only(outputs)
    if call is None or call.weight.shape != layer.shape:  # type: ignore[union-attr]
        return None
    try:
        result = ordinary_call(
            outputs, call.features, call.weight, ce.target, ce.weight, ce.ignore_index, ce.label_smoothing,
            ce.reduction, strength * factor, options.curvature_grad,
        )  # fmt: skip
    except IndexError as error:
        raise _of(options.caller, error) from None
    if result is None:
        return None
    call.used[0] = True
    captures.done()
    return result if factor == 1.0 else (result[0], result[1] * factor)


def from_logits(
    options: Options,
    outputs: Tensor,
    features: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    loss_hessian: CrossEntropy,
    strength: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """(total, kappa) of a head; `rows` tells which rows of the layer's output the criterion sees (None: all, in order)."""
    fan_in = features.shape[-1]
    if rows is not None:
        features = features.flatten(0, -2)[rows]
    elif outputs.dim() > 2 or features.dim() != 2:
        features = features.reshape(outputs.shape[0], *outputs.shape[2:], fan_in)
    try:
        total, kappa = head_cross_entropy(
            outputs,
            features,
            weight,
            loss_hessian.target,  # type: ignore[arg-type]
            class_weight=loss_hessian.weight,
            ignore_index=loss_hessian.ignore_index,
            label_smoothing=loss_hessian.label_smoothing,
            reduction=loss_hessian.reduction,
            strength=strength * factor,
            curvature_grad=options.curvature_grad,
            backend=options.backend,
        )
    except _REFUSALS as error:
        raise _of(options.caller, error) from None
    return total, kappa if factor == 1.0 else kappa * factor


def check_num_items(caller: str, loss_hessian: LossHessian, num_items: object) -> str:
    """The reduction of a criterion whose sum is to be divided by `num_items` (None: by a number that is not known yet).

    Raises UnsupportedError for class weights under "mean", TypeError or ValueError for another reduction than "mean" and "sum"
    and where `num_items` is no number of at least 0.
    """
    if num_items is not None:
        _checks.check_count(caller, "num_items", num_items)
    reduction = loss_hessian.reduction
    _checks.check_choice(caller, "reduction of the criterion, with num_items,", reduction, ("mean", "sum"))
    if reduction == "mean" and getattr(loss_hessian, "weight", None) is not None:
        raise UnsupportedError(
            f"{caller}: num_items counts terms, the criterion's weights do not; use reduction='sum'"
        )
    return reduction


class FeatureLoss:
    """One loss from the head's input: (CE + strength * kappa, kappa) for a strength, everything else loss_hessian and checked.

    `loss_hessian` is `criterion` with its arguments, None where it has no closed form.
    """

    def __init__(
        self,
        options: Options,
        layers: Sequence[LinearMap],
        criterion: Any,
        loss_hessian: Any,
        factor: float,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        num_items: int | Tensor | None,
        parts: int,
    ) -> None:
        layer, loss_hessian = _checked(options, layers, criterion, loss_hessian)
        _checks.check_floating(NAME, "weight", weight)
        if weight.shape != (layer.outputs, layer.inputs):
            _checks.bad_value(NAME, "weight", f"of the layer's shape {(layer.outputs, layer.inputs)}", weight)
        if num_items is not None:
            check_num_items(NAME, loss_hessian, num_items)
        self.tensors = (features, weight, target)
        self.num_items = num_items
        self.factor = factor
        self.arguments: dict[str, Any] = {
            "bias": bias,
            "class_weight": loss_hessian.weight,
            "ignore_index": loss_hessian.ignore_index,
            "label_smoothing": loss_hessian.label_smoothing,
            "reduction": loss_hessian.reduction if num_items is None else "sum",
            "curvature_grad": options.curvature_grad,
            "parts": parts,
            "backend": options.backend,
        }

    def __call__(self, strength: float) -> tuple[Tensor, Tensor]:
        try:
            total, kappa = linear_cross_entropy(
                *self.tensors, strength=strength * self.factor, **self.arguments
            )
        except _REFUSALS as error:
            raise _of(NAME, error) from None
        if self.factor != 1.0:
            kappa = kappa * self.factor
        return (total, kappa) if self.num_items is None else (total / self.num_items, kappa / self.num_items)

    @torch.no_grad()
    def values(self) -> tuple[Tensor, Tensor]:
        """(CE, kappa) without gradients."""
        return self(0.0)


def _checked(
    options: Options, layers: Sequence[LinearMap], criterion: Any, loss_hessian: Any
) -> tuple[LinearMap, CrossEntropy]:
    """Refuse what is not cross-entropy on one linear layer with the measure kappa in closed form."""
    if len(layers) != 1 or not layers[0].linear:
        described = ", ".join(str(layer.module) for layer in layers)
        raise UnsupportedError(f"{NAME}: the layer must be one nn.Linear, got {described}")
    if not isinstance(loss_hessian, CrossEntropy):
        raise UnsupportedError(f"{NAME}: the criterion must be CrossEntropyLoss, got {criterion}")
    if has_hooks(criterion):
        raise UnsupportedError(f"{NAME}: the criterion has forward hooks, which would not run; remove them")
    if options.measure != "neuronwise":
        raise UnsupportedError(f"{NAME}: measure must be 'neuronwise', got {options.measure!r}")
    if options.method not in ("auto", "closed_form"):
        raise UnsupportedError(f"{NAME}: method must be 'auto' or 'closed_form', got {options.method!r}")
    if options.curvature == "empirical_fisher":
        raise UnsupportedError(
            f"{NAME}: curvature must be 'hessian', 'ggn' or 'fisher', got 'empirical_fisher'"
        )
    options.check_fisher(loss_hessian)
    return layers[0], loss_hessian
