"""A label for every row of probabilities, drawn so that all labels' factors of the Hessian have one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fam_ext.ops import backends

_VANISHES = 1e-30  # a sum of weights below which a row has no curvature to speak of
_native: Any = backends.native_function("draw_labels")


def draw(p: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Labels y from q_y ~ p_y |e_y - p|^2 and sqrt(p_y / q_y), both (..., 1), for probabilities p (..., O) without a graph.

    y is the first label at which the sum of these weights exceeds `share` (..., 1) of their total, so shares that are uniform
    on [0, 1) draw from q. A row without curvature has its most likely label and 1; one with NaN has NaN in place of the root.
    """
    if _native is not None and p.device.type == "cpu" and type(p) is Tensor and p.shape[-1]:
        rows = p.reshape(-1, p.shape[-1]).contiguous()
        labels, stretch = _native(rows, share.to(p.dtype).reshape(-1).contiguous())
        return labels.reshape(share.shape), stretch.reshape(share.shape)
    return in_torch(p, share)


def in_torch(p: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    top = p.argmax(-1, keepdim=True)
    others, likely = p.scatter(-1, top, 0.0), p.gather(-1, top)
    rest, squares = others.sum(-1, keepdim=True), others.square().sum(-1, keepdim=True)
    norm = squares + likely * likely
    of_top = rest * rest + squares  # |e_y - p|^2 without the difference 1 - p
    weights = others * (1 + norm - 2 * others)
    until = weights.scatter_(-1, top, likely * of_top).cumsum(-1)
    total = until[..., -1:]
    labels = torch.searchsorted(until, share.to(p.dtype) * total, right=True).clamp_(max=p.shape[-1] - 1)
    distance = torch.where(labels == top, of_top, 1 + norm - 2 * p.gather(-1, labels))
    vanishes = total <= _VANISHES
    return torch.where(vanishes, top, labels), torch.where(vanishes, 1.0, (total / distance).sqrt())
