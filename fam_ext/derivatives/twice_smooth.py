"""GELU, SiLU, layer_norm and attention for gradients that are differentiated once more (fam_ext.derivatives.taken_twice).

torch forms these derivatives from a dozen operations each, every one of which reads and writes the whole activation; that of the
CPU's flash attention it lacks. Here the gradient's value is at hand, and its derivative is written out once; that of activations
is one pass in C++ on the CPU (csrc/cpu/smooth_activation.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fam_ext.derivatives.corrections import attention_weights
from fam_ext.ops import backends

aten = torch.ops.aten
_native: Any = backends.native_function("smooth_activation")
Optional = Tensor | None


def _gelu(x: Tensor) -> Tensor:
    """phi(x) (2 - x^2), the second derivative of x Phi(x)."""
    density = torch.exp(x.square().mul_(-0.5))
    return torch.addcmul(x.new_full((), 2.0), x, x, value=-1).mul_(density).mul_(1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x: Tensor) -> Tensor:
    """The second derivative of x (1 + t) / 2 with t = tanh k and k = sqrt(2 / pi) (x + 0.044715 x^3)."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    twice_k = square.mul(a).add_(1).mul_(x).mul_(2 * c)
    below, above = torch.sigmoid(twice_k), torch.sigmoid(twice_k.neg_())  # (1 + t) / 2 and (1 - t) / 2
    slope = square.mul_(3 * a * c).add_(c)  # k'
    inner = ((below - above) * slope).mul_(slope).mul_(-2).add_(x, alpha=6 * a * c)  # k'' - 2 t k'^2
    inner.mul_(x).mul_(0.5).add_(slope)
    return inner.mul_(below.mul_(above).mul_(4))


def _silu(x: Tensor) -> Tensor:
    """s r (2 + x (r - s)) with s = sigmoid(x), r = 1 - s."""
    s, r = torch.sigmoid(x), torch.sigmoid(-x)
    return (r - s).mul_(x).add_(2).mul_(s.mul_(r))


