"""linear_cross_entropy as a differentiable function: what is handed out, skipped, bounded, refused, traced and checked."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations, peak
from autograd_checks import (
    COMPILERS,
    assert_autocast_changes_nothing,
    assert_partial_grads,
    assert_transforms,
)
from inputs import make_input, needs_native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fam_ext import UnsupportedError
from fam_ext.functional import head_cross_entropy, linear_cross_entropy
from fam_ext.ops import backends

Y = torch.tensor([0, 2, 1, 1, -100, 3, 0])
NAMES = ("input", "weight", "bias")


def make_problem(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (7,)) -> list[Tensor]:
    """input, weight and bias with four classes, which require grad."""
    shapes = (*rows, 5), (4, 5), (4,)
    return [make_input(s, dtype, seed=k).requires_grad_() for k, s in enumerate(shapes)]


def call(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor = Y, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(x, w, target, bias=b, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str, backend: str) -> None:
    run = lambda *t: call(  # noqa: E731
        *t, class_weight=torch.tensor([0.5, 1.0, 2.0, 0.1]), label_smoothing=0.1, reduction=reduction, strength=0.3,
        backend=backend, max_bytes=1,
    )[0]  # fmt: skip
    assert torch.autograd.gradcheck(run, make_problem(torch.float64))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_as_head_cross_entropy(reduction: str, backend: str) -> None:
    """Of the logits that a linear layer makes."""
    inputs = make_problem(torch.float64)
    options = {"label_smoothing": 0.1, "reduction": reduction, "strength": 0.3}
    expected = head_cross_entropy(F.linear(*inputs), *inputs[:2], Y, **options)
    results = call(*inputs, backend=backend, **options)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(
        torch.autograd.grad(results[0].sum(), inputs), torch.autograd.grad(expected[0].sum(), inputs)
    )


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason=f"torch {torch.__version__} has no F.linear_cross_entropy"
)
def test_loss_is_torchs(backend: str) -> None:
    inputs = make_problem(torch.float64)
    expected = F.linear_cross_entropy(*inputs[:2], Y, linear_bias=inputs[2])
    loss, _ = call(*inputs, strength=0.0, backend=backend)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


@needs_native
def test_upstream_one_hands_out_the_gradients_as_they_are() -> None:
    inputs = make_problem()
    made = torch.ops.fam_ext.linear_cross_entropy(
        *(t.detach() for t in inputs),
        Y,
        None,
        None,
        -100,
        0.0,
        1,
        1.0,
        True,
        2**27,
        False,
        False,
        2,
        True,
        True,
        True,
    )[2:]
    loss, _ = call(*inputs, backend="native")
    with torch.autograd.profiler.profile() as plain:  # a dispatch mode would switch the shortcut off
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert not {"aten::mul", "aten::clone", "aten::copy_"} & {event.name for event in plain.function_events}
    again = torch.autograd.grad(loss, inputs, torch.tensor(1.0), retain_graph=True)
    assert [a.data_ptr() for a in first] == [b.data_ptr() for b in again]
    halves = torch.autograd.grad(loss, inputs, torch.tensor(0.5), retain_graph=True)
    for one, half, expected in zip(first, halves, made, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
        torch.testing.assert_close(half, 0.5 * expected, rtol=0, atol=0)


@pytest.mark.parametrize("upstream", [-1.0, 0.0, 2.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_upstream_gradients(reduction: str, upstream: float, backend: str) -> None:
    """Any number is a factor, its sign included."""
    inputs = make_problem()
    loss = call(*inputs, reduction=reduction, backend=backend)[0].sum()
    expected = [upstream * g for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
    (upstream * loss).backward()
    torch.testing.assert_close([t.grad for t in inputs], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_accumulation_over_calls(reduction: str, backend: str) -> None:
    """Two losses, and one loss backwards twice: .grad adds up, and no saved gradient is written."""
    inputs = make_problem()
    options = {"backend": backend, "reduction": reduction}
    losses = [call(*inputs, **options)[0].sum(), call(*inputs, strength=-2.0, **options)[0].sum()]
    expected = [
        2 * a + b
        for a, b in zip(
            *(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses), strict=True
        )
    ]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    losses[0].backward()
    torch.testing.assert_close([t.grad for t in inputs], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("curvature_grad", [True, False])
@pytest.mark.parametrize("mask", range(8))
def test_partial_requires_grad(mask: int, curvature_grad: bool, reduction: str, backend: str) -> None:
    needs = [bool(mask & 1 << k) for k in range(3)]
    run = partial(call, curvature_grad=curvature_grad, backend=backend, reduction=reduction)
    assert_partial_grads(run, make_problem(), needs)


class Recorder(TorchDispatchMode):
    """The operations that run, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.__name__.split(".")[0], args, out))
        return out


