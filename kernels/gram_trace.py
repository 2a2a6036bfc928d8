"""Triton kernels of gram_trace's Gram form: products of (Q, Q) pairs of positions are made tile by tile and never stored.

With phi (N, Q, I) and s (N, Q, K, O), N samples and groups, K factors:

    value_k  = sum_{q,q'} <phi_q, phi_q'> (s_qk^T G s_q'k)      pair_trace: both products of a tile, in registers, then their sum
    out_q    = sum_{q'}   <x_q, y_q'> z_q'                      chain: a tile of products times the rows of z, as in attention
                                                                without softmax (Dao et al. 2022, arXiv 2205.14135)
    with E = chain(phi, phi, s):  ds = 2 g E G,  dG = sum g s^T E,  dphi = 2 chain(g s G, s, phi)

Everything is accumulated in float32. Products of two bfloat16 or float16 tensors go to the matrix units as they are: each is
exact in float32. A float32 operand beside one of those is split in two bfloat16 parts, which keep 16 bits, and so is the float16
one, which has 11. Two float32 operands are each split in three, and six of the nine products kept (Henry et al. 2019,
arXiv 1904.06376): the 24 bits of float32, on the matrix units of NVIDIA and AMD alike. tf32 would keep 11 bits, of sums whose
terms have both signs; "ieee" has no matrix unit on NVIDIA, and these tiles then spill registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8

# Triton's interpreter multiplies the bit patterns of bfloat16 (3.9: create_dot takes its uint16 storage for numbers)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def pair_trace_blocks(phi: torch.dtype, left: torch.dtype, right: torch.dtype) -> dict[str, int]:
    """Tile sizes: as large as registers allow on every target of tests/helpers/kernel_builds.py."""
    steps = {torch.float32: 16, torch.float16: 32}
    wide = 64 if left == right else 32
    return {"BLOCK_Q": 64, "BLOCK_I": steps.get(phi, 64), "BLOCK_O": min(steps.get(right, wide), wide)}


def chain_blocks(x: torch.dtype, z: torch.dtype) -> dict[str, int]:
    # with steps of 32, float32 by bfloat16 spills registers on sm_100 (Triton 3.6)
    step = 16 if z == torch.float32 else 64 if x == z else 32 if z == torch.float16 else 16
    return {"BLOCK_Q": 64, "BLOCK_M": step, "BLOCK_N": 64 if z == torch.bfloat16 else 32}


def stages(*tensors: Tensor) -> int:
    """Loads in flight: several where rows are contiguous, so that they can be copied in pieces of 16 bytes."""
    return 3 if all(t.stride(-1) == 1 for t in tensors) else 1


@triton.jit
def _product(a, b, acc):
    """acc + a b of 16-bit operands: on the matrix units, each product exact in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _split(x):
    """x as a bfloat16 and what is left of it."""
    high = x.to(tl.bfloat16)
    return high, x.to(tl.float32) - high.to(tl.float32)


