"""Gradients that are right to any order for operations whose own are not, put in their place while curvature is taken.

torch differentiates batch_norm (training), layer_norm and instance_norm correctly twice. Their double-backward formulas treat the
saved mean and variance as constants, so a third derivative, which the gradient of kappa is, comes out wrong without a word.
group_norm is right, but where several products are taken at once (vmap) it raises, or is silently wrong where dimensions happen
to be equal. hardsigmoid and flash attention have no second derivative at all. log_softmax over a vocabulary is right but slow.

While kappa is formed, a hook on each such autograd node replaces the gradients it returns by the same ones written with
elementary operations, from which every further derivative follows. Forward pass, running statistics and the backward pass of
the plain loss stay torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fam_ext.derivatives import log_softmax

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
    if rows:
        return dx, (grad * xhat).sum(rows), grad.sum(rows)
    return dx, grad * xhat, grad


def batch_norm(saved: Any, grad: Tensor) -> Gradients:
    """batch_norm in training mode; instance_norm is one, on reshaped input."""
    x, weight = saved.input, saved.weight
    by_channel = [-1 if d == 1 else 1 for d in range(x.dim())]
    rows = [d for d in range(x.dim()) if d != 1]
    rstd = saved.result2.view(by_channel)
    return _normalization_gradients(
        x, None if weight is None else weight.view(by_channel), grad, rstd, rows, rows
    )


def layer_norm(saved: Any, grad: Tensor) -> Gradients:
    x, leading = saved.input, saved.input.dim() - len(saved.normalized_shape)
    dims, rows = list(range(leading, x.dim())), list(range(leading))
    return _normalization_gradients(x, saved.weight, grad, saved.result2, dims, rows)


def group_norm(saved: Any, grad: Tensor) -> Gradients:
    x, weight = saved.input, saved.weight
    grouped = (x.shape[0], saved.group, x.shape[1] // saved.group, -1)
    dx, dweight, dbias = _normalization_gradients(
        x.reshape(grouped),
        None if weight is None else weight.view(1, grouped[1], grouped[2], 1),
        grad.reshape(grouped),
        saved.result2.view(*grouped[:2], 1, 1),
        [2, 3],
        [0, 3],
    )
    assert dx is not None and dweight is not None and dbias is not None
    return dx.reshape(x.shape), dweight.flatten(), dbias.flatten()


def hardsigmoid(saved: Any, grad: Tensor) -> Gradients:
    x = saved.self
    return (grad * ((x > -3) & (x < 3)) / 6,)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(scale q k^T + mask), (B, heads, queries, keys); 0 for a query that sees no key. Differentiable to any order."""
    scores = (q @ k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    empty = scores.detach().amax(-1, keepdim=True) == -torch.inf
    return torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)


def scaled_dot_product_attention(saved: Any, grad: Tensor) -> Gradients:
    """The flash kernel of the CPU without dropout, (B, heads, tokens, width)."""
    acc = torch.promote_types(grad.dtype, torch.float32)
    q, k, v, grad = saved.query.to(acc), saved.key.to(acc), saved.value.to(acc), grad.to(acc)
    scale = q.shape[-1] ** -0.5 if saved.scale is None else saved.scale
    of_keys = k.shape
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # grouped-query attention: heads of k and v serve several of q
        k, v = (
            t.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(q.shape[:2] + t.shape[2:]) for t in (k, v)
        )
    p = attention_weights(q, k, saved.attn_mask, saved.is_causal, scale)
    dv = p.transpose(-2, -1) @ grad
    dp = grad @ v.transpose(-2, -1)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dq, dk = ds @ k, ds.transpose(-2, -1) @ q
    if groups > 1:
        by_head = (*of_keys[:2], groups, *of_keys[2:])
        dk, dv = dk.reshape(by_head).sum(2), dv.reshape(by_head).sum(2)
    return dq, dk, dv


class Correction(NamedTuple):
    """A formula for the gradients of a node's inputs, and the names of what it needs of what the node saved."""

    formula: Callable[[Any, Tensor], Gradients]
    saved: tuple[str, ...]


_BATCH_NORM = Correction(batch_norm, ("input", "weight", "result2"))
CORRECTED: dict[str, Correction] = {
    "NativeBatchNormBackward0": _BATCH_NORM,
    "CudnnBatchNormBackward0": _BATCH_NORM,
    "MiopenBatchNormBackward0": _BATCH_NORM,
    "NativeLayerNormBackward0": Correction(layer_norm, ("input", "weight", "normalized_shape", "result2")),
    "NativeGroupNormBackward0": Correction(group_norm, ("input", "weight", "group", "result2")),
    "HardsigmoidBackward0": Correction(hardsigmoid, ("self",)),
    "ScaledDotProductFlashAttentionForCpuBackward0": Correction(
        scaled_dot_product_attention, ("query", "key", "value", "attn_mask", "scale", "is_causal")
    ),
}
# torch's are right, and slow on a matrix that leaves the cache
FASTER: dict[str, Correction] = {"LogSoftmaxBackward0": Correction(log_softmax.gradient, ("result",))}
REPLACED = {**CORRECTED, **FASTER}


def needs_correction(node: Any) -> bool:
    """Whether torch's derivatives of this autograd node are wrong, missing or slow from the third order on, and ours are not."""
    name = node.name()
    if name not in REPLACED:
        return False
    if name in FASTER:
        return log_softmax.pays(node)
    if "BatchNorm" in name:
        return bool(getattr(node, "_saved_training", True))
    return not (name.startswith("ScaledDotProduct") and node._saved_dropout_p > 0)


@contextmanager
def hooked(hooks: Iterable[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Within the block, these hooks are on these autograd nodes."""
    handles = [node.register_hook(hook) for node, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def corrected(nodes: Iterable[Any]) -> AbstractContextManager[None]:
    """Within the block, gradients through these autograd nodes can be differentiated to any order and are right."""
    hooks = []
    for node in nodes:
        correction = REPLACED[node.name()]
        # Unpacked here and not in the hook: a checkpointed tensor can be unpacked only once in a backward pass.
        saved = SimpleNamespace(**{name: getattr(node, f"_saved_{name}") for name in correction.saved})

        def replace(
            inputs: Gradients, grads: Gradients, saved: Any = saved, formula: Any = correction.formula
        ) -> Gradients:
            upstream = grads[0]
            if upstream is None:
                return inputs
            ours = formula(saved, upstream)
            ours += (None,) * (len(inputs) - len(ours))
            return tuple(
                None if theirs is None or mine is None else mine.to(theirs.dtype)
                for theirs, mine in zip(inputs, ours, strict=True)
            )

        hooks.append((node, replace))
    return hooked(hooks)