@needs_native
def test_only_wanted_gradients_are_made() -> None:
    inputs = make_problem()
    for mask in range(8):
        needs = [bool(mask & 1 << k) for k in range(3)]
        fewer = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        with Recorder() as recorder:
            call(*fewer, backend="native")
        ((name, args, _),) = recorder.calls
        assert (name, list(args[-3:])) == ("linear_cross_entropy", needs)
    with torch.no_grad(), Recorder() as recorder:
        call(*inputs, backend="native")
    assert list(recorder.calls[0][1][-3:]) == [False] * 3


def products(needs: tuple[bool, bool], **options: Any) -> int:
    """Matrix products of one chunk."""
    x, w = (t.detach().requires_grad_(r) for t, r in zip(make_problem()[:2], needs, strict=True))
    with torch.autograd.profiler.profile() as profile:
        linear_cross_entropy(x, w, Y, backend="native", **options)
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.function_events)


@needs_native
def test_products_that_nobody_needs_are_skipped() -> None:
    # z, U, <w, u>, dphi, and dW with twice the terms
    assert products((True, True)) == 5
    assert products((True, False)) == 4 and products((False, True)) == 4
    assert products((False, False)) == 2
    assert products((True, True), strength=0.0) == products((True, True), curvature_grad=False) == 4


@needs_native
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_allocation_holds_the_logits(dtype: torch.dtype, reduction: str) -> None:
    """No block of memory is as large as (N, V), their sum stays within the bound and the gradients; nothing of it is kept."""
    rows, fan_in, classes, max_bytes = 1024, 8, 3000, 2**20
    x, w = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((rows, fan_in), (classes, fan_in)))
    target = torch.arange(rows) % classes
    kept: list[Tensor] = []

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss, _ = linear_cross_entropy(x, w, target, max_bytes=max_bytes, reduction=reduction)
        loss.sum().backward()

    sizes = allocations(step)
    assert all(t.numel() <= max(x.numel(), w.numel()) for t in kept)
    gradients = 4 * (x.numel() + w.numel())
    assert max(sizes) < rows * classes * 4 / 8
    # class sums, norms and offsets are (V), and what small tensors take in all is far below
    assert peak(sizes) <= max_bytes + 2 * gradients + 2**17


@needs_native
def test_offsets_past_32_bits() -> None:
    """N * V > 2**31 where every row is the same memory; N rows at a vocabulary of one chunk's width, most of them ignored."""
    rows, classes = 2**20 + 1, 4099  # N * V = 4.3e9
    x = torch.randn(1, 2).expand(rows, 2)
    w, target = torch.randn(classes, 2, requires_grad=True), torch.full((rows,), -100)
    target[[0, 77, -1]] = torch.tensor([5, 7, classes - 1])
    loss, flatness = linear_cross_entropy(x, w, target)
    short = linear_cross_entropy(x[:3], w, target[[0, 77, -1]])
    torch.testing.assert_close((loss, flatness), short)
    torch.testing.assert_close(torch.autograd.grad(loss, w), torch.autograd.grad(short[0], w))


def test_inputs_are_not_written(backend: str) -> None:
    inputs, class_weight = make_problem(), torch.rand(4)
    tensors = [*inputs, Y, class_weight]
    kept = [(t.detach().clone(), t._version) for t in tensors]
    for reduction in ("mean", "none"):
        options = {"class_weight": class_weight, "label_smoothing": 0.1, "reduction": reduction}
        (0.5 * call(*inputs, backend=backend, **options)[0]).sum().backward()
    for tensor, (before, version) in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, before) and tensor._version == version


@needs_native
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction: str) -> None:
    inputs = make_problem()
    loss = call(*inputs, reduction=reduction, backend="native")[0].sum()
    for grad in torch.autograd.grad(loss, inputs, create_graph=True):
        with pytest.raises(RuntimeError, match=r'linear_cross_entropy .*once only.*backend="reference"'):
            grad.sum().backward(retain_graph=True)


