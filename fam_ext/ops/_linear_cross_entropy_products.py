"""linear_cross_entropy's matrix products: of one dtype, of bfloat16 factors with float32 sums, and narrow ones on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGN = 16  # rows of buffers begin at multiples of so many numbers: the matrix units want 16 bytes
# tiles of a product on a GPU have so many rows: what is left over is a tile that is mostly empty
_TILE_ROWS = 256
_MOST_ROWS = 8192  # rounding errors grow with the length of a chunk's sums


def rows_per_chunk(count: int, most: int) -> int:
    """Of `count` rows, for chunks of alike sizes that are not larger than `most`; multiples of 256 where there are so many.

    >>> rows_per_chunk(8192, 1900), rows_per_chunk(8192, 100), rows_per_chunk(40, 1900)
    (1792, 96, 40)
    """
    step = _TILE_ROWS if most >= _TILE_ROWS else ALIGN
    most = min(max(step, most // step * step), _MOST_ROWS)
    if count <= most:
        return max(1, count)
    alike = -(-count // -(-count // most))
    return -(-alike // step) * step


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b, float32 from float32 or bfloat16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)  # torch's CPU has no out_dtype


# before 2.10 torch.addmm's out_dtype asked for a summand of the factors' dtype
_ADDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def add_product(a: Tensor, b: Tensor, out: Tensor, start: bool) -> None:
    """out += a b, or out = a b at the start."""
    if start:
        multiply(a, b, out)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and _ADDS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU with instructions for products of bfloat16 numbers, AVX512-BF16 or AMX: several times as fast as
    float32's there, and slow elsewhere.
    """
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def narrow_weight(weight: Tensor, acc: torch.dtype) -> Tensor | None:
    """W in bfloat16 for narrow products; None where they do not pay, or all is float64."""
    if acc != torch.float32 or not multiplies_bfloat16(weight.device):
        return None
    return weight.to(torch.bfloat16)


def multiply_narrow(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, from factors and to a product of 8 bits."""
    out.copy_(a.to(b.dtype) @ b)


def add_narrow(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b, likewise."""
    out.add_(a.to(b.dtype) @ b)
