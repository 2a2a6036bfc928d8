"""Random criteria and calls of fam_ext.relative_flatness, against the full float64 Hessian of torch's own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from full_hessian import from_traces
from fuzz_draws import (
    Draws,
    Kwargs,
    corrupted,
    elsewhere,
    not_bool,
    not_choice,
    not_floating,
    not_integer,
    not_real,
    of_another_shape,
    of_no_class_count,
    outside_of_0_to_1,
)
from fuzz_operations import backend
from fuzz_run import described, refuses, unchanged
from tolerance import assert_accurate
from torch import Tensor

import fam_ext

Loss = Callable[[Tensor], Tensor]
LOSSES = ("cross_entropy", "cross_entropy", "mse", "bce_with_logits", "poisson_nll", "gaussian_nll")


def relative_flatness(d: Draws) -> None:
    rows = tuple(d.size(1, 5) for _ in range(d.one_of(0, 1, 1, 2)))
    if d.chance(0.05):
        rows = (0, *rows)
    outputs, fan_in, dtypes = d.size(1, 5), d.size(1, 4), d.dtypes(3)
    features, weight = d.tensor((*rows, fan_in), dtypes[0]), d.tensor((outputs, fan_in), dtypes[1])
    logits = d.tensor((*rows, outputs), dtypes[2], scale=min(d.scale(), 10.0))
    options = _options(d, rows, outputs)
    measure = d.one_of("neuronwise", "neuronwise", "layerwise", "trace")
    settings: Kwargs = {
        "measure": measure,
        "norm_power": d.one_of(1, 2) if measure == "layerwise" else 2,
        "normalize": d.one_of(None, "fan_in"),
        "curvature_grad": d.chance(0.7) or measure == "trace",
        "backend": backend(d),
    }
    kwargs = {"features": features, "weight": weight, "logits": logits, **options, **settings}
    if d.chance(0.4):
        return _refused(d, kwargs)
    results = []
    upstream = torch.rand(options_shape(options, rows, outputs)) + 0.1
    for dtype, by in ((None, settings["backend"]), (None, "reference"), (torch.float64, None)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (features, weight, logits)]
        with unchanged(*leaves, options.get("target"), options.get("class_weight")):
            if by is None:
                value = _exact(*leaves, options, settings, upstream)
            else:
                names = dict(zip(("features", "weight", "logits"), leaves, strict=True))
                shares = fam_ext.relative_flatness(**{**kwargs, **names, "backend": by})
                assert shares.shape == upstream.shape, f"shape {shares.shape} instead of {upstream.shape}"
                value = (shares * upstream.to(shares.dtype)).sum()
            grads = torch.autograd.grad(value, leaves, materialize_grads=True) if value.requires_grad else ()
        results.append((value.detach(), *grads))
    terms = 8 * max(1, features.numel()) * outputs
    assert [t.dtype for t in results[0][1:]] == dtypes
    for actual, plain, exact in zip(*results, strict=True):
        # gradients of z and W may cancel: errors are those of their parts, the largest gradient for its size
        largest = max(float(t.abs().max()) if t.numel() else 0.0 for t in results[2])
        parts = torch.full_like(exact, largest) if exact.dim() else None
        assert_accurate(actual, plain, exact, terms, elementwise=parts is not None, parts=parts, roundings=16)
    return None


def options_shape(options: Kwargs, rows: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """Of the result: a row's share for cross-entropy, an element's for the other losses."""
    if options["reduction"] != "none":
        return ()
    return rows if options["loss"] == "cross_entropy" else (*rows, outputs)


def _options(d: Draws, rows: tuple[int, ...], outputs: int) -> Kwargs:
    loss = d.one_of(*LOSSES)
    options: Kwargs = {"loss": loss, "reduction": d.one_of("mean", "sum", "none")}
    if loss == "cross_entropy":
        soft = d.chance(0.25)
        target: Any = torch.rand(*rows, outputs) if soft else torch.randint(0, outputs, rows)
        if not soft and d.chance(0.4):
            options["ignore_index"] = d.one_of(-100, -1, outputs - 1)
            target[torch.rand(rows) < 0.3] = options["ignore_index"]
        if d.chance(0.4):
            options["class_weight"] = torch.rand(outputs, dtype=d.one_of(torch.float32, torch.float64)) + 0.1
        if d.chance(0.3):
            options["label_smoothing"] = d.one_of(0.1, 0.5, 1.0)
        needed = "class_weight" in options or "ignore_index" in options or soft
        if needed or d.chance(0.8):
            options["target"] = target
        return options
    options["target"] = torch.rand(*rows, outputs, dtype=d.one_of(torch.float32, torch.float64))
    if loss in ("mse", "bce_with_logits") and d.chance(0.4):
        options["element_weight"] = torch.rand(*rows, outputs) + 0.1
    if loss == "bce_with_logits" and d.chance(0.4):
        options["pos_weight"] = torch.rand(d.one_of((outputs,), (*rows, outputs), ())) + 0.5
    if loss == "gaussian_nll":
        options["variance"] = d.one_of(0.5, torch.rand(*rows, outputs) + 0.1, torch.rand(rows) + 0.1, 1e-9)
        options["eps"] = d.one_of(1e-6, 1e-3)
    if (d.chance(0.2) and loss in ("poisson_nll", "gaussian_nll")) or (loss == "mse" and d.chance(0.2)):
        del options["target"]
    return options


def torchs_loss(z: Tensor, options: Kwargs) -> Tensor:
    """torch's own loss of (*rows, O), in float64."""
    options = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    loss, reduction, target = options["loss"], options["reduction"], options.get("target")
    if loss == "cross_entropy":
        if target is None:
            target = torch.zeros(z.shape[:-1], dtype=torch.int64)
        flat, soft = z.reshape(-1, z.shape[-1]), target.is_floating_point()
        known = {k: options[k] for k in ("ignore_index", "label_smoothing") if k in options}
        shares = F.cross_entropy(
            flat,
            target.reshape(flat.shape if soft else -1),
            options.get("class_weight"),
            reduction=reduction,
            **known,
        )
        return shares.reshape(z.shape[:-1]) if reduction == "none" else shares
    if target is None:
        target = torch.zeros_like(z)
    weight = options.get("element_weight", torch.ones_like(z))
    total: Any = z.numel()
    if loss == "mse":
        shares, total = weight * (z - target) ** 2, weight.sum() if "element_weight" in options else total
    elif loss == "bce_with_logits":
        shares = F.binary_cross_entropy_with_logits(
            z, target, weight, reduction="none", pos_weight=options.get("pos_weight")
        )
    elif loss == "poisson_nll":
        shares = z.exp() - target * z
    else:
        variance = torch.as_tensor(options["variance"], dtype=z.dtype)
        if variance.dim() and variance.shape != z.shape:
            variance = variance.unsqueeze(-1)
        variance = variance.clamp(min=options["eps"])
        shares = 0.5 * (variance.log() + (z - target) ** 2 / variance)
    if reduction == "none":
        return shares
    return shares.sum() / (total if reduction == "mean" else 1)


