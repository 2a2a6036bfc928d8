"""One call of gram_trace's operations: its checked sizes, its chunks of samples, and products that keep memory layouts.

Inside a chunk the axes are: samples b, groups g, factors K, then neurons O (or features) and positions Q. A tensor is laid out
"in columns" where positions are contiguous (a convolution), or "in rows" where features are (a linear layer).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops._conv_args import LIMIT
from fam_ext.ops._gram_products import on_matrix_units, product
from fam_ext.ops._gram_windows import Windows
from fam_ext.ops._registration import triton_launches

Ints = Sequence[int]
FORMS = ("direct", "gram_shifts", "gram_patches", "gram_tiles")
_ARGUMENTS = (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
# axes (b, g, K, O, Q) in the orders in which rows may follow each other in memory, and the way back
_ROW_ORDERS = (((0, 1, 4, 2, 3), (0, 1, 3, 4, 2)), ((2, 0, 1, 4, 3), (1, 2, 0, 4, 3)))


@dataclass(frozen=True)
class _Sizes:
    windows: Windows
    fan_in: int
    outputs: int
    chunk: int


@functools.lru_cache(maxsize=64)
def _sizes(
    name: str,
    x: tuple[int, ...],
    s: tuple[int, ...],
    window: tuple[tuple[int, ...], ...],
    form: str,
    itemsize: int,
    max_bytes: int,
) -> _Sizes:
    """Sizes of a call, for x of shape (B, g, C, *in) and s of shape (K, B, g, O, *out), checked."""
    rank = len(window[0])
    if len(x) != 3 + rank or len(s) != 4 + rank or s[1:3] != x[:2]:
        raise ValueError(
            f"{name}: input (B, g, C, *in) and factors (K, B, g, O, *out) must have {rank} spatial axes and the same B and g, "
            f"got shapes {x} and {s}"
        )
    for (argument, least), values in zip(_ARGUMENTS, window, strict=True):
        if len(values) != rank or not all(least <= v <= LIMIT for v in values):
            _checks.bad_value(name, argument, f"{rank} integers from {least} to {LIMIT}", values)
    _checks.check_choice(name, "form", form, FORMS)
    windows = Windows(x[3:], s[4:], *window)
    channels, rows = x[2], s[0] * s[3]
    fan_in, n, q = channels * windows.volume, windows.positions, math.prod(s[4:])
    # numbers that a sample and group hold at a time, forward or backward
    numbers = channels * n + 3 * rows * q
    if form != "gram_shifts":
        numbers += 2 * fan_in * q
    if form == "direct":
        numbers += 3 * rows * fan_in
    elif form == "gram_tiles":
        numbers += 3 * rows * q
    else:
        numbers += 2 * (q * q + (0 if windows.pointwise else n * n))
    chunk = max(1, min(x[0], max_bytes // max(1, x[1] * numbers * itemsize)))
    return _Sizes(windows, fan_in, q, chunk)


def _in_rows(kernel: Ints, form: str) -> bool:
    """Whether E is kept in rows: for what may be a linear layer, whose factors come in rows."""
    return form != "direct" and tuple(kernel) == (1,)


def kept_shape(x: Ints, s: Ints, kernel: Ints, form: str) -> tuple[int, ...]:
    """Of what the backward pass needs of the forward pass, for x (B, g, C, *in) and s (K, B, g, O, *out).

    Gamma (B, g, K, O, I); E (B, g, K, O, Q), or (B, g, Q, K, O) in rows; nothing for Triton's kernels.
    """
    if form == "gram_tiles":
        return (0,)
    last = 1
    for size in (x[2], *kernel) if form == "direct" else s[4:]:
        last *= size
    return (*x[:2], last, s[0], s[3]) if _in_rows(kernel, form) else (*x[:2], s[0], s[3], last)


def must_have(name: str, argument: str, what: str, expected: object, got: object) -> None:
    """Raise ValueError unless `got`, the `what` of an argument, is the expected one."""
    if expected != got:
        raise ValueError(f"{name}: {argument} must have {what} {expected}, got {got}")


class Problem:
    """The arguments of one call, checked: x (B, g, C, *in), s (K, B, g, O, *out) and G (g, O, O) or None."""

    def __init__(
        self,
        name: str,
        x: Tensor,
        s: Tensor,
        gram: Tensor | None,
        window: Sequence[Ints],
        form: str,
        max_bytes: int,
    ) -> None:
        self.name, self.x, self.s, self.form, self.gram = name, x, s, form, None
        self.dtype = accumulation_dtype(x, s, gram)
        self._matrix_units = self.dtype == torch.float32 and on_matrix_units(x)
        shapes, window = (tuple(x.shape), tuple(s.shape)), tuple(tuple(values) for values in window)
        # a float32 factor that is split is held once more while its three parts are
        number = self.dtype.itemsize + (6 if self._matrix_units else 0)
        sizes = _sizes(name, *shapes, window, form, number, max_bytes)
        self.windows, self.fan_in, self.outputs = sizes.windows, sizes.fan_in, sizes.outputs
        self._chunk, self._rows = sizes.chunk, _in_rows(window[0], form)
        self.kept_shape = kept_shape(*shapes, window[0], form)
        self.factors, self.groups, self.neurons = s.shape[0], x.shape[1], s.shape[3]
        self.empty = x.numel() == 0 or s.numel() == 0
        for argument, tensor in (("input", x), ("factors", s), ("gram", gram)):
            if tensor is not None:
                _checks.check_floating(name, argument, tensor)
                must_have(name, argument, "device", x.device, tensor.device)
        if gram is not None:
            must_have(name, "gram", "shape", (self.groups, self.neurons, self.neurons), tuple(gram.shape))
            self.gram = gram.to(self.dtype)
        if form == "gram_tiles" and self.dtype != torch.float32:
            _checks.bad_value(name, "form", "another one for float64: Triton's kernels sum in float32", form)

    def store(self, product: Tensor) -> Tensor:
        """Gamma or E (b, g, K, n, m) in the order of `kept_shape`."""
        return product.permute(0, 1, 4, 2, 3) if self._rows else product

    def load(self, kept: Tensor) -> Tensor:
        """The reverse of `store`."""
        return kept.permute(0, 1, 3, 4, 2) if self._rows else kept

    def chunks(self) -> Iterator[tuple[slice | None, Tensor, Tensor]]:
        """(samples, or None for all of them, x (b, g, C, *in), s (b, g, K, O, Q)), ready for the products."""
        if self._chunk >= self.x.shape[0]:
            yield None, self._of_chunk(self.x), self._factors(self._of_chunk(self.s))
            return
        for first in range(0, self.x.shape[0], self._chunk):
            part = slice(first, first + self._chunk)
            yield part, self._of_chunk(self.x[part]), self._factors(self._of_chunk(self.s[:, part]))

    def _of_chunk(self, t: Tensor) -> Tensor:
        return t if self.form == "gram_tiles" else self.operand(t)

    def operand(self, t: Tensor) -> Tensor:
        """t as `product` takes it."""
        return t if self._matrix_units and t.dtype == torch.bfloat16 else t.to(self.dtype)

    def _factors(self, s: Tensor) -> Tensor:
        """(K, b, g, O, *out) -> (b, g, K, O, Q); several factors of a sample are copied to lie together, in rows or columns."""
        s = s.flatten(4).permute(1, 2, 0, 3, 4)
        if self.factors == 1:
            return s
        if s.stride(4) == 1 or s.stride(3) != 1:
            return s.contiguous()
        return s.transpose(3, 4).transpose(2, 3).contiguous().permute(0, 1, 3, 4, 2)

    def products(self) -> AbstractContextManager[None]:
        """In which products keep their dtype, and Triton's kernels start on the tensors' device."""
        plain = not (self.x.is_cuda or torch.is_autocast_enabled(self.x.device.type))
        return nullcontext() if plain else triton_launches(self.x)

    def apart(self, t: Tensor) -> Tensor:
        """(b g, K n, m) -> (b, g, K, n, m), a view; the reverse of `together`."""
        return t.view(-1, self.groups, self.factors, t.shape[1] // self.factors, t.shape[2])

    def times_gram(self, t: Tensor) -> Tensor:
        """G t for t (b, g, K, O, m), or t itself without a G: one product over all rows where they lie so, else one a sample."""
        if self.gram is None:
            return t
        t = self.operand(t)
        if self.groups > 1:
            each = self.gram.unsqueeze(1).expand(t.shape[0], -1, t.shape[2], -1, -1)
            each = each.reshape(-1, self.neurons, self.neurons)
        else:
            for order, back in _ROW_ORDERS if t.stride(3) == 1 else ():
                rows = t.permute(order)
                if rows.is_contiguous():
                    each_row = product(rows.view(-1, self.neurons), self.gram[0])
                    return each_row.view(rows.shape).permute(back)
            each = self.gram.expand(t.shape[0] * t.shape[2], -1, -1)
        return product(each, t.reshape(-1, self.neurons, t.shape[4])).view(t.shape)


def together(t: Tensor) -> Tensor:
    """(b, g, K, n, m) -> (b g, K n, m): all factors of a sample in one product."""
    return t.reshape(-1, t.shape[2] * t.shape[3], t.shape[4])


def positions_first(t: Tensor) -> Tensor:
    """(b, g, K, O, Q) -> (b g, Q, K, O), what Triton's kernels take."""
    return t.permute(0, 1, 4, 2, 3).flatten(0, 1)


def put(whole: Tensor, axis: int, part: slice | None, value: Tensor) -> Tensor:
    """`whole` with `value` as its `part` along `axis`; `value` itself where it is all of it (part None) and laid out alike."""
    if part is None and value.dtype == whole.dtype:
        value = value.reshape(whole.shape)
        strides = zip(whole.shape, whole.stride(), value.stride(), strict=True)
        if all(size == 1 or a == b for size, a, b in strides):
            return value.as_strided(whole.shape, whole.stride())
    target = whole if part is None else whole[part] if axis == 0 else whole[:, part]
    target.copy_(value.reshape(target.shape))
    return whole
