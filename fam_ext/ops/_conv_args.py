"""What the operations on convolutions share: kernel_size, stride, padding and dilation as torch.nn.ConvNd reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype

Ints = tuple[int, ...]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
# The largest kernel size, stride, padding and dilation: far above any layer's, and the product of two fits in 64 bits.
# csrc/patch_windows.h has the same number.
LIMIT = 2**24


def per_axis(function: str, argument: str, value: int | Sequence[int], rank: int, minimum: int) -> Ints:
    """`value` as one integer per spatial axis, each from `minimum` to LIMIT."""
    if isinstance(value, int) and not isinstance(value, bool):
        values: Ints = (value,) * max(rank, 1)
    elif isinstance(value, (tuple, list)):
        values = tuple(value)
        if len(values) != rank:
            _checks.bad_value(
                function, argument, f"an integer or {rank} integers, one per spatial axis", value
            )
    else:
        _checks.bad_type(function, argument, f"an integer or {rank} integers", value)
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        _checks.bad_type(function, argument, "made of integers", value)
    if any(v < minimum for v in values):
        _checks.bad_value(function, argument, f"at least {minimum}", value)
    if any(v > LIMIT for v in values):
        _checks.bad_value(function, argument, f"at most {LIMIT}", value)
    return values[:rank]


def check_groups(function: str, groups: int, total: int, of: str) -> None:
    """Raise TypeError or ValueError unless `groups` is a positive integer that divides `total`."""
    if isinstance(groups, bool) or not isinstance(groups, int):
        _checks.bad_type(function, "groups", "an integer", groups)
    if groups < 1 or total % groups:
        _checks.bad_value(function, "groups", f"a positive divisor of the {int(total)} {of}", groups)


def padding_of(
    function: str, padding: str | int | Sequence[int], kernel: Ints, stride: Ints, dilation: Ints
) -> tuple[Ints, Ints]:
    """Padding before and after each spatial axis, as torch.nn.ConvNd reads its argument."""
    if not isinstance(padding, str):
        both = per_axis(function, "padding", padding, len(kernel), 0)
        return both, both
    _checks.check_choice(function, "padding", padding, ("same", "valid"))
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if any(s != 1 for s in stride):
        _checks.bad_value(function, "stride", "1 with padding='same'", stride)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def check_extent(
    function: str,
    argument: str,
    input: Tensor,
    kernel: Ints,
    dilation: Ints,
    before: Ints,
    after: Ints,
    mode: str,
) -> None:
    """Raise ValueError where the kernel exceeds the padded input, or the padding what its mode allows."""
    for axis, (size, k, d) in enumerate(zip(input.shape[2:], kernel, dilation, strict=True)):
        extent, padded = d * (k - 1) + 1, size + before[axis] + after[axis]
        if extent > padded:
            expected = (
                f"small enough for the padded input (spatial axis {axis}: extent {extent}, size {padded})"
            )
            _checks.bad_value(function, argument, expected, kernel)
        limit = {"reflect": size - 1, "circular": size, "replicate": after[axis] if size else 0}.get(mode)
        if limit is not None and after[axis] > limit:
            _checks.bad_value(
                function, "padding", f"at most {limit} along spatial axis {axis} with {mode!r}", after
            )


def pad(input: Tensor, before: Ints, after: Ints, mode: str) -> Tensor:
    """`input` padded in a mode other than zeros, in the accumulation dtype.

    An input position may stand in several places of the result: in bfloat16 the sum of its gradients would lose digits.
    """
    pairs = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    if input.shape[1] == 0:  # torch pads no tensor without channels but by a constant
        mode = "constant"
    return F.pad(input.to(accumulation_dtype(input)), pairs, mode=mode)
