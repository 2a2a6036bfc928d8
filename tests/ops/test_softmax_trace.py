"""softmax_trace: value and gradients of both forms against float64 and the full Hessian, on every backend."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from full_hessian import relative_flatness
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, LAYOUTS, confident_logits, make_input, needs_native
from loss_scaling import GAPS, assert_scales_like_torch, confident_head
from tolerance import assert_accurate, relative_error
from torch import Tensor

from fam_ext.ops import backends
from fam_ext.ops.softmax_trace import choose_form, softmax_trace

pytestmark = pytest.mark.on_devices

FORMS = ["shifted", "pairwise"]
ROUNDINGS = 8  # exp, division, products with the upstream gradient and the weights
LOGITS = [  # shape, fan-in: one class, tiles up to 32 classes, blocks past them, odd sizes, empty ones
    ((5, 1), 7), ((9, 2), 16), ((33, 3), 1), ((17, 10), 37), ((20, 32), 33), ((16, 31), 64), ((20, 33), 5), ((7, 100), 48),
    ((40, 1000), 3), ((1, 5), 9), ((2, 3, 7), 5), ((3, 34, 2, 5), 18), ((2, 4, 3, 2, 3), 6), ((0, 3), 2), ((0, 40), 2),
    ((2, 3, 0), 4), ((4, 3), 0), ((4, 35), 0),
]  # fmt: skip


@pytest.fixture(params=FORMS)
def form(request: Any) -> str:
    return request.param


def call(form: str, backend: str) -> Any:
    return lambda z, w: softmax_trace(z, w, form=form, backend=backend)


def differentiate(function: Any, logits: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    logits, weight = logits.detach().requires_grad_(), weight.detach().requires_grad_()
    value = function(logits, weight)
    return value.detach(), *torch.autograd.grad(value, (logits, weight), upstream.to(value))


def check(logits: Tensor, weight: Tensor, form: str, backend: str) -> None:
    """Value and gradients, which are no further from float64 than those of the reference."""
    acc = torch.float64 if torch.float64 in (logits.dtype, weight.dtype) else torch.float32
    upstream = torch.rand(logits.shape[0], *logits.shape[2:]) - 0.3
    run = lambda b: differentiate(call(form, b), logits, weight, upstream)  # noqa: E731
    truth = differentiate(oracle.softmax_trace, logits.double(), weight.double(), upstream)
    value, *grads = run(backend)
    base, *base_grads = run("reference")
    assert [t.dtype for t in (value, *grads)] == [acc, logits.dtype, weight.dtype]
    classes, rows, fan_in = logits.shape[1], value.numel(), weight.shape[1]
    p, squares = logits.double().softmax(1).movedim(1, -1), (weight - weight.mean(0)).double().square().sum(1)
    # shifted: sum of p_s |w_s|^2 and p_s |w_y|^2 over s != y, less than which v is where w_y lies far from the others
    rest, far = p.scatter(-1, p.argmax(-1, keepdim=True), 0.0), squares[p.argmax(-1)]
    parts = rest @ squares + rest.sum(-1) * far if form == "shifted" else None
    assert_accurate(value, base, truth[0], classes * fan_in, form == "pairwise", parts, ROUNDINGS)
    # dz = g p (|w_s - u|^2 - v) is 0 where all classes are alike
    parts = ((upstream * truth[0]).unsqueeze(-1) * p).movedim(-1, 1)
    assert_accurate(grads[0], base_grads[0], truth[1], classes * fan_in, False, parts, ROUNDINGS)
    assert_accurate(grads[1], base_grads[1], truth[2], classes * rows, roundings=ROUNDINGS)


def test_full_hessian(form: str, backend: str) -> None:
    """sum |phi|^2 v is relative flatness of summed cross-entropy: its value, and its total derivative through z = phi W^T."""
    phi = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 1, 2])

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(phi @ w.T, target, reduction="sum")

    kappa = (phi.square().sum(1) * softmax_trace(phi @ weight.T, weight, form=form, backend=backend)).sum()
    torch.testing.assert_close(kappa, relative_flatness(loss, weight), rtol=1e-12, atol=0)
    grads = torch.autograd.grad(kappa, (phi, weight))
    expected = torch.autograd.grad(oracle.kappa(loss, weight), (phi, weight))
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("shape", "fan_in"), LOGITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_shapes(shape: Any, fan_in: int, dtype: torch.dtype, form: str, backend: str) -> None:
    check(3 * make_input(shape, dtype), make_input((shape[1], fan_in), dtype, seed=1), form, backend)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_layouts_and_dtypes(layout: str, dtypes: Any, form: str) -> None:
    for shape in ((19, 5), (3, 36, 5), (2, 4, 3, 10)):
        weight = make_input((shape[1], 21), dtypes[1], layout, seed=1)
        check(make_input(shape, dtypes[0], layout), weight, form, "native")


@needs_native
@pytest.mark.parametrize(
    ("form", "rows", "classes"), [("pairwise", 127000, 35), ("shifted", 2 * 8192 + 3, 5)]
)
def test_several_blocks_of_rows(form: str, rows: int, classes: int) -> None:
    check(make_input((rows, classes)), make_input((classes, 3), seed=1), form, "native")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", GAPS)
def test_gradients_under_a_loss_scale(gap: float, dtype: torch.dtype, form: str) -> None:
    """kappa of a mean over many rows: the backward pass knows the whole factor, and rounds once."""
    (logits, features, weight), _ = confident_head(16384, 20, 4, gap, dtype)

    def kappa(backend: str) -> Any:
        def value(z: Tensor, w: Tensor) -> Tensor:
            trace = softmax_trace(z, w, form=form, backend=backend)
            return (features.to(trace).square().sum(1) * trace).mean()

        return value

    assert_scales_like_torch(kappa("native"), kappa("reference"), (logits, weight))


@needs_native
@pytest.mark.parametrize("classes", [3, 40])
def test_long_sums_keep_their_digits(classes: int, form: str) -> None:
    """The weight's gradient sums over all rows; one running sum of 200000 numbers in float32 loses two digits."""
    z, _ = confident_logits(200_000, classes, 1e-3)
    weight, upstream = make_input((classes, 4), seed=1), torch.rand(len(z))
    _, _, dw = differentiate(call(form, "native"), z, weight, upstream)
    assert (
        relative_error(dw, differentiate(oracle.softmax_trace, z.double(), weight.double(), upstream)[2])
        <= 1e-6
    )


