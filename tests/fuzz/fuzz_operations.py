"""Random calls of the operations on rows of logits: values and gradients against float64, and refusals of what does not fit."""

from __future__ import annotations

from typing import Any

import head_problems
import linear_problems
import oracle
import torch
import trace_problems
from fuzz_draws import (
    Draws,
    Kwargs,
    corrupted,
    elsewhere,
    not_bool,
    not_choice,
    not_finite,
    not_floating,
    not_integer,
    not_number,
    not_real,
    of_another_shape,
    of_no_class_count,
    outside_of_0_to_1,
)
from fuzz_run import described, refuses, unchanged
from torch import Tensor

from fam_ext import functional
from fam_ext.ops import backends

D = torch.float64


def backend(d: Draws) -> str:
    return str(d.one_of("auto", "native", "reference") if backends.native_loaded() else "reference")


def bad_backend(d: Draws, value: Any) -> Any:
    return d.one_of("cuda", "", None, 3, ["native"])


def softmax_trace(d: Draws) -> None:
    classes, positions = d.size(1), [d.size(most=7) for _ in range(d.one_of(0, 0, 1, 2, 3))]
    of_logits, of_weight = d.dtypes(2)
    logits = d.tensor((d.size(), classes, *positions), of_logits, scale=d.scale())
    weight = d.tensor((classes, d.size()), of_weight)
    form, by = d.one_of("auto", "shifted", "pairwise"), backend(d)
    if d.chance(0.35):
        kwargs = {"logits": logits, "weight": weight, "form": form, "backend": by}
        bad, name = corrupted(
            d,
            kwargs,
            {
                "logits": (not_floating, lambda d, t: t.flatten()[:1], lambda d, t: t[:, :0]),
                "weight": (not_floating, of_another_shape_of_weight, elsewhere),
                "form": (not_choice,),
                "backend": (bad_backend,),
            },
        )
        names = (name, "weight") if name == "logits" else name
        return refuses("softmax_trace", names, lambda: functional.softmax_trace(**bad), described(bad))
    with unchanged(logits, weight):
        if by == "reference":  # float64 is exact enough for the plain formula
            _exactly(
                lambda z, w: functional.softmax_trace(z, w, form=form, backend=by),
                oracle.softmax_trace,
                (logits, weight),
            )
        else:
            resolved = form if form != "auto" else d.one_of("shifted", "pairwise")
            trace_problems.check(logits, weight, resolved, by)
    return None


def of_another_shape_of_weight(d: Draws, value: Tensor) -> Tensor:
    """Another first dimension, or rank: any fan-in will do."""
    return torch.zeros(d.one_of((value.shape[0] + 1, value.shape[1]), (*value.shape, 2), value.shape[:1]))


def _exactly(ours: Any, exact: Any, inputs: Any) -> None:
    """Values and gradients in float64 agree to nine digits of the largest."""
    results = []
    for f in (ours, exact):
        tensors = [t.detach().double().requires_grad_() for t in inputs]
        value = f(*tensors)
        upstream = torch.linspace(0.3, 1, value.numel(), dtype=D).reshape(value.shape)
        results.append([value.detach(), *torch.autograd.grad(value, tensors, upstream)])
    sizes = [max(1.0, float(t.detach().abs().max()) if t.numel() else 1.0) for t in inputs]
    scale = sizes[0] * sizes[-1] ** 2
    for a, b in zip(*results, strict=True):
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * largest + 1e-13 * scale)


_OF_CROSS_ENTROPY: dict[str, Any] = {
    "class_weight": (not_real, of_no_class_count, elsewhere),
    "ignore_index": (not_integer,),
    "label_smoothing": (outside_of_0_to_1,),
    "reduction": (not_choice,),
    "strength": (not_number, not_finite),
    "curvature_grad": (not_bool,),
    "backend": (bad_backend,),
}


def _bad_target(d: Draws, target: Tensor, classes: int) -> Any:
    """Of another type, shape or dtype, or with a class that there is not."""
    if d.chance(0.4) and target.numel() and not target.is_floating_point():
        wrong = target.long().clone()
        wrong.view(-1)[-1] = d.one_of(classes, classes + 7, -5, 2**62)
        return wrong
    return d.one_of(
        lambda: None,
        lambda: target.tolist(),
        lambda: "target",
        lambda: of_another_shape(d, target),
        lambda: target.to(torch.int32),
        lambda: target.bool(),
        lambda: target.to(torch.complex64),
        lambda: target.to("meta"),
        lambda: target.float().to_sparse() if target.dim() else None,
    )()


