"""Checks of operations that return (loss, flatness) with gradients made in the forward pass, which tests of several share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Operation = Callable[..., tuple[Tensor, Tensor]]
"""Of the tensors that are differentiated."""

COMPILERS = pytest.mark.parametrize(
    ("compiler", "dynamic", "reduction"),
    [
        ("aot_eager", False, "mean"),
        ("aot_eager", True, "mean"),
        ("aot_eager", False, "none"),
        ("aot_eager", True, "none"),
        pytest.param("inductor", False, "mean", marks=pytest.mark.slow),
    ],
)


def assert_partial_grads(
    run: Operation, inputs: Sequence[Tensor], needs: Sequence[bool], same_bits: bool = False
) -> None:
    """The values and the gradients that are asked for do not depend on what else is asked for."""
    whole = [t.detach().requires_grad_() for t in inputs]
    loss, flatness = run(*whole)
    expected = torch.autograd.grad(loss.sum(), whole)
    fewer = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    result, same = run(*fewer)
    tolerance = {"rtol": 0.0, "atol": 0.0} if same_bits else {}
    torch.testing.assert_close((result, same), (loss, flatness), **tolerance)
    assert result.requires_grad == any(needs) and not same.requires_grad
    if any(needs):
        result.sum().backward()
    for tensor, need, grad in zip(fewer, needs, expected, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, grad)


def assert_transforms(run: Operation, inputs: Sequence[Tensor]) -> None:
    """torch.func's grad and vmap over the first input give the ordinary values and gradients."""
    alone = lambda *t: run(*t)[0]  # noqa: E731
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = alone(*leaves)
    expected, plain = torch.autograd.grad(loss, leaves), [t.detach() for t in inputs]
    torch.testing.assert_close(torch.func.grad(alone, argnums=(0, 1, 2))(*plain), expected)
    batched = torch.func.vmap(alone, in_dims=(0, None, None))(torch.stack([plain[0], -plain[0]]), *plain[1:])
    torch.testing.assert_close(batched, torch.stack([loss, alone(-plain[0], *plain[1:])]))


def assert_autocast_changes_nothing(run: Operation, inputs: Sequence[Tensor]) -> None:
    """Bits of both results under autocast, which are float32."""
    plain = run(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(*inputs)
        mixed[0].backward()
    assert mixed[0].dtype == mixed[1].dtype == torch.float32
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[1], plain[1])
