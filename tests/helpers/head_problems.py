"""Problems of head_cross_entropy that tests of the CPU and of the CUDA kernels share, and their checks against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import torch
from inputs import make_input
from tolerance import assert_accurate, total_parts
from torch import Tensor

from fam_ext.ops.head_cross_entropy import head_cross_entropy
from fam_ext.ops.row_coefficients import cross_entropy_coefficients

Variant = Callable[[tuple[int, ...]], tuple[Tensor, dict[str, Any]]]


def indices(shape: tuple[int, ...], ignored: int | None = None) -> Tensor:
    """Class indices of logits of `shape`; with `ignored`, every third row has that index."""
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if ignored is not None:
        target.view(-1)[::3] = ignored
    return target


def distributions(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape).div(torch.rand(shape).sum(1, keepdim=True))  # need not sum to 1


def omega(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape[1]) + 0.1


VARIANTS: dict[str, Variant] = {
    "index": lambda s: (indices(s), {}),
    "sum": lambda s: (indices(s), {"reduction": "sum"}),
    "none": lambda s: (indices(s, -100), {"reduction": "none", "class_weight": omega(s)}),
    "ignored": lambda s: (indices(s, -100), {}),
    "ignored class": lambda s: (indices(s, 0), {"ignore_index": 0}),
    "weights": lambda s: (indices(s, -1), {"class_weight": omega(s), "ignore_index": -1}),
    "weights sum": lambda s: (indices(s), {"class_weight": omega(s), "reduction": "sum"}),
    "smoothing": lambda s: (indices(s, -100), {"label_smoothing": 0.3}),
    "all smoothed": lambda s: (indices(s), {"label_smoothing": 1.0}),
    "smoothing weights": lambda s: (indices(s, -100), {"label_smoothing": 0.1, "class_weight": omega(s)}),
    "soft": lambda s: (distributions(s), {}),
    "soft sum": lambda s: (distributions(s), {"reduction": "sum"}),
    "soft none": lambda s: (distributions(s), {"reduction": "none", "label_smoothing": 0.2}),
    "soft all": lambda s: (distributions(s), {"label_smoothing": 0.2, "class_weight": omega(s)}),
    "negative": lambda s: (indices(s), {"strength": -0.7}),
    "strength 0": lambda s: (indices(s), {"strength": 0.0}),
    "constant": lambda s: (indices(s, -100), {"curvature_grad": False, "class_weight": omega(s)}),
    "constant none": lambda s: (indices(s), {"curvature_grad": False, "reduction": "none"}),
}


def make_problem(
    shape: tuple[int, ...], fan_in: int, dtypes: Any = (torch.float32,) * 3, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, features and weight."""
    logits, features, weight = (
        make_input(s, dtype, layout, seed=k)
        for k, (s, dtype) in enumerate(
            zip((shape, (shape[0], *shape[2:], fan_in), (shape[1], fan_in)), dtypes, strict=True)
        )
    )
    return 2 * logits, features, weight


