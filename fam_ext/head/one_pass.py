"""FAMLoss's steps that head_cross_entropy computes in one pass: cross-entropy on a linear head.

`ordinary_step` is the short way. Most training steps hand the criterion the very tensor that the layer returned, of shape (N, O),
with one call since the last loss. A few comparisons recognize that, and the operation's entry in C++ checks shapes, dtypes and
devices anyway; the long way (LayerCriterion._take, then `fused_step`) asks the same in Python, which takes as long as a small
head itself, and has a name for everything unusual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fam_ext.loss.hidden import CLOSED_FORM
from fam_ext.loss_hessians import CrossEntropy
from fam_ext.ops.head_cross_entropy import head_cross_entropy, ordinary_call

if TYPE_CHECKING:
    from fam_ext.loss.layer_criterion import LayerCriterion, Taken
    from fam_ext.loss_hessians import LossHessian


def fusible(
    owner: LayerCriterion, outputs: object, bound: LossHessian | None, strength: object
) -> CrossEntropy | None:
    """`bound` where the operation stands for criterion and term; a hook on the criterion would miss its call."""
    if not isinstance(bound, CrossEntropy) or not isinstance(strength, float):
        return None
    target, weight = bound.target, bound.weight
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or not isinstance(target, Tensor):
        return None
    if target.requires_grad or (weight is not None and weight.requires_grad):
        return None
    if target.dtype != torch.int64 and (target.dtype != outputs.dtype or bound.ignore_index >= 0):
        return None
    if (
        weight is not None
        and weight.dtype != outputs.dtype
        and not torch.is_autocast_enabled(outputs.device.type)
    ):
        return None  # which the criterion alone does not take either
    return None if owner.hooked() else bound


def ordinary_step(
    owner: LayerCriterion, outputs: Tensor, bound: CrossEntropy, strength: float
) -> tuple[Tensor, Tensor] | None:
    """(total, kappa) of an ordinary step; None, and nothing has happened, where the long way must look."""
    part, options = owner.parts[0], owner.options
    # of more dimensions, the second one need not be the neurons'
    capture = part.captures.only(outputs) if outputs.dim() == 2 else None
    if capture is None or options.curvature == "fisher" or options.backend not in ("auto", "native"):
        return None
    features, weight = capture.features, capture.weight
    if weight.shape != part.layer.shape:  # type: ignore[union-attr]
        return None
    found = ordinary_call(
        outputs, features, weight, bound.target, bound.weight, bound.ignore_index, bound.label_smoothing, bound.reduction,
        strength * part.factor, options.curvature_grad,
    )  # fmt: skip
    if found is None:
        return None
    part.general.note(CLOSED_FORM)
    capture.used[0] = True
    part.captures.done()
    return found if part.factor == 1.0 else (found[0], found[1] * part.factor)


def fused_step(
    owner: LayerCriterion, outputs: Tensor, taken: Taken, bound: CrossEntropy, strength: float
) -> tuple[Tensor, Tensor]:
    """(total, kappa) of what `taken` found."""
    _, features, weight, _, rows, _ = taken
    options, fan_in = owner.options, features.shape[-1]
    if rows is not None:
        features = features.reshape(-1, fan_in)[rows]
    elif outputs.dim() > 2 or features.dim() != 2:
        features = features.reshape(outputs.shape[0], *outputs.shape[2:], fan_in)
    factor = owner.parts[0].factor
    total, kappa = head_cross_entropy(
        outputs,
        features,
        weight,
        bound.target,  # type: ignore[arg-type]
        class_weight=bound.weight,
        ignore_index=bound.ignore_index,
        label_smoothing=bound.label_smoothing,
        reduction=bound.reduction,
        strength=strength * factor,
        curvature_grad=options.curvature_grad,
        backend=options.backend,
    )
    return total, kappa if factor == 1.0 else kappa * factor
