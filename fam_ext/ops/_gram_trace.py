"""gram_trace's operations `fam_ext::gram_trace` and `_backward`: schemas, the one implementation, fake kernels and autograd.

With Gamma = s phi^T and E = s <phi, phi> of one sample, upstream gradient g and G = W W^T:

    direct    v = <Gamma, G Gamma>   dGamma = 2 g G Gamma   ds = dGamma phi   dphi = s^T dGamma         dG = g Gamma Gamma^T
    gram_*    v = <E, G s>           ds = 2 g G E           dphi = 2 phi (g (G s)^T s)                  dG = g E s^T

Gamma or E is kept for the backward pass. The products are torch's batched ones over chunks of samples, so that patches, Gram
matrices and copies in the accumulation dtype stay under a byte bound. The forms differ in how <phi, phi> is made:

    gram_shifts    from the products of input positions, summed over the kernel's offsets (see _gram_windows)
    gram_patches   from the patches of a chunk
    gram_tiles     tile by tile in Triton kernels that never store it (fam_ext.kernels.gram_trace); nothing is kept
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops._conv_args import LIMIT
from fam_ext.ops._gram_windows import Windows
from fam_ext.ops._registration import refuse_double_backward, register_fake, triton_launches

Ints = Sequence[int]
FORMS = ("direct", "gram_shifts", "gram_patches", "gram_tiles")
_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, str form, int max_bytes"
_SCHEMAS = (
    f"gram_trace(Tensor input, Tensor factors, Tensor? gram, {_WINDOW}, bool keep) -> (Tensor, Tensor)",
    f"gram_trace_backward(Tensor grad, Tensor input, Tensor factors, Tensor? gram, Tensor saved, {_WINDOW}, "
    "bool grad_input, bool grad_factors, bool grad_gram) -> (Tensor, Tensor, Tensor)",
)


def _kernels() -> Any:
    """The Triton kernels; triton is imported when one of them first runs."""
    return importlib.import_module("fam_ext.kernels.gram_trace")


def _must_have(name: str, argument: str, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise ValueError(f"{name}: {argument} must have {what} {expected}, got {got}")


class _Problem:
    """The sizes of one call, x (B, g, C, *in), s (K, B, g, O, *out), G (g, O, O): checked, and cut into chunks of samples."""

    def __init__(
        self,
        name: str,
        x: Tensor,
        s: Tensor,
        gram: Tensor | None,
        window: tuple[Ints, Ints, Ints, Ints],
        form: str,
        max_bytes: int,
    ) -> None:
        rank = len(window[0])
        if x.dim() != 3 + rank or s.dim() != 4 + rank or s.shape[1:3] != x.shape[:2]:
            shapes = f"input {tuple(x.shape)} and factors {tuple(s.shape)}"
            raise ValueError(
                f"{name}: input (B, g, C, *in) and factors (K, B, g, O, *out) with {rank} spatial axes expected, got {shapes}"
            )
        for argument, values, least in zip(
            ("kernel_size", "stride", "padding", "dilation"), window, (1, 1, 0, 1), strict=True
        ):
            if len(values) != rank or not all(least <= v <= LIMIT for v in values):
                _checks.bad_value(name, argument, f"{rank} integers from {least} to {LIMIT}", tuple(values))
        for argument, tensor in (("input", x), ("factors", s), ("gram", gram)):
            if tensor is not None:
                _checks.check_floating(name, argument, tensor)
                _must_have(name, argument, "device", x.device, tensor.device)
        _checks.check_choice(name, "form", form, FORMS)
        self.name, self.x, self.s, self.form = name, x, s, form
        self.factors, self.groups, self.neurons = s.shape[0], x.shape[1], s.shape[3]
        self.windows = Windows(x.shape[3:], s.shape[4:], *window)
        self.fan_in, self.outputs = x.shape[2] * self.windows.volume, math.prod(s.shape[4:])
        self.empty = x.numel() == 0 or s.numel() == 0
        self.dtype = accumulation_dtype(x, s, gram)
        self.gram = None
        if gram is not None:
            _must_have(name, "gram", "shape", (self.groups, self.neurons, self.neurons), tuple(gram.shape))
            self.gram = gram.to(self.dtype)
        if form == "gram_tiles" and self.dtype != torch.float32:
            _checks.bad_value(name, "form", "another one for float64: Triton's kernels sum in float32", form)
        self._chunk = self._samples_at_once(max_bytes)

    def saved_shape(self) -> tuple[int, ...]:
        """Of what the backward pass needs: Gamma, E, or nothing."""
        if self.form == "gram_tiles":
            return (0,)
        return (*self.s.shape[:4], self.fan_in if self.form == "direct" else self.outputs)

    def _samples_at_once(self, max_bytes: int) -> int:
        """By what each of them holds at a time, forward or backward."""
        n, q, rows = self.windows.positions, self.outputs, self.factors * self.neurons
        numbers = self.x.shape[2] * n + 3 * rows * q
        if self.form != "gram_shifts":
            numbers += 2 * self.fan_in * q
        if self.form == "direct":
            numbers += 3 * rows * self.fan_in
        elif self.form == "gram_tiles":
            numbers += 3 * rows * q
        else:
            numbers += 2 * (q * q + (0 if self.windows.pointwise else n * n))
        size = max_bytes // max(1, self.groups * numbers * self.dtype.itemsize)
        return max(1, min(size, self.x.shape[0]))

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(samples, x (b, g, C, *in), s (K, b, g, O, Q)), in the accumulation dtype except for Triton's kernels."""
        kept = self.form == "gram_tiles"
        for first in range(0, self.x.shape[0], self._chunk):
            part = slice(first, first + self._chunk)
            x, s = self.x[part], self.s[:, part].flatten(4)
            yield part, x if kept else x.to(self.dtype), s if kept else s.to(self.dtype)

    def products(self) -> AbstractContextManager[None]:
        """In which products keep their dtype, and Triton's kernels start on the tensors' device."""
        plain = not (self.x.is_cuda or torch.is_autocast_enabled(self.x.device.type))
        return nullcontext() if plain else triton_launches(self.x)

    def times_gram(self, t: Tensor) -> Tensor:
        """G t for t (K, b, g, O, m): one product over all rows where they lie so, else one for each sample."""
        if self.gram is None:
            return t
        t = t.to(self.dtype)
        rows = t.transpose(-1, -2)
        if self.groups == 1 and rows.is_contiguous():
            return rows.reshape(-1, self.neurons).mm(self.gram[0]).view(rows.shape).transpose(-1, -2)
        each = self.gram.expand(*t.shape[:2], -1, -1, -1).reshape(-1, self.neurons, self.neurons)
        return each.bmm(t.reshape(-1, *t.shape[3:])).view(t.shape)

    def apart(self, t: Tensor) -> Tensor:
        """(b g, K n, m) -> (K, b, g, n, m), a view; the reverse of `_together`."""
        return t.view(-1, self.groups, self.factors, t.shape[1] // self.factors, t.shape[2]).permute(
            2, 0, 1, 3, 4
        )

    def positions_first(self, t: Tensor) -> Tensor:
        """(K, b, g, O, Q) -> (b g, Q, K, O), what Triton's kernels take."""
        return t.permute(1, 2, 4, 0, 3).flatten(0, 1)


