"""patch_sqnorm: squared norm of the patch that each output position of a convolution sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops import backends
from fam_ext.ops._conv_args import PADDING_MODES, Ints, check_extent, check_groups, pad, padding_of, per_axis
from fam_ext.ops._registration import refuse_double_backward, register_fake
from fam_ext.ops.reference import patch_sqnorm as reference

_NAME = "patch_sqnorm"


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
        kernel_size, stride, dilation: one integer, or one per spatial axis; these and the padding at most 2**24.
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

    >>> patch_sqnorm(torch.ones(1, 2, 4), 3, padding=1)  # 2 channels, 2 or 3 positions inside the input
    tensor([[[4., 6., 6., 4.]]])
    >>> patch_sqnorm(torch.tensor([[3.0, 4.0]]), ())  # a row of a linear layer
    tensor([[25.]])
    """
    _checks.check_floating(_NAME, "input", input)
    if not 2 <= input.dim() <= 5:
        _checks.bad_value(_NAME, "input", "(B, C, *spatial) with 1 to 3 spatial axes, or rows (N, I)", input)
    rank = input.dim() - 2
    if rank == 0 and isinstance(kernel_size, int):
        expected = "() for rows (N, I); unsqueeze(0) an unbatched (C, L) input"
        _checks.bad_value(_NAME, "kernel_size", expected, kernel_size)
    kernel = per_axis(_NAME, "kernel_size", kernel_size, rank, 1)
    strides = per_axis(_NAME, "stride", stride, rank, 1)
    dilations = per_axis(_NAME, "dilation", dilation, rank, 1)
    check_groups(_NAME, groups, input.shape[1], "channels")
    _checks.check_choice(_NAME, "padding_mode", padding_mode, PADDING_MODES)
    before, after = padding_of(_NAME, padding, kernel, strides, dilations)
    check_extent(_NAME, "kernel_size", input, kernel, dilations, before, after, padding_mode)
    chosen = backends.choose(_NAME, backend, input)

    if padding_mode != "zeros" and any(after):
        input = pad(input, before, after, padding_mode)
        before = after = (0,) * rank
    op = torch.ops.fam_ext.patch_sqnorm if chosen == "native" else reference.patch_sqnorm
    out: Tensor = op(input, kernel, strides, after, dilations, groups)
    for axis, (p, q) in enumerate(zip(before, after, strict=True), start=2):
        if p != q:  # "same", odd total: with q in front, too, there are q - p positions too many
            out = out.narrow(axis, q - p, out.shape[axis] - (q - p))
    return out


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
