"""The two stable forms in plain PyTorch against the definition Tr(W^T (diag(p) - p p^T) W), value and gradients."""

from __future__ import annotations

import pytest
import torch
from inputs import confident_logits
from torch import Tensor

from fam_ext.ops.reference import softmax_trace as reference

FORMS = ["shifted", "pairwise"]


def definition(z: Tensor, w: Tensor) -> Tensor:
    p = z.softmax(-1)
    covariance = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("...st,si,ti->...", covariance, w, w)


@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradients(form: str) -> None:
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    got, want = reference.softmax_trace(z, w, form), definition(z, w)
    torch.testing.assert_close(got, want)
    upstream = torch.randn(5, dtype=torch.float64)
    for g, e in zip(
        torch.autograd.grad(got, (z, w), upstream), torch.autograd.grad(want, (z, w), upstream), strict=True
    ):
        torch.testing.assert_close(g, e)
    assert torch.autograd.gradcheck(lambda z, w: reference.softmax_trace(z, w, form), (z, w))


@pytest.mark.parametrize("form", FORMS)
def test_confident_rows_in_float32(form: str) -> None:
    """Where max p is 1 - 1e-8 the textbook difference of squares has no digit left."""
    z, _ = confident_logits(20, 6, 1e-8)
    w = torch.randn(6, 7)
    got, want = reference.softmax_trace(z, w, form), definition(z.double(), w.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_shapes(form: str) -> None:
    z, w = torch.randn(2, 4, 3, 5), torch.randn(4, 6)
    got = reference.softmax_trace(z, w, form)
    torch.testing.assert_close(got, definition(z.movedim(1, -1), w), rtol=1e-4, atol=1e-5)
    assert reference.softmax_trace(z[:0], w, form).shape == (0, 3, 5)
    assert reference.softmax_trace(z.bfloat16(), w.bfloat16(), form).dtype == torch.float32
    assert (reference.softmax_trace(z, w[:1].expand(4, 6), form) == 0).all()  # equal rows
    with torch.autocast("cpu"):
        assert torch.equal(reference.softmax_trace(z, w, form), got)


@pytest.mark.parametrize("form", FORMS)
def test_logits_that_are_not_finite(form: str) -> None:
    w = torch.randn(3, 2)
    masked = torch.tensor([[0.0, 1.0, -torch.inf]])
    torch.testing.assert_close(
        reference.softmax_trace(masked, w, form), definition(masked[:, :2], w[:2]), rtol=1e-4, atol=1e-6
    )
    for bad in (torch.nan, torch.inf):
        assert reference.softmax_trace(torch.tensor([[0.0, bad, 1.0]]), w, form).isnan().all()