class _Kind(NamedTuple):
    """An activation f: its name in the compiled library, f'(x) times a gradient, and f''."""

    name: str
    slope: Callable[[Tensor, Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]


_KINDS = {
    kind.name: kind
    for kind in (
        _Kind("gelu", partial(aten.gelu_backward, approximate="none"), _gelu),
        _Kind("gelu_tanh", partial(aten.gelu_backward, approximate="tanh"), _gelu_tanh),
        _Kind("silu", aten.silu_backward, _silu),
    )
}


class _Activation(torch.autograd.Function):
    """f'(x) grad, whose value is at hand."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, value: Tensor, kind: _Kind) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.kind = kind
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Optional, ...]:
        return *_of_activation(ctx.kind, upstream, *ctx.saved_tensors, *ctx.needs_input_grad[:2]), None, None


def _of_activation(
    kind: _Kind, upstream: Tensor, grad: Tensor, x: Tensor, want_grad: bool, want_x: bool
) -> tuple[Optional, Optional]:
    """(f'(x) upstream, f''(x) grad upstream), where they are wanted."""
    if _native is not None and all(type(t) is Tensor or type(t) is nn.Parameter for t in (upstream, grad, x)):
        taken = _native(kind.name, upstream, grad, x, want_grad, want_x)
        if taken is not None:
            return taken  # type: ignore[no-any-return]
    of_grad = kind.slope(upstream, x) if want_grad else None
    of_x = None
    if want_x:
        acc = torch.promote_types(x.dtype, torch.float32)
        of_x = kind.bend(x.to(acc)).mul_(grad).mul_(upstream).to(x.dtype)
    return of_grad, of_x


class _LayerNorm(torch.autograd.Function):
    """r (y - <y> - h <y h>) for rows of x, whose value is at hand: y = weight grad, h = r (x - <x>), r = 1 / std(x), mean <>."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Optional, mean: Tensor, rstd: Tensor, value: Tensor
    ) -> Tensor:
        ctx.save_for_backward(grad, x, weight, mean, rstd)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Optional, ...]:
        grad, x, weight, mean, rstd = ctx.saved_tensors
        leading = mean.numel()  # rows
        acc = torch.promote_types(x.dtype, torch.float32)
        u, g, h = (t.to(acc).reshape(leading, -1) for t in (upstream, grad, x))
        r, width = rstd.to(acc).reshape(-1, 1), h.shape[1]
        h = (h - mean.to(acc).reshape(-1, 1)).mul_(r)
        w = None if weight is None else weight.to(acc).reshape(-1)
        y = g if w is None else g * w
        of_grad = of_x = of_weight = None
        u = u - u.mean(1, keepdim=True)
        along_u = _inner(u, h).div_(width)
        projected = torch.addcmul(u, h, along_u, value=-1)  # u - <u> - h <u h>
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            rated = projected * r
            if ctx.needs_input_grad[2]:
                of_weight = (rated * g).sum(0).reshape(weight.shape).to(weight.dtype)
            if ctx.needs_input_grad[0]:
                of_grad = (rated if w is None else rated.mul_(w)).reshape(grad.shape).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            along_y = _inner(y, h).div_(width)
            both = _inner(projected, y).div_(width)  # <u y> - <u> <y> - <u h> <y h>
            y = torch.addcmul(y - y.mean(1, keepdim=True), h, along_y, value=-1)
            of_x = projected.mul_(along_y).addcmul_(y, along_u).addcmul_(h, both).mul_(-r.square())
            of_x = of_x.reshape(x.shape).to(x.dtype)
        return of_grad, of_x, of_weight, None, None, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every row, (N, 1)."""
    return a.unsqueeze(1).bmm(b.unsqueeze(2)).squeeze(2)


class _Attention(torch.autograd.Function):
    """The gradients of queries, keys and values (B, heads, tokens, width) of attention, whose values are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Optional,
        causal: bool,
        scale: float,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(grad, q, k, v, mask)
        ctx.how = causal, scale
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        *saved, mask = ctx.saved_tensors
        acc = torch.promote_types(saved[0].dtype, torch.float32)
        grad, q, k, v, uq, uk, uv = (t.to(acc) for t in (*saved, *upstream))
        several = q.shape[1] // k.shape[1]  # grouped queries: heads of them that share those of k and v
        if several > 1:
            k, v, uk, uv = (t.repeat_interleave(several, 1) for t in (k, v, uk, uv))
        with torch.autocast(grad.device.type, enabled=False):
            found = _of_attention(grad, q, k, v, uq, uk, uv, mask, *ctx.how)
        if several > 1:
            found = (
                *found[:2],
                *(t.reshape(t.shape[0], -1, several, *t.shape[2:]).sum(2) for t in found[2:]),
            )
        return *(t.to(s.dtype) for t, s in zip(found, saved, strict=True)), *(None,) * 6


def _of_attention(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    uq: Tensor,
    uk: Tensor,
    uv: Tensor,
    mask: Optional,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Derivatives of <uq, dq> + <uk, dk> + <uv, dv> by grad, q, k and v, where dv = p^T grad, dp = grad v^T,
    ds = scale p (dp - <p, dp>), dq = ds k and dk = ds^T q, with <> a sum over keys.
    """
    p = attention_weights(q, k, mask, causal, scale)
    dp = grad @ v.mT
    centered = dp - (p * dp).sum(-1, keepdim=True)
    ds = (p * centered).mul_(scale)
    of_ds = (uq @ k.mT).add_(q @ uk.mT).mul_(scale)
    mean = (p * of_ds).sum(-1, keepdim=True)
    of_dp = (of_ds - mean).mul_(p)
    of_p = (grad @ uv.mT).addcmul_(of_ds, centered).addcmul_(dp, mean, value=-1)
    of_scores = (of_p - (p * of_p).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    return (
        (p @ uv).add_(of_dp @ v),
        (of_scores @ k).add_(ds @ uk),
        (of_scores.mT @ q).add_(ds.mT @ uq),
        of_dp.mT @ grad,
    )


def activation(node: Any) -> Any:
    """For GELU and SiLU."""
    x = node._saved_self
    kind = _KINDS["silu"]
    if node.name().startswith("Gelu"):
        kind = _KINDS["gelu_tanh" if node._saved_approximate == "tanh" else "gelu"]

    def formula(values: Sequence[Any], grad: Tensor) -> tuple[Any, ...]:
        return (_Activation.apply(grad, x, values[0].detach(), kind),)  # type: ignore[no-untyped-call]

    return formula


def layer_norm(node: Any) -> Any:
    x, weight = node._saved_input, node._saved_weight
    mean, rstd = node._saved_result1.detach(), node._saved_result2.detach()

    def formula(values: Sequence[Any], grad: Tensor) -> tuple[Any, ...]:
        return (_LayerNorm.apply(grad, x, weight, mean, rstd, values[0].detach()),)  # type: ignore[no-untyped-call]

    return formula


def attention(node: Any) -> Any:
    """For the flash kernel of the CPU without dropout."""
    q, k, v, mask = (getattr(node, f"_saved_{name}") for name in ("query", "key", "value", "attn_mask"))
    scale = q.shape[-1] ** -0.5 if node._saved_scale is None else node._saved_scale
    causal = node._saved_is_causal

    def formula(values: Sequence[Any], grad: Tensor) -> tuple[Any, ...]:
        given = [
            torch.zeros_like(t) if value is None else value.detach()
            for value, t in zip(values, (q, k, v), strict=True)
        ]
        ours = _Attention.apply(grad, q, k, v, mask, causal, scale, *given)  # type: ignore[no-untyped-call]
        return tuple(None if value is None else own for value, own in zip(values, ours, strict=True))

    return formula
