"""Problems for gram_trace, and its values and gradients in float64 from the weight gradient of every sample, by autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from inputs import make_input
from tolerance import assert_accurate
from torch import Tensor

from fam_ext.ops.gram_trace import gram_trace

Options = dict[str, Any]
# input, weight, options of the convolution; the factors have the shape of the layer's output
PROBLEMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Options]] = {
    "tokens": ((3, 7, 5), (4, 5), {}),
    "tokens-narrow": ((3, 5, 4), (9, 4), {}),
    "tokens-grid": ((2, 3, 4, 5), (6, 5), {}),
    "rows": ((6, 5), (3, 5), {}),
    "one-neuron": ((3, 6, 5), (1, 5), {}),
    "one-feature": ((3, 6, 1), (4, 1), {}),
    "1d": ((2, 4, 11), (5, 4, 3), {"padding": 1}),
    "1d-same": ((2, 4, 6), (3, 4, 4), {"padding": "same"}),
    "1d-stride-dilation": ((2, 6, 23), (4, 3, 3), {"stride": 2, "padding": 4, "dilation": 3, "groups": 2}),
    "1d-skips-inputs": ((2, 3, 17), (4, 3, 2), {"stride": 5}),
    "2d": ((3, 5, 7, 6), (4, 5, 3, 3), {"padding": 1}),
    "2d-all": (
        (2, 6, 9, 11),
        (6, 2, 3, 2),
        {"stride": (2, 3), "padding": (2, 0), "dilation": (2, 3), "groups": 3},
    ),
    "2d-narrow": ((2, 2, 6, 7), (20, 1, 2, 3), {"padding": 1, "groups": 2}),
    "2d-depthwise": ((2, 7, 5, 6), (7, 1, 3, 3), {"padding": 1, "groups": 7}),
    "2d-pointwise": ((3, 8, 5, 4), (6, 8, 1, 1), {}),
    "2d-pointwise-stride": ((2, 5, 7, 8), (6, 5, 1, 1), {"stride": (2, 3)}),
    "2d-whole-input": ((4, 6, 5, 5), (4, 3, 5, 5), {"groups": 2}),
    "2d-more-padding-than-kernel": ((2, 3, 4, 5), (4, 3, 2, 1), {"stride": (1, 2), "padding": (5, 4)}),
    "2d-reflect": ((2, 3, 5, 6), (4, 3, 3, 2), {"padding": (1, 2), "padding_mode": "reflect"}),
    "3d": ((2, 4, 4, 5, 3), (4, 2, 3, 2, 3), {"padding": (1, 0, 1), "groups": 2}),
    "3d-all": (
        (1, 2, 7, 6, 6),
        (3, 2, 2, 3, 2),
        {"stride": (2, 1, 3), "padding": (1, 2, 0), "dilation": (3, 2, 1)},
    ),
}


def apply(x: Tensor, weight: Tensor, options: Options) -> Tensor:
    """The layer without its bias."""
    if weight.dim() == 2:
        return x @ weight.T
    if weight.dim() == 3:
        layer: Any = torch.nn.Conv1d
    else:
        layer = torch.nn.Conv2d if weight.dim() == 4 else torch.nn.Conv3d
    groups = options.get("groups", 1)
    module = layer(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], bias=False, **options)
    result: Tensor = torch.func.functional_call(module, {"weight": weight}, (x,))
    return result


def tensors(
    name: str,
    stacked: int | None = None,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    samples: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Options]:
    shape, weight_shape, options = PROBLEMS[name]
    options = dict(options)
    x = make_input(shape if samples is None else (samples, *shape[1:]), dtype, layout)
    weight = make_input(weight_shape, dtype, "contiguous" if layout == "expanded" else layout, seed=1)
    out = apply(x.double(), weight.double(), options).shape
    factors = make_input(out if stacked is None else (stacked, *out), dtype, layout, seed=2)
    return x, factors, weight, options


def oracle(x: Tensor, factors: Tensor, weight: Tensor, options: Options, weighted: bool = True) -> Tensor:
    """Float64, differentiable: sample by sample, Gamma is the gradient of <s, z> by the weight."""
    x, factors, w = x.double(), factors.double(), weight.double()
    if factors.dim() == x.dim() + 1:
        return torch.stack([oracle(x, f, w, options, weighted) for f in factors])
    groups = options.get("groups", 1)
    by_group = w.reshape(groups, len(w) // groups, -1)
    values = []
    for phi, s in zip(x.split(1), factors.split(1), strict=True) if len(x) else ():
        probe = torch.zeros_like(w, requires_grad=True)
        (gamma,) = torch.autograd.grad((apply(phi, probe, options) * s).sum(), probe, create_graph=True)
        gamma = gamma.reshape(by_group.shape)
        values.append((by_group.transpose(1, 2) @ gamma if weighted else gamma).square().sum())
    if values:
        return torch.stack(values)
    return (x.sum() + factors.sum() + w.sum()) * x.new_zeros(0)


def by_patches(x: Tensor, factors: Tensor, weight: Tensor, options: Options) -> Tensor:
    """A 2-d convolution's values from F.unfold: sum_qq' <phi_q, phi_q'> s_q^T G s_q', written out."""
    padding, dilation, stride = (
        options.get(k, d) for k, d in (("padding", 0), ("dilation", 1), ("stride", 1))
    )
    groups = options.get("groups", 1)
    phi = F.unfold(x, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
    phi = phi.reshape(len(x), groups, -1, phi.shape[-1])
    s = factors.reshape(len(x), groups, weight.shape[0] // groups, -1)
    w = weight.reshape(groups, weight.shape[0] // groups, -1)
    return torch.einsum("bgiq,bgir,bgsq,gsj,gtj,bgtr->b", phi, phi, s, w, w, s)


def run(
    x: Tensor,
    factors: Tensor,
    weight: Tensor,
    options: Options,
    upstream: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Value and gradients; the gradient of a weight that gives its shape only is None."""
    inputs = [t.detach().requires_grad_() for t in (x, factors, weight)]
    value = gram_trace(*inputs, **options, **kwargs)
    if upstream is None:
        upstream = torch.linspace(0.5, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad(value, inputs, upstream.to(value.dtype), allow_unused=True)


def exact(x: Tensor, factors: Tensor, weight: Tensor, options: Options, weighted: bool = True) -> Any:
    """As `run`, in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (x, factors, weight)]
    value = oracle(*inputs, options, weighted)
    upstream = torch.linspace(0.5, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad(value, inputs, upstream, allow_unused=True)


def check(
    x: Tensor,
    factors: Tensor,
    weight: Tensor,
    options: Options,
    backend: str,
    form: str,
    weighted: bool = True,
    **kwargs: Any,
) -> None:
    """No result is further from float64 than that of the reference, but for rounding."""
    got = run(x, factors, weight, options, backend=backend, form=form, weighted=weighted, **kwargs)
    base = run(x, factors, weight, options, backend="reference", form=form, weighted=weighted)
    want = exact(x, factors, weight, options, weighted)
    counts = (x, factors, weight) if weighted else (x, factors)
    acc = torch.float64 if any(t.dtype == torch.float64 for t in counts) else torch.float32
    assert [None if g is None else g.dtype for g in got] == [
        acc,
        x.dtype,
        factors.dtype,
        weight.dtype if weighted else None,
    ]
    terms = weight[0].numel() * max(1, factors.numel() // max(1, len(x)))
    for g, b, w in zip(got, base, want, strict=True):
        if g is None:
            assert not weighted and (w is None or not w.any())
            continue
        if g.numel():
            assert_accurate(g, b, w, terms)
