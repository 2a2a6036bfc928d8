"""Gradients under a loss scale, in the dtypes that need one: no further from float64 than 1.5 times what torch makes of the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerance import relative_error
from torch import Tensor

Loss = Callable[..., Tensor]
SCALES = (1.0, 2.0**10, 65536.0)
# of a mean cross-entropy of 2.6e-4, 9e-6 and 3e-7
GAPS = (8.25, 11.6, 15.0)


def confident_head(
    rows: int, classes: int, fan_in: int, gap: float, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """(logits, features, weight) and targets, every row's target above all other classes by about `gap`, the others' share in sum."""
    target = torch.arange(rows) % classes
    logits = torch.randn(rows, classes) / 4
    logits[torch.arange(rows), target] = gap + math.log(classes - 1)
    return [t.to(dtype) for t in (logits, torch.randn(rows, fan_in), torch.randn(classes, fan_in))], target


def scaled_gradients(loss: Loss, inputs: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Gradients of scale * loss, divided by scale in float64."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(loss(*inputs) * scale, inputs, materialize_grads=True)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    return [g.double() / scale for g in grads]


def assert_scales_like_torch(loss: Loss, plain: Loss, inputs: Sequence[Tensor], scales: Any = SCALES) -> None:
    """`plain` is the same in plain PyTorch, for any dtype."""
    exact = scaled_gradients(plain, [t.double() for t in inputs], 1.0)
    for scale in scales:
        ours, torchs = (scaled_gradients(f, inputs, scale) for f in (loss, plain))
        for k, (a, b, value) in enumerate(zip(ours, torchs, exact, strict=True)):
            error, allowed = relative_error(a, value), 1.5 * relative_error(b, value) + 1e-6
            assert error <= allowed, (
                f"input {k} at scale {scale:g}: error {error:.2e}, torch's own {allowed / 1.5:.2e}"
            )
