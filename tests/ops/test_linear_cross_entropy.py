"""linear_cross_entropy: loss, flatness and gradients against the full Hessian, torch, and the float64 reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from full_hessian import relative_flatness
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, LAYOUTS, needs_native
from linear_problems import (
    VARIANTS,
    check,
    confident_problem,
    differentiate,
    exact,
    indices,
    make_problem,
    nearly_equal_rows,
    roundings_of,
)
from tolerance import relative_error
from torch import Tensor

from fam_ext.functional import linear_cross_entropy

ONE_TILE = 1  # max_bytes: chunks as small as they get, one SIMD vector of rows


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_hessian(variant: str, backend: str) -> None:
    """kappa from torch's own loss, differentiated as often as it takes; no formula of ours is in it."""
    rows, classes = (2, 3), 4
    phi, weight, bias = (t.requires_grad_() for t in make_problem(rows, 3, classes, (torch.float64,) * 3))
    target, options = VARIANTS[variant](rows, classes)
    ce = {k: v for k, v in options.items() if k not in ("strength", "curvature_grad", "class_weight")}
    omegas = options["class_weight"].double() if "class_weight" in options else None
    strength, reduction = options.get("strength", 1.0), ce.get("reduction", "mean")

    def plain(w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(phi, w, bias).movedim(-1, 1), target, omegas, **ce).sum()

    options = options if omegas is None else {**options, "class_weight": omegas}
    loss, flatness = linear_cross_entropy(
        phi, weight, target, bias=bias, backend=backend, max_bytes=ONE_TILE, **options
    )
    assert loss.shape == flatness.shape == (rows if reduction == "none" else ())
    torch.testing.assert_close(flatness.sum(), relative_flatness(plain, weight), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(loss.sum(), plain(weight) + strength * flatness.sum(), rtol=1e-11, atol=1e-13)
    if options.get("curvature_grad", True):
        expected = torch.autograd.grad(
            plain(weight) + strength * oracle.kappa(plain, weight), (phi, weight, bias)
        )
        got = torch.autograd.grad(loss.sum(), (phi, weight, bias))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "classes"), [((37,), 5), ((3, 7, 5), 35), ((19,), 1), ((1,), 211)], ids=str)
def test_variants(variant: str, rows: Any, classes: int) -> None:
    target, options = VARIANTS[variant](rows, classes)
    if (target == options.get("ignore_index", -100)).all():
        options["ignore_index"] = -100 - target.view(-1)[0].item()  # some row takes part
        target = target.clamp(min=0)
    for max_bytes in (ONE_TILE, 2**20):
        check(make_problem(rows, 21, classes), target, options, max_bytes=max_bytes)


@needs_native
@pytest.mark.parametrize("accumulate", ["float32", "input"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtypes", [*((d,) * 3 for d in DTYPES), *(DTYPES[k : k + 3] for k in range(2))], ids=str
)
def test_layouts_and_dtypes(layout: str, dtypes: Any, accumulate: str) -> None:
    """One chunk: then accumulation in the weight's dtype rounds no more often than the result itself, but for W's share."""
    for rows, classes in (((19,), 5), ((2, 3, 5), 130)):
        target = indices(rows, classes, -100)
        options = {"strength": 0.1, "label_smoothing": 0.1}
        check(make_problem(rows, 23, classes, dtypes, layout), target, options, accumulate=accumulate)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 95, 96, 97])
def test_chunk_boundaries(rows: int, dtype: torch.dtype) -> None:
    """Chunks of one tile, of two, and one for all give the same numbers, but for the order of sums."""
    classes, fan_in = 67, 9
    inputs, target = make_problem((rows,), fan_in, classes, (dtype,) * 3), indices((rows,), classes)
    for max_bytes in (ONE_TILE, 32 * 4 * (2 * classes + 6 * fan_in), 2**27):
        check(inputs, target, {}, max_bytes=max_bytes)


