"""kernel_size, stride, padding, dilation and groups as torch reads them, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fam_ext.ops import _conv_args as args


def test_one_integer_per_axis() -> None:
    assert args.per_axis("f", "stride", 2, 3, 1) == (2, 2, 2)
    assert args.per_axis("f", "stride", [1, 2], 2, 1) == (1, 2)
    assert args.per_axis("f", "padding", 0, 1, 0) == (0,)
    assert args.per_axis("f", "stride", 2, 0, 1) == ()  # no spatial axis; the value is checked all the same


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((1, 2, 3), ValueError, "f: stride must be an integer or 2 integers, one per spatial axis"),
        ("2", TypeError, "an integer or 2 integers"),
        (True, TypeError, "an integer or 2 integers"),
        ((1, 2.0), TypeError, "made of integers"),
        ((1, True), TypeError, "made of integers"),
        ((1, 0), ValueError, "at least 1"),
        (-3, ValueError, "at least 1"),
        (2**24 + 1, ValueError, "at most 16777216"),
    ],
)
def test_what_is_no_such_argument(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        args.per_axis("f", "stride", value, 2, 1)
    if value == -3:
        with pytest.raises(ValueError, match="at least 1"):
            args.per_axis("f", "stride", value, 0, 1)


def test_groups() -> None:
    args.check_groups("f", 3, 6, "channels")
    for groups, error in ((4, ValueError), (0, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match="f: groups must be"):
            args.check_groups("f", groups, 6, "channels")
    with pytest.raises(ValueError, match="a positive divisor of the 6 channels"):
        args.check_groups("f", 4, 6, "channels")


@pytest.mark.parametrize("kernel", [(1, 2), (3, 4), (5, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_same_is_torch_s(kernel: tuple[int, int], dilation: int) -> None:
    before, after = args.padding_of("f", "same", kernel, (1, 1), (dilation,) * 2)
    layer = nn.Conv2d(1, 1, kernel, padding="same", dilation=dilation)
    assert [p for pair in zip(before, after, strict=True) for p in reversed(pair)] == list(
        reversed(layer._reversed_padding_repeated_twice)
    )


def test_padding() -> None:
    assert args.padding_of("f", "valid", (3,), (2,), (1,)) == ((0,), (0,))
    assert args.padding_of("f", (1, 0), (3, 3), (2, 2), (1, 1)) == ((1, 0), (1, 0))
    with pytest.raises(ValueError, match="f: stride must be 1 with padding='same'"):
        args.padding_of("f", "same", (3,), (2,), (1,))
    with pytest.raises(ValueError, match="f: padding must be"):
        args.padding_of("f", "full", (3,), (1,), (1,))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_what_is_refused_is_what_torch_refuses(mode: str) -> None:
    """Kernels larger than the padded input, and padding larger than its mode allows."""
    for size in (1, 2, 4):
        for kernel in (1, 3, 5):
            for padding in (0, 1, 2, 4):
                x = torch.randn(1, 1, size)
                layer = nn.Conv1d(1, 1, kernel, padding=padding, padding_mode=mode)
                try:
                    layer(x)
                    fine = True
                except RuntimeError:
                    fine = False
                try:
                    args.check_extent("f", "input", x, (kernel,), (1,), (padding,), (padding,), mode)
                    ours = True
                except ValueError as error:
                    assert "f: input must be small enough" in str(
                        error
                    ) or "f: padding must be at most" in str(error)
                    ours = False
                assert ours == fine, (size, kernel, padding)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pad(mode: str) -> None:
    x = torch.randn(2, 3, 4, 5).bfloat16()
    padded = args.pad(x, (1, 2), (0, 1), mode)
    assert padded.shape == (2, 3, 5, 8) and padded.dtype == torch.float32
    assert torch.equal(padded[:, :, 1:, 2:7], x.float())
    first = {"reflect": x[:, :, :, 1], "replicate": x[:, :, :, 0], "circular": x[:, :, :, 4]}[mode]
    assert torch.equal(padded[:, :, 1:, 1], first.float())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pad_without_channels_or_samples(mode: str) -> None:
    for shape in ((2, 0, 5), (0, 0, 5, 5), (0, 3, 5), (2, 0, 4, 5, 6)):
        ones = (1,) * (len(shape) - 2)
        padded = args.pad(torch.randn(shape), ones, ones, mode)
        assert padded.shape == (*shape[:2], *(size + 2 for size in shape[2:]))
