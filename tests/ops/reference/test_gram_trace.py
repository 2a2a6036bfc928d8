"""gram_trace in plain PyTorch: both forms against Gamma of every sample by autograd, and the patches of a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.ops.reference.gram_trace import gram_trace, patches

WINDOW = ((2, 3), (2, 1), (1, 0), (1, 2))  # kernel, stride, padding before, dilation


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """input (B, g, C, *in), factors (K, B, g, O, *out) and W (g O, C, *kernel)."""
    x = torch.randn(2, 2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    z = F.conv2d(x.flatten(1, 2), w, None, WINDOW[1], WINDOW[2], WINDOW[3], groups=2)
    factors = torch.randn(3, 2, 2, 3, *z.shape[2:], dtype=torch.float64, requires_grad=True)
    return x, factors, w


def definition(x: Tensor, factors: Tensor, w: Tensor, weighted: bool) -> Tensor:
    """|W^T Gamma_ik|_F^2 by group, Gamma_ik the gradient of <s_ik, z_i> by the weight."""
    gram = w.flatten(1).reshape(2, 3, -1)
    gram = gram @ gram.transpose(1, 2)
    values = []
    for s in factors:
        for i in range(len(x)):
            each = w.detach().clone().requires_grad_()
            z = F.conv2d(x[i : i + 1].flatten(1, 2), each, None, WINDOW[1], WINDOW[2], WINDOW[3], groups=2)
            (gamma,) = torch.autograd.grad((z[0] * s[i].flatten(0, 1)).sum(), each, create_graph=True)
            gamma = gamma.flatten(1).reshape(2, 3, -1)
            values.append((gamma * (gram @ gamma if weighted else gamma)).sum())
    return torch.stack(values).reshape(len(factors), len(x))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("form", ["direct", "gram_patches"])
def test_both_forms(form: str, weighted: bool) -> None:
    x, s, w = problem()
    rows = w.flatten(1).reshape(2, 3, -1)
    got = gram_trace(x, s, rows @ rows.transpose(1, 2) if weighted else None, *WINDOW, form)
    want = definition(x, s, w, weighted)
    torch.testing.assert_close(got, want)
    tensors = (x, s, w) if weighted else (x, s)
    upstream = torch.randn_like(got)
    for g, e in zip(*(torch.autograd.grad(v, tensors, upstream) for v in (got, want)), strict=True):
        torch.testing.assert_close(g, e)


def test_patches() -> None:
    """Those of F.unfold, with more zeros behind the input where the output positions need them."""
    x = torch.randn(2, 1, 3, 5, 6)
    kernel, stride, padding, dilation = WINDOW
    unfolded = F.unfold(x.flatten(1, 2), kernel, dilation, padding, stride)
    out = (3, 2)
    assert torch.equal(patches(x, kernel, stride, padding, dilation, out), unfolded.reshape(2, 1, -1, 6))
    behind = patches(torch.ones(1, 1, 1, 3), (2,), (1,), (0,), (1,), (3,))
    assert behind[0, 0].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert patches(x, kernel, stride, padding, dilation, (0, 2)).shape == (2, 1, 18, 0)


def test_sums_are_formed_in_float32_at_least() -> None:
    x, s = torch.randn(1, 1, 40, 9).bfloat16(), torch.randn(1, 1, 1, 3, 9).bfloat16()
    got = gram_trace(x, s, None, (1,), (1,), (0,), (1,), "direct")
    want = gram_trace(x.double(), s.double(), None, (1,), (1,), (0,), (1,), "direct")
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
