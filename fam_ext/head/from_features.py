"""FAMLoss's options for linear_cross_entropy: a head's loss where the model hands out features instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks, loss_hessians
from fam_ext.errors import UnsupportedError
from fam_ext.loss.layer_criterion import LayerCriterion
from fam_ext.ops.linear_cross_entropy import linear_cross_entropy

NAME = "FAMLoss.linear_cross_entropy"


class FeatureLoss:
    """One call: (CE + strength * kappa, kappa) for a strength, with everything else bound and checked."""

    def __init__(
        self,
        owner: LayerCriterion,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        num_items: int | Tensor | None,
    ) -> None:
        bound = _cross_entropy(owner, target)
        options, layer = owner.options, owner.parts[0].layer
        _checks.check_floating(NAME, "weight", weight)
        if weight.shape != (layer.outputs, layer.inputs):
            _checks.bad_value(NAME, "weight", f"of the layer's shape {(layer.outputs, layer.inputs)}", weight)
        if num_items is not None and bound.reduction != "mean":
            _checks.bad_value(
                NAME, "num_items", "None unless the criterion's reduction is 'mean'", bound.reduction
            )
        if num_items is not None and bound.weight is not None:
            raise UnsupportedError(
                f"{NAME}: num_items counts rows, class weights do not; use reduction='sum'"
            )
        self.tensors = (features, weight, target)
        self.num_items = num_items
        self.factor = owner.parts[0].factor
        self.arguments: dict[str, Any] = {
            "bias": bias,
            "class_weight": bound.weight,
            "ignore_index": bound.ignore_index,
            "label_smoothing": bound.label_smoothing,
            "reduction": bound.reduction if num_items is None else "sum",
            "curvature_grad": options.curvature_grad,
            "backend": options.backend,
        }

    def __call__(self, strength: float) -> tuple[Tensor, Tensor]:
        total, kappa = linear_cross_entropy(*self.tensors, strength=strength * self.factor, **self.arguments)
        if self.factor != 1.0:
            kappa = kappa * self.factor
        return (total, kappa) if self.num_items is None else (total / self.num_items, kappa / self.num_items)

    @torch.no_grad()
    def values(self) -> tuple[Tensor, Tensor]:
        """(CE, kappa) without gradients."""
        return self(0.0)


def _cross_entropy(owner: LayerCriterion, target: Tensor) -> loss_hessians.CrossEntropy:
    """The criterion's arguments, if this is FAMLoss of cross-entropy on one linear layer with the measure kappa."""
    options, criterion = owner.options, owner.criterion
    if len(owner.parts) != 1 or not owner.parts[0].layer.linear:
        raise UnsupportedError(f"{NAME}: the layer must be one nn.Linear, got {owner.extra_repr()}")
    bound = None if owner._bind is None else owner._bind(target)
    if not isinstance(bound, loss_hessians.CrossEntropy):
        raise UnsupportedError(f"{NAME}: the criterion must be CrossEntropyLoss, got {criterion}")
    if getattr(criterion, "_forward_hooks", None) or getattr(criterion, "_forward_pre_hooks", None):
        raise UnsupportedError(f"{NAME}: the criterion has forward hooks, which would not run; remove them")
    if options.measure != "neuronwise":
        raise UnsupportedError(f"{NAME}: measure must be 'neuronwise', got {options.measure!r}")
    if options.method not in ("auto", "closed_form"):
        raise UnsupportedError(f"{NAME}: method must be 'auto' or 'closed_form', got {options.method!r}")
    options.check_bound(bound)
    return bound