def test_reference_has_second_derivatives() -> None:
    inputs = [t.detach()[:4].requires_grad_() for t in make_problem(torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, target=Y[:4], backend="reference")[0], inputs)


@needs_native
def test_forward_mode_is_refused() -> None:
    x, w, b = (t.detach() for t in make_problem())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            call(dual, w, b, backend="native")


def test_function_transforms_take_the_reference() -> None:
    inputs = make_problem(torch.float64)
    assert_transforms(partial(call, strength=0.3), inputs)
    if backends.native_loaded():
        with pytest.raises(RuntimeError, match=r"linear_cross_entropy: backend 'native' .*torch.func"):
            torch.func.grad(lambda *t: call(*t, backend="native")[0])(*(t.detach() for t in inputs))


def test_autocast_changes_nothing(backend: str) -> None:
    x, w, b = make_problem()
    assert_autocast_changes_nothing(partial(call, backend=backend), (x.bfloat16(), w, b))


@COMPILERS
def test_compiles_to_one_graph(compiler: str, dynamic: bool, reduction: str, backend: str) -> None:
    if (compiler, backend) == ("inductor", "reference"):
        pytest.skip("plain PyTorch: whether inductor compiles it is torch's own test")
    torch._dynamo.reset()

    def run(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
        loss, flatness = call(
            x.transpose(0, 1), w.t(), b, target, label_smoothing=0.1, reduction=reduction, backend=backend
        )
        return (2 * loss + flatness).sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=compiler)
    for size in (3, 6):
        shapes = (5, size, 6), (6, 4), (4,)
        inputs = [make_input(s, torch.float64, seed=k).requires_grad_() for k, s in enumerate(shapes)]
        target = torch.arange(5 * size).reshape(size, 5) % 4
        expected, got = run(*inputs, target), compiled(*inputs, target)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs))


X, W, B = torch.zeros(7, 5), torch.zeros(4, 5), torch.zeros(4)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"input": X.int()}, TypeError, "input must be a float32"),
        ({"weight": None}, TypeError, "weight must be a float32.*got None"),
        ({"weight": W[:, :4]}, ValueError, r"input must be of shape \(\*rows, 4\), got .*\(7, 5\)"),
        ({"weight": W[0]}, ValueError, r"weight must be of shape \(V, I\)"),
        ({"weight": W[:0]}, ValueError, "weight must be .*at least one class"),
        ({"target": Y.int()}, TypeError, "target must be .*class indices of int64.*got a int32"),
        ({"target": [0] * 7}, TypeError, "target must be .*tensor"),
        ({"target": Y[:6]}, ValueError, r"target must be of shape \(7,\), got"),
        (
            {"target": torch.rand(7, 4)},
            UnsupportedError,
            "target must .*class probabilities.*head_cross_entropy",
        ),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be of shape \(4,\)"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be of shape \(4,\)"),
        ({"class_weight": torch.ones(4).long()}, TypeError, "class_weight must be a float32"),
        ({"class_weight": B.clone().requires_grad_()}, ValueError, "class_weight must be free of req"),
        ({"reduction": "average"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'"),
        ({"accumulate": "bfloat16"}, ValueError, "accumulate must be one of 'float32', 'input'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be between 0 and 1, got 1\.5"),
        ({"strength": float("nan")}, ValueError, "strength must be a finite number, got nan"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1"),
        ({"max_bytes": 1e6}, TypeError, "max_bytes must be an integer"),
        ({"backend": "cpp"}, ValueError, "backend must be one of"),
        ({"input": X.to("meta")}, ValueError, "weight must be on the device of input"),
    ],
    ids=str,
)
def test_bad_arguments(changed: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match="linear_cross_entropy: " + match):
        linear_cross_entropy(**{"input": X, "weight": W, "target": Y, **changed})


@pytest.mark.parametrize("bad", [4, -1])
def test_class_index_out_of_range(bad: int, backend: str) -> None:
    with pytest.raises(IndexError, match=f"[Tt]arget.* {bad}"):
        linear_cross_entropy(X, W, torch.full((7,), bad), backend=backend)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_kernels", frozenset())
    monkeypatch.setattr(backends, "_reason", "compiled for another torch")
    assert linear_cross_entropy(X, W, Y)[1] == 0
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: backend 'native' .*for another torch"):
        linear_cross_entropy(X, W, Y, backend="native")
