"""gram_trace in plain PyTorch: patches unfolded, then Gamma of every sample or the Gram matrix of its patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext._dtypes import without_autocast


def patches(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
) -> Tensor:
    """The patch that each output position sees, (B, g, C, *spatial) -> (B, g, C * kernel volume, Q), zeros outside the input.

    `padding` is what stands before each axis; after it there is as much as the `out` positions need.
    """
    rank = input.dim() - 3
    for axis, (k, s, p, d, n) in enumerate(zip(kernel_size, stride, padding, dilation, out, strict=True), 3):
        extent = d * (k - 1) + 1
        after = (n - 1) * s + extent - input.shape[axis] - p
        if p or after > 0:
            input = F.pad(input, (0, 0) * (input.dim() - 1 - axis) + (p, max(after, 0)))
        # unfold refuses an axis without positions
        windows = input.unsqueeze(-1) if extent == s == 1 else input.unfold(axis, extent, s)
        input = windows.narrow(axis, 0, n)[..., ::d]
    # (B, g, C, *out, *kernel) -> (B, g, C, *kernel, *out)
    moved = input.permute(0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank))
    return moved.flatten(3 + rank).flatten(2, 2 + rank)


def gram_trace(
    input: Tensor,
    factors: Tensor,
    gram: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    form: str,
) -> Tensor:
    """sum_g Tr(Gamma^T G Gamma) of every factor and sample, (K, B); see fam_ext.ops.gram_trace.

    input (B, g, C, *spatial), factors (K, B, g, O, *out), gram (g, O, O) or None for the identity. form="direct" makes
    Gamma = sum_q s_q phi_q^T; every other one the Gram matrix of the patches.
    """
    tensors = [input, factors] if gram is None else [input, factors, gram]
    acc = torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32
    with without_autocast(input):
        phi = patches(
            input.to(acc), kernel_size, stride, padding, dilation, factors.shape[4:]
        )  # (B, g, I, Q)
        s = factors.to(acc).flatten(4)  # (K, B, g, O, Q)
        if form == "direct":
            gamma = s @ phi.transpose(-1, -2)
            return (gamma * (gamma if gram is None else gram.to(acc) @ gamma)).sum((2, 3, 4))
        pairs = phi.transpose(-1, -2) @ phi  # <phi_q, phi_q'>, (B, g, Q, Q)
        return ((s @ pairs) * (s if gram is None else gram.to(acc) @ s)).sum((2, 3, 4))
