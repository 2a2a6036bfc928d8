"""kappa of positive forms from its definition: Tr((W W^T kron 1) J^T M J) with dense J by torch.func.jacrev, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fam_ext.layers.linear_map import LinearMap


def quadratic_form(
    layer: nn.Module,
    tail: Callable[[Tensor], Tensor],
    x: Tensor,
    matrix: Callable[[Tensor], Tensor],
    weighted: bool = True,
) -> Tensor:
    """sum_kl M_kl <G J_k, J_l>: J_k the gradient of the k-th output by the weight, M (K, K) of the outputs, differentiable."""
    layer_map = LinearMap("test", layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]

    def outputs(w: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.func.functional_call(layer, {"weight": w}, (x,))
        f = tail(z)
        return f.flatten(), f

    jacobian, f = torch.func.jacrev(outputs, has_aux=True)(weight)
    rows = torch.stack([layer_map.canonical(j) for j in jacobian])  # (K, groups, n, I)
    w = layer_map.canonical(weight)
    moved = w @ w.transpose(1, 2) @ rows if weighted else rows
    return torch.einsum("kgsi,kl,lgsi->", moved, matrix(f), rows)


def of_loss(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The Hessian of the loss by its input as M."""

    def matrix(f: Tensor) -> Tensor:
        second: Tensor = torch.func.hessian(loss)(f)
        return second.reshape(f.numel(), f.numel())

    return matrix


def compare(value: Tensor, expected: Tensor, tensors: Sequence[Tensor], rtol: float = 1e-9) -> None:
    """Values, and gradients by `tensors`, of which at least one is not zero."""
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-13)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    got, want = (torch.autograd.grad(v, list(tensors), **options) for v in (value, expected))
    assert any(bool((w != 0).any()) for w in want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11)
