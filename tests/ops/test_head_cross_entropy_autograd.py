"""head_cross_entropy as a differentiable function: what is handed out, skipped, refused, traced and checked."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from autograd_checks import COMPILERS, assert_autocast_changes_nothing, assert_transforms
from inputs import make_input, needs_native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fam_ext.ops import backends
from fam_ext.ops import head_cross_entropy as module
from fam_ext.ops.head_cross_entropy import head_cross_entropy

pytestmark = pytest.mark.on_devices

Y = torch.tensor([0, 2, 1, 1, -100, 3, 0])


@pytest.fixture(params=["shifted", "pairwise"])
def form(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "choose_form", lambda *sizes: request.param)
    return request.param


def make_problem(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (7,)) -> list[Tensor]:
    """logits, features and weight with four classes, which require grad."""
    shapes = (rows[0], 4, *rows[1:]), (*rows, 5), (4, 5)
    return [make_input(s, dtype, seed=k).requires_grad_() for k, s in enumerate(shapes)]


class Recorder(TorchDispatchMode):
    """Names and arguments of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.__name__.split(".")[0], args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", ["index", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(target: str, reduction: str, form: str, backend: str) -> None:
    y = Y if target == "index" else make_input((7, 4), torch.float64, seed=3).softmax(1)
    run = lambda *t: head_cross_entropy(  # noqa: E731
        *t, y, class_weight=torch.tensor([0.5, 1.0, 2.0, 0.1]), label_smoothing=0.1, reduction=reduction,
        strength=0.3, backend=backend,
    )[0]  # fmt: skip
    assert torch.autograd.gradcheck(run, make_problem(torch.float64))


def test_loss_is_torchs(backend: str) -> None:
    """With strength 0, and at any strength in the gradient of the logits once the curvature is held."""
    logits, features, weight = make_problem(torch.float64)
    expected = F.cross_entropy(logits, Y, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(expected, logits)
    for options in ({"strength": 0.0}, {"curvature_grad": False}):
        loss, flatness = head_cross_entropy(
            logits, features, weight, Y, label_smoothing=0.1, backend=backend, **options
        )
        torch.testing.assert_close(loss - options.get("strength", 1.0) * flatness, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], gradient)
        if "curvature_grad" in options:
            assert torch.autograd.grad(loss, features, allow_unused=True)[0] is None


