"""linear_cross_entropy on Triton's interpreter: the whole operation against float64, kernels' blocks made smaller than a row."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations
from autograd_checks import assert_partial_grads
from inputs import TRITON_ON_GPU, make_input
from linear_problems import VARIANTS, confident_problem, differentiate, exact, indices, make_problem
from tolerance import assert_accurate, relative_error
from torch import Tensor

from fam_ext.ops import backends
from fam_ext.ops.linear_cross_entropy import linear_cross_entropy

pytest.importorskip("triton")
kernels = pytest.importorskip("fam_ext.kernels.linear_cross_entropy")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_TILE = 1  # max_bytes: 16 rows at a time
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


def call(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, target: Tensor, backend: str = "triton", **options: Any
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(x, w, target, bias=b, backend=backend, **options)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks along every axis, the last of them partly empty."""
    for name, size in (
        ("ROW_BLOCK", 16),
        ("MEAN_BLOCK", 8),
        ("CLASS_BLOCK", 8),
        ("CHUNK_BLOCK", 4),
        ("COLUMN_BLOCK", 8),
    ):
        monkeypatch.setattr(kernels, name, size)


def check(inputs: Any, target: Tensor, options: dict[str, Any], **triton: Any) -> list[float]:
    """No result is further from float64 than that of the reference, but for rounding: where both tensors of a head are bfloat16,
    kappa keeps 16 bits (2^8 roundings of float32). Gradients of less than float32 are rounded themselves, and made of such."""
    x, weight, bias = inputs
    upstream = torch.rand(target.shape) if options.get("reduction") == "none" else torch.tensor(0.7)
    run = partial(call, target=target, **options)
    truth = differentiate(lambda *t: exact(*t, target, **options), [t.double() for t in inputs], upstream)
    results = differentiate(partial(run, **triton), inputs, upstream)
    base = differentiate(partial(run, backend="reference"), inputs, upstream)
    assert [t.dtype for t in results] == [F32, F32, x.dtype, weight.dtype, bias.dtype]
    assert [t.shape for t in results] == [t.shape for t in truth]
    split = x.dtype == weight.dtype == BF16
    for actual, plain, value in zip(results, base, truth, strict=True):
        terms, roundings = target.numel() + sum(weight.shape), 8
        if actual.dtype != F32:
            terms, roundings = 1, 6
        elif split:
            terms, roundings = 1, 2**8
        assert_accurate(actual, plain, value, terms, roundings=roundings)
    return [relative_error(a, b) for a, b in zip(results, truth, strict=True)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, dtype: torch.dtype) -> None:
    """Odd numbers of features and classes; two chunks of rows, or all at once."""
    target, options = VARIANTS[variant]((3, 6), 19)
    inputs = make_problem((3, 6), 9, 19, (dtype,) * 3)
    check(inputs, target, options, max_bytes=ONE_TILE if dtype == F32 else 2**20)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "sliced", "expanded"])
@pytest.mark.parametrize(
    "dtypes", [(F32,) * 3, (BF16, BF16, F32), (F16, BF16, F32), (BF16, F32, F16)], ids=str
)
def test_layouts_and_dtypes(layout: str, dtypes: Any) -> None:
    """The launcher's own blocks; weights that are converted a block of classes at a time."""
    target, options = indices((7,), 150, -100), {"strength": 0.1, "label_smoothing": 0.1}
    for accumulate in ("float32", "input") if layout == "contiguous" else ("float32",):
        inputs = make_problem((7,), 9, 150, dtypes, layout)
        check(inputs, target, options, accumulate=accumulate, max_bytes=2**14)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 33])
def test_chunk_boundaries(rows: int, dtype: torch.dtype) -> None:
    inputs, target = make_problem((rows,), 3, 1 if rows == 16 else 6, (dtype,) * 3), torch.arange(rows)
    check(inputs, target % inputs[1].shape[0], {}, max_bytes=ONE_TILE)