@needs_native
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 32, 33, 100, 1000])
def test_confident_predictions(classes: int, offset: float, form: str) -> None:
    for digits in range(2, 9):
        for rows, fan_in in ((67, 37), (300, 5)):
            z, _ = confident_logits(rows, classes, 10.0**-digits)
            weight, upstream = torch.randn(classes, fan_in) + offset, torch.rand(rows)
            value, *grads = differentiate(call(form, "native"), z, weight, upstream)
            truth = differentiate(oracle.softmax_trace, z.double(), weight.double(), upstream)
            assert relative_error(value, truth[0], elementwise=True) <= 2e-6
            assert [relative_error(a, b) <= 2e-6 for a, b in zip(grads, truth[1:], strict=True)] == [True] * 2


@needs_native
def test_difference_of_logits_keeps_its_rounding_error(form: str) -> None:
    """z_s - z_y is near -20 here, and exp of it is off by up to 1e-6 when the difference is rounded to float32."""
    z, _ = confident_logits(500, 2, 1e-8)
    weight = make_input((2, 5), seed=1)
    value = softmax_trace(z, weight, form=form, backend="native")
    truth = oracle.softmax_trace(z.double(), weight.double())
    assert relative_error(value, truth, elementwise=True) <= 5e-7


@st.composite
def problems(draw: Any) -> Any:
    classes = draw(st.sampled_from([1, 2, 3, 8, 31, 32, 33, 50]))
    positions = draw(st.lists(st.integers(0, 6), max_size=3))
    shape = (draw(st.integers(0, 40)), classes, *positions)
    dtypes, layouts = st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)
    weight = make_input(
        (classes, draw(st.integers(0, 40))), draw(dtypes), draw(layouts), draw(st.integers(0, 99))
    )
    logits = make_input(shape, draw(dtypes), draw(layouts), draw(st.integers(0, 99)))
    return logits * draw(st.sampled_from([0.0, 1.0, 12.0])), weight, draw(st.sampled_from(FORMS))


