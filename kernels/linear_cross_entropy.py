"""Triton row kernels of linear_cross_entropy: what stands between the products of a chunk of rows, which cuBLAS takes.

For logits z (N, V) of a chunk, in the stable form (a) of docs/design.md, "Why not sum p|w|^2 - |sum p w|^2":

    softmax   y = argmax z, rest = sum_{s != y} exp(z_s - z_y);  p~_s = exp(z_s - z_y) / (1 + rest), p~_y = -r,
              r = sum_{s != y} p~_s;  weighted = sum_s p~_s |w_s|^2;
              loss = h (z_y - z_t) + sum_s f_s (z_y - z_s) + c log(1 + rest)
    shift     with U = p~ W:  u = w_y + U,  v = weighted - 2 w_y.U - |U|^2
    gradient  with X = u W^T and g = strength c |phi|^2:  D_s = |w_s|^2 - 2 X_s + |u|^2, D_y = |U|^2;
              dz_s = g p_s (D_s - v) + c p_s - q_s,  and g p~ for dW = dz^T phi + 2 [diag(sum g p~) W - (g p~)^T u], -2 g U at y

Row i has targets q_s = h [s = t] + f omega_s, a hard share h and a soft one f of every class's weight (label smoothing), with the
reduction multiplied in, and c = sum_s q_s. A row with c = 0 is ignored, whatever it holds. One program per row; sums in float32,
block by block of classes, always in the same order. p~_y is stored as 0 until the end, and r is the sum of the p~_s as they are
stored: so v is that of probabilities that sum to one, and cancels no digits, even where p~ is held in bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # classes, or features, of a row that are worked on at once
WARPS = 8


@triton.jit
def softmax_kernel(
    z,  # (N, V)
    target,  # (N)
    hard,  # (N): h
    soft,  # (N): f
    coefficient,  # (N): c
    omega,  # (V): class weights
    squares,  # (V): |w_s|^2
    p,  # (N, V): p~ with 0 at y, may be z itself
    loss,  # (N)
    best,  # (N): y
    rest_share,  # (N): r
    weighted,  # (N)
    classes,
    z_row,
    p_row,
    WEIGHTS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    z += n * z_row
    p += n * p_row
    c = tl.load(coefficient + n)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    if c == 0:
        for start in range(0, classes, BLOCK):
            s = start + columns
            tl.store(p + s, tl.zeros((BLOCK,), p.dtype.element_ty), mask=s < classes)
        tl.store(loss + n, 0.0)
        tl.store(best + n, tl.zeros((), tl.int64))
        tl.store(rest_share + n, 0.0)
        tl.store(weighted + n, 0.0)
        return
    top = tl.full((), float("-inf"), tl.float32)
    y = tl.zeros((), tl.int64)
    for start in range(0, classes, BLOCK):
        s = start + columns
        block = tl.load(z + s, mask=s < classes, other=float("-inf")).to(tl.float32)
        highest, where = tl.max(block, 0, return_indices=True)
        y = tl.where(highest > top, start + where.to(tl.int64), y)
        top = tl.maximum(highest, top)
    t = tl.load(target + n)
    h = tl.load(hard + n)
    f = tl.load(soft + n)
    value = h * (top - tl.load(z + t).to(tl.float32))
    rest = tl.zeros((), tl.float32)
    for start in range(0, classes, BLOCK):
        s = start + columns
        inside = s < classes
        gap = tl.load(z + s, mask=inside, other=float("-inf")).to(tl.float32) - top
        rest += tl.sum(tl.where(inside & (s != y), tl.exp(gap), 0.0))
        if SMOOTHING:
            share = f * tl.load(omega + s, mask=inside, other=0.0) if WEIGHTS else f
            value -= tl.sum(tl.where(inside, share * gap, 0.0))
    total = 1.0 + rest
    # log(1 + rest) with the digits of rest where it is small (Kahan)
    small = total == 1.0
    log_total = tl.where(small, rest, tl.log(total) * (rest / tl.where(small, 1.0, total - 1.0)))
    r = tl.zeros((), tl.float32)
    weights = tl.zeros((), tl.float32)
    for start in range(0, classes, BLOCK):
        s = start + columns
        inside = s < classes
        e = tl.exp(tl.load(z + s, mask=inside, other=float("-inf")).to(tl.float32) - top) / total
        stored = tl.where(inside & (s != y), e, 0.0).to(p.dtype.element_ty)
        r += tl.sum(stored.to(tl.float32))
        weights += tl.sum(stored.to(tl.float32) * tl.load(squares + s, mask=inside, other=0.0))
        tl.store(p + s, stored, mask=inside)
    tl.store(loss + n, value + c * log_total)
    tl.store(best + n, y)
    tl.store(rest_share + n, r)
    tl.store(weighted + n, weights - r * tl.load(squares + y))


@triton.jit
def shift_kernel(
    shift,  # (N, I): U + r w_y; becomes U
    weight,  # (V, I)
    best,  # (N): y
    rest_share,  # (N): r
    weighted,  # (N)
    mean,  # (N, I): u
    trace,  # (N): v
    squared_shift,  # (N): |U|^2
    squared_mean,  # (N): |u|^2
    features,
    shift_row,
    weight_row,
    mean_row,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    shift += n * shift_row
    mean += n * mean_row
    weight += tl.load(best + n) * weight_row
    r = tl.load(rest_share + n)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    along = tl.zeros((), tl.float32)
    of_shift = tl.zeros((), tl.float32)
    of_mean = tl.zeros((), tl.float32)
    for start in range(0, features, BLOCK):
        i = start + columns
        inside = i < features
        w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(shift + i, mask=inside, other=0.0).to(tl.float32) - r * w
        tl.store(shift + i, a.to(shift.dtype.element_ty), mask=inside)
        along += tl.sum(a * w)
        of_shift += tl.sum(a * a)
        of_mean += tl.sum((a + w) * (a + w))
        tl.store(mean + i, (a + w).to(mean.dtype.element_ty), mask=inside)
    tl.store(trace + n, tl.load(weighted + n) - 2.0 * along - of_shift)
    tl.store(squared_shift + n, of_shift)
    tl.store(squared_mean + n, of_mean)


@triton.jit
def gradient_kernel(
    p,  # (N, V): p~ with 0 at y; becomes g p~
    x,  # (N, V): X; becomes dz
    target,
    hard,
    soft,
    coefficient,
    upstream,  # (N): g
    omega,  # (V)
    squares,  # (V)
    best,
    rest_share,
    trace,
    squared_shift,
    squared_mean,
    classes,
    omega_total,  # sum of the class weights, float32
    p_row,
    x_row,
    WEIGHTS: tl.constexpr,
    CURVATURE: tl.constexpr,  # False: dz is that of the loss alone, X is not read
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    p += n * p_row
    x += n * x_row
    t, h, f = tl.load(target + n), tl.load(hard + n), tl.load(soft + n)
    c, g, y, r = tl.load(coefficient + n), tl.load(upstream + n), tl.load(best + n), tl.load(rest_share + n)
    v, of_shift, of_mean = tl.load(trace + n), tl.load(squared_shift + n), tl.load(squared_mean + n)
    omega_y = tl.load(omega + y) if WEIGHTS else 1.0
    # c p_y - q_y: what the other classes are due, less c r
    at_y = f * (omega_total - omega_y) + tl.where(t == y, 0.0, h) - c * r
    if CURVATURE:
        at_y += g * (1.0 - r) * (of_shift - v)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    for start in range(0, classes, BLOCK):
        s = start + columns
        inside = s < classes
        ps = tl.load(p + s, mask=inside, other=0.0).to(tl.float32)
        dz = c * ps - (f * tl.load(omega + s, mask=inside, other=0.0) if WEIGHTS else f)
        dz -= tl.where(s == t, h, 0.0)
        if CURVATURE:
            distance = tl.load(squares + s, mask=inside, other=0.0) + of_mean
            distance -= 2.0 * tl.load(x + s, mask=inside, other=0.0).to(tl.float32)
            dz += g * ps * (distance - v)
        dz = tl.where(s == y, at_y, dz)
        dz = tl.where(c == 0, 0.0, dz)
        tl.store(x + s, dz.to(x.dtype.element_ty), mask=inside)
        pull = g * tl.where(s == y, -r, ps)
        tl.store(p + s, tl.where(c == 0, 0.0, pull).to(p.dtype.element_ty), mask=inside)


def softmax(
    z: Tensor,
    target: Tensor,
    hard: Tensor,
    soft: Tensor,
    coefficient: Tensor,
    class_weight: Tensor | None,
    squares: Tensor,
    out: Tensor,
    smoothing: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p~ with 0 at y into `out`, which may be z; (loss, y, r, weighted) of every row. Rows of z and out are contiguous."""
    rows, classes = z.shape
    loss, rest_share, weighted = (torch.empty(rows, dtype=torch.float32, device=z.device) for _ in range(3))
    best = torch.empty(rows, dtype=torch.int64, device=z.device)
    if rows:
        softmax_kernel[(rows,)](
            z, target, hard, soft, coefficient, squares if class_weight is None else class_weight, squares,
            out, loss, best, rest_share, weighted, classes, z.stride(0), out.stride(0),
            WEIGHTS=class_weight is not None, SMOOTHING=smoothing, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return loss, best, rest_share, weighted


def shift(
    shifts: Tensor, weight: Tensor, best: Tensor, rest_share: Tensor, weighted: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From what softmax stored times W: U in its place and u = w_y + U in `mean`; (v, |U|^2, |u|^2) of every row.

    Rows of shifts, weight and mean are contiguous.
    """
    rows, features = shifts.shape
    found = tuple(torch.empty(rows, dtype=torch.float32, device=shifts.device) for _ in range(3))
    if rows:
        shift_kernel[(rows,)](
            shifts, weight, best, rest_share, weighted, mean, *found, features, shifts.stride(0), weight.stride(0),
            mean.stride(0), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return found


def gradient(
    p: Tensor,
    x: Tensor,
    target: Tensor,
    hard: Tensor,
    soft: Tensor,
    coefficient: Tensor,
    upstream: Tensor,
    class_weight: Tensor | None,
    omega_total: float,
    squares: Tensor,
    best: Tensor,
    rest_share: Tensor,
    row: tuple[Tensor, Tensor, Tensor],
    curvature_grad: bool,
) -> None:
    """dz in place of X, g p~ in place of p~; `row` is what :func:`shift` returned. Rows of p and x are contiguous."""
    rows, classes = p.shape
    if rows:
        gradient_kernel[(rows,)](
            p, x, target, hard, soft, coefficient, upstream, squares if class_weight is None else class_weight,
            squares, best, rest_share, *row, classes, float(omega_total), p.stride(0), x.stride(0),
            WEIGHTS=class_weight is not None, CURVATURE=curvature_grad, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
