"""Problems of linear_cross_entropy that tests of several backends share: every option, confident rows, and float64's answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from inputs import make_input
from tolerance import assert_accurate, total_parts
from torch import Tensor

from fam_ext.functional import linear_cross_entropy
from fam_ext.ops.row_coefficients import cross_entropy_coefficients

Variant = Callable[[tuple[int, ...], int], tuple[Tensor, dict[str, Any]]]


def indices(rows: tuple[int, ...], classes: int, ignored: int | None = None) -> Tensor:
    """Class indices; with `ignored`, every third row has that index."""
    target = torch.randint(0, classes, rows)
    if ignored is not None:
        target.view(-1)[::3] = ignored
    return target


def omega(classes: int) -> Tensor:
    return torch.rand(classes) + 0.1


VARIANTS: dict[str, Variant] = {
    "index": lambda r, v: (indices(r, v), {}),
    "sum": lambda r, v: (indices(r, v), {"reduction": "sum"}),
    "none": lambda r, v: (indices(r, v, -100), {"reduction": "none", "class_weight": omega(v)}),
    "none smoothed": lambda r, v: (indices(r, v, -100), {"reduction": "none", "label_smoothing": 0.2}),
    "ignored": lambda r, v: (indices(r, v, -100), {}),
    "ignored class": lambda r, v: (indices(r, v, 0), {"ignore_index": 0}),
    "weights": lambda r, v: (indices(r, v, -1), {"class_weight": omega(v), "ignore_index": -1}),
    "smoothing": lambda r, v: (indices(r, v, -100), {"label_smoothing": 0.3}),
    "all smoothed": lambda r, v: (indices(r, v), {"label_smoothing": 1.0, "reduction": "sum"}),
    "smoothing weights": lambda r, v: (
        indices(r, v, -100),
        {"label_smoothing": 0.1, "class_weight": omega(v)},
    ),
    "negative": lambda r, v: (indices(r, v), {"strength": -0.7}),
    "strength 0": lambda r, v: (indices(r, v), {"strength": 0.0}),
    "constant": lambda r, v: (indices(r, v, -100), {"curvature_grad": False, "class_weight": omega(v)}),
    "constant none": lambda r, v: (indices(r, v), {"curvature_grad": False, "reduction": "none"}),
}


def make_problem(
    rows: tuple[int, ...],
    fan_in: int,
    classes: int,
    dtypes: Any = (torch.float32,) * 3,
    layout: str = "contiguous",
) -> list[Tensor]:
    """input, weight and bias."""
    shapes = ((*rows, fan_in), (classes, fan_in), (classes,))
    layouts = [layout if len(s) > 1 or layout in ("strided", "sliced") else "contiguous" for s in shapes]
    return [
        make_input(s, d, kind, seed=k)
        for k, (s, d, kind) in enumerate(zip(shapes, dtypes, layouts, strict=True))
    ]


def exact(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, strength: float = 1.0, curvature_grad: bool = True,
    rounded: torch.Generator | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(CE + strength kappa, kappa): the loss and the covariance as they are defined, in the dtype of the inputs.

    With `rounded`, logits and the terms of the shifted form are off by random roundings of float32.
    """
    options = {k: v.to(input.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    phi, target, rows = input.reshape(target.numel(), weight.shape[1]), target.reshape(-1), target.shape
    z = F.linear(phi, weight, bias)
    if rounded is not None:
        z = z + logit_roundings(phi, weight, bias, rounded)
    c = cross_entropy_coefficients(z, target, **options)
    loss = oracle.cross_entropy(z, target, options.pop("class_weight", None), **options)
    if not curvature_grad:
        z, phi = z.detach(), phi.detach()
    v = oracle.softmax_trace(z, weight)
    if rounded is not None:
        v = v + shifted_roundings(z, weight, rounded)
    kappa = c * phi.square().sum(-1) * v
    if options.get("reduction") == "none":
        return (loss + strength * kappa).reshape(rows), kappa.detach().reshape(rows)
    return loss + strength * kappa.sum(), kappa.detach().sum()


# root mean square of what float32 adds to a number of size 1 by rounding: spread evenly over one unit, at most eps
_ROUNDING = torch.finfo(torch.float32).eps / math.sqrt(12)


def logit_roundings(phi: Tensor, weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> Tensor:
    """What float32 may add to phi W^T + b: every one of the I sums on the way is rounded, and of sums of numbers of random sign
    the k-th is as large as the root of the sum of the first k squares, half of all squares on average; or as large as the result.
    """
    squares = phi.square() @ weight.square().T + (0.0 if bias is None else bias.square())
    size = torch.maximum((squares / 2).sqrt(), F.linear(phi, weight, bias).abs()).detach()
    noise = torch.randn(size.shape, generator=generator, dtype=size.dtype)
    return _ROUNDING * math.sqrt(weight.shape[1] + 1) * size * noise


def shifted_roundings(z: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """What float32 may add to v = sum_s p~_s |w_s|^2 - 2 w_y U - |U|^2, U = sum_s p~_s w_s (see docs/design.md), where a product
    and a sum are rounded for each of its terms: they are much larger than v where likely rows of W nearly agree.
    """
    w, y = weight - weight.detach().mean(0), z.detach().argmax(1, keepdim=True)
    others = z.softmax(1).scatter(1, y, 0.0)
    p = others.scatter(1, y, -others.sum(1, keepdim=True))
    shares = p.unsqueeze(2) * w  # (N, V, I)
    terms = (shares * w, 2 * shares * w[y], shares.sum(1, keepdim=True).square())
    noise = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in terms)
    return math.sqrt(2) * _ROUNDING * sum((t * n).sum((1, 2)) for t, n in zip(terms, noise, strict=True))


def differentiate(function: Any, inputs: Any, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """(loss, flatness, gradients of the loss)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    loss, flatness = function(*inputs)
    assert not flatness.requires_grad
    grads = torch.autograd.grad(loss, inputs, None if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), flatness, *grads


def cancelling_parts(
    inputs: Any, target: Tensor, options: dict[str, Any], upstream: Tensor
) -> list[Tensor | None]:
    """The sizes of what the three gradients are sums of: dz W, dz^T phi and the sum of dz over rows, where numbers of either sign
    may cancel, as those of dz do in every row. Their roundings stay, so that an error is to be seen beside them.

    For smoothed targets dz = c (p - q) is a difference itself, p may be q, and p + q is at most |p - q| + 2 p; with class indices
    p - q is formed as -(1 - p), which loses nothing.
    """
    x, weight, bias = (t.detach().double() for t in inputs)
    phi, y = x.reshape(target.numel(), weight.shape[1]), target.reshape(-1)
    z = F.linear(phi, weight, bias).requires_grad_()
    known = ("class_weight", "ignore_index", "label_smoothing", "reduction")
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items() if k in known}
    c = cross_entropy_coefficients(z, y, **options)
    ce = oracle.cross_entropy(z, y, **options)
    of_rows = upstream.double().reshape(-1)
    (dz,) = torch.autograd.grad(ce, z, of_rows.reshape(ce.shape))
    parts = dz.abs()
    if options.get("label_smoothing"):
        parts = parts + 2 * (c * of_rows).detach().abs()[:, None] * z.detach().softmax(1)
    return [(parts @ weight.abs()).reshape(x.shape), parts.T @ phi.abs(), parts.sum(0)]


def check(inputs: Any, target: Tensor, options: dict[str, Any], **native: Any) -> None:
    """No result is further from float64 than that of the reference, but for rounding."""
    x, weight, bias = inputs
    acc = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
    rows, (classes, fan_in) = target.numel(), weight.shape
    upstream = torch.rand(target.shape) if options.get("reduction") == "none" else torch.tensor(0.7)
    run = lambda **k: differentiate(  # noqa: E731
        lambda x, w, b: linear_cross_entropy(x, w, target, bias=b, **options, **k), inputs, upstream
    )
    truth = differentiate(lambda *t: exact(*t, target, **options), [t.double() for t in inputs], upstream)
    results, base = run(backend="native", **native), run(backend="reference")
    assert [t.dtype for t in results] == [acc, acc, x.dtype, weight.dtype, bias.dtype]
    assert [t.shape for t in results] == [t.shape for t in truth]
    terms = (classes * fan_in * rows,) * 2 + (classes * fan_in,) + (classes * rows,) * 2
    total = total_parts(*truth[:2], options.get("strength", 1.0))
    parts = (total, None, *cancelling_parts(inputs, target, options, upstream))

    spread = functools.cache(lambda: roundings_of(inputs, target, options, upstream))
    for k, (actual, plain, value, count) in enumerate(zip(results, base, truth, terms, strict=True)):
        of_k = (lambda k=k: spread()[k]) if acc == torch.float32 else None
        assert_accurate(actual, plain, value, count, parts=parts[k], roundings=8, spread=of_k)


def roundings_of(
    inputs: Any, target: Tensor, options: dict[str, Any], upstream: Tensor | None = None
) -> list[tuple[Tensor, ...]]:
    """16 draws of (loss, flatness, gradients) in float64, each with random roundings of float32 in it."""
    generator = torch.Generator().manual_seed(0)
    moved = lambda *t: exact(*t, target, rounded=generator, **options)  # noqa: E731
    inputs = [t.double() for t in inputs]
    return list(zip(*(differentiate(moved, inputs, upstream) for _ in range(16)), strict=True))


def on_grid(*sizes: int) -> Tensor:
    """Numbers with few digits: products and sums of them are exact in float32."""
    return torch.randint(-8, 9, sizes).float() / 8


def nearly_equal_rows(classes: int, fan_in: int, spread: float) -> tuple[Tensor, Tensor]:
    """Logits (64, classes) that favour the first half of the classes, and a weight whose rows for those differ by `spread` only,
    far from the mean row of all.
    """
    near = torch.arange(classes) < classes // 2
    weight = torch.where(near[:, None], torch.randn(fan_in), torch.randn(classes, fan_in))
    return torch.randn(64, classes) + 8.0 * near, weight + spread * torch.randn(classes, fan_in)


def confident_problem(classes: int, doubt: float, offset: float) -> tuple[Tensor, Tensor]:
    """input and weight whose logits are exact in float32, with max p about 1 - doubt in every row, for three classes y in turn.

    Feature k is what lifts class k above the others.
    """
    rows, fan_in, likely = 67, 37, min(classes, 3)
    weight, phi, y = on_grid(classes, fan_in), on_grid(rows, fan_in), torch.arange(rows) % likely
    z = (phi @ weight.T).double()
    others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    gap = (others - math.log(doubt) - z[torch.arange(rows), y]).mul(64).round() / 64
    phi = torch.cat([phi, gap.float()[:, None] * F.one_hot(y, likely)], 1)
    weight = torch.cat([weight, torch.eye(classes)[:, :likely]], 1) + offset
    return phi, weight
