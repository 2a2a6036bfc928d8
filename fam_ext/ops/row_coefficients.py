"""Row coefficients c_i of cross-entropy: what labels, class weights, smoothing and the reduction do to its Hessian.

For every variant of torch.nn.functional.cross_entropy the Hessian with respect to one row of logits is
c_i (diag(p_i) - p_i p_i^T): labels enter through the scalar c_i alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clear_rows(rows: Tensor, coefficients: Tensor, class_dim: int) -> Tensor:
    """`rows` with zeros where the coefficient is 0: whatever an ignored row holds, it must not reach a sum over rows as 0 * nan,
    in a gradient either.
    """
    return torch.where((coefficients == 0).unsqueeze(class_dim), 0.0, rows)


def cross_entropy_coefficients(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """c_i for each row of `logits`, of the shape of an index target.

    With omega the class weights (ones when None) and eps the label smoothing, before the reduction
    c_i = (1 - eps) omega_{y_i} + eps/O sum_s omega_s for a class index y_i, and
    c_i = sum_s q'_is omega_s for a distribution q_i, where q' = (1 - eps) q + eps/O.
    "mean" divides by the sum of omega_{y_i} over the rows not ignored (by the number of rows for distributions). Where that is 0,
    c_i is not finite for rows that are not ignored, as torch's loss is not, and 0 for the others.

    Args:
        logits: (O,), (N, O) or (N, O, *positions); only its shape and dtype are used.
        target: class indices of the shape of `logits` without its class dimension, or probabilities of the same shape.
        class_weight: (O,) or None.
        reduction: "mean", "sum" or "none".

    Returns:
        Tensor of the accumulation dtype (float32, float64 when an input is float64).

    Example:
        >>> logits, target = torch.zeros(3, 2), torch.tensor([0, -100, 1])
        >>> cross_entropy_coefficients(logits, target, class_weight=torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.0000, 0.7500])
    """
    acc = torch.float64 if torch.float64 in (logits.dtype, target.dtype) else torch.float32
    if class_weight is not None and class_weight.dtype == torch.float64:
        acc = torch.float64
    class_dim = 0 if logits.dim() == 1 else 1
    classes = logits.shape[class_dim]
    omega = None if class_weight is None else class_weight.to(acc)
    if target.is_floating_point():
        q = target.to(acc)
        if label_smoothing:
            q = q * (1 - label_smoothing) + label_smoothing / classes
        if omega is not None:
            q = q * omega.view([-1 if d == class_dim else 1 for d in range(q.dim())])
        c = q.sum(class_dim)
        return c / c.numel() if reduction == "mean" else c

    valid = target != ignore_index
    if omega is None:
        picked = valid.to(acc)
        c = picked
    else:
        picked = omega[torch.where(valid, target, 0)] * valid
        c = (
            picked * (1 - label_smoothing) + omega.sum() * (label_smoothing / classes) * valid
            if label_smoothing
            else picked
        )
    if reduction == "mean":
        # class weights that sum to 0 divide by 0, as in torch; ignored rows stay at 0, and with all of them kappa
        c = torch.where(valid, c / picked.sum(), 0)
    return c