def head_cross_entropy(d: Draws) -> None:
    classes, positions = d.size(1), [d.size(1, 5) for _ in range(d.one_of(0, 0, 0, 1, 2))]
    shape, fan_in = (d.size(1, 40), classes, *positions), d.size()
    dtypes = d.dtypes(3)
    logits = d.tensor(shape, dtypes[0], scale=d.scale())
    features, weight = (
        d.tensor((shape[0], *positions, fan_in), dtypes[1]),
        d.tensor((classes, fan_in), dtypes[2]),
    )
    target, options = head_problems.VARIANTS[d.one_of(*head_problems.VARIANTS)](shape)
    if not target.is_floating_point() and d.chance(0.1) and target.min() >= 0:
        target = target.to(torch.uint8)
    if "strength" not in options:
        options = {**options, "strength": d.one_of(1.0, 0.1, -2, 0.0, 30.0)}
    by = backend(d)
    kwargs = {
        "logits": logits,
        "features": features,
        "weight": weight,
        "target": target,
        **options,
        "backend": by,
    }
    if d.chance(0.35):
        corruptions = {
            **_OF_CROSS_ENTROPY,
            "logits": (not_floating, of_another_shape, elsewhere),
            "features": (not_floating, of_another_shape, elsewhere),
            "weight": (not_floating, of_another_shape, elsewhere),
            "target": (lambda d, t: _bad_target(d, t, classes),),
        }
        bad, name = corrupted(d, kwargs, corruptions)
        names = (name, "weight", "features", "target") if name in ("logits", "weight") else name
        return refuses(
            "head_cross_entropy", names, lambda: functional.head_cross_entropy(**bad), described(bad)
        )
    with unchanged(logits, features, weight, target, options.get("class_weight")):
        if by == "reference":
            inputs = [t.detach().double().requires_grad_() for t in (logits, features, weight)]
            _same(
                lambda *t: functional.head_cross_entropy(*t, target, **options, backend=by),
                lambda *t: head_problems.exact(
                    *t, target.long() if target.dtype == torch.uint8 else target, **options
                ),
                inputs,
            )
        else:
            plain = target.long() if target.dtype == torch.uint8 else target
            head_problems.check((logits, features, weight), plain, options, by)
            if target is not plain:
                _same_bits(
                    functional.head_cross_entropy,
                    (logits, features, weight),
                    target,
                    plain,
                    {**options, "backend": by},
                )
    return None


def _same(ours: Any, exact: Any, inputs: list[Tensor]) -> None:
    """Loss, flatness and gradients in float64."""
    results = []
    for f in (ours, exact):
        loss, kappa = f(*inputs)
        upstream = torch.full_like(loss, 0.7)
        results.append(
            [loss.detach(), kappa, *torch.autograd.grad(loss, inputs, upstream, materialize_grads=True)]
        )
    scale = float(sum(t.detach().abs().max() if t.numel() else 0 for t in inputs)) ** 2
    for a, b in zip(*results, strict=True):
        largest = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * largest + 1e-13 * scale, equal_nan=True)


def _same_bits(function: Any, inputs: Any, target: Tensor, plain: Tensor, options: Kwargs) -> None:
    for a, b in zip(function(*inputs, target, **options), function(*inputs, plain, **options), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def linear_cross_entropy(d: Draws) -> None:
    rows = tuple(d.size(1, 7) for _ in range(d.one_of(0, 1, 1, 2, 3)))
    classes, fan_in, dtypes = d.size(1), d.size(), d.dtypes(3)
    x, weight = (
        d.tensor((*rows, fan_in), dtypes[0], scale=d.scale() ** 0.5),
        d.tensor((classes, fan_in), dtypes[1]),
    )
    bias = d.tensor((classes,), dtypes[2])
    target, options = linear_problems.VARIANTS[d.one_of(*linear_problems.VARIANTS)](rows, classes)
    by = backend(d)
    native = {"max_bytes": d.one_of(None, 1, 2**14, 2**27), "accumulate": d.one_of("float32", "input")}
    if d.chance(0.35):
        kwargs = {
            "input": x,
            "weight": weight,
            "target": target,
            "bias": bias,
            **options,
            **native,
            "backend": by,
        }
        corruptions = {
            **_OF_CROSS_ENTROPY,
            "input": (not_floating, of_another_shape, elsewhere),
            "weight": (not_floating, of_another_shape, elsewhere),
            "target": (lambda d, t: _bad_target(d, t, classes), lambda d, t: torch.rand(*rows, classes)),
            "bias": (not_real, of_no_class_count, elsewhere),
            "max_bytes": (lambda d, v: d.one_of(0, -1, 1.5, "1", True, torch.tensor(1)),),
            "accumulate": (not_choice,),
        }
        bad, name = corrupted(d, kwargs, corruptions)
        names = (name, "input", "target", "bias") if name in ("input", "weight") else name
        return refuses(
            "linear_cross_entropy", names, lambda: functional.linear_cross_entropy(**bad), described(bad)
        )
    if (target == options.get("ignore_index", -100)).all():  # the mean of nothing is nan
        return None
    with unchanged(x, weight, bias, target, options.get("class_weight")):
        if by == "reference":
            inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
            _same(
                lambda x, w, b: functional.linear_cross_entropy(x, w, target, bias=b, **options, backend=by),
                lambda *t: linear_problems.exact(*t, target, **options),
                inputs,
            )
        else:
            linear_problems.check((x, weight, bias), target, options, **{**native, "accumulate": "float32"})
    return None
