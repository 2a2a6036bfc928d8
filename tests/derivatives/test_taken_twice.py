"""Gradients with derivatives of their own: against torch's in float64, or against batch_norm written with held statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_nodes import nodes_of, randn
from torch import Tensor

from fam_ext.derivatives import taken_twice

pytestmark = pytest.mark.on_devices


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taken_twice, "_PAYS", 0)


def second(y: Tensor, x: Tensor, others: list[Tensor], hold: bool | None = None) -> tuple[Tensor, ...]:
    """dx of <v, sin y>, and the derivatives of its squared norm by x and the others; `hold` None: torch's own."""
    torch.manual_seed(3)
    loss = (torch.randn_like(y) * y.sin()).sum()
    if hold is None:
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    else:
        with taken_twice.replaced(list(nodes_of(loss)), hold):
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    return dx, *torch.autograd.grad(dx.square().sum(), [x, *others], retain_graph=True)


CONVOLUTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "1d, a stride": (lambda x, w: F.conv1d(x, w, stride=2), (2, 3, 7), (4, 3, 3)),
    "2d, groups": (lambda x, w: F.conv2d(x, w, padding=1, groups=2), (2, 4, 5, 6), (6, 2, 3, 3)),
    "2d, dilation": (
        lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=2, dilation=2),
        (2, 2, 5, 6),
        (3, 2, 2, 3),
    ),
    "3d": (lambda x, w: F.conv3d(x, w), (2, 2, 3, 4, 3), (2, 2, 2, 2, 2)),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 3, 4),
        (4, 3, 3, 3),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    convolve, of_input, of_weight = CONVOLUTIONS[name]
    x, w = randn(*of_input), randn(*of_weight)
    got, want = second(convolve(x, w), x, [w], False), second(convolve(x, w), x, [w])
    torch.testing.assert_close(got, want)
    assert "_ConvolutionBackward" in {n.name() for n in nodes_of(got[0])}
    assert "_ConvolutionBackward" not in {n.name() for n in nodes_of(want[0])}


def test_relu() -> None:
    x, w = randn(4, 5), randn(5, 5)
    got, want = second(F.relu(x @ w), x, [w], False), second(F.relu(x @ w), x, [w])
    torch.testing.assert_close(got, want)
    assert "_ReluBackward" in {n.name() for n in nodes_of(got[0])}


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 9, 8)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_with_its_statistics_held(shape: tuple[int, ...], affine: bool) -> None:
    """dx = weight / std(x) * grad: its value, and its derivatives by the input and the weight, std(x) included."""
    x, dy = randn(*shape), randn(*shape)
    weight, bias = (randn(3), randn(3)) if affine else (None, None)
    parameters = [] if weight is None else [weight]
    y = F.batch_norm(x, None, None, weight, bias, True)
    with taken_twice.replaced(list(nodes_of(y)), True):
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    dims, by_channel = [d for d in range(x.dim()) if d != 1], (1, -1, *(1,) * (x.dim() - 2))
    scale = (x.var(dims, correction=0) + 1e-5).rsqrt()
    want = dy * (scale if weight is None else scale * weight).view(by_channel)
    torch.testing.assert_close(dx, want)
    sources = [x, dy, *parameters]
    torch.testing.assert_close(
        torch.autograd.grad(dx.cos().sum(), sources), torch.autograd.grad(want.cos().sum(), sources)
    )
    assert taken_twice.holds(y.grad_fn)


def test_batch_norms_that_are_left_alone() -> None:
    x, weight = randn(4, 3), randn(3)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    evaluated = F.batch_norm(x, *running, weight)
    assert not taken_twice.holds(evaluated.grad_fn)
    one = F.instance_norm(randn(1, 3, 5))
    assert not any(taken_twice.holds(n) for n in nodes_of(one))
    y = F.batch_norm(x, None, None, weight, None, True)
    torch.testing.assert_close(second(y, x, [], False), second(y, x, []))  # statistics are not to be held


def test_the_end_of_the_block_and_a_gradient_without_a_graph() -> None:
    x, w = randn(2, 3, 5), randn(4, 3, 3)
    y = F.relu(F.conv1d(x, w))
    with taken_twice.replaced(list(nodes_of(y)), False):
        (inside,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (outside,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert not any(n.name().startswith("_") for n in nodes_of(outside))


def test_a_third_derivative_is_an_error() -> None:
    x, w = randn(2, 3, 5), randn(4, 3, 3)
    y = F.conv1d(x, w).square().sum()
    with taken_twice.replaced(list(nodes_of(y)), False):
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
    (again,) = torch.autograd.grad(dx.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


def test_small_gradients_stay_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taken_twice, "_PAYS", 1000)
    x, w = randn(2, 3, 5), randn(4, 3, 3)
    (dx, *_) = second(F.relu(F.conv1d(x, w)), x, [w], False)
    assert not any(n.name().startswith("_") for n in nodes_of(dx))