def _together(t: Tensor) -> Tensor:
    """(K, b, g, n, m) -> (b g, K n, m): all factors of a sample in one product."""
    return t.permute(1, 2, 0, 3, 4).reshape(-1, t.shape[0] * t.shape[3], t.shape[4])


def _product_like(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a b in the memory layout of `like`: a transposed product costs nothing, a transposed copy does."""
    if like.stride(-1) == 1 or like.stride(-2) != 1:
        return a.bmm(b)
    return b.transpose(1, 2).bmm(a.transpose(1, 2)).transpose(1, 2)


def _kept(p: _Problem, x: Tensor, s: Tensor) -> Tensor:
    """Gamma (K, b, g, O, I) or E (K, b, g, O, Q)."""
    if p.form == "direct":
        return p.apart(_together(s).bmm(p.windows.patches(x).flatten(0, 1).transpose(1, 2)))
    if p.form == "gram_tiles":
        phi = p.windows.patches(x).flatten(0, 1).transpose(1, 2)
        e = _kernels().chain(phi, phi, p.positions_first(s).flatten(2))  # (b g, Q, K O)
        return p.apart(e.transpose(1, 2))
    if p.form == "gram_shifts":
        pairs = p.windows.pairs(x)
    else:
        patches = p.windows.patches(x).flatten(0, 1)
        pairs = patches.transpose(1, 2).bmm(patches)
    return p.apart(_product_like(_together(s), pairs, s))


def _forward(
    input: Tensor,
    factors: Tensor,
    gram: Tensor | None,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    form: str,
    max_bytes: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    window = (kernel_size, stride, padding, dilation)
    p = _Problem("gram_trace", input, factors, gram, window, form, max_bytes)
    values = input.new_zeros(factors.shape[:2], dtype=p.dtype)
    saved = input.new_empty(p.saved_shape() if keep else (0,), dtype=p.dtype)
    if p.empty:
        return values, saved.zero_()
    with p.products():
        for part, x, s in p.chunks():
            if form == "gram_tiles":
                phi = p.windows.patches(x).flatten(0, 1).transpose(1, 2)
                left, right = p.positions_first(p.times_gram(s)), p.positions_first(s)
                each = _kernels().pair_trace(phi, left, right)  # (b g, K)
                values[:, part] = each.view(-1, p.groups, p.factors).sum(1).T
                continue
            product = _kept(p, x, s)
            other = p.times_gram(product if form == "direct" else s)
            values[:, part] = (product * other).sum((2, 3, 4))
            if keep:
                saved[:, part] = product
    return values, saved


def _backward(
    grad: Tensor,
    input: Tensor,
    factors: Tensor,
    gram: Tensor | None,
    saved: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    form: str,
    max_bytes: int,
    grad_input: bool,
    grad_factors: bool,
    grad_gram: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    window = (kernel_size, stride, padding, dilation)
    p = _Problem("gram_trace_backward", input, factors, gram, window, form, max_bytes)
    _must_have(p.name, "grad", "shape", tuple(factors.shape[:2]), tuple(grad.shape))
    _must_have(p.name, "saved", "shape", p.saved_shape(), tuple(saved.shape))
    _must_have(p.name, "saved", "dtype", p.dtype, saved.dtype)
    for argument, tensor in (("grad", grad), ("saved", saved)):
        _must_have(p.name, argument, "device", input.device, tensor.device)
    dx = torch.zeros_like(input) if grad_input else input.new_empty((0,))
    ds = torch.zeros_like(factors) if grad_factors else factors.new_empty((0,))
    dg = input.new_zeros((p.groups, p.neurons, p.neurons) if grad_gram else (0,), dtype=p.dtype)
    if not p.empty:
        with p.products():
            for part, x, s in p.chunks():
                upstream = grad[:, part].to(p.dtype)[:, :, None, None, None]
                product = saved[:, part] if saved.numel() else None
                if product is None and (grad_factors or grad_gram):
                    product = _kept(p, x, s)
                d_input, d_factors = _chunk_backward(p, x, s, product, upstream, grad_input, grad_factors)
                if d_input is not None:
                    _add_input(p, d_input, dx[part])
                if d_factors is not None:
                    ds[:, part] = d_factors.reshape(ds[:, part].shape)
                if grad_gram and product is not None:
                    left, right = (
                        t.permute(2, 3, 0, 1, 4).reshape(p.groups, p.neurons, -1)
                        for t in (product * upstream, product if form == "direct" else s.to(p.dtype))
                    )
                    dg += left.bmm(right.transpose(1, 2))
    return dx, ds, dg if gram is None else dg.to(gram.dtype)


def _chunk_backward(
    p: _Problem,
    x: Tensor,
    s: Tensor,
    product: Tensor | None,
    upstream: Tensor,
    to_input: bool,
    to_factors: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a chunk: of x, (b g, I, Q) of its patches or (b g, C, N), and of s, (K, b, g, O, Q)."""
    d_input = d_factors = None
    if p.form == "direct":
        assert product is not None
        patches = p.windows.patches(x).flatten(0, 1)
        d_gamma = _together(p.times_gram(product) * (2 * upstream))  # (b g, K O, I)
        if to_factors:
            d_factors = p.apart(_product_like(d_gamma, patches, s))
        if to_input:
            d_input = _product_like(d_gamma.transpose(1, 2), _together(s), patches)
        return d_input, d_factors
    if to_factors:
        assert product is not None
        d_factors = p.times_gram(product) * (2 * upstream)
    if to_input:
        left = p.times_gram(s) * upstream
        if p.form == "gram_tiles":
            phi = p.windows.patches(x).flatten(0, 1).transpose(1, 2)
            rows = [p.positions_first(t).flatten(2) for t in (left, s)]
            return 2 * _kernels().chain(*rows, phi).transpose(1, 2), d_factors
        d_pairs = _together(left).transpose(1, 2).bmm(_together(s))
        if p.form == "gram_shifts":
            d_input = p.windows.pairs_backward(d_pairs, x)
        else:
            d_input = p.windows.patches(x).flatten(0, 1).bmm(d_pairs).mul_(2)
    return d_input, d_factors


def _add_input(p: _Problem, d_input: Tensor, dx: Tensor) -> None:
    """Write one chunk's gradient to dx (b, g, C, *in); windows overlap, and are summed in the accumulation dtype."""
    if p.windows.pointwise or p.form == "gram_shifts":
        dx.copy_(d_input.reshape(dx.shape))
        return
    sums = dx if dx.dtype == p.dtype else dx.new_zeros(dx.shape, dtype=p.dtype)
    p.windows.add_patches(d_input, sums)
    if sums is not dx:
        dx.copy_(sums)


def _register() -> Any:
    library: Any = torch.library.Library("fam_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema, function in zip(_SCHEMAS, (_forward, _backward), strict=True):
        library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(schema.split("(")[0], function, key)

    @register_fake("gram_trace")
    def _(
        input: Tensor, factors: Tensor, gram: Tensor | None, kernel: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        form, _, keep = rest[-3:]
        acc = accumulation_dtype(input, factors, gram)
        values = input.new_empty(factors.shape[:2], dtype=acc)
        if form == "gram_tiles" or not keep:
            return values, input.new_empty((0,), dtype=acc)
        last = 1  # a product of symbols: math.prod would do, but for its type
        for size in (input.shape[2], *kernel) if form == "direct" else factors.shape[4:]:
            last *= size
        return values, input.new_empty((*factors.shape[:4], last), dtype=acc)

    @register_fake("gram_trace_backward")
    def _(
        grad: Tensor, input: Tensor, factors: Tensor, gram: Tensor | None, saved: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = (factors.shape[2], factors.shape[3], factors.shape[3]) if rest[-1] else (0,)
        return (
            torch.empty_like(input) if rest[-3] else input.new_empty((0,)),
            torch.empty_like(factors) if rest[-2] else factors.new_empty((0,)),
            input.new_empty(shape, dtype=accumulation_dtype(input, factors) if gram is None else gram.dtype),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, factors, gram, *rest = inputs
        ctx.save_for_backward(input, factors, gram, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.rest = rest[:-1]

    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.fam_ext.gram_trace_backward(grad, *ctx.saved_tensors, *ctx.rest, *needs)
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*wanted, *(None,) * 7)

    torch.library.register_autograd("fam_ext::gram_trace", backward, setup_context=setup_context)
    refuse_double_backward("gram_trace_backward")
    return library


_library = _register()
