"""Windows of a convolution over chunks of samples: patches, their transpose, and the inner products of patches.

Everything is a loop over the kernel's offsets: at one offset, a range of output positions sees a range of input positions, both
slices. Zeros that pad the input are never stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fam_ext.ops._gram_products import product

Ints = Sequence[int]
Index = tuple[int | slice, ...]
Run = tuple[slice, slice]  # a range of output positions, and the input positions that they see
_ALL = slice(None)


def _runs(size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Run | None]:
    """Along one axis: the run of every offset of the kernel, None where all it sees is padding."""
    runs: list[Run | None] = []
    for j in range(kernel):
        shift = j * dilation - padding  # output q sees input q * stride + shift
        first = max(0, -(shift // stride))
        last = min(outputs, (size - 1 - shift) // stride + 1)
        start = first * stride + shift
        end = start + (last - first - 1) * stride + 1
        runs.append((slice(first, last), slice(start, end, stride)) if first < last else None)
    return runs


def product_like(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a b in the memory layout of `like`: a transposed product costs nothing, a transposed copy does."""
    if like.stride(-1) == 1 or like.stride(-2) != 1:
        return product(a, b)
    return product(b.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2)


class Windows:
    """Which input positions each output position of a convolution sees.

    Shapes: x (b, g, C, *in) of one chunk, patches (b, g, I, Q) with I = C * the kernel's volume and Q output positions, and the
    products of patches (b * g, Q, Q). `padding` is what stands before each axis.
    """

    def __init__(
        self, inputs: Ints, outputs: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.positions, self.volume = math.prod(inputs), math.prod(kernel)
        axes = list(zip(inputs, outputs, kernel, stride, padding, dilation, strict=True))
        self._trivial = [k == s == 1 and p == 0 and n == m for n, m, k, s, p, _ in axes]
        self.pointwise = all(self._trivial)
        self._axes = [] if self.pointwise else [_runs(*axis) for axis in axes]
        self._shift_steps = [[self._along(axis, back) for axis in range(len(self._axes))] for back in (0, 1)]

    def _along(self, axis: int, back: int) -> tuple[bool, list[tuple[Index, Index]]]:
        """The sums over the offsets along one axis, of products (n, *positions, *positions) of inputs; `back` is the transpose.

        (target, source) of every offset, and whether the first of them fills all of the sums.
        """
        before, between = (_ALL,) * (1 + axis), (_ALL,) * (len(self._axes) - 1)
        size = (self.inputs if back else self.outputs)[axis]
        parts = [run[::-1] if back else run for run in self._axes[axis] if run is not None]
        everything = (slice(0, size), slice(0, size, 1))
        parts.sort(key=lambda part: part[0] not in everything)
        fills = bool(parts) and parts[0][0] in everything
        return fills, [((*before, t, *between, t), (*before, s, *between, s)) for t, s in parts]

    def _offsets(self) -> Iterator[tuple[Index, Index]]:
        """At every offset that some output sees inside the input: its part of columns (b, g, C, volume, *out), and of x."""
        for number, runs in enumerate(itertools.product(*self._axes)):
            seen = [run for run in runs if run is not None]
            if len(seen) == len(runs):
                outputs, inputs = zip(*seen, strict=True)
                yield (_ALL, _ALL, _ALL, number, *outputs), (_ALL, _ALL, _ALL, *inputs)

    def patches(self, x: Tensor) -> Tensor:
        """(b, g, C, *in) -> (b, g, I, Q); a view where the kernel is one position."""
        if self.pointwise:
            return x.flatten(3)
        columns = x.new_zeros((*x.shape[:3], self.volume, *self.outputs))
        for at_columns, at_inputs in self._offsets():
            columns[at_columns] = x[at_inputs]
        return columns.flatten(4).flatten(2, 3)

    def add_patches(self, columns: Tensor, dx: Tensor) -> None:
        """The transpose of `patches`: columns (b, g, I, Q) are summed into dx (b, g, C, *in)."""
        columns = columns.reshape(*dx.shape[:3], self.volume, *self.outputs)
        for at_columns, at_inputs in self._offsets():
            dx[at_inputs].add_(columns[at_columns])

    def pairs(self, x: Tensor) -> Tensor:
        """<phi_q, phi_q'> of every two output positions, (b * g, Q, Q), without patches.

        It is the sum over the kernel's offsets of <x_p, x_p'> at the input positions p and p' that q and q' see at that offset.
        """
        flat = x.flatten(3).flatten(0, 1)
        own = product(flat.transpose(1, 2), flat)
        if self.pointwise:
            return own
        q = math.prod(self.outputs)
        return self._shifts(own.view(-1, *self.inputs, *self.inputs), transpose=False).view(-1, q, q)

    def pairs_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, (b * g, C, N); `grad` (b * g, Q, Q), symmetric, is twice that of `pairs(x)`."""
        if not self.pointwise:
            grad = self._shifts(grad.view(-1, *self.outputs, *self.outputs), transpose=True)
            grad = grad.view(-1, self.positions, self.positions)
        flat = x.flatten(3).flatten(0, 1)
        return product_like(flat, grad, flat)

    def _shifts(self, pairs: Tensor, transpose: bool) -> Tensor:
        """Sums over the offsets, one axis at a time: (n, *in, *in) -> (n, *out, *out), or the transpose of that map."""
        rank = len(self._axes)
        for axis, (fills, steps) in enumerate(self._shift_steps[transpose]):
            if self._trivial[axis]:
                continue
            if fills:
                sums = pairs[steps[0][1]].clone(memory_format=torch.contiguous_format)
            else:
                sizes = list(pairs.shape)
                sizes[1 + axis] = sizes[1 + rank + axis] = (self.inputs if transpose else self.outputs)[axis]
                sums = pairs.new_zeros(sizes)
            for target, source in steps[fills:]:
                sums[target].add_(pairs[source])
            pairs = sums
        return pairs