@needs_native
def test_upstream_one_hands_out_the_gradients_as_they_are() -> None:
    inputs = make_problem()
    made = torch.ops.fam_ext.head_cross_entropy_forward(
        *(t.detach() for t in inputs), Y, None, -100, 0.0, True, 1.0, True, True, True, True, True
    )[2:]
    loss, _ = head_cross_entropy(*inputs, Y, backend="native")
    with torch.autograd.profiler.profile() as plain:  # a dispatch mode would switch the shortcut off
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert not {"aten::mul", "aten::clone", "aten::copy_"} & {event.name for event in plain.function_events}
    again = torch.autograd.grad(loss, inputs, torch.tensor(1.0), retain_graph=True)
    assert [a.data_ptr() for a in first] == [b.data_ptr() for b in again]
    with torch.autograd.profiler.profile() as scaled:
        halves = torch.autograd.grad(loss, inputs, torch.tensor(0.5), retain_graph=True)
    assert [event.name for event in scaled.function_events].count("aten::mul") == 3
    for one, half, expected in zip(first, halves, made, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
        torch.testing.assert_close(half, 0.5 * expected, rtol=0, atol=0)


@pytest.mark.parametrize("upstream", [-1.0, 0.0, 2.0, 0.3])
def test_upstream_gradients(upstream: float, backend: str) -> None:
    """Any number is a factor, its sign included."""
    inputs = make_problem()
    loss, _ = head_cross_entropy(*inputs, Y, backend=backend)
    expected = [upstream * g for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
    (upstream * loss).backward()
    torch.testing.assert_close([t.grad for t in inputs], expected)


@needs_native
def test_backward_twice_accumulates() -> None:
    """The first backward's .grad must not be the saved gradient, which the second would add to."""
    inputs = make_problem()
    loss, _ = head_cross_entropy(*inputs, Y, backend="native")
    expected = [2 * g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([t.grad for t in inputs], expected)


@needs_native
def test_changed_gradient_is_noticed() -> None:
    inputs = make_problem()
    loss, _ = head_cross_entropy(*inputs, Y, backend="native")
    torch.autograd.grad(loss, inputs, retain_graph=True)[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("curvature_grad", [True, False])
@pytest.mark.parametrize("mask", range(8))
def test_partial_requires_grad(mask: int, curvature_grad: bool, form: str, backend: str) -> None:
    options = {"curvature_grad": curvature_grad, "backend": backend}
    inputs, needs = make_problem(), [bool(mask & 1 << k) for k in range(3)]
    loss, flatness = head_cross_entropy(*inputs, Y, **options)
    expected = torch.autograd.grad(loss, inputs, materialize_grads=True)
    fewer = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    result, same = head_cross_entropy(*fewer, Y, **options)
    assert torch.equal(result, loss) and torch.equal(same, flatness)
    if not any(needs) or (not curvature_grad and needs == [False, True, False]):
        return
    result.backward()
    for k, (tensor, need) in enumerate(zip(fewer, needs, strict=True)):
        if not need or (k == 1 and not curvature_grad):
            assert tensor.grad is None or not tensor.grad.any()
        else:
            assert torch.equal(tensor.grad, expected[k])


@needs_native
@pytest.mark.parametrize("curvature_grad", [True, False])
def test_only_wanted_gradients_are_made(curvature_grad: bool) -> None:
    def flags(inputs: list[Tensor]) -> Any:
        with Recorder() as recorder:
            head_cross_entropy(*inputs, Y, curvature_grad=curvature_grad, backend="native")
        ((name, args),) = recorder.calls
        return name, list(args[-3:])

    inputs = make_problem()
    for mask in range(8):
        needs = [bool(mask & 1 << k) for k in range(3)]
        fewer = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        expected = [needs[0], needs[1] and curvature_grad, needs[2]]
        assert flags(fewer) == ("head_cross_entropy_forward", expected)
    with torch.no_grad():
        assert flags(inputs)[1] == [False] * 3


def test_inputs_are_not_written(form: str, backend: str) -> None:
    inputs, soft, class_weight = make_problem(), torch.rand(7, 4), torch.rand(4)
    tensors = [*inputs, Y, soft, class_weight]
    kept = [(t.detach().clone(), t._version) for t in tensors]
    for target in (Y, soft):
        options = {"class_weight": class_weight, "label_smoothing": 0.1, "backend": backend}
        head_cross_entropy(*inputs, target, **options)[0].backward(torch.tensor(0.5))
    for tensor, (before, version) in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, before) and tensor._version == version


@needs_native
def test_second_derivative_is_refused() -> None:
    inputs = make_problem()
    for upstream in (1.0, 0.5):
        loss, _ = head_cross_entropy(*inputs, Y, backend="native")
        grads = torch.autograd.grad(loss, inputs, torch.tensor(upstream), create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match=r'head_cross_entropy .*once only.*backend="reference"'):
                grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reference_has_second_derivatives(reduction: str, form: str) -> None:
    inputs = [t.detach()[:4].requires_grad_() for t in make_problem(torch.float64)]
    run = lambda *t: head_cross_entropy(*t, Y[:4], reduction=reduction, backend="reference")[0]  # noqa: E731
    assert torch.autograd.gradgradcheck(run, inputs)


@needs_native
def test_forward_mode_is_refused() -> None:
    """No tangent may get lost on the way."""
    logits, features, weight = (t.detach() for t in make_problem())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        with pytest.raises((RuntimeError, NotImplementedError)):
            head_cross_entropy(dual, features, weight, Y, backend="native")


@needs_native
def test_function_transforms_take_the_reference() -> None:
    inputs = make_problem(torch.float64)
    assert_transforms(partial(head_cross_entropy, target=Y, strength=0.3), inputs)
    with pytest.raises(RuntimeError, match=r"head_cross_entropy: backend 'native' .*torch.func"):
        torch.func.grad(lambda *t: head_cross_entropy(*t, Y, backend="native")[0])(
            *(t.detach() for t in inputs)
        )


def test_autocast_changes_nothing(form: str, backend: str) -> None:
    logits, features, weight = make_problem()
    run = partial(head_cross_entropy, target=Y, backend=backend)
    assert_autocast_changes_nothing(run, (logits.bfloat16(), features.bfloat16(), weight))


@COMPILERS
def test_compiles_to_one_graph(compiler: str, dynamic: bool, reduction: str, backend: str) -> None:
    torch._dynamo.reset()

    def run(logits: Tensor, features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        options = {"label_smoothing": 0.1, "reduction": reduction, "backend": backend}
        loss, flatness = head_cross_entropy(logits.transpose(1, -1), features, weight.t(), target, **options)
        return (2 * loss + flatness).sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=compiler)
    for size in (3, 6):
        shapes = (size, 5, 4), (size, 5, 6), (6, 4)
        inputs = [make_input(s, torch.float64, seed=k).requires_grad_() for k, s in enumerate(shapes)]
        target = torch.arange(5 * size).reshape(size, 5) % 4
        expected, got = run(*inputs, target), compiled(*inputs, target)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs))


Z, PHI, W = torch.zeros(7, 4), torch.zeros(7, 5), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"logits": Z.int()}, TypeError, "logits must be a float32"),
        ({"features": None}, TypeError, "features must be a float32.*got None"),
        ({"weight": W.long()}, TypeError, "weight must be a float32"),
        ({"logits": Z[0]}, ValueError, r"logits must be of shape \(N, O\)"),
        ({"logits": Z[:, :0], "weight": W[:0]}, ValueError, "logits must be .*at least one class"),
        ({"weight": W[:3]}, ValueError, r"weight must be .*O = 4 classes, got .*\(3, 5\)"),
        ({"features": PHI[:6]}, ValueError, r"features must be of shape \(7, 5\), got .*\(6, 5\)"),
        ({"target": Y.int()}, TypeError, "target must be .*class indices of int64.*got a int32"),
        ({"target": [0] * 7}, TypeError, "target must be .*tensor"),
        ({"target": Y[:6]}, ValueError, r"target must be of shape \(7,\), got"),
        ({"target": torch.rand(7, 3)}, ValueError, r"target must be of shape \(7, 4\), got"),
        ({"target": torch.rand(7, 4).requires_grad_()}, ValueError, "target must be free of requires_grad"),
        (
            {"target": torch.rand(7, 4), "ignore_index": 1},
            ValueError,
            "ignore_index must be left out with class probabilities, got 1",
        ),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be of shape \(4,\)"),
        ({"class_weight": torch.ones(4).long()}, TypeError, "class_weight must be a float32"),
        ({"class_weight": W[:, 0].clone().requires_grad_()}, ValueError, "class_weight must be free of req"),
        ({"reduction": "average"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be between 0 and 1, got 1\.5"),
        ({"strength": float("nan")}, ValueError, "strength must be a finite number, got nan"),
        ({"backend": "cpp"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' is not available"),
        ({"features": PHI.to("meta")}, ValueError, "features must be on the device of logits"),
        (
            {"logits": torch.nested.nested_tensor([Z])},
            TypeError,
            "logits must be a dense tensor, got a nested",
        ),
    ],
    ids=str,
)
def test_bad_arguments(changed: dict[str, Any], error: Any, match: str) -> None:
    arguments = {"logits": Z, "features": PHI, "weight": W, "target": Y, **changed}
    with pytest.raises(error, match="head_cross_entropy: " + match):
        head_cross_entropy(**arguments)


@pytest.mark.parametrize("bad", [4, -1])
def test_class_index_out_of_range(bad: int, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("stops the kernel there, and with it CUDA in this process: tests/cuda/test_device.py")
    with pytest.raises(IndexError, match=f"[Tt]arget.* {bad}"):
        head_cross_entropy(Z, PHI, W, torch.full((7,), bad), backend=backend)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ordinary", None)
    monkeypatch.setattr(backends, "_kernels", frozenset())
    monkeypatch.setattr(backends, "_reason", "compiled for another torch")
    assert head_cross_entropy(Z, PHI, W, Y)[1] == 0
    with pytest.raises(RuntimeError, match=r"head_cross_entropy: backend 'native' .*for another torch"):
        head_cross_entropy(Z, PHI, W, Y, backend="native")
