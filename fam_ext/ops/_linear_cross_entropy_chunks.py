"""linear_cross_entropy on a GPU: chunks of rows, products by the vendor's library, Triton row kernels in between.

The algorithm of csrc/cpu/linear_cross_entropy.cpp, rows first: z = phi W^T; U = p~ W; <w_s, u - m> = (u - m) W^T; dphi = dz W;
dW += [-2 g p~ | dz]^T [u - m; phi]. torch.mm forms the products, in whatever precision torch.backends.cuda.matmul allows float32.

A bfloat16 head, both tensors of it, is multiplied on the matrix units, with float32 sums and results (torch.mm's out_dtype).
z is exact but for its sum. What becomes kappa, and the distances in its gradient, keeps 16 bits: e and u - m are split in two
bfloat16 parts, two products each, where one part would keep 8. dz and the factors of dW are rounded to bfloat16 once, as in
torch's own backward of a bfloat16 layer. Every other head of less than float32 is converted a block of classes at a time: in
float16 dz, made before any loss scaling, would underflow.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fam_ext.ops._registration import triton_launches

NONE, MEAN, SUM = range(3)
_ALIGN = 16  # rows of buffers begin at multiples of so many numbers: the matrix units want 16 bytes
_MOST_ROWS = 8192  # rounding errors grow with the length of a chunk's sums


@dataclass(frozen=True)
class Options:
    ignore_index: int
    label_smoothing: float
    reduction: int
    strength: float
    curvature_grad: bool
    max_bytes: int
    narrow: bool  # the gradient of the weight is summed in the weight's dtype
    grad_input: bool
    grad_weight: bool
    grad_bias: bool


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, flatness and the gradients of input, weight and bias, empty where not wanted."""
    with triton_launches(input), torch.no_grad():
        rows = _Rows(target.reshape(-1), weight.shape[0], class_weight, row_scale, options)
        x = input.reshape(target.numel(), weight.shape[1])
        chunks = _Chunks(x, weight, None if bias is None else bias.float().contiguous(), rows, options)
        loss, flatness = chunks.run()
        if options.reduction == NONE:
            values = [t.reshape(target.shape) for t in (rows.scatter(loss), rows.scatter(flatness))]
        else:
            kappa = flatness.sum(dtype=torch.float64)
            total = loss.sum(dtype=torch.float64) + rows.empty_mean + options.strength * kappa
            values = [total.float(), kappa.float()]
        if options.reduction == NONE:
            values[0] = values[0] + options.strength * values[1]
        dphi = chunks.grad_input.reshape(input.shape) if options.grad_input else input.new_empty(0)
        dw = chunks.finish_weight() if options.grad_weight else weight.new_empty(0)
        dtype = torch.float32 if bias is None else bias.dtype
        db = chunks.bias_sums.to(dtype) if options.grad_bias else weight.new_empty(0, dtype=dtype)
    return values[0], values[1], dphi, dw, db


class _Rows:
    """The rows that are not ignored: where they stand, their targets h [s = t] + f omega_s and coefficients c."""

    def __init__(
        self, labels: Tensor, classes: int, omega: Tensor | None, scale: Tensor | None, options: Options
    ) -> None:
        valid = labels != options.ignore_index
        wrong = valid & ((labels < 0) | (labels >= classes))
        # the only wait for the device: how many rows there are decides what is launched
        bad = torch.where(wrong, labels, 0)
        extreme = torch.where(bad.amin() < 0, bad.amin(), bad.amax()) if bad.numel() else labels.sum()
        count, any_wrong, example = torch.stack([valid.sum(), wrong.sum(), extreme]).tolist()
        if any_wrong:
            raise IndexError(
                f"linear_cross_entropy: target must be a class index from 0 to {classes - 1} or ignore_index "
                f"({options.ignore_index}), got {example}"
            )
        self.total, self.count = labels.numel(), int(count)
        self.kept = (
            None if self.count == self.total else torch.argsort((~valid).byte(), stable=True)[: self.count]
        )
        self.target = labels.contiguous() if self.kept is None else labels[self.kept]
        self.omega = None if omega is None else omega.float().contiguous()
        self.may_be_zero = omega is not None or scale is not None
        eps = options.label_smoothing
        of_target = torch.ones(self.count, dtype=torch.float64, device=labels.device)
        omega_sum: Tensor | float = float(classes)
        if self.omega is not None:
            of_target, omega_sum = self.omega.double()[self.target], self.omega.sum(dtype=torch.float64)
        factor = torch.ones_like(of_target)
        self.empty_mean: Tensor | float = 0.0  # torch's mean over no valid row is nan
        if options.reduction == MEAN:
            weights = of_target.sum()
            factor /= torch.where(weights == 0, 1.0, weights)
            self.empty_mean = torch.where(weights == 0, torch.nan, 0.0)
        if scale is not None:
            each = scale.reshape(-1).double()
            factor *= each if self.kept is None else each[self.kept]
        self.hard = ((1 - eps) * of_target * factor).float()
        self.coefficient = (((1 - eps) * of_target + eps / classes * omega_sum) * factor).float()
        self.soft = torch.where(self.coefficient == 0, 0.0, eps / classes * factor).float()
        self.smooth = eps != 0

    def scatter(self, values: Tensor) -> Tensor:
        if self.kept is None:
            return values
        return values.new_zeros(self.total).index_copy_(0, self.kept, values)

    def gather(self, source: Tensor, first: int, count: int) -> Tensor:
        rows = slice(first, first + count)
        return source[rows] if self.kept is None else source[self.kept[rows]]


