"""gram_trace over Triton kernels: the operations' schemas and host side. triton is imported when one of them first runs.

Chunks of samples as in csrc/cpu/gram_trace.cpp; patches of a convolution are made for a chunk at a time. The direct form needs no
kernel of its own: its products go to the vendor's library.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fam_ext.ops._gram_trace import register
from fam_ext.ops._registration import triton_launches
from fam_ext.ops.reference.gram_trace import patches

Ints = Sequence[int]
_ARGUMENTS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, str form, int max_bytes"
_SCHEMAS = (
    f"triton_gram_trace(Tensor input, Tensor factors, Tensor? gram, {_ARGUMENTS}, bool keep) -> (Tensor, Tensor)",
    f"triton_gram_trace_backward(Tensor grad, Tensor input, Tensor factors, Tensor? gram, Tensor saved, {_ARGUMENTS}, "
    "bool grad_input, bool grad_factors, bool grad_gram) -> (Tensor, Tensor, Tensor)",
)


def _kernels() -> Any:
    return importlib.import_module("fam_ext.kernels.gram_trace")


def _unflatten(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    return tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


def _chunks(
    input: Tensor, factors: Tensor, window: tuple[Ints, Ints, Ints, Ints], form: str, max_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(samples, phi (n, Q, I), s (n, Q, K, O)) with n = samples times groups, in the dtypes given."""
    k, b, g, o = factors.shape[:4]
    q = factors[0, 0, 0, 0].numel()
    fan_in = input.shape[2]
    for size in window[0]:
        fan_in *= size
    numbers = 2 * q * (fan_in + 3 * k * o) + (3 * k * o * fan_in if form == "direct" else 0)
    size = max(1, min(b, max_bytes // (4 * g * numbers)))
    for first in range(0, b, size):
        part = slice(first, min(b, first + size))
        phi = patches(input[part], *window, factors.shape[4:])
        # (K, b, g, O, Q) -> (b g, Q, K, O)
        s = factors[:, part].flatten(4).permute(1, 2, 4, 0, 3).flatten(0, 1)
        yield part, phi.flatten(0, 1).transpose(1, 2), s


def _times_gram(gram: Tensor | None, s: Tensor) -> Tensor:
    """s G in float32 (n, Q, K, O); s itself without a G, which is symmetric."""
    if gram is None:
        return s
    rows = _unflatten(s.float(), 0, (-1, gram.shape[0]))
    return torch.einsum("bgqko,gop->bgqkp", rows, gram.float()).flatten(0, 1)


def _gamma(phi: Tensor, s: Tensor) -> Tensor:
    """s^T phi, (n, K, O, I) in float32."""
    return _unflatten(s.float().flatten(2).transpose(1, 2) @ phi.float(), 1, s.shape[2:])


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
    groups = input.shape[1]
    values = input.new_zeros(factors.shape[:2], dtype=torch.float32)
    saved = input.new_empty((0,), dtype=torch.float32)
    if not (input.numel() and factors.numel()):
        return values, saved
    with triton_launches(input):
        for part, phi, s in _chunks(input, factors, window, form, max_bytes):
            if form == "direct":
                gamma = _gamma(phi, s)
                each = (gamma * _gram_times(gram, gamma)).sum((2, 3))
            else:
                each = _kernels().pair_trace(phi, _times_gram(gram, s), s)
            values[:, part] = _unflatten(each, 0, (-1, groups)).sum(1).T
    return values, saved


def _gram_times(gram: Tensor | None, gamma: Tensor) -> Tensor:
    """G Gamma, (n, K, O, I)."""
    if gram is None:
        return gamma
    return torch.einsum("gop,bgkpi->bgkoi", gram.float(), _unflatten(gamma, 0, (-1, gram.shape[0]))).flatten(
        0, 1
    )


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
    groups, neurons = input.shape[1], factors.shape[3]
    d_input = torch.zeros_like(input) if grad_input else input.new_empty((0,))
    d_factors = torch.zeros_like(factors) if grad_factors else factors.new_empty((0,))
    d_gram = input.new_zeros((groups, neurons, neurons) if grad_gram else (0,), dtype=torch.float32)
    if input.numel() and factors.numel():
        with triton_launches(input):
            for part, phi, s in _chunks(input, factors, window, form, max_bytes):
                upstream = grad[:, part].float().T.repeat_interleave(groups, 0)  # (n, K)
                parts = _direct_backward if form == "direct" else _pairs_backward
                d_phi, d_s, pairs = parts(phi, s, gram, upstream, grad_input, grad_factors, grad_gram)
                if d_phi is not None:
                    columns = _unflatten(d_phi.transpose(1, 2), 0, (-1, groups))
                    _add_patches(columns, d_input[part], window, factors.shape[4:])
                if d_s is not None:
                    back = _unflatten(d_s, 0, (-1, groups)).permute(3, 0, 1, 4, 2)
                    d_factors[:, part] = back.reshape(d_factors[:, part].shape).to(factors.dtype)
                if pairs is not None:
                    d_gram += _unflatten(pairs, 0, (-1, groups)).sum(0)
    return d_input, d_factors, d_gram if gram is None else d_gram.to(gram.dtype)


Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def _pairs_backward(
    phi: Tensor, s: Tensor, gram: Tensor | None, upstream: Tensor, to_phi: bool, to_s: bool, to_gram: bool
) -> Parts:
    """Gradients (n, Q, I), (n, Q, K, O) and of G (n, O, O)."""
    kernels, scale = _kernels(), upstream[:, None, :, None]
    d_phi = d_s = d_gram = None
    if to_s or to_gram:
        e = _unflatten(kernels.chain(phi, phi, s.flatten(2)), 2, s.shape[2:]) * scale
        d_s = 2 * _times_gram(gram, e) if to_s else None
        d_gram = torch.einsum("nqko,nqkp->nop", s.float(), e) if to_gram else None
    if to_phi:
        d_phi = 2 * kernels.chain((_times_gram(gram, s) * scale).flatten(2), s.flatten(2), phi)
    return d_phi, d_s, d_gram


def _direct_backward(
    phi: Tensor, s: Tensor, gram: Tensor | None, upstream: Tensor, to_phi: bool, to_s: bool, to_gram: bool
) -> Parts:
    gamma = _gamma(phi, s)
    scaled = gamma * upstream[:, :, None, None]
    d_gamma = 2 * _gram_times(gram, scaled).flatten(1, 2)  # (n, K O, I)
    d_phi = s.float().flatten(2) @ d_gamma if to_phi else None
    d_s = _unflatten(phi.float() @ d_gamma.transpose(1, 2), 2, s.shape[2:]) if to_s else None
    return d_phi, d_s, torch.einsum("nkoi,nkpi->nop", scaled, gamma) if to_gram else None


def _add_patches(columns: Tensor, d_input: Tensor, window: tuple[Ints, Ints, Ints, Ints], out: Ints) -> None:
    """The transpose of `patches`: columns (b, g, I, Q) are summed into d_input (b, g, C, *in), in float32 first."""
    kernel, stride, padding, dilation = window
    by_offset = _unflatten(_unflatten(columns, 3, out), 2, (d_input.shape[2], -1))
    sums = torch.zeros(d_input.shape, dtype=torch.float32, device=d_input.device)
    for number in range(by_offset.shape[3]):
        source, target, rest, seen = by_offset[:, :, :, number], sums, number, True
        for axis in reversed(range(len(kernel))):
            shift = (
                rest % kernel[axis] * dilation[axis] - padding[axis]
            )  # output q sees input q stride + shift
            rest //= kernel[axis]
            first = max(0, -(shift // stride[axis]))
            last = min(out[axis], (d_input.shape[3 + axis] - 1 - shift) // stride[axis] + 1)
            if first >= last:
                seen = False
                break
            start = first * stride[axis] + shift
            source = source.narrow(3 + axis, first, last - first)
            end = start + (last - first - 1) * stride[axis] + 1
            target = target[(slice(None),) * (3 + axis) + (slice(start, end, stride[axis]),)]
        if seen:
            target += source
    d_input.copy_(sums)


_library: Any = torch.library.Library("fam_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _function in zip(_SCHEMAS, (_forward, _backward), strict=True):
    _library.define(_schema)
    _library.impl(_schema.split("(")[0], _function, "CompositeExplicitAutograd")
register("triton_gram_trace", keeps=False)
