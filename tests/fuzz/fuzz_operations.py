"""Random calls of the operations: values and gradients against float64, and refusals of what does not fit."""

from __future__ import annotations

from typing import Any

import gram_problems
import head_problems
import linear_problems
import oracle
import torch
import trace_problems
from fuzz_draws import (
    Draws,
    Kwargs,
    below,
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
    too_large,
)
from fuzz_run import described, refuses, unchanged
from tolerance import assert_accurate
from torch import Tensor, nn

from fam_ext import functional
from fam_ext.ops import backends

D = torch.float64


def backend(d: Draws) -> str:
    return str(d.one_of("auto", "native", "reference") if backends.native_loaded() else "reference")


def _bad_backend(d: Draws, value: Any) -> Any:
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
                "logits": (not_floating, lambda d, t: t[..., 0].flatten()[:1], lambda d, t: t[:, :0]),
                "weight": (not_floating, of_another_shape_of_weight, elsewhere),
                "form": (not_choice,),
                "backend": (_bad_backend,),
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


def _per_axis(d: Draws, values: tuple[int, ...]) -> Any:
    """As one integer where all are alike, or as a tuple or list."""
    if values and len(set(values)) == 1 and d.chance(0.5):
        return values[0]
    return d.one_of(tuple, list)(values)


