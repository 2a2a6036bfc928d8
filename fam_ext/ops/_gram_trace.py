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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops._gram_problem import Problem, kept_shape, must_have, positions_first, put, together
from fam_ext.ops._gram_products import product as multiply
from fam_ext.ops._gram_windows import product_like
from fam_ext.ops._registration import refuse_double_backward, register_fake

Ints = Sequence[int]
_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, str form, int max_bytes"
_SCHEMAS = (
    f"gram_trace(Tensor input, Tensor factors, Tensor? gram, {_WINDOW}, bool keep) -> (Tensor, Tensor)",
    f"gram_trace_backward(Tensor grad, Tensor input, Tensor factors, Tensor? gram, Tensor saved, {_WINDOW}, "
    "bool grad_input, bool grad_factors, bool grad_gram) -> (Tensor, Tensor, Tensor)",
)


def _kernels() -> Any:
    """The Triton kernels; triton is imported when one of them first runs."""
    return importlib.import_module("fam_ext.kernels.gram_trace")


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
    p = Problem("gram_trace", input, factors, gram, window, form, max_bytes)
    values = (
        input.new_zeros(factors.shape[:2], dtype=p.dtype)
        if p.empty
        else input.new_empty(factors.shape[:2], dtype=p.dtype)
    )
    saved = input.new_empty(p.kept_shape if keep else (0,), dtype=p.dtype)
    if p.empty:
        return values, saved.zero_()
    with p.products():
        for part, x, s in p.chunks():
            of_chunk, product = _chunk_forward(p, x, s)
            values = put(values, 1, part, of_chunk)
            if keep and product is not None:
                saved = put(saved, 0, part, p.store(product))
            del x, s, product  # before the next chunk takes as much
    return values, saved


