"""Windows of a convolution: patches, their transpose and their inner products, against F.unfold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.ops._gram_windows import Windows, product_like

pytestmark = pytest.mark.on_devices

WINDOWS: list[Any] = [  # kernel, stride, padding, dilation
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((2, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 2), (2, 1), (0, 2), (1, 2)),
    ((1, 2), (1, 3), (0, 0), (1, 1)),
    ((4, 1), (1, 1), (3, 0), (2, 1)),
]


def problem(window: Any) -> tuple[Windows, Tensor, Tensor]:
    """Windows, x (b, g, C, *in), and its patches (b, g, I, Q) in their order by F.unfold."""
    kernel, stride, padding, dilation = window
    x = torch.randn(2, 3, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    columns = F.unfold(x.flatten(0, 1), kernel, dilation, padding, stride)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip((5, 6), *window, strict=True)]
    assert len(out) == 2
    return (
        Windows((5, 6), out, kernel, stride, padding, dilation),
        x,
        columns.reshape(2, 3, -1, columns.shape[-1]),
    )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_patches_and_their_transpose(window: Any) -> None:
    windows, x, expected = problem(window)
    assert torch.equal(windows.patches(x.detach()), expected)
    assert windows.pointwise == (window == WINDOWS[0])
    if windows.pointwise:
        return
    columns = torch.randn_like(expected)
    dx = torch.randn(x.shape, dtype=torch.float64)
    before = dx.clone()
    windows.add_patches(columns, dx)
    torch.testing.assert_close(dx - before, torch.autograd.grad(expected, x, columns)[0])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_products_of_patches(window: Any) -> None:
    windows, x, patches = problem(window)
    pairs = (patches.transpose(2, 3) @ patches).flatten(0, 1)
    torch.testing.assert_close(windows.pairs(x.detach()), pairs)
    upstream = torch.randn_like(pairs)
    upstream = upstream + upstream.transpose(1, 2)
    (expected,) = torch.autograd.grad(pairs, x, upstream / 2)
    got = windows.pairs_backward(upstream.contiguous(), x.detach())
    torch.testing.assert_close(got.reshape(x.shape), expected)


def test_no_output_positions() -> None:
    windows = Windows((3,), (0,), (2,), (1,), (0,), (1,))
    assert windows.patches(torch.ones(1, 1, 2, 3)).shape == (1, 1, 4, 0)


def test_a_product_in_the_layout_of_another_tensor() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    for like in (torch.empty(2, 3, 5), torch.empty(2, 5, 3).transpose(1, 2)):
        product = product_like(a, b, like)
        torch.testing.assert_close(product, a @ b)
        assert product.stride() == like.stride()
