"""Triton row kernels of linear_cross_entropy, between products by the vendor's library (ops/_linear_cross_entropy_chunks.py).

For a chunk of rows, with y the most likely class, e_s = exp(z_s - z_y) for s != y and e_y = 0, Z = 1 + sum e, r = 1 - 1 / Z, m
the mean of the rows w_s, and p~ = e / Z but for p~_y = -r (the shifted form of csrc/cpu/trace_shifted.h; 1 / Z is left to the
factors of rows, which saves a pass over the classes). csrc/cpu/linear_cross_entropy.cpp has the same four steps for the CPU:

    softmax_rows   z -> e, and what the loss needs
    mean_rows      e W -> U = sum_s p~_s w_s and u - m = w_y - m + U, v, and the rows that the weight's gradient is made of
    grad_logits    <w_s, u - m> -> dz, and sums over rows: g p~ and dz
    add_rows       -2 g_n (U_n - r_n (u_n - m)) to the weight's gradient at y_n

No atomics: every number is the sum of the same terms in the same order. Offsets have 64 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_BLOCK, MEAN_BLOCK = 2048, 1024  # numbers of a row at a time
CLASS_BLOCK, CHUNK_BLOCK = 128, 8  # classes and rows of a tile of grad_logits
COLUMN_BLOCK = 1024  # columns of one program of add_rows
ROW_WARPS, TILE_WARPS = 8, 4
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def block_of(size: int, most: int) -> int:
    return int(min(most, triton.next_power_of_2(max(size, 1))))


@triton.jit
def _exp(d, error):
    """exp(d + error) for d <= 0, |error| tiny. Without the range reduction, exp2(d log2(e)) would be off by d's rounding: at
    d = -20, where max p = 1 - 1e-8, by 1e-6. 355/512 has 9 bits, so that n times it is exact."""
    n = tl.floor(d * 1.4426950408889634 + 0.5)
    n = tl.where(n < -126.0, -126.0, n)
    rest = (d - n * 0.693359375) + n * 2.12194440e-4 + error
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(d < -87.0, 0.0, tl.exp(rest) * power)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """x in another dtype, to nearest: Triton's interpreter (3.9) cuts bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def softmax_rows_kernel(
    z,  # (rows, V): logits without bias; becomes e where PARTS is 0
    high,  # (rows, V): e as PARTS bfloat16 numbers, 1 or 2, where they are not 0
    low,
    bias,  # (V,)
    squares,  # (V,): |w_s - m|^2
    omega,  # (V,): class weights
    target,  # (rows,)
    best,  # (rows,): y
    stats,  # (4 or 5, rows): sum e, sum e |w_s - m|^2, z_y - z_t, sum omega_s (z_y - z_s); PARTS 1: sum e before its rounding
    classes,
    rows,
    z_row,
    e_row,
    HAS_BIAS: tl.constexpr,
    HAS_OMEGA: tl.constexpr,
    SMOOTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row, which is read twice. One part: everything but the loss belongs to the probabilities of the rounded e."""
    row = tl.program_id(0).to(tl.int64)
    z += row * z_row
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = lanes
    for start in range(0, classes, BLOCK):
        s = start + lanes
        mask = s < classes
        x = tl.load(z + s, mask=mask, other=float("-inf"))
        if HAS_BIAS:
            x += tl.load(bias + s, mask=mask, other=0.0)
        better = x > largest
        largest = tl.where(better, x, largest)
        where = tl.where(better, s, where)
    top = tl.max(largest, axis=0)
    y = tl.min(tl.where(largest == top, where, classes), axis=0)

    t = tl.load(target + row)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    exact = tl.zeros((BLOCK,), tl.float32)
    to_target = tl.zeros((BLOCK,), tl.float32)
    to_all = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        s = start + lanes
        mask = s < classes
        x = tl.load(z + s, mask=mask, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias + s, mask=mask, other=0.0)
        d = x - top
        back = x - d
        error = (x - (d + back)) - (
            top - back
        )  # of d, by TwoSum: half a unit in the last place of 20 is 1e-6
        e = tl.where((s == y) | (s >= classes), 0.0, _exp(d, tl.where(d > -88.0, error, 0.0)))
        if PARTS == 1:
            exact += e
            e = _round(e, tl.bfloat16).to(tl.float32)
        total += e
        weighted += e * tl.load(squares + s, mask=mask, other=0.0)
        gap = tl.where(mask, top - x, 0.0)
        to_target += tl.where(s == t, gap, 0.0)
        if SMOOTH:
            share = tl.where(mask, 1.0, 0.0)
            if HAS_OMEGA:
                share = tl.load(omega + s, mask=mask, other=0.0)
            to_all += share * gap
        if PARTS > 0:
            first = _round(e, tl.bfloat16)
            tl.store(high + row * e_row + s, first, mask=mask)
            if PARTS == 2:
                tl.store(low + row * e_row + s, _round(e - first.to(tl.float32), tl.bfloat16), mask=mask)
        else:
            tl.store(z + s, e, mask=mask)
    size = tl.zeros((), tl.int64) + rows
    tl.store(best + row, tl.minimum(y, classes - 1))
    # nan where the largest logit is not finite, as softmax is
    tl.store(stats + row, tl.sum(total, axis=0) + (top - top))
    tl.store(stats + (size + row), tl.sum(weighted, axis=0))
    tl.store(stats + (2 * size + row), tl.sum(to_target, axis=0))
    if SMOOTH:
        tl.store(stats + (3 * size + row), tl.sum(to_all, axis=0))
    if PARTS == 1:
        tl.store(stats + (4 * size + row), tl.sum(exact, axis=0) + (top - top))


@triton.jit
def mean_rows_kernel(
    shift,  # (1 or 2 rows, I): e W, in two parts where SPLIT; its first rows become what add_rows adds
    weight,  # (V, I)
    offset,  # (I,): m
    features,  # (rows, I)
    squares,  # (V,)
    best,  # (rows,)
    stats,  # of softmax_rows
    curvature_factor,  # (rows,): strength c
    means,  # (1 or 2 rows, I): u - m, in two parts where SPLIT
    scaled,  # (rows, I): -2 g / Z (u - m)
    row_sums,  # (4, rows): v, |U|^2, |u - m|^2 + 2 <m, u - m>, |phi|^2
    rows,
    fan_in,
    weight_row,
    weight_column,
    SPLIT: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    size = tl.zeros((), tl.int64) + rows
    y = tl.load(best + row)
    rest = tl.load(stats + row)
    inverse = 1.0 / (1.0 + rest)
    r = rest * inverse
    weight += y * weight_row
    begin, second = row * fan_in, (size + row) * fan_in
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    dot = tl.zeros((BLOCK,), tl.float32)
    squared = tl.zeros((BLOCK,), tl.float32)
    squared_mean = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, fan_in, BLOCK):
        i = start + lanes
        mask = i < fan_in
        raw = tl.load(shift + (begin + i), mask=mask, other=0.0)
        if SPLIT:
            raw += tl.load(shift + (second + i), mask=mask, other=0.0)
        m = tl.load(offset + i, mask=mask, other=0.0)
        wy = tl.load(weight + i * weight_column, mask=mask, other=0.0).to(tl.float32)
        u = raw * inverse - r * wy
        wy -= m
        mean = wy + u
        if GRADS and not SPLIT:
            mean = _round(mean, means.dtype.element_ty).to(
                tl.float32
            )  # distances to what the products take, or they cancel
        phi = tl.load(features + (begin + i), mask=mask, other=0.0).to(tl.float32)
        dot += wy * u
        squared += u * u
        squared_mean += mean * mean
        along += m * mean
        norm += phi * phi
        if GRADS:
            if SPLIT:
                first = _round(mean, tl.bfloat16)
                tl.store(means + (begin + i), first, mask=mask)
                rest_of = _round(mean - first.to(tl.float32), tl.bfloat16)
                tl.store(means + (second + i), rest_of, mask=mask)
            else:
                tl.store(means + (begin + i), mean.to(means.dtype.element_ty), mask=mask)
    shift_square = tl.sum(squared, axis=0)
    v = tl.load(stats + (size + row)) * inverse - r * tl.load(squares + y)
    v -= 2.0 * tl.sum(dot, axis=0) + shift_square
    v = tl.where(v < 0.0, 0.0, v)  # rounding, where all likely rows nearly agree; nan stays
    length = tl.sum(norm, axis=0)
    tl.store(row_sums + row, v)
    tl.store(row_sums + (size + row), shift_square)
    tl.store(row_sums + (2 * size + row), tl.sum(squared_mean, axis=0) + 2.0 * tl.sum(along, axis=0))
    tl.store(row_sums + (3 * size + row), length)
    if GRADS:
        factor = -2.0 * length * tl.load(curvature_factor + row)
        for start in range(0, fan_in, BLOCK):
            i = start + lanes
            mask = i < fan_in
            raw = tl.load(shift + (begin + i), mask=mask, other=0.0)
            if SPLIT:
                raw += tl.load(shift + (second + i), mask=mask, other=0.0)
            wy = tl.load(weight + i * weight_column, mask=mask, other=0.0).to(tl.float32)
            u = raw * inverse - r * wy
            mean = (wy - tl.load(offset + i, mask=mask, other=0.0)) + u
            tl.store(
                scaled + (begin + i), _round(factor * inverse * mean, scaled.dtype.element_ty), mask=mask
            )
            tl.store(shift + (begin + i), factor * (u - r * mean), mask=mask)


@triton.jit
def grad_logits_kernel(
    high,  # (rows, V): e, its first part where SPLIT
    low,  # (rows, V): its second part where SPLIT
    dots,  # (1 or 2 rows, classes of this call): <w_s, u - m>, in two parts where SPLIT
    dz,  # (rows, V): float32, where `dots` may lie, or bfloat16, where `low` may lie
    squares,  # (V,)
    omega,  # (V,)
    target,  # (rows,)
    best,  # (rows,)
    factors,  # (9, rows): rest, v, |U|^2, |u|^2 of D, g, c, hard share, soft share, targets of all classes but y
    class_sums,  # (V,), += sum_n g_n p~_n
    bias_sums,  # (V,), += sum_n dz_n
    rows,
    first,
    count,
    e_row,
    dot_row,
    dz_row,
    PRODUCTS: tl.constexpr,
    HAS_OMEGA: tl.constexpr,
    SMOOTH: tl.constexpr,
    SPLIT: tl.constexpr,
    CLASS_SUMS: tl.constexpr,
    BIAS_SUMS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for BLOCK_S classes and all rows."""
    size = tl.zeros((), tl.int64) + rows
    column = (tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    s = column + first
    inside = column < count
    q = tl.load(squares + s, mask=inside, other=0.0)
    share = tl.full((1, BLOCK_S), 1.0, tl.float32)
    if HAS_OMEGA:
        share = tl.load(omega + s, mask=inside, other=0.0)
    weighted_sum = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    summed = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N).to(tl.int64))[:, None]
        valid = n < rows
        mask = valid & inside
        rest = tl.load(factors + n, mask=valid, other=0.0)
        g = tl.load(factors + (4 * size + n), mask=valid, other=0.0)
        c = tl.load(factors + (5 * size + n), mask=valid, other=0.0)
        is_y = s == tl.load(best + n, mask=valid, other=-1)
        inverse = 1.0 / (1.0 + rest)
        e = tl.load(high + (n * e_row + s), mask=mask, other=0.0).to(tl.float32)
        if SPLIT:
            e += tl.load(low + (n * e_row + s), mask=mask, other=0.0).to(tl.float32)
        p = tl.where(is_y, -rest * inverse, e * inverse)
        out = c * p
        hard = tl.load(factors + (6 * size + n), mask=valid, other=0.0)
        out -= tl.where(s == tl.load(target + n, mask=valid, other=-1), hard, 0.0)
        if SMOOTH:
            out -= tl.load(factors + (7 * size + n), mask=valid, other=0.0) * share
        # at y the targets come in as c - q_y = those of all the others: p_y may be 1 to the last digit
        others = tl.load(factors + (8 * size + n), mask=valid, other=0.0)
        out = tl.where(is_y, c * p + others, out)
        if PRODUCTS:
            dot = tl.load(dots + (n * dot_row + column), mask=mask, other=0.0)
            if SPLIT:
                dot += tl.load(dots + ((size + n) * dot_row + column), mask=mask, other=0.0)
            v = tl.load(factors + (size + n), mask=valid, other=0.0)
            at_y = tl.load(factors + (2 * size + n), mask=valid, other=0.0)
            distance = q - 2.0 * dot + tl.load(factors + (3 * size + n), mask=valid, other=0.0)
            distance = tl.where(is_y, at_y, tl.where(distance < 0.0, 0.0, distance))
            out += g * tl.where(is_y, inverse, p) * (distance - v)
        if CLASS_SUMS:
            weighted_sum += tl.where(mask, g * p, 0.0)
        if BIAS_SUMS:
            summed += tl.where(mask, out, 0.0)
        tl.store(dz + (n * dz_row + s), _round(out, dz.dtype.element_ty), mask=mask)
    if CLASS_SUMS:
        place = class_sums + s
        tl.store(place, tl.load(place, mask=inside) + tl.sum(weighted_sum, axis=0)[None, :], mask=inside)
    if BIAS_SUMS:
        place = bias_sums + s
        tl.store(place, tl.load(place, mask=inside) + tl.sum(summed, axis=0)[None, :], mask=inside)


