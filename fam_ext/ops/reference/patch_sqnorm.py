"""patch_sqnorm in plain PyTorch: squares summed over each group's channels, then window sums axis by axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext._dtypes import without_autocast


def patch_sqnorm(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Squared norm of every patch, (B, C, *spatial) -> (B, groups, *out); see fam_ext.ops.patch_sqnorm.

    One integer per spatial axis in each argument; zeros are padded on both sides. Window sums over views, not
    a convolution with ones, which may use reduced-precision products (TF32) or subtract (Winograd).
    """
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    batch, channels, *spatial = input.shape
    with without_autocast(input):
        out = input.to(acc).square().reshape(batch, groups, channels // groups, *spatial).sum(2)
        axes = zip(kernel_size, stride, padding, dilation, strict=True)
        for axis, (k, s, p, d) in enumerate(axes, start=2):
            if p:
                out = F.pad(out, (0, 0) * (out.dim() - 1 - axis) + (p, p))
            if (k, s) != (1, 1):
                windows = out.unfold(axis, d * (k - 1) + 1, s)  # (B, groups, ..., out, ..., window)
                out = windows[..., ::d].sum(-1)
    return out