@needs_native
def test_accumulation_in_the_weights_dtype_over_many_chunks() -> None:
    """float32 accumulation rounds once, the weight's dtype once per chunk: both are what they say."""
    rows, classes = 640, 100
    inputs, target = make_problem((rows,), 16, classes, (torch.bfloat16,) * 3), indices((rows,), classes)
    truth = differentiate(lambda *t: exact(*t, target), [t.double() for t in inputs])[3]
    error = {
        kind: relative_error(
            differentiate(
                lambda x, w, b, kind=kind: linear_cross_entropy(
                    x, w, target, bias=b, accumulate=kind, max_bytes=ONE_TILE, backend="native"
                ),
                inputs,
            )[3],
            truth,
        )
        for kind in ("float32", "input")
    }
    eps = torch.finfo(torch.bfloat16).eps
    assert error["float32"] <= eps / 2 < error["input"] * 2
    assert error["input"] <= eps / 2 * (
        math.sqrt(rows / 16) + 1
    )  # 40 chunks, roundings without a common sign


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_that_are_the_smoothed_targets(dtype: torch.dtype) -> None:
    """Two classes of almost equal logits, all smoothed: p - 1/2 keeps few digits in any order of operations."""
    for seed in range(40):
        torch.manual_seed(seed)
        weight = torch.randn(1, 3).expand(2, 3) * torch.tensor([[1.0], [1 + 1e-3 * seed]])
        inputs = [torch.randn(1, 3).to(dtype), weight.to(dtype), torch.zeros(2, dtype=dtype)]
        check(inputs, torch.tensor([0]), {"label_smoothing": 1.0, "reduction": "sum", "strength": 0.0})


@needs_native
def test_accumulation_in_the_weights_dtype_where_parts_cancel() -> None:
    """Rows of W that come in nearly equal pairs, each as likely as the other: w_s - u is far smaller than w_s - m and u - m."""
    pairs, fan_in, rows = 4, 16, 64
    likely = torch.arange(rows) % pairs
    base = 3 * torch.linalg.qr(torch.randn(fan_in, fan_in))[0][:pairs]
    weight = (base.repeat_interleave(2, 0) + 0.02 * torch.randn(2 * pairs, fan_in)).bfloat16()
    x, target = (4 * base[likely]).bfloat16(), 2 * likely + torch.arange(rows) // pairs % 2
    run = lambda f, **k: differentiate(lambda *t: f(*t, target=target, strength=1e4, **k), (x, weight))[3]  # noqa: E731
    truth = differentiate(lambda x, w: exact(x, w, None, target, 1e4), (x.double(), weight.double()))[3]
    error = relative_error(run(linear_cross_entropy, accumulate="input", max_bytes=ONE_TILE), truth)
    eps = torch.finfo(torch.bfloat16).eps
    assert error <= eps / 2 * (math.sqrt(rows / 16) + 1)  # 4 chunks
    parts = (weight.double() - weight.double().mean(0)).norm()
    assert truth.norm() < parts * 1e4  # and the parts are larger by far


@needs_native
def test_float16_weights_are_summed_in_float32() -> None:
    """Whatever is asked for: their range is too small for gradients that no loss scale has reached."""
    inputs, target = make_problem((64,), 16, 100, (torch.float16,) * 3), indices((64,), 100)
    run = lambda kind: differentiate(  # noqa: E731
        lambda x, w, b: linear_cross_entropy(x, w, target, bias=b, accumulate=kind, max_bytes=ONE_TILE),
        inputs,
    )
    assert all(torch.equal(a, b) for a, b in zip(run("input"), run("float32"), strict=True))


@st.composite
def problems(draw: Any) -> Any:
    rows = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    classes = draw(st.sampled_from([1, 2, 3, 8, 33, 100]))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    inputs = make_problem(rows, draw(st.integers(0, 40)), classes, dtypes, draw(st.sampled_from(LAYOUTS)))
    return inputs, *VARIANTS[draw(st.sampled_from(sorted(VARIANTS)))](rows, classes)


@needs_native
@settings(max_examples=120)
@given(problems(), st.sampled_from([1, 2**14, 2**27]))
def test_any_problem(problem: Any, max_bytes: int) -> None:
    if not (problem[1] == problem[2].get("ignore_index", -100)).all():  # the mean of nothing is nan
        check(*problem, max_bytes=max_bytes)