@triton.jit
def add_rows_kernel(
    source,  # (rows, I), float32
    classes,  # (rows,), ascending
    order,  # (rows,): where each of them stands in `source`
    out,  # (count, I): classes from `first` on
    rows,
    fan_in,
    out_row,
    first,
    count,
    BLOCK: tl.constexpr,
):
    """out[classes[k] - first] += source[order[k]]: the first row of a class adds up all of them, in order; others do nothing."""
    k = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < fan_in
    y = tl.load(classes + k)
    leads = (tl.load(classes + (k - 1), mask=k > 0, other=-1) != y) & (y >= first) & (y < first + count)
    total = tl.zeros((BLOCK,), tl.float32)
    more = leads
    while more:
        total += tl.load(source + (tl.load(order + k) * fan_in + i), mask=mask, other=0.0)
        k += 1
        more = tl.load(classes + k, mask=k < rows, other=-1) == y
    place = out + ((y - first) * out_row + i)
    mask = i < tl.where(leads, fan_in, 0)
    total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, _round(total, out.dtype.element_ty), mask=mask)


def softmax_rows(
    z: Tensor, bias: Tensor | None, squares: Tensor, omega: Tensor | None, target: Tensor, smooth: bool, best: Tensor,
    stats: Tensor, parts: tuple[Tensor, ...] = (),
) -> None:  # fmt: skip
    """z (rows, V) becomes e, or `parts` do, its 1 or 2 bfloat16 parts; `best` (rows,) and `stats` (4 or 5, rows) are written."""
    rows, classes = z.shape
    high, low = (parts[0], parts[-1]) if parts else (z, z)
    softmax_rows_kernel[(rows,)](
        z, high, low, squares if bias is None else bias, squares, squares if omega is None else omega, target, best,
        stats, classes, rows, z.stride(0), high.stride(0),
        HAS_BIAS=bias is not None, HAS_OMEGA=omega is not None, SMOOTH=smooth, PARTS=len(parts),
        BLOCK=block_of(classes, ROW_BLOCK), num_warps=ROW_WARPS,
    )  # fmt: skip