@needs_native
@settings(max_examples=120)
@given(problems())
def test_any_problem(problem: Any) -> None:
    check(*problem, "native")


@pytest.mark.parametrize("classes", [4, 40])
def test_masked_class_is_no_class(classes: int, form: str, backend: str) -> None:
    z, weight, upstream = make_input((21, classes)), make_input((classes, 6), seed=1), torch.rand(21)
    run = call(form, backend)
    keep = [s for s in range(classes) if s != 2]
    expected = differentiate(run, z[:, keep], weight[keep], upstream)
    z[:, 2] = -math.inf
    value, dz, dw = differentiate(run, z, weight, upstream)
    torch.testing.assert_close((value, dz[:, keep], dw[keep]), expected, rtol=1e-5, atol=1e-6)
    assert not dz[:, 2].any() and not dw[2].any()


@pytest.mark.parametrize("shape", [(20, 4), (20, 40)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_stay_in_their_rows(bad: float, shape: Any, form: str, backend: str) -> None:
    z, weight = make_input(shape), make_input((shape[1], 5), seed=1)
    z[3, 1] = bad
    z[5] = -math.inf
    z[7, 0] = z[7, 2] = bad
    value, dz, _ = differentiate(call(form, backend), z, weight, torch.ones(20))
    rows = [5] if bad == -math.inf else [3, 5, 7]
    assert [r.isnan().nonzero().flatten().tolist() for r in (value, dz.sum(1))] == [rows] * 2
    weight[1, 2] = math.nan if bad == -math.inf else bad
    assert not softmax_trace(make_input(shape), weight, form=form, backend=backend).isfinite().any()


def test_form_is_the_cheaper() -> None:
    assert choose_form(128, 512, 10) == "pairwise"
    assert choose_form(128, 64, 1000) == choose_form(0, 5, 3) == "shifted"
    z, weight = make_input((30, 3)), make_input((3, 4), seed=1)
    assert torch.equal(softmax_trace(z, weight), softmax_trace(z, weight, form=choose_form(30, 4, 3)))


def test_gradcheck(form: str, backend: str) -> None:
    for shape in ((4, 1), (5, 4), (1, 34), (2, 3, 2)):
        weight = make_input((shape[1], 2), torch.float64, seed=1).requires_grad_()
        inputs = make_input(shape, torch.float64, "transposed").requires_grad_(), weight
        assert torch.autograd.gradcheck(call(form, backend), inputs)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_partial_requires_grad(needs: tuple[bool, bool], form: str, backend: str) -> None:
    inputs = [make_input((9, 4)), make_input((4, 5), seed=1)]
    run = call(form, backend)
    value, *expected = differentiate(run, *inputs, torch.ones(9))
    result = run(*(t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True)))
    assert torch.equal(result, value) and result.requires_grad == any(needs)
    if any(needs):
        result.sum().backward()
    for tensor, need, grad in zip(inputs, needs, expected, strict=True):
        assert tensor.grad is None if not need else torch.equal(tensor.grad, grad)


def test_inputs_are_not_written(form: str, backend: str) -> None:
    inputs = [make_input((9, 4)).requires_grad_(), make_input((4, 5), seed=1).requires_grad_(), torch.rand(9)]
    kept = [(t.detach().clone(), t._version) for t in inputs]
    softmax_trace(*inputs[:2], form=form, backend=backend).backward(inputs[2])
    assert all(torch.equal(t, old) and t._version == v for t, (old, v) in zip(inputs, kept, strict=True))


def test_autocast_changes_nothing(form: str, backend: str) -> None:
    z, weight = make_input((9, 4), torch.bfloat16), make_input((4, 5), seed=1)
    plain = softmax_trace(z, weight, form=form, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(softmax_trace(z, weight, form=form, backend=backend), plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool, form: str, backend: str) -> None:
    torch._dynamo.reset()
    run = lambda z, w: call(form, backend)(z, w).square().sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, layout in ((5, "contiguous"), (8, "channels_last")):
        inputs = make_input((rows, 4, 3), torch.float64, layout).requires_grad_(), make_input((4, 6), seed=1)
        expected, got = run(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, inputs[0]), torch.autograd.grad(expected, inputs[0])
        )


@needs_native
def test_function_transforms_take_the_reference() -> None:
    z, weight = make_input((4, 9, 3), torch.float64), make_input((3, 5), torch.float64, seed=1)
    batched = torch.func.vmap(softmax_trace, in_dims=(0, None))(z, weight)
    torch.testing.assert_close(batched, torch.stack([softmax_trace(x, weight) for x in z]))
    gradient = torch.func.grad(lambda w: softmax_trace(z[0], w).sum())(weight)
    expected = differentiate(softmax_trace, z[0], weight, torch.ones(9))[2]
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match=r"softmax_trace: backend 'native' .*torch.func"):
        torch.func.grad(lambda w: softmax_trace(z[0], w, backend="native").sum())(weight)