@needs_native
@pytest.mark.parametrize("strength", [1.0, 1e6])
@pytest.mark.parametrize("classes", [2, 3, 10, 33, 1000])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_confident_predictions(classes: int, strength: float, offset: float) -> None:
    """Down to 1 - max p = 1e-8, where p~ lives on the last digits of p; also with an offset common to all rows of W."""
    for digits in range(2, 9):
        inputs = confident_problem(classes, 10.0**-digits, offset)
        target = indices((67,), classes)
        results, plain = (
            differentiate(
                lambda x, w: linear_cross_entropy(x, w, target, strength=strength, backend=b),  # noqa: B023
                inputs,
            )
            for b in ("native", "reference")
        )
        double = [t.double() for t in inputs]
        truth = differentiate(lambda x, w: exact(x, w, None, target, strength), double)  # noqa: B023
        top = F.linear(*double).softmax(1).amax(1)
        assert (1 - top).max() < 1.1 * 10.0**-digits
        errors = [relative_error(a, b) for a, b in zip(results, truth, strict=True)]
        # dphi = dz W as in any linear layer: an offset of W, where the sum of dz is 0, takes its digits in torch's too
        allowed = 2e-6 + (relative_error(plain[2], truth[2]) if offset else 0.0)
        assert errors.pop(2) <= allowed and max(errors) <= 2e-6


@pytest.mark.parametrize("kind", ["large logits", "near rows"])
def test_errors_are_those_of_rounding(kind: str, backend: str) -> None:
    """Where results are sensitive, they are as far from float64 as the rounding of logits and of what v is summed from makes it.

    Logits are as large as 30, and e^z has their absolute error as its relative one; or rows of W lie 30 times as near as they are
    long.
    """
    generator, ratios = torch.Generator().manual_seed(3), []
    for _ in range(40):
        if kind == "large logits":
            x, w = 2 * torch.randn(4, 64, generator=generator), torch.randn(5, 64, generator=generator)
        else:
            w = torch.linspace(-3, 3, 17)[:, None] + 0.05 * torch.randn(17, 1, generator=generator)
            x = 5 * torch.randn(4, 1, generator=generator)
            x, w = x.bfloat16().float(), w.bfloat16().float()  # logits lose nothing
        inputs, target = (x, w, torch.zeros(len(w))), indices((4,), len(w))
        ours = differentiate(
            lambda x, w, b: linear_cross_entropy(x, w, target, bias=b, backend=backend),  # noqa: B023
            inputs,
        )
        truth = differentiate(lambda *t: exact(*t, target), [t.double() for t in inputs])  # noqa: B023
        drawn = roundings_of(inputs, target, {})
        ratios.append([
            relative_error(a, e) / math.sqrt(sum(relative_error(d, e) ** 2 for d in of) / len(of))
            for a, e, of in list(zip(ours, truth, drawn, strict=True))[1::2]
        ])  # fmt: skip
    assert torch.tensor(ratios).square().mean(0).sqrt().max() < 1.2


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2])
def test_nearly_equal_rows(spread: float, backend: str) -> None:
    """Rows of a vocabulary that were never trained: kappa is not negative, and off by no more than rounding of |w|^2."""
    _, weight = nearly_equal_rows(40, 24, spread)
    x, target = torch.randn(64, 24) / 8, torch.arange(64) % 40
    bias = torch.where(torch.arange(40) < 20, 6.0, 0.0)
    run = lambda f, *t: differentiate(lambda x, w, b: f(x, w, b, reduction="sum"), t)  # noqa: E731
    ours = run(
        lambda x, w, b, **k: linear_cross_entropy(x, w, target, bias=b, backend=backend, **k), x, weight, bias
    )
    truth = run(lambda x, w, b, **k: exact(x, w, b, target, **k), *(t.double() for t in (x, weight, bias)))
    scale = 16 * torch.finfo(torch.float32).eps * weight.square().sum(1).max() * x.square().sum()
    rows = linear_cross_entropy(x, weight, target, bias=bias, reduction="none", backend=backend)[1]
    assert (rows >= 0).all() and ours[1] >= 0
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).abs().max() <= scale