def test_bfloat16_keeps_16_bits_of_kappa_and_rounds_gradients_once() -> None:
    """Eight bits of e or of u - m would be off by 1e-3."""
    inputs, target = make_problem((12,), 9, 60, (BF16,) * 3), indices((12,), 60)
    errors = check(inputs, target, {"strength": 0.1, "reduction": "none"}, max_bytes=2**20)
    assert max(errors[:2]) < 2.0**-16 and max(errors[2:]) < 2.0**-7


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("confidence", [1.0, 15.0])
def test_one_part_keeps_8_bits_of_kappa_and_all_of_the_loss(confidence: float, offset: float) -> None:
    """Also where one class has almost all of the probability, and where all rows of the weight are far from zero."""
    x, weight, bias = make_problem((12,), 9, 60, (BF16,) * 3)
    target = indices((12,), 60)
    weight = weight + offset
    bias = confidence * torch.nn.functional.one_hot(torch.tensor(7), 60).to(BF16) + bias
    inputs = (x, weight.to(BF16), bias.to(BF16))
    options: dict[str, Any] = {"strength": 0.1, "reduction": "none"}
    double = [t.double() for t in inputs]
    upstream = torch.rand(12)
    truth = differentiate(lambda *t: exact(*t, target, **options), double, upstream)
    plain = exact(*double, target, strength=0.0, reduction="none")[0]
    results = differentiate(partial(call, target=target, parts=1, **options), inputs, upstream)
    assert relative_error(results[1], truth[1], elementwise=True) < 2.0**-8
    assert relative_error(results[0] - 0.1 * results[1], plain) < 1e-5
    both = differentiate(partial(call, target=target, **options), inputs, upstream)
    one, two = (
        [relative_error(a, b) for a, b in zip(r[1:], truth[1:], strict=True)] for r in (results, both)
    )
    assert two[0] < one[0]
    assert all(
        a <= 4 * b for a, b in zip(one[1:], two[1:], strict=True)
    )  # gradients are rounded to 8 bits anyway
    assert max(one[1:]) < 2.0**-6 or offset


