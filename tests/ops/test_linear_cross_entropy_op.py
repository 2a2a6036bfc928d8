"""linear_cross_entropy as an operation: shapes are asked again, gradients come once, with row factors for reduction="none"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import needs_native

from fam_ext.ops._linear_cross_entropy_op import check_shapes, linear_cross_entropy
from fam_ext.ops._linear_cross_entropy_targets import MEAN, NONE
from fam_ext.ops.reference.linear_cross_entropy import linear_cross_entropy as reference

x, w, bias = torch.randn(2, 3, 4).double(), torch.randn(5, 4).double(), torch.randn(5).double()
y, omega = torch.tensor([[0, 4, -100], [2, 2, 1]]), torch.rand(5).double()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": x.long()}, TypeError, "linear_cross_entropy: input"),
        ({"weight": w[0]}, ValueError, "weight must be of shape .V, I. with at least one class"),
        ({"weight": w[:0]}, ValueError, "at least one class"),
        ({"input": x[..., :3]}, ValueError, r"input must be of shape .\*rows, 4."),
        ({"target": y.int()}, TypeError, "target must be an int64 tensor"),
        ({"target": y[0]}, ValueError, r"target must be of shape \(2, 3\)"),
        ({"row_scale": omega}, ValueError, r"row_scale must be of shape \(2, 3\)"),
        ({"row_scale": y}, TypeError, "row_scale"),
        ({"bias": bias[:2]}, ValueError, "linear_cross_entropy: bias"),
        ({"class_weight": omega[:2]}, ValueError, "linear_cross_entropy: class_weight"),
    ],
)
def test_shapes(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": x, "weight": w, "bias": bias, "target": y, "class_weight": omega} | changed
    with pytest.raises(error, match=message):
        check_shapes(**given)
    check_shapes(x, w, None, y, None, torch.ones(2, 3))


@needs_native
@pytest.mark.parametrize("reduction", [MEAN, NONE])
def test_values_and_gradients(reduction: int) -> None:
    """Upstream gradients of rows are known in the backward pass only: they are factors of the rows there."""
    options = (-100, 0.1, reduction, 0.3, True, 2**27, False, False, 2)
    tensors = [t.clone().requires_grad_() for t in (x, w, bias)]
    got = linear_cross_entropy(tensors[0], tensors[1], tensors[2], y, omega, *options)
    name = "none" if reduction == NONE else "mean"
    want = reference(tensors[0], tensors[1], y, tensors[2], omega, -100, 0.1, name, 0.3, True)
    torch.testing.assert_close(got, want)
    assert not got[1].requires_grad
    upstream = torch.rand_like(got[0])
    gradients = [torch.autograd.grad(v[0], tensors, upstream, retain_graph=True) for v in (got, want)]
    for g, e in zip(*gradients, strict=True):
        torch.testing.assert_close(g, e)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        (again,) = torch.autograd.grad(got[0], tensors[:1], upstream, create_graph=True)
        again.sum().backward()


@needs_native
def test_gradients_are_made_where_something_requires_them() -> None:
    operator = torch.ops.fam_ext.linear_cross_entropy
    made = operator(
        x, w, bias, y, None, None, -100, 0.0, MEAN, 0.3, True, 2**27, False, False, 2, False, True, False
    )
    assert [t.numel() for t in made[2:]] == [0, w.numel(), 0]
    meta = operator(
        *(t.to("meta") for t in (x, w, bias, y)), None, None, -100, 0.0, NONE, 0.3, True, 2**27, False, False, 2, True, True,
        False,
    )  # fmt: skip
    assert [tuple(t.shape) for t in meta] == [(2, 3), (2, 3), (2, 3, 4), (5, 4), (0,)]