def _window(d: Draws, rank: int) -> tuple[Kwargs, list[int]]:
    """Options of a convolution, the kernel among them, and spatial sizes that it fits."""
    kernel, stride, dilation = (tuple(d.between(1, most) for _ in range(rank)) for most in (4, 3, 3))
    mode = d.one_of("zeros", "zeros", "reflect", "replicate", "circular")
    padding: Any = tuple(d.between(0, 4) for _ in range(rank))
    if rank and d.chance(0.2):
        padding = d.one_of("same", "valid")
    if padding == "same":
        stride = (1,) * rank
    extents = [s * (k - 1) for s, k in zip(dilation, kernel, strict=True)]
    before = [0] * rank if padding == "valid" else [e // 2 for e in extents] if padding == "same" else padding
    after = [e - e // 2 for e in extents] if padding == "same" else before
    most = (0, 20, 5, 2)[rank]
    sizes = [
        max(1, q + 1 if mode in ("reflect", "circular") else 1, e + 1 - p - q) + d.between(0, most)
        for e, p, q in zip(extents, before, after, strict=True)
    ]
    padding = padding if isinstance(padding, str) else _per_axis(d, padding)
    options = {
        "stride": _per_axis(d, stride),
        "padding": padding,
        "dilation": _per_axis(d, dilation),
        "padding_mode": mode,
    }
    return {"kernel_size": _per_axis(d, kernel), **options}, sizes


_OF_WINDOWS: dict[str, Any] = {
    "stride": (not_integer, below(1), too_large, lambda d, v: (1,) * 7),
    "padding": (not_integer, below(0), too_large, lambda d, v: "full"),
    "dilation": (not_integer, below(1), too_large),
    "groups": (not_integer, below(1), too_large),
    "padding_mode": (not_choice,),
    "backend": (_bad_backend,),
}


def patch_sqnorm(d: Draws) -> None:
    rank, groups = d.between(0, 3), d.one_of(1, 1, 2, 3)
    window, sizes = _window(d, rank)
    x = d.tensor((d.size(most=3), groups * d.size(most=(70, 33, 17, 7)[rank]), *sizes), d.dtype())
    kwargs: Kwargs = {"input": x, **window, "groups": groups, "backend": backend(d)}
    if rank == 0:
        kwargs["kernel_size"] = ()
        for name in ("stride", "padding", "dilation"):
            kwargs[name] = d.one_of((), 0 if name == "padding" else 1)
    if d.chance(0.35):
        corruptions = {
            **_OF_WINDOWS,
            "input": (not_floating, lambda d, t: t.flatten(), lambda d, t: t.reshape(1, 1, 1, 1, 1, -1)),
            "kernel_size": (not_integer, below(1), too_large, lambda d, v: (1,) * 7),
        }
        if rank == 0:  # no axis, so that an integer means nothing
            corruptions = {k: corruptions[k] for k in ("input", "groups", "padding_mode", "backend")}
        if x.shape[1] == 0:  # divided by any number
            corruptions["groups"] = (not_integer, below(1))
        bad, name = corrupted(d, kwargs, corruptions)
        also = {"dilation": "kernel_size", "padding": "stride", "input": "kernel_size"}
        return refuses(
            "patch_sqnorm",
            (name, also.get(name, name)),
            lambda: functional.patch_sqnorm(**bad),
            described(bad),
        )
    upstream = None
    results = []
    for t, by in ((x, kwargs["backend"]), (x, "reference"), (x.double(), None)):
        point = t.detach().requires_grad_()
        with unchanged(point):
            value = (
                _patches(point, kwargs)
                if by is None
                else functional.patch_sqnorm(point, **{**_rest(kwargs), "backend": by})
            )
            if upstream is None:
                upstream = torch.rand(value.shape)
            results.append((value.detach(), *torch.autograd.grad(value, point, upstream.to(value.dtype))))
    kernel = kwargs["kernel_size"]
    volume = kernel**rank if isinstance(kernel, int) else int(torch.tensor(kernel).prod())
    for k, terms in enumerate((volume * max(1, x.shape[1] // groups), volume)):
        assert_accurate(results[0][k], results[1][k], results[2][k], terms, elementwise=True)
    acc = D if x.dtype == D else torch.float32
    assert [t.dtype for t in results[0]] == [acc, x.dtype]
    if kwargs["backend"] == "reference":  # which nothing has been compared with yet
        value = functional.patch_sqnorm(x.double(), **_rest(kwargs))
        torch.testing.assert_close(value, results[2][0], rtol=1e-12, atol=0)
    return None


def _rest(kwargs: Kwargs) -> Kwargs:
    return {k: v for k, v in kwargs.items() if k != "input"}


def _patches(x: Tensor, kwargs: Kwargs) -> Tensor:
    """torch's own convolution of the squares with ones, in float64."""
    groups = kwargs["groups"]
    by_group = x.square().reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).sum(2)
    if x.dim() == 2:
        return by_group
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[x.dim() - 3]
    options = {k: v for k, v in kwargs.items() if k not in ("input", "groups", "backend")}
    module: Any = layer(groups, groups, groups=groups, bias=False, dtype=D, **options)
    ones = torch.ones_like(module.weight)
    result: Tensor = torch.func.functional_call(module, {"weight": ones}, (by_group,))
    return result


_OF_CROSS_ENTROPY: dict[str, Any] = {
    "class_weight": (not_real, of_no_class_count, elsewhere),
    "ignore_index": (not_integer,),
    "label_smoothing": (outside_of_0_to_1,),
    "reduction": (not_choice,),
    "strength": (not_number, not_finite),
    "curvature_grad": (not_bool,),
    "backend": (_bad_backend,),
}


def _bad_target(d: Draws, target: Tensor, classes: int) -> Any:
    """Of another type, shape or dtype, or with a class that there is not."""
    if d.chance(0.4) and target.numel() and not target.is_floating_point():
        wrong = target.clone()
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


def gram_trace(d: Draws) -> None:
    rank, groups = d.between(0, 3), d.one_of(1, 1, 2, 3)
    dtypes, stacked = d.dtypes(3), d.one_of(None, 1, 3)
    channels, neurons, samples = d.size(1, 8), d.size(1, 8), d.size(most=5)
    if rank:
        options, sizes = _window(d, rank)
        kernel = options.pop("kernel_size")
        kernel = (kernel,) * rank if isinstance(kernel, int) else tuple(kernel)
        options["groups"] = groups
        x = d.tensor((samples, channels * groups, *sizes), dtypes[0])
        weight = d.tensor((neurons * groups, channels, *kernel), dtypes[1], expanded=False)
    else:
        options = {}
        x = d.tensor((samples, *(d.size(1, 9) for _ in range(d.one_of(0, 1, 2))), channels), dtypes[0])
        weight = d.tensor((neurons, channels), dtypes[1], expanded=False)
    out = gram_problems.apply(x.double(), weight.double(), options).shape
    factors = d.tensor(out if stacked is None else (stacked, *out), dtypes[2])
    by, form, weighted = (
        d.one_of("auto", "native", "reference"),
        d.one_of("auto", "direct", "gram"),
        d.chance(0.7),
    )
    kwargs = {
        "input": x,
        "factors": factors,
        "weight": weight,
        **options,
        "form": form,
        "weighted": weighted,
        "backend": by,
    }
    if d.chance(0.35):
        tensors = (not_floating, of_another_shape, elsewhere)
        corruptions: dict[str, Any] = {
            "input": tensors,
            "factors": (not_floating, lambda d, t: t[..., :0], lambda d, t: t.flatten(), elsewhere),
            "weight": tensors,
            "form": (not_choice,),
            "weighted": (not_bool,),
            "max_bytes": (lambda d, v: d.one_of(0, -1, 1.5, "1", True, None),),
            "backend": (_bad_backend,),
        }
        if rank:
            corruptions |= {k: v for k, v in _OF_WINDOWS.items() if k != "backend"}
        if x.numel() == 0:
            corruptions["input"] = corruptions["weight"] = (not_floating,)
        bad, name = corrupted(d, kwargs, corruptions)
        of_shapes = ("input", "factors", "weight", "kernel", "stride", "padding", "dilation", "groups")
        names = of_shapes if name in of_shapes else name
        return refuses("gram_trace", names, lambda: functional.gram_trace(**bad), described(bad))
    with unchanged(x, factors, weight):
        if by == "reference":
            x, factors, weight = x.double(), factors.double(), weight.double()
        gram_problems.check(
            x, factors, weight, options, by, form, weighted, max_bytes=d.one_of(1, 2**10, 2**26)
        )
        if by == "reference":
            got = gram_problems.run(x, factors, weight, options, backend=by, form=form, weighted=weighted)
            want = gram_problems.exact(x, factors, weight, options, weighted)
            for g, w in zip(got, want, strict=True):
                if g is not None:
                    scale = float(w.abs().max()) if w.numel() else 0.0
                    torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9 * scale + 1e-12)
    return None