def test_one_part_changes_nothing_elsewhere() -> None:
    for dtypes in ((F32,) * 3, (F16, BF16, F32)):
        inputs, target = make_problem((12,), 9, 60, dtypes), indices((12,), 60)
        one, two = (differentiate(partial(call, target=target, parts=n), inputs) for n in (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for parts, error in ((3, ValueError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="linear_cross_entropy: parts must be"):
            call(*inputs, target=target, parts=parts)


def test_accumulation_in_the_weights_dtype_over_many_chunks() -> None:
    rows = 80
    inputs, target = make_problem((rows,), 6, 9, (BF16,) * 3), indices((rows,), 9)
    truth = differentiate(lambda *t: exact(*t, target), [t.double() for t in inputs])[3]
    error = {}
    for kind in ("float32", "input"):
        run = partial(call, target=target, accumulate=kind, max_bytes=ONE_TILE)
        error[kind] = relative_error(differentiate(run, inputs)[3], truth)
    eps = torch.finfo(BF16).eps
    assert error["float32"] < error["input"] <= eps / 2 * (math.sqrt(2 * rows / 16) + 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("classes", [2, 3, 33])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_confident_predictions(classes: int, offset: float) -> None:
    """Down to 1 - max p = 1e-8, where p~ lives on the last digits of p; also with an offset common to all rows of W."""
    for digits in (3, 8):
        inputs = [
            t[:9] if k == 0 else t for k, t in enumerate(confident_problem(classes, 10.0**-digits, offset))
        ]
        target = indices((9,), classes)
        results, plain = (
            differentiate(partial(call, target=target, backend=b), inputs) for b in ("triton", "reference")
        )
        double = [t.double() for t in inputs]
        truth = differentiate(lambda x, w: exact(x, w, None, target), double)  # noqa: B023
        assert (1 - F.linear(*double).softmax(1).amax(1)).max() < 1.1 * 10.0**-digits
        errors = [relative_error(a, b) for a, b in zip(results, truth, strict=True)]
        # dphi = dz W as in any linear layer: an offset of W, where the sum of dz is 0, takes its digits in torch's too
        allowed = 1e-6 + (relative_error(plain[2], truth[2]) if offset else 0.0)
        assert errors.pop(2) <= allowed and max(errors) <= 1e-6


@pytest.mark.parametrize("strength", [0.0, 1e6])
def test_confident_and_right(strength: float) -> None:
    """The loss and its gradients are as small as 1 - max p, alone or beside a kappa that outweighs them."""
    for digits in (4, 8):
        x, w = confident_problem(10, 10.0**-digits, 0.0)
        x = x[:8]
        target = (x.double() @ w.double().T).argmax(1)
        results = differentiate(partial(call, target=target, strength=strength), (x, w))
        double = x.double(), w.double()
        truth = differentiate(lambda x, w: exact(x, w, None, target, strength), double)  # noqa: B023
        assert max(relative_error(a, b) for a, b in zip(results, truth, strict=True)) <= 1e-6


@pytest.mark.usefixtures("small_blocks")
def test_exponentials_of_differences_that_are_rounded() -> None:
    """Each e_s to float32's last digits, where half a unit in the last place of z_s - z_y is 1e-6 of it; down to the smallest."""
    z = torch.randn(6, 40)
    z[torch.arange(6), torch.arange(6) * 7] += torch.tensor([0.0, 5.0, 20.0, 40.0, 80.0, 95.0])
    top = z.double().max(1, keepdim=True)
    e = (z.double() - top.values).exp().scatter(1, top.indices, 0.0)
    squares, stats, best = torch.rand(40), torch.empty(4, 6), torch.empty(6, dtype=torch.int64)
    kernels.softmax_rows(z, None, squares, None, torch.zeros(6, dtype=torch.int64), False, best, stats)
    assert torch.equal(best, top.indices.squeeze(1))
    torch.testing.assert_close(z.double(), e, rtol=2.5e-7, atol=2e-38)
    torch.testing.assert_close(
        stats[:2].double(), torch.stack([e.sum(1), e @ squares.double()]), rtol=5e-7, atol=1e-36
    )


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
@pytest.mark.parametrize(
    "options", [{}, {"curvature_grad": False}, {"strength": 0.0}, {"reduction": "none"}], ids=str
)
def test_frozen_tensors(needs: tuple[bool, ...], options: dict[str, Any]) -> None:
    """What is not asked for is neither made nor missed."""
    for dtype in (F32, BF16):
        inputs, target = make_problem((7,), 5, 7, (dtype,) * 3), indices((7,), 7, -100)
        assert_partial_grads(partial(call, target=target, **options), inputs, needs, same_bits=True)


def products(needs: tuple[bool, bool], dtype: torch.dtype, **options: Any) -> int:
    x, w, _ = make_problem((3,), 5, 40, (dtype,) * 3)
    x, w = (t.requires_grad_(need) for t, need in zip((x, w), needs, strict=True))
    with torch.autograd.profiler.profile() as profile:
        linear_cross_entropy(x, w, torch.arange(3), backend="triton", **options)
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.function_events)


def test_products_that_nobody_needs_are_skipped() -> None:
    for dtype, split in (
        (F32, 0),
        (BF16, 1),
    ):  # the dots of a bfloat16 head come in two halves of the classes
        assert products((True, True), dtype) == 5 + split
        assert products((True, False), dtype) == products((False, True), dtype) == 4 + split
        assert products((False, False), dtype) == 2
        assert products((True, True), dtype, parts=1) == 5
        assert (
            products((True, True), dtype, strength=0.0)
            == products((True, True), dtype, curvature_grad=False)
            == 4
        )


@pytest.mark.skipif(TRITON_ON_GPU, reason="cuBLAS takes a workspace of its own")
def test_no_allocation_holds_the_logits() -> None:
    rows, classes = 96, 3000
    x, w = (torch.randn(size, 8, requires_grad=True) for size in (rows, classes))
    sizes = allocations(lambda: call(x, w, target=torch.arange(rows), max_bytes=2**19)[0].backward())
    assert 0 < max(sizes) <= 2**19 < rows * classes * 4 / 2


def test_rows_without_a_share_may_hold_anything() -> None:
    x, w, b = make_problem((20,), 5, 4)
    for options in ({}, {"label_smoothing": 0.1}, {"class_weight": torch.tensor([1.0, 0.0, 2.0, 0.5])}):
        target = torch.arange(20) % 4
        lost = target == 1
        if "class_weight" not in options:
            target[lost] = -100
        run = partial(call, target=target, **options)
        expected = differentiate(run, (x, w, b))
        result = differentiate(run, (torch.where(lost[:, None], math.nan, x), w, b))
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
        assert not result[2][lost].any()


def test_no_rows_and_all_ignored() -> None:
    inputs = make_problem((6,), 5, 4)
    for x, target in (
        (inputs[0], torch.full((6,), -100)),
        (inputs[0][:0], torch.zeros(0, dtype=torch.int64)),
    ):
        for reduction, value in (("mean", math.nan), ("sum", 0.0), ("none", 0.0)):
            run = partial(call, target=target, reduction=reduction)
            upstream = torch.ones(len(x)) if reduction == "none" else None
            loss, flatness, *grads = differentiate(run, (x, *inputs[1:]), upstream)
            assert torch.equal(loss.isnan(), torch.full_like(loss, value).isnan())
            assert not loss.nan_to_num().any() and not flatness.any() and not any(g.any() for g in grads)
    assert (
        linear_cross_entropy(torch.zeros(3, 0), torch.zeros(4, 0), torch.arange(3), backend="triton")[1] == 0
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_bad_numbers_come_out(bad: float, where: int) -> None:
    inputs = make_problem((5,), 6, 40)
    inputs[where][(1, 2)[: inputs[where].dim()]] = bad
    x, w, b = inputs
    loss, flatness = linear_cross_entropy(x, w, torch.full((5,), 1), bias=b, backend="triton")
    assert not loss.isfinite() and not flatness.isfinite()


def test_gradients_are_the_same_every_time_and_inputs_are_not_written() -> None:
    inputs, target = make_problem((20,), 5, 3, (BF16,) * 3), indices((20,), 3)
    before = [t.clone() for t in inputs]
    run = partial(call, target=target)
    first, second = differentiate(run, inputs), differentiate(run, inputs)
    assert all(torch.equal(a, b) for a, b in zip((*first, *before), (*second, *inputs), strict=True))


def arguments(
    *, reduction: int = 1, dtype: torch.dtype = F32, needs: Any = (True,) * 3, bias: bool = True
) -> Any:
    x, w, b = (t.requires_grad_() for t in make_problem((2, 3), 5, 7, (dtype,) * 3, "transposed"))
    options = (-100, 0.1, reduction, 0.5, True, 1000, dtype == BF16, True, 2)
    return x, w, b if bias else None, indices((2, 3), 7), None, None, *options, *needs


def test_opcheck() -> None:
    operator = torch.ops.fam_ext.linear_cross_entropy.default
    for sample in (
        arguments(),
        arguments(reduction=0, needs=(False,) * 3),
        arguments(reduction=2, dtype=BF16),
        arguments(bias=False, needs=(True, True, False)),
    ):
        torch.library.opcheck(operator, sample)
        with torch.no_grad():
            real = operator(*sample)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in sample))
        assert [(a.shape, a.dtype, a.stride()) for a in real] == [
            (b.shape, b.dtype, b.stride()) for b in fake
        ]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph_and_refuses_second_derivatives(reduction: str) -> None:
    target = indices((6,), 4)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        values, flatness = linear_cross_entropy(
            x.T, w, target, bias=b, reduction=reduction, backend="triton", max_bytes=1
        )
        return (2 * values + flatness).sum()

    inputs = [make_input(s, seed=k).requires_grad_() for k, s in enumerate([(5, 6), (4, 5), (4,)])]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs))
    for grad in torch.autograd.grad(loss(*inputs), inputs, create_graph=True):
        with pytest.raises(RuntimeError, match=r'linear_cross_entropy .*once only.*backend="reference"'):
            grad.sum().backward(retain_graph=True)


def test_who_serves() -> None:
    expected = "triton" if TRITON_ON_GPU else "native" if backends.native_loaded() else "reference"
    assert backends.choose("linear_cross_entropy", "auto", torch.zeros(2)) == expected
    assert backends.choose("linear_cross_entropy", "triton", torch.zeros(2)) == "triton"
    x, w, b = make_problem((3,), 5, 4, (F32, F32, torch.float64))
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: backend 'triton' .*no float64"):
        linear_cross_entropy(x, w, torch.arange(3), bias=b, backend="triton")
    for bad in (4, -1):
        with pytest.raises(IndexError, match=f"linear_cross_entropy: target .*got {bad}"):
            linear_cross_entropy(x, w, torch.full((3,), bad), backend="triton")


def test_importing_the_package_leaves_the_kernels_alone() -> None:
    code = "import sys, fam_ext.functional; assert 'fam_ext.kernels.linear_cross_entropy' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