def exact(
    logits: Tensor, features: Tensor, weight: Tensor, target: Tensor, strength: float = 1.0, curvature_grad: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(CE + strength kappa, kappa): the loss and the covariance as they are defined, in the dtype of the inputs."""
    options = {k: v.to(logits.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    target = target.to(logits.dtype) if target.is_floating_point() else target
    c = cross_entropy_coefficients(logits, target, **options)
    loss = oracle.cross_entropy(logits, target, options.pop("class_weight", None), **options)
    z, phi = (logits, features) if curvature_grad else (logits.detach(), features.detach())
    kappa = c * phi.square().sum(-1) * oracle.softmax_trace(z, weight)
    kappa = kappa if options.get("reduction") == "none" else kappa.sum()
    return loss + strength * kappa, kappa.detach()


def differentiate(function: Any, inputs: Any, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """(loss, flatness, gradients of the loss); what it does not depend on has a zero one."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    loss, flatness = function(*inputs)
    assert not flatness.requires_grad
    grads = torch.autograd.grad(
        loss, inputs, None if upstream is None else upstream.to(loss), materialize_grads=True
    )
    return loss.detach(), flatness, *grads


def coefficient_options(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in ("strength", "curvature_grad")}


def check(inputs: Any, target: Tensor, options: dict[str, Any], backend: str) -> None:
    """No result is further from float64 than that of the reference, but for rounding."""
    logits, features, weight = inputs
    acc = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
    rows, (classes, fan_in) = math.prod(features.shape[:-1]), weight.shape
    upstream = torch.rand(features.shape[:-1]) if options.get("reduction") == "none" else torch.tensor(0.7)
    run = lambda b: differentiate(  # noqa: E731
        lambda *t: head_cross_entropy(*t, target, backend=b, **options), inputs, upstream
    )
    truth = differentiate(lambda *t: exact(*t, target, **options), [t.double() for t in inputs], upstream)
    results, base = run(backend), run("reference")
    assert [t.dtype for t in results] == [acc, acc, logits.dtype, features.dtype, weight.dtype]
    terms = (classes * fan_in * rows,) * 2 + (classes * fan_in,) * 2 + (classes * rows,)
    # dz = c p - q + ... is 0 where the prediction is the target
    c = cross_entropy_coefficients(logits.double(), target, **coefficient_options(options))
    total = total_parts(*truth[:2], options.get("strength", 1.0))
    parts: list[Any] = [total, None, (upstream * c).unsqueeze(1) * logits.double().softmax(1), None, None]
    for actual, plain, value, count, part in zip(results, base, truth, terms, parts, strict=True):
        assert_accurate(actual, plain, value, count, parts=part, roundings=8)


def check_all_rows_ignored(form: str, backend: str) -> None:
    """torch's mean over nothing is nan, the sum 0; no gradient reaches anything."""
    for shape in ((6, 4), (6, 40)):
        target, inputs = torch.full((6,), -100), make_problem(shape, 5)
        for reduction, value in (("mean", math.nan), ("sum", 0.0), ("none", 0.0)):
            for smoothing in (0.0, 0.1):
                options = {"reduction": reduction, "label_smoothing": smoothing, "backend": backend}
                loss, flatness, *grads = differentiate(
                    lambda *t: head_cross_entropy(*t, target, **options),  # noqa: B023
                    inputs,
                    torch.ones(6) if reduction == "none" else None,
                )
                assert torch.equal(loss.isnan(), torch.full_like(loss, value).isnan())
                assert not loss.nan_to_num().any() and not flatness.any()
                assert not any(grad.any() for grad in grads)


def check_ignored_rows_may_hold_anything(variant: str, shape: Any, form: str, backend: str) -> None:
    target, options = VARIANTS[variant](shape)
    inputs = make_problem(shape, 5)
    upstream = torch.rand(target.shape) if options.get("reduction") == "none" else None
    run = lambda: differentiate(  # noqa: E731
        lambda *t: head_cross_entropy(*t, target, backend=backend, **options), inputs, upstream
    )
    expected = run()
    ignored = target == -100
    inputs[0].movedim(1, -1)[ignored] = math.nan
    inputs[1][ignored] = math.inf
    result = run()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
    assert not result[2].movedim(1, -1)[ignored].any() and not result[3][ignored].any()


def check_no_rows(form: str, backend: str) -> None:
    for shape, fan_in in (((0, 3), 5), ((2, 40, 0), 5), ((4, 3), 0), ((4, 40), 0)):
        check(make_problem(shape, fan_in), indices(shape), {"reduction": "sum"}, backend)
    loss, flatness = head_cross_entropy(*make_problem((0, 3), 5), indices((0, 3)), backend=backend)
    assert loss.isnan() and flatness == 0


def check_bad_numbers_come_out(bad: float, where: int, form: str, backend: str) -> None:
    for shape in ((20, 4), (20, 40)):
        inputs = make_problem(shape, 6)
        inputs[where][1, 2] = bad
        loss, flatness = head_cross_entropy(*inputs, torch.full((20,), 1), backend=backend)
        assert not loss.isfinite() and not flatness.isfinite()
