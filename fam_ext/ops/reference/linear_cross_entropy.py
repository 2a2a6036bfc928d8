"""linear_cross_entropy in plain PyTorch: all logits at once, then head_cross_entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype, without_autocast
from fam_ext.ops.reference.head_cross_entropy import head_cross_entropy
from fam_ext.ops.reference.softmax_trace import softmax_trace
from fam_ext.ops.row_coefficients import clear_rows


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    strength: float,
    curvature_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(CE + strength * kappa, kappa) of a linear head; see fam_ext.functional.linear_cross_entropy."""
    acc = accumulation_dtype(input, weight, bias)
    with without_autocast(input):
        labels = target.reshape(-1)
        rows = input.reshape(target.numel(), weight.shape[1]).to(acc)
        w = weight.to(acc)
        # an ignored row may hold anything; times the weight it would reach the weight's gradient as 0 * nan
        rows = clear_rows(rows, (labels != ignore_index).to(acc), 1)
        logits = F.linear(rows, w, None if bias is None else bias.to(acc))
        loss, flatness = head_cross_entropy(
            logits, rows, w, labels, class_weight, ignore_index, label_smoothing, reduction, strength, curvature_grad,
            lambda z, v: softmax_trace(z, v, "shifted"),
        )  # fmt: skip
    if reduction == "none":
        return loss.reshape(target.shape), flatness.reshape(target.shape)
    return loss, flatness