@needs_native
def test_second_derivative_is_refused(form: str) -> None:
    z, weight = make_input((5, 3)).requires_grad_(), make_input((3, 2), seed=1).requires_grad_()
    value = softmax_trace(z, weight, form=form, backend="native").sum()
    (grad,) = torch.autograd.grad(value, z, create_graph=True)
    with pytest.raises(RuntimeError, match=r'softmax_trace.*once only.*backend="reference"'):
        grad.sum().backward()


def test_reference_has_second_derivatives(form: str) -> None:
    inputs = [make_input(s, torch.float64, seed=k).requires_grad_() for k, s in enumerate([(4, 3), (3, 2)])]
    assert torch.autograd.gradgradcheck(call(form, "reference"), inputs)


Z, W = torch.zeros(6, 4), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("logits", "weight", "options", "error", "match"),
    [
        (Z.long(), W, {}, TypeError, r"logits must be a float32.*got a int64 tensor of shape \(6, 4\)"),
        (Z, None, {}, TypeError, "weight must be a float32.*got None"),
        (Z[0], W, {}, ValueError, r"logits must be of shape \(B, O\).*got .*\(4,\)"),
        (Z, W[0], {}, ValueError, r"weight must be of shape \(O, I\) with O = 4 classes, got .*\(5,\)"),
        (Z, W[:3], {}, ValueError, r"weight must be .*O = 4 classes, got .*\(3, 5\)"),
        (Z[:, :0], W[:0], {}, ValueError, "logits must be of at least one class"),
        (Z, W, {"form": "direct"}, ValueError, "form must be one of 'auto', 'shifted', 'pairwise', got 'dir"),
        (Z, W, {"backend": "cuda"}, ValueError, "backend must be one of 'auto'.*got 'cuda'"),
        (Z, W, {"backend": "triton"}, RuntimeError, "backend 'triton' is not available: "),
        (Z, W.to("meta"), {}, ValueError, r"weight must be on the device of logits \(.+, got .* on meta"),
    ],
)
def test_bad_arguments(logits: Any, weight: Any, options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match="softmax_trace: " + match):
        softmax_trace(logits, weight, **options)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_kernels", frozenset())
    monkeypatch.setattr(backends, "_reason", "compiled for another torch")
    assert torch.equal(softmax_trace(Z, W), torch.zeros(6))
    with pytest.raises(RuntimeError, match=r"softmax_trace: backend 'native' .*compiled for another torch"):
        softmax_trace(Z, W, backend="native")
