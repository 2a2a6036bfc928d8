"""softmax_trace in plain PyTorch, in its two stable forms."""

from __future__ import annotations

import torch
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype, without_autocast


def softmax_trace(logits: Tensor, weight: Tensor, form: str) -> Tensor:
    """v = Tr(W^T (diag(p) - p p^T) W) for every row; see fam_ext.functional.softmax_trace."""
    rows = logits.movedim(1, -1)  # (B, *pos, O)
    z = rows.reshape(-1, rows.shape[-1])
    acc = accumulation_dtype(logits, weight)
    with without_autocast(logits):
        compute = shifted if form == "shifted" else pairwise
        return compute(z.to(acc), weight.to(acc)).reshape(rows.shape[:-1])


def at_least_zero(values: Tensor) -> Tensor:
    """Numbers that only rounding makes negative, where nearly equal rows of the weight are subtracted; gradients as they are."""
    return values + (values.clamp(min=0) - values).detach()


def shifted(z: Tensor, w: Tensor) -> Tensor:
    """Form (a): the mean weight as a shift from the most likely class's; one (N,O)x(O,I) product.

    With y = argmax z, e_s = exp(z_s - z_y), rest = sum_{s != y} e_s and p_s = e_s / (1 + rest): U = sum_{s != y} p_s (w_s - w_y)
    is small where the prediction is confident, and so is every term of v. The textbook sum_s p_s |w_s|^2 - |sum_s p_s w_s|^2
    subtracts two large numbers there.
    """
    if z.shape[0] == 0:
        return z.sum(1) + 0 * w.sum()
    w = w - w.detach().mean(0)  # v does not change; a common offset would only cost digits
    y = z.detach().argmax(1, keepdim=True)  # (N, 1)
    top = z.gather(1, y)
    e = torch.exp(z - top).scatter(1, y, 0.0)  # (N, O), zero at y
    rest = (
        e.sum(1, keepdim=True) + (top - top).detach()
    )  # nan where the largest logit is not finite, as softmax is
    p, r = e / (1 + rest), rest / (1 + rest)  # p without its y-th entry; r = 1 - p_y
    wy = w[y.squeeze(1)]  # (N, I)
    u = p @ w - r * wy
    sq = w.square().sum(1)  # (O,)
    return at_least_zero(p @ sq - r.squeeze(1) * sq[y.squeeze(1)] - 2 * (wy * u).sum(1) - u.square().sum(1))


def pairwise(z: Tensor, w: Tensor) -> Tensor:
    """Form (b): v = 1/2 p^T D p with D_st = |w_s - w_t|^2; every term is non-negative, O^2 I + N O^2 operations."""
    w = w - w.detach().mean(0)
    gram = w @ w.T
    sq = gram.diagonal()
    distances = sq[:, None] + sq[None, :] - 2 * gram
    distances = at_least_zero(
        distances.masked_fill(torch.eye(len(w), dtype=torch.bool, device=w.device), 0.0)
    )
    p = torch.softmax(z, 1)
    return 0.5 * ((p @ distances) * p).sum(1)