@triton.jit
def _dot(a, b, acc):
    """acc + a b, in float32."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = _product(a, b, acc)
    elif b.dtype == tl.bfloat16:
        a1, rest = _split(a)
        acc = _product(rest.to(tl.bfloat16), b, acc)
        acc = _product(a1, b, acc)
    elif b.dtype == tl.float16:
        a1, rest = _split(a)
        b1, b_rest = _split(b)
        acc = _product(rest.to(tl.bfloat16), b1, acc)
        acc = _product(a1, b_rest.to(tl.bfloat16), acc)
        acc = _product(a1, b1, acc)
    else:
        a1, rest = _split(a)
        a2, rest = _split(rest)
        a3 = rest.to(tl.bfloat16)
        b1, rest = _split(b)
        b2, rest = _split(rest)
        b3 = rest.to(tl.bfloat16)
        acc = _product(a3, b1, acc)  # the small ones first
        acc = _product(a2, b2, acc)
        acc = _product(a1, b3, acc)
        acc = _product(a2, b1, acc)
        acc = _product(a1, b2, acc)
        acc = _product(a1, b1, acc)
    return acc


@triton.jit
def _tile(
    rows_of_x, rows_of_y, x_mask, y_mask, size, x_step, y_step, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr
):
    """<x_q, y_q'> over `size` features, (BLOCK_Q, BLOCK_Q); rows_of_x (BLOCK_Q, 1) and rows_of_y (1, BLOCK_Q) point to rows."""
    acc = tl.zeros((BLOCK_Q, BLOCK_Q), dtype=tl.float32)
    for start in range(0, size, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        x = tl.load(rows_of_x + m[None, :] * x_step, mask=x_mask & (m[None, :] < size), other=0.0)
        y = tl.load(rows_of_y + m[:, None] * y_step, mask=y_mask & (m[:, None] < size), other=0.0)
        acc = _dot(x, y, acc)
    return acc


@triton.jit
def pair_trace_kernel(
    phi,  # (N, Q, I)
    left,  # (N, Q, K, O): s G, float32, or s
    right,  # (N, Q, K, O): s
    out,  # (N, K, pairs of tiles), float32
    positions,
    fan_in,
    factors,
    neurons,
    pairs,
    phi_n,
    phi_q,
    phi_i,
    left_n,
    left_q,
    left_k,
    left_o,
    right_n,
    right_q,
    right_k,
    right_o,
    BLOCK_Q: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program for every sample and pair of tiles (r, c) with c <= r: both factors of the sum are symmetric."""
    n = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    r = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    r -= (r * (r + 1) // 2 > pair).to(tl.int32)  # where the square root was rounded over a whole number
    r += ((r + 1) * (r + 2) // 2 <= pair).to(tl.int32)
    c = pair - r * (r + 1) // 2
    rows = (r * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)[:, None]
    cols = (c * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)[None, :]
    row_mask, col_mask = rows < positions, cols < positions
    phi += n * phi_n
    products = _tile(
        phi + rows * phi_q, phi + cols * phi_q, row_mask, col_mask, fan_in, phi_i, phi_i, BLOCK_Q, BLOCK_I
    )
    weight = tl.where(r == c, 1.0, 2.0)
    left += n * left_n
    right += n * right_n
    for k in range(0, factors):
        other = _tile(
            left + rows * left_q,
            right + cols * right_q,
            row_mask,
            col_mask,
            neurons,
            left_o,
            right_o,
            BLOCK_Q,
            BLOCK_O,
        )
        tl.store(out + ((n * factors + k) * pairs + pair), weight * tl.sum(products * other))
        left += left_k
        right += right_k


@triton.jit
def chain_kernel(
    x,  # (N, Q, M)
    y,  # (N, Q, M)
    z,  # (N, Q, C)
    out,  # (N, Q, C), float32, contiguous
    positions,
    features,
    columns,
    row_tiles,
    column_tiles,
    x_n,
    x_q,
    x_m,
    y_n,
    y_q,
    y_m,
    z_n,
    z_q,
    z_c,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for every sample, tile of positions and tile of columns."""
    pid = tl.program_id(0)
    c0 = (pid % column_tiles) * BLOCK_N
    r0 = (pid // column_tiles % row_tiles) * BLOCK_Q
    n = (pid // column_tiles // row_tiles).to(tl.int64)
    rows = (r0 + tl.arange(0, BLOCK_Q)).to(tl.int64)[:, None]
    cols = (c0 + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    row_mask, col_mask = rows < positions, cols < columns
    x += n * x_n
    y += n * y_n
    z += n * z_n
    acc = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
    for start in range(0, positions, BLOCK_Q):
        others = start + tl.arange(0, BLOCK_Q).to(tl.int64)
        products = _tile(
            x + rows * x_q,
            y + others[None, :] * y_q,
            row_mask,
            others[None, :] < positions,
            features,
            x_m,
            y_m,
            BLOCK_Q,
            BLOCK_M,
        )
        values = tl.load(
            z + others[:, None] * z_q + cols * z_c, mask=(others[:, None] < positions) & col_mask, other=0.0
        )
        acc = _dot(products, values, acc)
    tl.store(out + (n * positions + rows) * columns + cols, acc, mask=row_mask & col_mask)


def pair_trace(phi: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_{q,q'} <phi_q, phi_q'> <left_qk, right_q'k>, both symmetric in q and q': (N, Q, I), (N, Q, K, O) twice -> (N, K)."""
    samples, positions, fan_in = phi.shape
    factors, neurons = left.shape[2:]
    blocks = pair_trace_blocks(phi.dtype, left.dtype, right.dtype)
    tiles = triton.cdiv(positions, blocks["BLOCK_Q"])
    pairs = tiles * (tiles + 1) // 2
    out = torch.empty(samples, factors, pairs, dtype=torch.float32, device=phi.device)
    if out.numel():
        pair_trace_kernel[(samples * pairs,)](
            phi, left, right, out, positions, fan_in, factors, neurons, pairs,
            *phi.stride(), *left.stride(), *right.stride(),
            **blocks, num_warps=WARPS, num_stages=stages(phi, left, right),
        )  # fmt: skip
    return out.sum(2)


def chain(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """sum_{q'} <x_q, y_q'> z_q': x and y (N, Q, M), z (N, Q, C) -> (N, Q, C), float32."""
    samples, positions, features = x.shape
    columns = z.shape[2]
    out = torch.empty(samples, positions, columns, dtype=torch.float32, device=x.device)
    blocks = chain_blocks(x.dtype, z.dtype)
    tiles = (triton.cdiv(positions, blocks["BLOCK_Q"]), triton.cdiv(columns, blocks["BLOCK_N"]))
    if out.numel():
        chain_kernel[(samples * tiles[0] * tiles[1],)](
            x, y, z, out, positions, features, columns, *tiles, *x.stride(), *y.stride(), *z.stride(),
            **blocks, num_warps=WARPS, num_stages=stages(x, y, z),
        )  # fmt: skip
    return out