def mean_rows(
    shift: Tensor, weight: Tensor, offset: Tensor, features: Tensor, squares: Tensor, best: Tensor, stats: Tensor,
    curvature_factor: Tensor, means: Tensor | None, scaled: Tensor | None, row_sums: Tensor,
) -> None:  # fmt: skip
    """`row_sums` (4, rows) and, unless None, `means` and `scaled` are written, and `shift` becomes what add_rows adds."""
    rows, fan_in = features.shape
    mean_rows_kernel[(rows,)](
        shift, weight, offset, features, squares, best, stats, curvature_factor, shift if means is None else means,
        shift if scaled is None else scaled, row_sums, rows, fan_in, *weight.stride(),
        SPLIT=shift.shape[0] != rows, GRADS=means is not None, BLOCK=block_of(fan_in, MEAN_BLOCK), num_warps=ROW_WARPS,
    )  # fmt: skip


def grad_logits(
    e: Tensor, dots: Tensor | None, dz: Tensor, first: int, count: int, squares: Tensor, omega: Tensor | None,
    smooth: bool, target: Tensor, best: Tensor, factors: Tensor, class_sums: Tensor | None, bias_sums: Tensor | None,
    low: Tensor | None = None,
) -> None:  # fmt: skip
    """dz (rows, V) of `count` classes from `first` on; `dots` holds these alone. `low`: e is the first of two parts."""
    grad_logits_kernel[(triton.cdiv(count, CLASS_BLOCK),)](
        e, e if low is None else low, dz if dots is None else dots, dz, squares,
        squares if omega is None else omega, target, best, factors, squares if class_sums is None else class_sums,
        squares if bias_sums is None else bias_sums, e.shape[0], first, count, e.stride(0),
        0 if dots is None else dots.stride(0), dz.stride(0),
        PRODUCTS=dots is not None, HAS_OMEGA=omega is not None, SMOOTH=smooth, SPLIT=low is not None,
        CLASS_SUMS=class_sums is not None, BIAS_SUMS=bias_sums is not None, BLOCK_S=CLASS_BLOCK, BLOCK_N=CHUNK_BLOCK,
        num_warps=TILE_WARPS,
    )  # fmt: skip


def add_rows(source: Tensor, classes: Tensor, out: Tensor, first: int) -> None:
    """out[classes[n] - first] += source[n] for every row n whose class is one of out's, with rows of `out` contiguous."""
    rows, fan_in = source.shape
    ascending, order = torch.sort(classes, stable=True)
    block = block_of(fan_in, COLUMN_BLOCK)
    if fan_in:
        add_rows_kernel[(rows, triton.cdiv(fan_in, block))](
            source, ascending, order, out, rows, fan_in, out.stride(0), first, out.shape[0], BLOCK=block,
            num_warps=TILE_WARPS,
        )  # fmt: skip
