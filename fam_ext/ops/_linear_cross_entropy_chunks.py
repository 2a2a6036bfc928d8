"""linear_cross_entropy in chunks of rows: matrix products by torch.mm, row kernels in C++ or Triton in between.

With y the most likely class of a row, e_s = exp(z_s - z_y) for s != y and e_y = 0, p~ = e / (1 + sum e) but for p~_y = p_y - 1,
and m the mean of the weight's rows, a chunk of rows passes through

    z = phi W^T;  U = p~ W;  <w_s, u - m> = (u - m) W^T;  dphi = dz W;  dW += [-2 g p~ | dz]^T [u - m; phi]

with u = w_y + U, two terms of dW as one product, so that dW is read and written once a chunk. 2 diag(sum_n g_n p~_n) (W - m)
comes at the end. The offset m common to all rows of W is taken out by algebra: a centered copy of W would be as large as dW,
and the products lose no more digits to m than z has lost already. What a frozen tensor, strength 0 or curvature_grad=False
makes needless is skipped; ignored rows are never gathered. The row kernels: csrc/cpu/linear_cross_entropy.cpp,
kernels/linear_cross_entropy.py.

A weight of less than float32 is converted a block of classes at a time, since torch.mm would round z to the weight's dtype. A
bfloat16 head on Triton's kernels, both tensors of it, is multiplied on the matrix units instead, with float32 sums and results
(torch.mm's out_dtype). z is exact but for its sum. What becomes kappa, and the distances in its gradient, keeps 16 bits: e and
u - m are split in two bfloat16 parts, two products each. With one part they keep 8 bits, and two products of eight are saved;
kappa then is that of the probabilities that the rounded e make, so that nothing cancels that should not, and the loss keeps e.
dz and the factors of dW are rounded to bfloat16 once, as in torch's own backward of a bfloat16 layer.

With one part, a CPU that multiplies bfloat16 numbers takes the two products that only the gradient of kappa needs from factors
rounded to 8 bits: <w_s, u - m>, and p~^T [u - m]. Cross-entropy, its gradient and kappa keep float32's digits.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops import backends
from fam_ext.ops._linear_cross_entropy_products import (
    ALIGN,
    add_narrow,
    add_product,
    multiply,
    multiply_narrow,
    narrow_weight,
    rows_per_chunk,
)
from fam_ext.ops._linear_cross_entropy_targets import NONE, Targets
from fam_ext.ops._registration import gradient_dtype, register_fake, triton_launches

_LEAST_CLASSES = 64  # of a block of converted weights
_NATIVE = "linear_cross_entropy_"
ROW_KERNELS = ("softmax_rows", "mean_rows", "grad_logits", "add_rows")


@dataclass(frozen=True)
class Options:
    ignore_index: int
    label_smoothing: float
    reduction: int
    strength: float
    curvature_grad: bool
    max_bytes: int
    accumulate_in_weight_dtype: bool
    triton: bool
    parts: int
    grad_input: bool
    grad_weight: bool
    grad_bias: bool


def weight_grad_dtype(weight: Tensor, acc: torch.dtype, accumulate_in_weight_dtype: bool) -> torch.dtype:
    """What the weight's gradient is summed in over chunks: float16 could not hold what no loss scale has reached yet."""
    return weight.dtype if accumulate_in_weight_dtype and weight.dtype == torch.bfloat16 else acc


def row_kernels(triton: bool) -> Any:
    """What has the functions ROW_KERNELS; triton is imported when it is first asked for."""
    if triton:
        return importlib.import_module("fam_ext.kernels.linear_cross_entropy")
    return SimpleNamespace(**{name: getattr(torch.ops.fam_ext, _NATIVE + name) for name in ROW_KERNELS})


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
    acc = accumulation_dtype(input, weight, bias)
    with triton_launches(input), torch.no_grad():
        targets = Targets(
            target.reshape(-1), weight.shape[0], class_weight, row_scale, acc, options.ignore_index,
            options.label_smoothing, options.reduction,
        )  # fmt: skip
        x = input.reshape(target.numel(), weight.shape[1])
        chunks = _Chunks(
            x, weight, None if bias is None else bias.to(acc).contiguous(), targets, options, acc
        )
        loss, kappa = chunks.run()
        if options.reduction == NONE:
            loss, kappa = (targets.scatter(t).reshape(target.shape) for t in (loss, kappa))
            loss = loss + options.strength * kappa
        else:
            wide = kappa.sum(dtype=torch.float64)
            total = loss.sum(dtype=torch.float64) + options.strength * wide
            loss, kappa = (total + torch.nan if targets.mean_of_nothing else total).to(acc), wide.to(acc)
        grad_input, grad_weight, grad_bias = chunks.gradients()
    bias_dtype = acc if bias is None else gradient_dtype(bias)
    return (
        loss,
        kappa,
        grad_input.reshape(input.shape) if options.grad_input else grad_input,
        grad_weight,
        grad_bias.to(bias_dtype),
    )


