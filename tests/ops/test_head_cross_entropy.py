"""head_cross_entropy: loss, flatness and gradients of every variant of cross-entropy against torch and float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import head_problems
import oracle
import pytest
import torch
import torch.nn.functional as F
from full_hessian import relative_flatness
from head_problems import VARIANTS, check, differentiate, exact, indices, make_problem, omega
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, LAYOUTS, confident_logits, make_input, needs_native
from tolerance import relative_error
from torch import Tensor

from fam_ext.ops import head_cross_entropy as module
from fam_ext.ops.head_cross_entropy import head_cross_entropy

pytestmark = pytest.mark.on_devices


@pytest.fixture(params=["shifted", "pairwise"])
def form(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "choose_form", lambda *sizes: request.param)
    return request.param


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_hessian(variant: str, form: str, backend: str) -> None:
    """kappa from torch's own loss, differentiated as often as it takes; no formula of ours is in it."""
    shape = (2, 4, 3)
    _, phi, weight = make_problem(shape, 3, (torch.float64,) * 3)
    target, options = VARIANTS[variant](shape)
    target = target.double() if target.is_floating_point() else target
    class_weight = options.pop("class_weight", None)
    class_weight = None if class_weight is None else class_weight.double()
    ce = {k: v for k, v in options.items() if k not in ("strength", "curvature_grad")}
    phi, weight = phi.requires_grad_(), weight.requires_grad_()
    strength, reduction = options.get("strength", 1.0), ce.get("reduction", "mean")

    def plain(w: Tensor) -> Tensor:
        return F.cross_entropy((phi @ w.T).movedim(-1, 1), target, class_weight, **ce)

    logits = (phi @ weight.T).movedim(-1, 1)
    loss, flatness = head_cross_entropy(
        logits, phi, weight, target, class_weight=class_weight, backend=backend, **options
    )
    summed = (lambda w: plain(w).sum()) if reduction == "none" else plain
    torch.testing.assert_close(flatness.sum(), relative_flatness(summed, weight), rtol=1e-11, atol=1e-13)
    total = (plain(weight) + strength * flatness).sum() if reduction != "none" else loss.sum()
    torch.testing.assert_close(loss.sum(), total, rtol=1e-11, atol=1e-13)
    if options.get("curvature_grad", True):
        expected = torch.autograd.grad(
            summed(weight) + strength * oracle.kappa(summed, weight), (phi, weight)
        )
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), (phi, weight)), expected, rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(37, 5), (3, 34, 2, 5), (19, 1), (21, 2)], ids=str)
def test_variants(variant: str, shape: Any, form: str, backend: str) -> None:
    check(make_problem(shape, 21), *VARIANTS[variant](shape), backend)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtypes", [*((d,) * 3 for d in DTYPES), *(DTYPES[k : k + 3] for k in range(2))], ids=str
)
def test_layouts_and_dtypes(layout: str, dtypes: Any, form: str) -> None:
    for shape in ((19, 5), (2, 36, 5), (2, 4, 3, 10)):
        check(make_problem(shape, 23, dtypes, layout), indices(shape, -100), {"strength": 0.1}, "native")
        soft = make_input(shape, dtypes[2], layout, seed=5).abs()
        check(make_problem(shape, 23, dtypes, layout), soft, {"label_smoothing": 0.1}, "native")


@needs_native
@pytest.mark.parametrize(("rows", "classes"), [(2 * 8192 + 3, 5), (127_000, 35)])
def test_several_blocks_of_rows(rows: int, classes: int, form: str) -> None:
    """Rows are taken in blocks: their targets, coefficients and features must be those of the block."""
    shape = (rows, classes)
    check(make_problem(shape, 3), indices(shape, -100), {"class_weight": omega(shape)}, "native")


@st.composite
def problems(draw: Any) -> Any:
    positions = draw(st.lists(st.integers(1, 5), max_size=2))
    shape = (draw(st.integers(1, 30)), draw(st.sampled_from([1, 2, 3, 8, 32, 33, 40])), *positions)
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    inputs = make_problem(shape, draw(st.integers(0, 40)), dtypes, draw(st.sampled_from(LAYOUTS)))
    return inputs, *VARIANTS[draw(st.sampled_from(sorted(VARIANTS)))](shape)


