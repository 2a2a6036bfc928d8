"""Products of gram_trace with results in float32 or float64, on the matrix units where a factor is bfloat16.

A product of two bfloat16 numbers is exact in float32, so such factors go in as they are. A float32 factor beside a bfloat16 one
is split in three bfloat16 parts, which keep all of its 24 bits, and takes three products (Henry et al. 2019, arXiv 1904.06376):
the digits are those of a float32 product. float32 by float32 stays one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_matrix_units(tensor: Tensor) -> bool:
    """Whether products on this tensor's device multiply bfloat16 with float32 results."""
    return tensor.is_cuda and torch.version.hip is None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices or of two batches; one factor may be bfloat16 and the other float32."""
    if a.dtype == b.dtype != torch.bfloat16:
        return a.bmm(b) if a.dim() == 3 else a.mm(b)
    if a.dtype == b.dtype:
        return _exact(a, b)
    result = None
    for part in _split(b if a.dtype == torch.bfloat16 else a):  # the small one first
        share = _exact(a, part) if a.dtype == torch.bfloat16 else _exact(part, b)
        result = share if result is None else result.add_(share)
    assert result is not None
    return result


def _split(x: Tensor) -> list[Tensor]:
    """Three bfloat16 numbers, in ascending order, whose sum x is."""
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return parts[::-1]


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """a b of bfloat16 factors, summed and returned in float32."""
    if not a.is_cuda:  # torch's CPU has no out_dtype
        return a.float() @ b.float()
    multiply = torch.bmm if a.dim() == 3 else torch.mm
    return multiply(a, b, out_dtype=torch.float32)
