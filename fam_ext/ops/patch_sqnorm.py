"""patch_sqnorm: squared norm of the patch that each output position of a convolution sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext import _checks, backends
from fam_ext.ops._native import refuse_double_backward, register_fake
from fam_ext.reference import patch_sqnorm as reference
from fam_ext.reference.softmax_trace import accumulation_dtype

_NAME = "patch_sqnorm"
Ints = tuple[int, ...]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def patch_sqnorm(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    backend: str = "auto",
) -> Tensor:
    """Squared norm of the input patch at every output position of a convolution, patches never materialised.

    out[b, g, pos] = sum_{c in group g} sum_{j in kernel} x[b, c, pos * stride - padding + j * dilation]^2

    This is the factor ||phi||^2 in the curvature of a layer with respect to its weight (Petzka et al. 2021,
    arXiv 2001.00939). The arguments mean what they mean for torch.nn.Conv1d, Conv2d and Conv3d.

    Args:
        input: (B, C, *spatial) with 1 to 3 spatial axes, any strides, float32, float64, bfloat16 or float16,
            or the rows (N, I) of a linear layer with kernel_size=(). A single sample is input.unsqueeze(0).
        kernel_size, stride, dilation: one integer, or one per spatial axis.
        padding: one integer or one per spatial axis, "valid", or "same" (stride 1; the larger half of an odd
            total comes last).
        groups: channel groups; each has its own norm.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        backend: "auto", "reference" or "native".

    Returns:
        (B, groups, *out), or (N, groups) for rows; float64 for a float64 input, else float32. The native
        backend can be differentiated once.

    Raises:
        TypeError, ValueError: an argument of a wrong type, rank or range; a kernel beyond the padded input.
        RuntimeError: a backend asked for by name that is not available.
    """
    _checks.check_floating(_NAME, "input", input)
    if not 2 <= input.dim() <= 5:
        _checks.bad_value(_NAME, "input", "(B, C, *spatial) with 1 to 3 spatial axes, or rows (N, I)", input)
    rank = input.dim() - 2
    if rank == 0 and isinstance(kernel_size, int):
        expected = "() for rows (N, I); unsqueeze(0) an unbatched (C, L) input"
        _checks.bad_value(_NAME, "kernel_size", expected, kernel_size)
    kernel = _per_axis("kernel_size", kernel_size, rank, 1)
    strides = _per_axis("stride", stride, rank, 1)
    dilations = _per_axis("dilation", dilation, rank, 1)
    if isinstance(groups, bool) or not isinstance(groups, int):
        _checks.bad_type(_NAME, "groups", "an integer", groups)
    if groups < 1 or input.shape[1] % groups:
        _checks.bad_value(
            _NAME, "groups", f"a positive divisor of the {int(input.shape[1])} channels", groups
        )
    _checks.check_choice(_NAME, "padding_mode", padding_mode, _PADDING_MODES)
    before, after = _padding(padding, kernel, strides, dilations)
    _check_extent(input, kernel, dilations, before, after, padding_mode)
    chosen = backends.choose(_NAME, backend, input)

    if padding_mode != "zeros" and any(after):
        pairs = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
        input = F.pad(input, pairs, mode=padding_mode)
        before = after = (0,) * rank
    op = torch.ops.fam_ext.patch_sqnorm if chosen == "native" else reference.patch_sqnorm
    out: Tensor = op(input, kernel, strides, after, dilations, groups)
    for axis, (p, q) in enumerate(zip(before, after, strict=True), start=2):
        if p != q:  # "same", odd total: with q in front, too, there are q - p positions too many
            out = out.narrow(axis, q - p, out.shape[axis] - (q - p))
    return out


def _per_axis(argument: str, value: int | Sequence[int], rank: int, minimum: int) -> Ints:
    """`value` as one integer per spatial axis, each at least `minimum`."""
    if isinstance(value, int) and not isinstance(value, bool):
        values: Ints = (value,) * max(rank, 1)
    elif isinstance(value, (tuple, list)):
        values = tuple(value)
        if len(values) != rank:
            _checks.bad_value(_NAME, argument, f"an integer or {rank} integers, one per spatial axis", value)
    else:
        _checks.bad_type(_NAME, argument, f"an integer or {rank} integers", value)
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        _checks.bad_type(_NAME, argument, "made of integers", value)
    if any(v < minimum for v in values):
        _checks.bad_value(_NAME, argument, f"at least {minimum}", value)
    return values[:rank]


def _padding(
    padding: str | int | Sequence[int], kernel: Ints, stride: Ints, dilation: Ints
) -> tuple[Ints, Ints]:
    """Padding before and after each spatial axis, as torch.nn.ConvNd reads its argument."""
    if not isinstance(padding, str):
        both = _per_axis("padding", padding, len(kernel), 0)
        return both, both
    _checks.check_choice(_NAME, "padding", padding, ("same", "valid"))
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if any(s != 1 for s in stride):
        _checks.bad_value(_NAME, "stride", "1 with padding='same'", stride)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def _check_extent(input: Tensor, kernel: Ints, dilation: Ints, before: Ints, after: Ints, mode: str) -> None:
    """Raise ValueError where the kernel exceeds the padded input, or the padding what its mode allows."""
    for axis, (size, k, d) in enumerate(zip(input.shape[2:], kernel, dilation, strict=True)):
        extent, padded = d * (k - 1) + 1, size + before[axis] + after[axis]
        if extent > padded:
            expected = (
                f"small enough for the padded input (spatial axis {axis}: extent {extent}, size {padded})"
            )
            _checks.bad_value(_NAME, "kernel_size", expected, kernel)
        limit = {"reflect": size - 1, "circular": size, "replicate": after[axis] if size else 0}.get(mode)
        if limit is not None and after[axis] > limit:
            _checks.bad_value(
                _NAME, "padding", f"at most {limit} along spatial axis {axis} with {mode!r}", after
            )


def _register() -> None:
    @register_fake("patch_sqnorm")
    def _(input: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
        axes = zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
        out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes]
        acc = accumulation_dtype(input)
        if groups > 1 and input.movedim(1, -1).is_contiguous() and not input.is_contiguous():
            # channels last stays channels last
            return input.new_empty((input.shape[0], *out, groups), dtype=acc).movedim(-1, 1)
        return input.new_empty((input.shape[0], groups, *out), dtype=acc)

    @register_fake("patch_sqnorm_backward")
    def _(grad: Tensor, input: Tensor, *arguments: Any) -> Tensor:
        return torch.empty_like(input)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.arguments = inputs[1:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        dx = torch.ops.fam_ext.patch_sqnorm_backward(grad, input, *ctx.arguments)
        return dx, None, None, None, None, None

    torch.library.register_autograd("fam_ext::patch_sqnorm", backward, setup_context=setup_context)
    refuse_double_backward("patch_sqnorm_backward")


if backends.native_loaded():
    _register()