@needs_native
@settings(max_examples=120)
@given(problems())
def test_any_problem(problem: Any) -> None:
    if not (problem[1] == problem[2].get("ignore_index", -100)).all():  # the mean of nothing is nan
        check(*problem, "native")


@needs_native
@pytest.mark.parametrize("strength", [1.0, 1e6])
@pytest.mark.parametrize("classes", [2, 3, 10, 32, 33, 100, 1000])
def test_confident_predictions(classes: int, strength: float, form: str) -> None:
    for digits in range(2, 9):
        z, y = confident_logits(67, classes, 10.0**-digits)
        features, weight = torch.randn(67, 37), torch.randn(classes, 37)
        run = lambda f: lambda *t: f(*t, y, strength=strength)  # noqa: E731, B023
        results = differentiate(run(head_cross_entropy), (z, features, weight))
        truth = differentiate(run(exact), (z.double(), features.double(), weight.double()))
        assert max(relative_error(a, b) for a, b in zip(results, truth, strict=True)) <= 2e-6


def test_all_rows_ignored(form: str, backend: str) -> None:
    """torch's mean over nothing is nan, the sum 0; no gradient reaches anything."""
    head_problems.check_all_rows_ignored(form, backend)


@pytest.mark.parametrize("variant", ["none", "ignored", "smoothing", "smoothing weights", "constant"])
@pytest.mark.parametrize("shape", [(20, 4), (20, 40), (4, 3, 5)], ids=str)
def test_ignored_rows_may_hold_anything(variant: str, shape: Any, form: str, backend: str) -> None:
    head_problems.check_ignored_rows_may_hold_anything(variant, shape, form, backend)


def test_no_rows(form: str, backend: str) -> None:
    head_problems.check_no_rows(form, backend)


def test_no_rows_of_probabilities(form: str, backend: str) -> None:
    """torch's mean over nothing is nan, the sum 0."""
    for shape in ((0, 3), (0, 40), (2, 4, 0)):
        inputs, target = make_problem(shape, 5), torch.zeros(shape)
        for reduction in ("mean", "sum"):
            loss, flatness = head_cross_entropy(*inputs, target, reduction=reduction, backend=backend)
            assert loss.isnan() == F.cross_entropy(inputs[0], target, reduction=reduction).isnan()
            assert not loss.nan_to_num() and flatness == 0


def test_class_weights_that_sum_to_zero(form: str, backend: str) -> None:
    """The mean divides by 0, as torch's: no number that is not ignored is finite."""
    for shape in ((4, 3), (4, 40)):
        inputs, target = make_problem(shape, 5), torch.tensor([0, 0, -100, 0])
        class_weight = torch.ones(shape[1]).index_fill(0, torch.tensor([0]), 0.0)
        for smoothing in (0.0, 0.1):
            options = {"label_smoothing": smoothing}
            run = partial(
                head_cross_entropy, target=target, class_weight=class_weight, backend=backend, **options
            )
            loss, flatness, *grads = differentiate(run, inputs)
            logits = inputs[0].detach().requires_grad_()
            torchs = F.cross_entropy(logits, target, class_weight, **options)
            assert torchs.isnan() and loss.isnan() and not flatness.isfinite()
            assert torch.equal(grads[0].isnan(), torch.autograd.grad(torchs, logits)[0].isnan())
            assert not grads[1][2].any() and not grads[2].isfinite().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_bad_numbers_come_out(bad: float, where: int, form: str, backend: str) -> None:
    head_problems.check_bad_numbers_come_out(bad, where, form, backend)


@needs_native
def test_masked_class(form: str) -> None:
    """A logit of -inf that is nobody's target: the class might as well not be there."""
    (z, phi, weight), y, keep = make_problem((20, 5), 6), torch.arange(20) % 4, [0, 1, 2, 3]
    z[:, 4] = -math.inf
    result = differentiate(lambda *t: head_cross_entropy(*t, y), (z, phi, weight))
    expected = differentiate(lambda *t: head_cross_entropy(*t, y), (z[:, keep], phi, weight[keep]))
    torch.testing.assert_close(
        (*result[:2], result[2][:, keep], result[3], result[4][keep]), expected, rtol=1e-5, atol=1e-7
    )
    assert not result[2][:, 4].any() and not result[4][4].any()