def _chunk_forward(p: Problem, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Values of a chunk (K, b), and what is kept of it."""
    if p.form == "gram_tiles":
        phi = p.windows.patches(x).flatten(0, 1).transpose(1, 2)
        left, right = positions_first(p.times_gram(s)), positions_first(s)
        each: Tensor = _kernels().pair_trace(phi, left, right)  # (b g, K)
        return each.view(-1, p.groups, p.factors).sum(1).T, None
    product = _kept(p, x, s)
    other = p.times_gram(product if p.form == "direct" else s)
    terms = product * other if p.gram is None else other.mul_(product)
    return terms.permute(2, 0, 1, 3, 4).sum((2, 3, 4)), product


def _kept(p: Problem, x: Tensor, s: Tensor) -> Tensor:
    """Gamma (b, g, K, O, I) or E (b, g, K, O, Q)."""
    if p.form == "direct":
        return p.apart(multiply(together(s), p.windows.patches(x).flatten(0, 1).transpose(1, 2)))
    if p.form == "gram_tiles":
        phi = p.windows.patches(x).flatten(0, 1).transpose(1, 2)
        e = _kernels().chain(phi, phi, positions_first(s).flatten(2))  # (b g, Q, K O)
        return p.apart(e.transpose(1, 2))
    if p.form == "gram_shifts":
        pairs = p.windows.pairs(x)
    else:
        patches = p.windows.patches(x).flatten(0, 1)
        pairs = multiply(patches.transpose(1, 2), patches)
    return p.apart(product_like(together(s), pairs, s))


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
    p = Problem("gram_trace_backward", input, factors, gram, window, form, max_bytes)
    must_have(p.name, "grad", "shape", tuple(factors.shape[:2]), tuple(grad.shape))
    must_have(p.name, "grad", "device", input.device, grad.device)
    must_have(p.name, "saved", "shape", p.kept_shape, tuple(saved.shape))
    must_have(p.name, "saved", "dtype and device", (p.dtype, input.device), (saved.dtype, saved.device))
    create = torch.zeros_like if p.empty else torch.empty_like
    d_input = create(input) if grad_input else input.new_empty((0,))
    d_factors = create(factors) if grad_factors else factors.new_empty((0,))
    d_gram = input.new_zeros((p.groups, p.neurons, p.neurons) if grad_gram else (0,), dtype=p.dtype)
    if not p.empty:
        with p.products():
            for part, x, s in p.chunks():
                product = p.load(saved if part is None else saved[part]) if form != "gram_tiles" else None
                if product is None and (grad_factors or grad_gram):
                    product = _kept(p, x, s)
                of_chunk = grad if part is None else grad[:, part]
                upstream = 2 * of_chunk.to(p.dtype).T[:, None, :, None, None]
                needs = (grad_input, grad_factors, grad_gram)
                d_x, d_s, d_g = _chunk_backward(p, x, s, product, upstream, *needs)
                if d_x is not None:
                    d_input = put(d_input, 0, part, d_x)
                if d_s is not None:
                    d_factors = put(d_factors, 1, part, d_s.permute(2, 0, 1, 3, 4))
                if d_g is not None:
                    d_gram = d_g if part is None else d_gram.add_(d_g)
                del x, s, product, d_x, d_s  # before the next chunk takes as much
    return d_input, d_factors, d_gram if gram is None else d_gram.to(gram.dtype)


def _chunk_backward(
    p: Problem,
    x: Tensor,
    s: Tensor,
    product: Tensor | None,
    upstream: Tensor,
    to_input: bool,
    to_factors: bool,
    to_gram: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, s and G of a chunk; `product` is Gamma or E, and `upstream` twice the gradient of the values."""
    d_x = d_s = d_g = weighted = None
    direct = p.form == "direct"
    if product is not None and (direct or to_factors or to_gram):
        weighted = product * upstream
    if weighted is not None and direct:
        patches = p.windows.patches(x).flatten(0, 1)
        d_gamma = together(p.times_gram(weighted))  # (b g, K O, I)
        if to_factors:
            d_s = p.apart(product_like(d_gamma, patches, s))
        if to_input:
            d_x = _of_patches(p, product_like(d_gamma.transpose(1, 2), together(s), patches), x)
    elif to_factors and weighted is not None:
        d_s = p.times_gram(weighted)
    if to_input and not direct:
        d_x = _pairs_to_input(p, x, s, upstream)
    if to_gram and weighted is not None and product is not None:
        d_g = _outer(weighted, product if direct else p.operand(s)).mul_(0.5)
    return d_x, d_s, d_g


def _pairs_to_input(p: Problem, x: Tensor, s: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of x in the forms that are sums over pairs of positions."""
    left = s.to(p.dtype) * upstream if p.gram is None else p.times_gram(s).mul_(upstream)
    if p.form == "gram_tiles":
        phi = p.windows.patches(x).flatten(0, 1).transpose(1, 2)
        rows = (positions_first(t).flatten(2) for t in (left, s))
        return _of_patches(p, _kernels().chain(*rows, phi).transpose(1, 2), x)
    d_pairs = multiply(together(left).transpose(1, 2), together(s))
    if p.form == "gram_shifts":
        return p.windows.pairs_backward(d_pairs, x).reshape(x.shape)
    return _of_patches(p, multiply(p.windows.patches(x).flatten(0, 1), d_pairs), x)


def _of_patches(p: Problem, columns: Tensor, x: Tensor) -> Tensor:
    """The gradient of x (b, g, C, *in) from that of its patches (b g, I, Q); windows overlap, so it is summed in p.dtype."""
    if p.windows.pointwise:
        return columns.reshape(x.shape)
    sums = torch.zeros_like(x, dtype=p.dtype)
    p.windows.add_patches(columns, sums)
    return sums


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum over samples, factors and the last axis of a b^T for each group: two (b, g, K, O, m) -> (g, O, O)."""
    groups, neurons = a.shape[1], a.shape[3]
    if a.shape[4] < neurons or (a.stride(3) == b.stride(3) == 1):
        # one product; where the rows of O numbers lie one after another this copies nothing
        left, right = (t.permute(1, 0, 4, 2, 3).reshape(groups, -1, neurons) for t in (a, b))
        return multiply(left.transpose(1, 2), right)
    left, right = (t.reshape(-1, neurons, t.shape[4]) for t in (a, b))
    return multiply(left, right.transpose(1, 2)).view(*a.shape[:3], neurons, neurons).sum((0, 2))


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
        kept = kept_shape(input.shape, factors.shape, kernel, form) if keep else (0,)
        return values, input.new_empty(kept, dtype=acc)

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