class _Chunks:
    """Buffers of one call, and the steps of a chunk."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        options: Options,
        acc: torch.dtype,
    ) -> None:
        self.kernels = row_kernels(options.triton)
        self.x, self.weight, self.bias, self.targets, self.options, self.acc = (
            x,
            weight,
            bias,
            targets,
            options,
            acc,
        )
        self.classes, self.fan_in = weight.shape
        both_bfloat16 = x.dtype == weight.dtype == torch.bfloat16
        self.split = options.triton and both_bfloat16 and torch.version.hip is None
        self.parts = options.parts if self.split else 0
        self.copies = max(1, self.parts)  # rows of numbers, in so many parts
        # W takes part in products as it is
        self.direct = self.split or (weight.dtype == acc and 1 in weight.stride())
        self.grads = options.grad_input or options.grad_weight or options.grad_bias
        self.curvature_grads = options.strength != 0  # gradients of kappa; through the Hessian, too:
        self.hessian_grads = self.grads and self.curvature_grads and options.curvature_grad
        # W for the products that only the gradient of kappa needs, where they are narrow
        narrow = options.parts == 1 and not options.triton and self.grads and self.curvature_grads
        self.narrow = narrow_weight(weight, acc) if narrow else None
        self.weight_grad_dtype = weight_grad_dtype(weight, acc, options.accumulate_in_weight_dtype)
        self.in_weight_dtype = self.weight_grad_dtype != acc
        self.block = self._classes_per_block()
        self._find_offset()
        self._allocate_results()
        self._allocate_buffers()

    def _empty(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty((rows, columns), dtype=dtype or self.acc)

    def _classes_per_block(self) -> int:
        row_bytes = self.acc.itemsize * max(self.fan_in, 1)
        return min(self.classes, max(_LEAST_CLASSES, self.options.max_bytes // 8 // row_bytes))

    def _rows_per_chunk(self, row_bytes: int) -> int:
        return rows_per_chunk(self.targets.count, self.options.max_bytes // row_bytes)

    def _allocate_results(self) -> None:
        options, device = self.options, self.x.device
        self.grad_input = self.x.new_empty(0, dtype=gradient_dtype(self.x))
        if options.grad_input:
            make = torch.empty if self.targets.kept is None else torch.zeros  # ignored rows get nothing
            self.grad_input = make(self.x.shape, dtype=self.grad_input.dtype, device=device)
        shape = self.weight.shape if options.grad_weight else 0
        self.grad_weight = torch.empty(shape, dtype=self.weight_grad_dtype, device=device)
        sums = options.grad_weight and self.curvature_grads
        self.class_sums = torch.zeros(self.classes, dtype=self.acc, device=device) if sums else None
        self.bias_sums = torch.zeros(self.classes if options.grad_bias else 0, dtype=self.acc, device=device)

    def _allocate_buffers(self) -> None:
        work = torch.bfloat16 if self.split else self.acc
        ld = -(-self.classes // ALIGN) * ALIGN
        parts = 2 if self.grads or self.split else 1
        self.step = self._rows_per_chunk(self.acc.itemsize * (ld * parts + 6 * self.fan_in + 24))
        self.scratch = self._empty(0 if self.direct else self.block, self.fan_in)
        # z, then e; dots, then dz. Parts: z, then dots
        self.logits = self._empty(self.step if self.split else parts * self.step, ld)
        # [e; dz]. Two parts of e: the second lies where dz will
        self.pairs = self._empty(2 * self.step, ld, work) if self.split else self.logits
        self.shift = self._empty(self.copies * self.step, self.fan_in)
        self.right = self._empty(2 * self.step, self.fan_in, work)  # [-2 g (u - m); phi]
        self.means = self._empty(self.copies * self.step if self.grads else 0, self.fan_in, work)
        self.in_place = (
            self.targets.kept is None and self.x.dtype == self.acc
        )  # dphi is formed where it stays
        self.input_scratch = self._empty(
            0 if self.in_place or not self.options.grad_input else self.step, self.fan_in
        )

    def _blocks(self, step: int) -> Iterator[tuple[int, int]]:
        for first in range(0, self.classes, step):
            yield first, min(step, self.classes - first)

    def _weights(self, most: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(first class, number, their rows of W as products take them), at most `most` at a time."""
        step = min(most or self.classes, self.classes if self.direct else self.block)
        for first, count in self._blocks(step):
            rows = self.weight[first : first + count]
            yield first, count, rows if self.direct else self.scratch[:count].copy_(rows)

    def _dot_weights(self, most: int | None) -> Iterator[tuple[int, int, Tensor]]:
        """The same for <w_s, u - m>."""
        if self.narrow is None:
            yield from self._weights(most)
        else:
            yield from ((k, count, self.narrow[k : k + count]) for k, count in self._blocks(self.block))

    def _centered(self, first: int, count: int) -> Tensor:
        """w_s - m of a block of classes, in memory of its own."""
        rows = self.weight[first : first + count]
        return torch.sub(rows, self.offset, out=self._empty(count, self.fan_in))

    def _find_offset(self) -> None:
        """m and |w_s - m|^2"""
        self.offset = torch.zeros(self.fan_in, dtype=self.acc, device=self.x.device)
        for first, count in self._blocks(self.classes if self.weight.dtype == self.acc else self.block):
            self.offset += self.weight[first : first + count].to(self.acc).sum(0)
        self.offset /= self.classes
        self.squares = torch.empty(self.classes, dtype=self.acc, device=self.x.device)
        for first, count in self._blocks(self.block):
            self.squares[first : first + count] = self._centered(first, count).square_().sum(1)

    def run(self) -> tuple[Tensor, Tensor]:
        """Loss and curvature of every kept row."""
        loss, curvature = (
            torch.zeros(self.targets.count, dtype=self.acc, device=self.x.device) for _ in range(2)
        )
        for first in range(0, self.targets.count, self.step):
            part = slice(first, min(first + self.step, self.targets.count))
            loss[part], curvature[part] = self._chunk(part, part.stop - part.start)
        return loss, curvature

    def _chunk(self, part: slice, rows: int) -> tuple[Tensor, Tensor]:
        targets = self.targets
        c, index = targets.coefficient[part], targets.index[part]
        phi = self.right[rows : 2 * rows].copy_(targets.gather(self.x, part))
        if targets.may_be_zero:  # rows without a share in the loss may hold anything
            phi.masked_fill_((c == 0).unsqueeze(1), 0.0)
        z = self.logits[:rows, : self.classes]
        for k, count, w in self._weights():
            multiply(phi, w.T, z[:, k : k + count])
        e, below = self.pairs[:rows, : self.classes], self.pairs[rows : 2 * rows, : self.classes]
        best = torch.empty(rows, dtype=torch.int64, device=z.device)
        stats, row_sums = (
            torch.empty(n, rows, dtype=self.acc, device=z.device) for n in (4 + (self.parts == 1), 4)
        )
        parts = ((e, below)[: self.parts],) if self.split else ()
        self.kernels.softmax_rows(
            z, self.bias, self.squares, targets.omega, index, targets.smooth, best, stats, *parts
        )
        shift = self.shift[: self.copies * rows]
        for k, count, w in self._weights():
            add_product(self.pairs[: len(shift), k : k + count], w, shift, k == 0)
        grads = self.grads and self.curvature_grads
        means = self.means[: len(shift)] if grads else None
        curvature_factor = self.options.strength * c
        self.kernels.mean_rows(
            shift, self.weight, self.offset, phi, self.squares, best, stats, curvature_factor, means,
            self.right[:rows] if grads else None, row_sums,
        )  # fmt: skip
        v, norm = row_sums[0], row_sums[3]
        curvature = torch.where(c == 0, 0.0, c * norm * v)
        if self.grads:
            factors = torch.stack([
                stats[0], v, row_sums[1], row_sums[2], curvature_factor * norm, c, targets.hard[part], targets.soft[part],
                targets.others(part, best),
            ])  # fmt: skip
            self._grad_logits(e, below, means, factors, index, best)
            if self.options.grad_input:
                self._grad_input(part, phi, below, torch.where(c == 0, 0.0, 2 * curvature_factor * v))
            if self.options.grad_weight:
                self._grad_weight(rows, best, part.start == 0)
        return self._loss(part, c, stats), curvature

    def _loss(self, part: slice, c: Tensor, stats: Tensor) -> Tensor:
        """sum_s q_s (lse - z_s) of every row."""
        hard, soft = self.targets.hard[part], self.targets.soft[part]
        rest = stats[4 if self.parts == 1 else 0]
        loss = torch.where(hard == 0, 0.0, hard * stats[2]) + c * rest.log1p()
        if self.targets.smooth:
            loss += torch.where(soft == 0, 0.0, soft * stats[3])
        return torch.where(c == 0, 0.0, loss)

    def _grad_logits(
        self, e: Tensor, below: Tensor, means: Tensor | None, factors: Tensor, index: Tensor, best: Tensor
    ) -> None:
        """dz below e; where e has two parts, in the place of the second."""
        omega, smooth = self.targets.omega, self.targets.smooth
        parts = (below,) if self.parts == 2 else ()
        # z is not needed any more: its place holds the dots, in two parts those of half the classes
        step, space = (self.logits.shape[1] // 2 if self.parts == 2 else None), self.logits.view(-1)
        products = means is not None and self.hessian_grads
        product = multiply if self.narrow is None else multiply_narrow
        for k, count, w in self._dot_weights(step) if products else [(0, self.classes, self.weight)]:
            dots = None
            if means is not None and products:
                dots = space[: len(means) * count].view(-1, count) if self.split else below[:, k : k + count]
                product(means, w.T, dots)
            self.kernels.grad_logits(
                e, dots, below, k, count, self.squares, omega, smooth, index, best, factors, self.class_sums,
                self.bias_sums if self.options.grad_bias else None, *parts,
            )  # fmt: skip

    def _grad_input(self, part: slice, phi: Tensor, dz: Tensor, factor: Tensor) -> None:
        """dphi = dz W + 2 strength c v phi"""
        out = self.grad_input[part] if self.in_place else self.input_scratch[: len(phi)]
        if self.hessian_grads:
            torch.mul(phi, factor.unsqueeze(1), out=out)
        for k, count, w in self._weights():
            add_product(dz[:, k : k + count], w, out, k == 0 and not self.hessian_grads)
        if self.targets.kept is not None:
            self.grad_input[self.targets.kept[part]] = out.to(self.grad_input.dtype)
        elif not self.in_place:
            self.grad_input[part] = out

    def _grad_weight(self, rows: int, best: Tensor, start: bool) -> None:
        """dW += dz^T phi - 2 (g p~)^T (u - m), and -2 g (U - r (u - m)) at y, which e_y = 0 left out."""
        apart = self.narrow is not None and not self.in_weight_dtype  # the two terms
        begin = 0 if self.curvature_grads and not apart else rows
        left, right = self.pairs[begin : 2 * rows, : self.classes].T, self.right[begin : 2 * rows]
        if not self.in_weight_dtype:
            add_product(left, right, self.grad_weight, start)
            if self.curvature_grads:
                if apart:
                    narrow_right = self.right[:rows].to(torch.bfloat16)
                    for k, count in self._blocks(self.block):
                        add_narrow(
                            self.pairs[:rows, k : k + count].T, narrow_right, self.grad_weight[k : k + count]
                        )
                self.kernels.add_rows(self.shift[:rows], best, self.grad_weight, 0)
            return
        # what cancels is subtracted before it is rounded: every share of a chunk is whole
        for k, count in self._blocks(self.block):
            if self.class_sums is None:
                share = multiply(left[k : k + count], right, self._empty(count, self.fan_in))
            else:
                share = self._centered(k, count).mul_(2 * self.class_sums[k : k + count].unsqueeze(1))
                add_product(left[k : k + count], right, share, False)
            if self.curvature_grads:
                self.kernels.add_rows(self.shift[:rows], best, share, k)
            rows_of = self.grad_weight[k : k + count]
            rows_of.copy_(share) if start else rows_of.add_(share)
        if self.class_sums is not None:
            self.class_sums.zero_()

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of input, weight and bias, after the last chunk: ... + 2 diag(sum_n g_n p~_n) (W - m)."""
        self.logits = self.pairs = self.shift = self.right = self.means = self.input_scratch = self.x[:0]
        if self.targets.count == 0:
            self.grad_weight.zero_()
        elif self.class_sums is not None and not self.in_weight_dtype:
            for k, count in self._blocks(self.block):
                rows = self._centered(k, count)
                self.grad_weight[k : k + count] += rows.mul_(2 * self.class_sums[k : k + count].unsqueeze(1))
        return self.grad_input, self.grad_weight, self.bias_sums


def _register() -> None:
    for name in ROW_KERNELS:

        @register_fake(f"{_NATIVE}{name}")
        def _(*arguments: Any) -> None:
            """They write into what they are given, and return nothing."""


if backends.native_loaded():
    _register()