def test_class_weights_that_sum_to_zero(backend: str) -> None:
    """The mean divides by 0, as torch's: not finite, but for ignored rows."""
    (x, weight, bias), target = make_problem((4,), 3, 5), torch.tensor([0, 0, -100, 0])
    omega = torch.tensor([0.0, 1, 1, 1, 1])
    for smoothing in (0.0, 0.1):
        run = partial(
            linear_cross_entropy,
            target=target,
            class_weight=omega,
            label_smoothing=smoothing,
            backend=backend,
        )
        loss, flatness, *grads = differentiate(lambda x, w, b, run=run: run(x, w, bias=b), (x, weight, bias))
        assert F.cross_entropy(x @ weight.T, target, omega, label_smoothing=smoothing).isnan()
        assert loss.isnan() and not flatness.isfinite() and all(g.isnan().any() for g in grads)
        assert not grads[0][2].any()


def test_all_rows_ignored(backend: str) -> None:
    """torch's mean over nothing is nan, the sum 0; no gradient reaches anything."""
    target, inputs = torch.full((6,), -100), make_problem((6,), 5, 40)
    for reduction, value in (("mean", math.nan), ("sum", 0.0), ("none", 0.0)):
        for smoothing in (0.0, 0.1):
            options = {"reduction": reduction, "label_smoothing": smoothing, "backend": backend}
            loss, flatness, *grads = differentiate(
                lambda x, w, b: linear_cross_entropy(x, w, target, bias=b, **options),  # noqa: B023
                inputs,
                torch.ones(6) if reduction == "none" else None,
            )
            assert torch.equal(loss.isnan(), torch.full_like(loss, value).isnan())
            assert not loss.nan_to_num().any() and not flatness.any()
            assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("variant", ["none", "ignored", "smoothing", "smoothing weights", "constant"])
def test_ignored_rows_may_hold_anything(variant: str, backend: str) -> None:
    target, options = VARIANTS[variant]((20,), 40)
    inputs = make_problem((20,), 5, 40)
    upstream = torch.rand(20) if options.get("reduction") == "none" else None
    run = lambda: differentiate(  # noqa: E731
        lambda x, w, b: linear_cross_entropy(
            x, w, target, bias=b, backend=backend, max_bytes=ONE_TILE, **options
        ),
        inputs,
        upstream,
    )
    expected = run()
    inputs[0][target == -100] = math.nan
    result = run()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
    assert not result[2][target == -100].any()


def test_rows_of_classes_without_weight_may_hold_anything(backend: str) -> None:
    target, inputs = torch.arange(20) % 4, make_problem((20,), 5, 4)
    run = lambda: differentiate(  # noqa: E731
        lambda x, w, b: linear_cross_entropy(
            x, w, target, bias=b, class_weight=torch.tensor([1.0, 0.0, 2.0, 0.5]), backend=backend
        ),
        inputs,
    )
    expected = run()
    inputs[0][target == 1] *= -3
    torch.testing.assert_close(run(), expected, rtol=1e-6, atol=0)


def test_no_rows(backend: str) -> None:
    for rows, fan_in in (((0,), 5), ((2, 0), 5), ((4,), 0)):
        inputs, target = make_problem(rows, fan_in, 40), indices(rows, 40)
        if backend == "native":
            check(inputs, target, {"reduction": "sum"})
        loss, flatness = linear_cross_entropy(*inputs[:2], target, backend=backend)
        assert flatness == 0 and loss.isnan().item() == (0 in rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_bad_numbers_come_out(bad: float, where: int, backend: str) -> None:
    inputs = make_problem((20,), 6, 40)
    inputs[where][(1, 2)[: inputs[where].dim()]] = bad
    x, w, b = inputs
    loss, flatness = linear_cross_entropy(x, w, torch.full((20,), 1), bias=b, backend=backend)
    assert not loss.isfinite() and not flatness.isfinite()


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_is_a_scaled_input(temperature: float, backend: str) -> None:
    """z = phi W^T / T is the head of the features phi / T: kappa is the full Hessian's."""
    phi, weight, _ = make_problem((6,), 3, 4, (torch.float64,) * 3)
    target = indices((6,), 4)
    flatness = linear_cross_entropy(phi / temperature, weight, target, backend=backend)[1]
    plain = lambda w: F.cross_entropy(phi @ w.T / temperature, target)  # noqa: E731
    torch.testing.assert_close(flatness, relative_flatness(plain, weight), rtol=1e-11, atol=1e-13)
