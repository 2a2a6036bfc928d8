"""Random calls of the operations on convolutions' windows: values and gradients against float64, and refusals."""

from __future__ import annotations

from typing import Any

import gram_problems
import torch
from fuzz_draws import (
    Draws,
    Kwargs,
    below,
    corrupted,
    elsewhere,
    not_bool,
    not_choice,
    not_floating,
    not_integer,
    too_large,
)
from fuzz_operations import backend, bad_backend
from fuzz_run import described, refuses, unchanged
from tolerance import assert_accurate
from torch import Tensor, nn

from fam_ext import functional

D = torch.float64


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


def _not_integers(d: Draws, value: Any) -> Any:
    """Neither an integer nor one for each axis, of which there are three at most."""
    return d.one_of(1.5, "1", True, None, [1] * 7, [1.0], [True], torch.tensor(1), 1j, torch.ones(2))


_OF_WINDOWS: dict[str, Any] = {
    "stride": (_not_integers, below(1), too_large),
    "padding": (_not_integers, below(0), too_large, lambda d, v: "full"),
    "dilation": (_not_integers, below(1), too_large),
    "groups": (not_integer, below(1), too_large),
    "padding_mode": (not_choice,),
    "backend": (bad_backend,),
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
            "kernel_size": (_not_integers, below(1), too_large),
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
    acc = D if x.dtype == D else torch.float32
    upstream = None
    results = []
    # ours; torch's convolution in the dtype that ours is formed in, which shares nothing with it; the truth
    for dtype in (None, acc, D):
        point = x.detach().to(dtype or x.dtype).requires_grad_()
        with unchanged(point):
            value = (
                functional.patch_sqnorm(point, **_rest(kwargs)) if dtype is None else _patches(point, kwargs)
            )
            if upstream is None:
                upstream = torch.rand(value.shape)
            results.append((value.detach(), *torch.autograd.grad(value, point, upstream.to(value.dtype))))
    results[1] = (results[1][0], results[1][1].to(x.dtype))
    kernel = kwargs["kernel_size"]
    volume = kernel**rank if isinstance(kernel, int) else int(torch.tensor(kernel).prod())
    for k, terms in enumerate((volume * max(1, x.shape[1] // groups), volume)):
        assert_accurate(results[0][k], results[1][k], results[2][k], terms, elementwise=True)
    assert [t.dtype for t in results[0]] == [acc, x.dtype]
    return None


def _with_one_more(value: Tensor, dim: int) -> Tensor:
    """A size that no other argument fits: a sum over other channels, or a position too many."""
    shape = list(value.shape)
    shape[dim] += 1
    return torch.zeros(shape, dtype=value.dtype)


def _rest(kwargs: Kwargs) -> Kwargs:
    return {k: v for k, v in kwargs.items() if k != "input"}


def _patches(x: Tensor, kwargs: Kwargs) -> Tensor:
    """torch's own convolution of the squares with ones."""
    groups = kwargs["groups"]
    by_group = x.square().reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).sum(2)
    if x.dim() == 2:
        return by_group
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[x.dim() - 3]
    options = {k: v for k, v in kwargs.items() if k not in ("input", "groups", "backend")}
    module: Any = layer(groups, groups, groups=groups, bias=False, dtype=x.dtype, **options)
    ones = torch.ones_like(module.weight)
    result: Tensor = torch.func.functional_call(module, {"weight": ones}, (by_group,))
    return result


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
        # not any other shape: a row, or another kernel under a stride, may fit the factors as well
        channels_of = 1 if rank else -1
        tensors = (not_floating, lambda d, t: _with_one_more(t, channels_of), elsewhere)
        corruptions: dict[str, Any] = {
            "input": tensors,
            "factors": (
                not_floating,
                lambda d, t: _with_one_more(t, -1),
                lambda d, t: t.flatten(),
                elsewhere,
            ),
            "weight": tensors,
            "form": (not_choice,),
            "weighted": (not_bool,),
            "max_bytes": (lambda d, v: d.one_of(0, -1, 1.5, "1", True),),
            "backend": (bad_backend,),
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