def _exact(
    features: Tensor, weight: Tensor, logits: Tensor, options: Kwargs, settings: Kwargs, upstream: Tensor
) -> Tensor:
    """From the Hessian of z = logits + phi W^T at W = 0, which depends on phi and the logits; differentiable."""

    def loss(w: Tensor) -> Tensor:
        shares = torchs_loss(logits + features @ w.T, options)
        return (shares * upstream.double()).sum()

    hessian = torch.func.hessian(loss)(torch.zeros_like(weight))
    traces = torch.einsum("aibi->ab", hessian)
    traces = torch.nan_to_num(traces)  # the mean over no valid row is nan, and kappa 0 there
    if not settings["curvature_grad"]:
        traces = traces.detach()
    kappa = from_traces(traces, weight, settings["measure"], norm_power=settings["norm_power"])
    return kappa / (weight.shape[1] if settings["normalize"] else 1)


def _refused(d: Draws, kwargs: Kwargs) -> None:
    target, outputs = kwargs.get("target"), kwargs["weight"].shape[0]
    tensors = (not_floating, of_another_shape, elsewhere)
    corruptions: dict[str, Any] = {
        "features": tensors,
        "weight": tensors,
        "logits": tensors,
        "loss": (not_choice,),
        "reduction": (not_choice,),
        "measure": (not_choice,),
        "normalize": (lambda d, v: d.one_of("fan_out", 1, True, torch.ones(2)),),
        "norm_power": (lambda d, v: d.one_of(0, 3, 1.5, "2", True, None, torch.ones(2)),),
        "curvature_grad": (not_bool,),
        "backend": (lambda d, v: d.one_of("cuda", "", None, 3),),
    }
    if kwargs["loss"] == "cross_entropy":
        corruptions |= {
            "class_weight": (not_real, of_no_class_count),
            "ignore_index": (not_integer,),
            "label_smoothing": (outside_of_0_to_1,),
            "pos_weight": (lambda d, v: torch.ones(outputs),),
            "variance": (lambda d, v: 1.0,),
            "element_weight": (lambda d, v: torch.ones(outputs),),
        }
        if target is not None and not target.is_floating_point() and target.numel():
            corruptions["target"] = (lambda d, t: bad_indices(d, t, outputs),)
    else:
        corruptions["class_weight"] = (lambda d, v: torch.ones(outputs),)
        corruptions["label_smoothing"] = (lambda d, v: 0.1, outside_of_0_to_1)
        corruptions["target"] = (lambda d, v: d.one_of("x", 1.0, [1.0]), of_another_shape_of(outputs))
    if kwargs["loss"] == "gaussian_nll":
        corruptions["variance"] = (
            lambda d, v: d.one_of(
                None, "1", -1.0, float("nan"), torch.tensor(1j), torch.full_like(kwargs["logits"], -1)
            ),
        )
        corruptions["eps"] = (lambda d, v: d.one_of(-1.0, "1", None, float("nan")),)
    if kwargs["loss"] == "bce_with_logits":
        corruptions["pos_weight"] = (not_real, lambda d, v: torch.ones(outputs + 1))
    if kwargs["loss"] in ("bce_with_logits", "mse"):
        corruptions["element_weight"] = (not_real,)
    bad, name = corrupted(d, kwargs, corruptions)
    if isinstance(bad.get("variance"), Tensor) and bad["variance"].numel() == 0:
        return
    shapes = ("features", "weight", "logits", "target", "class_weight")
    names = (
        shapes
        if name in ("features", "weight", "logits")
        else (name, "target")
        if name == "class_weight"
        else name
    )
    refuses("relative_flatness", names, lambda: fam_ext.relative_flatness(**bad), described(bad))


def of_another_shape_of(outputs: int) -> Any:
    return lambda d, value: torch.ones(d.one_of((outputs + 1,), (outputs, outputs + 1, 3), (1, 1, 1, 1, 2)))


def bad_indices(d: Draws, target: Tensor, outputs: int) -> Any:
    wrong = target.clone()
    wrong.view(-1)[0] = d.one_of(outputs, outputs + 100, -7, 2**60)
    return d.one_of(
        wrong,
        target.int(),
        target.bool(),
        target.tolist(),
        "target",
        target.unsqueeze(-1).expand(*target.shape, 3),
    )
