"""Gradients that are right to any order for operations whose own are not, put in their place while curvature is taken.

torch differentiates batch_norm (training), layer_norm and instance_norm correctly twice. Their double-backward formulas treat the
saved mean and variance as constants, so a third derivative, which the gradient of kappa is, comes out wrong without a word.
While kappa is formed, a hook on each such autograd node replaces the gradients it returns by the same ones written with means and
variances of its input: every further derivative follows from elementary operations. Forward pass, running statistics and the
backward pass of the plain loss stay torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def _normalization_gradients(
    x: Tensor, weight: Tensor | None, grad: Tensor, rstd: Tensor, dims: list[int], rows: list[int]
) -> Gradients:
    """Gradients of input, weight and bias of y = weight * (x - mean) / sqrt(var + eps) + bias, statistics over `dims`.

    `rstd` is the saved 1 / sqrt(var + eps), a number: with it eps need not be known. `weight` broadcasts to x, and `rows` are the
    dimensions that its gradient is summed over.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    x, grad, rstd = x.to(acc), grad.to(acc), rstd.detach().to(acc)
    centered = x - x.mean(dims, keepdim=True)
    variance = centered.square().mean(dims, keepdim=True)
    inverse_std = (variance + (rstd**-2 - variance.detach())).rsqrt()
    xhat = centered * inverse_std
    upstream = grad if weight is None else grad * weight.to(acc)
    common = upstream.mean(dims, keepdim=True)
    along = (upstream * xhat).mean(dims, keepdim=True)
    dx = inverse_std * (upstream - common - xhat * along)
    if weight is None:
        return dx, None, None
    return dx, (grad * xhat).sum(rows) if rows else grad * xhat, grad.sum(rows) if rows else grad


def batch_norm(node: Any, grad: Tensor) -> Gradients:
    """batch_norm in training mode; instance_norm is one, on reshaped input."""
    x, weight = node._saved_input, node._saved_weight
    by_channel = [-1 if d == 1 else 1 for d in range(x.dim())]
    rows = [d for d in range(x.dim()) if d != 1]
    rstd = node._saved_result2.view(by_channel)
    return _normalization_gradients(
        x, None if weight is None else weight.view(by_channel), grad, rstd, rows, rows
    )


def layer_norm(node: Any, grad: Tensor) -> Gradients:
    x, leading = node._saved_input, node._saved_input.dim() - len(node._saved_normalized_shape)
    dims, rows = list(range(leading, x.dim())), list(range(leading))
    return _normalization_gradients(x, node._saved_weight, grad, node._saved_result2, dims, rows)


def scaled_dot_product_attention(node: Any, grad: Tensor) -> Gradients:
    """The flash kernel of the CPU without dropout, which torch cannot differentiate twice."""
    q, k, v, mask = (
        node._saved_query,
        node._saved_key,
        node._saved_value,
        getattr(node, "_saved_attn_mask", None),
    )
    scale = q.shape[-1] ** -0.5 if node._saved_scale is None else node._saved_scale
    if k.shape[1] != q.shape[1]:  # grouped-query attention: heads of k and v serve several of q
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    else:
        groups = 1
    scores = (q @ k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    if node._saved_is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    p = torch.softmax(scores, -1)
    dv = p.transpose(-2, -1) @ grad
    dp = grad @ v.transpose(-2, -1)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dq, dk = ds @ k, ds.transpose(-2, -1) @ q
    if groups > 1:
        dk, dv = (d.unflatten(1, (-1, groups)).sum(2) for d in (dk, dv))
    return dq, dk, dv


CORRECTED: dict[str, Callable[[Any, Tensor], Gradients]] = {
    "NativeBatchNormBackward0": batch_norm,
    "CudnnBatchNormBackward0": batch_norm,
    "MiopenBatchNormBackward0": batch_norm,
    "NativeLayerNormBackward0": layer_norm,
    "ScaledDotProductFlashAttentionForCpuBackward0": scaled_dot_product_attention,
}


def needs_correction(node: Any) -> bool:
    """Whether torch's own derivatives of this autograd node are wrong or missing from the third order on, and ours are not."""
    name = node.name()
    if name not in CORRECTED:
        return False
    if "BatchNorm" in name:
        return bool(getattr(node, "_saved_training", True))
    return name.startswith("NativeLayerNorm") or node._saved_dropout_p == 0


@contextmanager
def corrected(nodes: Iterable[Any]) -> Iterator[None]:
    """Within the block, gradients through these autograd nodes can be differentiated to any order and are right."""
    handles = []
    for node in nodes:
        formula = CORRECTED[node.name()]

        def replace(
            inputs: Gradients, grads: Gradients, node: Any = node, formula: Any = formula
        ) -> Gradients:
            upstream = grads[0]
            if upstream is None:
                return inputs
            ours = formula(node, upstream)
            ours += (None,) * (len(inputs) - len(ours))
            return tuple(
                None if theirs is None or mine is None else mine.to(theirs.dtype)
                for theirs, mine in zip(inputs, ours, strict=True)
            )

        handles.append(node.register_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
