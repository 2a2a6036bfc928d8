"""head_cross_entropy in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype, without_autocast
from fam_ext.ops.row_coefficients import clear_rows, cross_entropy_coefficients


def head_cross_entropy(
    logits: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    strength: float,
    curvature_grad: bool,
    trace: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(CE + strength * kappa, kappa) of a linear head; see fam_ext.functional.head_cross_entropy.

    `trace` maps (logits, weight) to the trace of every row, like softmax_trace of this package with a form.
    """
    acc = accumulation_dtype(logits, features, weight)
    with without_autocast(logits):
        z = logits.to(acc)
        soft = target.is_floating_point()
        omega = None if class_weight is None else class_weight.to(acc)
        c = cross_entropy_coefficients(z, target, omega, ignore_index, label_smoothing, reduction)
        if not soft:
            z, features = clear_rows(z, c, 1), clear_rows(features, c, -1)
        loss = F.cross_entropy(
            z,
            target.to(acc) if soft else target,
            omega,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        if not curvature_grad:
            z, features = z.detach(), features.detach()
        squares = features.to(acc).square().sum(-1)  # (N,) or (B, *pos)
        kappa = c * squares * trace(z, weight)
        if reduction != "none":
            kappa = kappa.sum()
        return loss + strength * kappa, kappa.detach()