class _Chunks:
    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, options: Options) -> None:
        self.kernels: Any = importlib.import_module("fam_ext.kernels.linear_cross_entropy")
        self.x, self.weight, self.bias, self.rows, self.options = x, weight, bias, rows, options
        self.classes, self.fan_in = weight.shape
        self.split = x.dtype == weight.dtype == torch.bfloat16 and torch.version.hip is None
        self.direct = self.split or weight.dtype == torch.float32  # W takes part in products as it is
        self.grads = options.grad_input or options.grad_weight or options.grad_bias
        self.pull = options.strength != 0  # gradients through the curvature at all, and through its Hessian
        self.products = self.grads and self.pull and options.curvature_grad
        work = torch.bfloat16 if self.split else torch.float32
        ld = -(-self.classes // _ALIGN) * _ALIGN
        parts = 2 if self.grads or self.split else 1
        self.step = self._rows_per_chunk(4 * ld * parts + 20 * self.fan_in)
        self.block = self._class_block()
        self.scratch = self._empty(0 if self.direct else self.block, self.fan_in)
        self.logits = self._empty(self.step if self.split else parts * self.step, ld)  # z, e; split: z, dots
        # [e; dz], with a split e first the two parts of it
        self.pairs = self._empty(2 * self.step, ld, dtype=work) if self.split else self.logits
        self.shift = self._empty((2 if self.split else 1) * self.step, self.fan_in)
        self.right = self._empty(2 * self.step, self.fan_in, dtype=work)  # [-2 g (u - m); phi]
        self.means = self._empty((2 if self.split else 1) * self.step, self.fan_in, dtype=work)
        zeros = torch.zeros(self.classes, device=x.device)
        self.class_sums = zeros if options.grad_weight and self.pull else None
        self.bias_sums = torch.zeros_like(zeros) if options.grad_bias else zeros
        self.grad_input = x.new_zeros(x.shape) if options.grad_input else x.new_empty(0)
        self.narrow = options.narrow and weight.dtype != torch.float32
        dtype = weight.dtype if self.narrow else torch.float32
        shape = weight.shape if options.grad_weight else (0,)
        self.grad_weight = torch.zeros(shape, dtype=dtype, device=x.device)
        self._find_offset()

    def _empty(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty((rows, columns), dtype=dtype)

    def _rows_per_chunk(self, row_bytes: int) -> int:
        most = min(max(_ALIGN, self.options.max_bytes // row_bytes // _ALIGN * _ALIGN), _MOST_ROWS)
        chunks = max(1, -(-self.rows.count // most))
        return max(1, -(-self.rows.count // chunks))

    def _class_block(self) -> int:
        return min(self.classes, max(1, self.options.max_bytes // 8 // (4 * max(self.fan_in, 1))))

    def _blocks(self, step: int) -> Iterator[tuple[int, int]]:
        for first in range(0, self.classes, step):
            yield first, min(step, self.classes - first)

    def _weights(self, most: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(first class, number, their rows of W as products take them), at most `most` at a time."""
        step = min(most or self.classes, self.classes if self.direct else self.block)
        for first, count in self._blocks(step):
            rows = self.weight[first : first + count]
            yield first, count, rows if self.direct else self.scratch[:count].copy_(rows)

    def _find_offset(self) -> None:
        """m and |w_s - m|^2"""
        self.offset = self.weight.mean(0, dtype=torch.float32)
        self.squares = torch.empty(self.classes, device=self.x.device)
        for first, count in self._blocks(self.block):
            rows = self.weight[first : first + count] - self.offset
            self.squares[first : first + count] = rows.square_().sum(1)

    def run(self) -> tuple[Tensor, Tensor]:
        """Loss and curvature of every kept row."""
        loss, flatness = (torch.zeros(self.rows.count, device=self.x.device) for _ in range(2))
        for first in range(0, self.rows.count, self.step):
            part = slice(first, min(first + self.step, self.rows.count))
            loss[part], flatness[part] = self._chunk(part.start, part.stop - part.start)
        return loss, flatness

    def _chunk(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        part = slice(first, first + rows)
        c, target = self.rows.coefficient[part], self.rows.target[part]
        phi = self.right[rows : 2 * rows].copy_(self.rows.gather(self.x, first, rows))
        if self.rows.may_be_zero:  # rows without a share in the loss may hold anything
            phi.masked_fill_((c == 0).unsqueeze(1), 0.0)
        z = self.logits[:rows, : self.classes]
        for k, count, w in self._weights():
            multiply(phi, w.T, z[:, k : k + count])
        high = self.pairs[:rows, : self.classes]
        low = self.pairs[rows : 2 * rows, : self.classes]  # empty where nobody needs it
        best = torch.empty(rows, dtype=torch.int64, device=z.device)
        stats = torch.empty(5, rows, device=z.device)
        self.kernels.softmax_rows(
            z, (high, low) if self.split else None, self.bias, self.squares, self.rows.omega, self.rows.smooth,
            target, best, stats,
        )  # fmt: skip
        shift = self.shift[: 2 * rows if self.split else rows]
        e = self.pairs[: shift.shape[0], : self.classes]
        for k, count, w in self._weights():
            add_product(e[:, k : k + count], w, shift, k == 0)
        grads = self.grads and self.pull
        found = torch.empty(4, rows, device=z.device)
        means, scaled = self.means[: shift.shape[0]], self.right[:rows]
        pull = self.options.strength * c
        self.kernels.mean_rows(
            shift, self.weight, self.offset, phi, self.squares, best, stats, pull, means if grads else None,
            scaled if grads else None, found,
        )  # fmt: skip
        rest, v, norm = stats[0], found[0], found[3]
        hard, soft = self.rows.hard[part], self.rows.soft[part]
        loss = torch.where(hard == 0, 0.0, hard * stats[2]) + c * rest.log1p()
        others = torch.where(target == best, 0.0, hard)
        if self.rows.smooth:
            loss += torch.where(soft == 0, 0.0, soft * stats[3])
            others += soft * stats[4]
        curvature = torch.where(c == 0, 0.0, c * norm * v)
        if self.grads:
            factors = torch.stack([rest, v, found[1], found[2], pull * norm, c, hard, soft, others])
            self._grad_logits(high, low, means, factors, target, best)
            if self.options.grad_input:
                self._grad_input(part, phi, low, 2 * pull * v if self.products else torch.zeros_like(v))
            if self.options.grad_weight:
                self._grad_weight(rows, best, first == 0)
        return torch.where(c == 0, 0.0, loss), curvature

    def _grad_logits(
        self, high: Tensor, low: Tensor, means: Tensor, factors: Tensor, target: Tensor, best: Tensor
    ) -> None:
        """dz in the place of the second part of e, or below e."""
        # z is not needed any more: with a split mean, its place holds two parts of the dots of half the classes
        step, space = (self.logits.shape[1] // 2 if self.split else None), self.logits.view(-1)
        for k, count, w in self._weights(step) if self.products else [(0, self.classes, self.weight)]:
            dots = None
            if self.products:
                dots = (
                    space[: means.shape[0] * count].view(-1, count) if self.split else low[:, k : k + count]
                )
                multiply(means, w.T, dots)
            self.kernels.grad_logits(
                high, low if self.split else None, dots, low, k, count, self.squares, self.rows.omega, self.rows.smooth,
                target, best, factors, self.class_sums, self.bias_sums if self.options.grad_bias else None,
            )  # fmt: skip

    def _grad_input(self, part: slice, phi: Tensor, dz: Tensor, factor: Tensor) -> None:
        """dphi = dz W + 2 strength c v phi"""
        out = torch.where((self.rows.coefficient[part] == 0).unsqueeze(1), 0.0, factor.unsqueeze(1) * phi)
        for k, count, w in self._weights():
            add_product(dz[:, k : k + count], w, out, False)
        if self.rows.kept is None:
            self.grad_input[part] = out
        else:
            self.grad_input[self.rows.kept[part]] = out.to(self.grad_input.dtype)

    def _grad_weight(self, rows: int, best: Tensor, start: bool) -> None:
        """dW += dz^T phi - 2 (g p~)^T (u - m), but for what p~_y brings: -2 g (U - r (u - m)) at y"""
        begin = 0 if self.pull else rows
        left = self.pairs[begin : 2 * rows, : self.classes].T
        right = self.right[begin : 2 * rows]
        if not self.narrow or self.split:
            add_product(left, right, self.grad_weight, start)
        else:
            for k, count in self._blocks(self.block):
                share = multiply(left[k : k + count], right, self.scratch[:count])
                self.grad_weight[k : k + count] += share
        if self.pull:
            self.kernels.add_rows(self.shift[:rows], best, self.grad_weight)

    def finish_weight(self) -> Tensor:
        """... + 2 diag(sum_n g_n p~_n) (W - m)"""
        if self.class_sums is not None:
            for k, count in self._blocks(self.block):
                rows = self.weight[k : k + count] - self.offset
                self.grad_weight[k : k + count] += rows.mul_(2 * self.class_sums[k : k + count].unsqueeze(1))
        return self.grad_weight.to(self.weight.dtype)


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
    if start and (a.dtype == out.dtype or out.dtype == torch.float32):
        multiply(a, b, out)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and _ADDS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
