"""Hessian products by way of the layer's output and of its weight, against the dense Hessian in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fam_ext import UnsupportedError
from fam_ext.hessian.products import LayerCall, LayerHessian, matvec, products
from fam_ext.layers.linear_map import LinearMap

pytestmark = pytest.mark.on_devices


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Case:
    """One layer and a loss of its output."""

    def __init__(self, layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], **options: Any) -> None:
        self.layer, self.x, self.tail = layer.double(), x, loss
        self.z = self.layer(x)
        self.call = LayerCall(GradientEdge(self.z.grad_fn, 0), x, tuple(self.z.shape), self.z.dtype)
        self.hessian = LayerHessian(LinearMap("test", layer), layer.weight, [self.call], **options)
        self.loss = loss(self.z)

    def by_output(self) -> Tensor:
        second: Any = torch.func.hessian(self.tail)(self.z.detach())
        return second.reshape(self.z.numel(), self.z.numel())

    def by_weight(self) -> Tensor:
        w = self.layer.weight

        def loss(weight: Tensor) -> Tensor:
            return self.tail(torch.func.functional_call(self.layer, {"weight": weight}, (self.x,)))

        second: Any = torch.func.hessian(loss)(w.detach())
        return second.reshape(w.numel(), w.numel())


def linear(**options: Any) -> Case:
    return Case(nn.Linear(3, 2), double(4, 3), lambda z: (z.tanh().sum(0) ** 3).sum(), **options)


def convolution(**options: Any) -> Case:
    layer = nn.ConvTranspose1d(4, 2, 2, groups=2)
    return Case(layer, double(2, 4, 3), lambda z: z.sin().flatten(1).sum(1).exp().sum(), **options)


@pytest.mark.parametrize("past_calls", [False, True])
@pytest.mark.parametrize("make", [linear, convolution])
def test_products_with_the_weight_s_hessian(make: Any, past_calls: bool) -> None:
    """`past_calls`: taken on the weight itself, the same numbers."""
    case = make(past_calls=past_calls)
    layer, w = case.hessian.layer, case.layer.weight
    direction = torch.randn_like(layer.canonical(w))
    flat = layer.to_module(direction, w.shape).flatten()
    with products(case.loss, [case.hessian], []):
        product = case.hessian.weight_product(direction)
        moved = case.hessian.direction(direction)
        assert moved.shape == (w.shape if past_calls else case.z.shape)
        square = (moved * case.hessian.matvec(moved.unsqueeze(0))[0]).sum()
    torch.testing.assert_close(layer.to_module(product, w.shape).flatten(), case.by_weight() @ flat)
    torch.testing.assert_close(square, flat @ case.by_weight() @ flat)


@pytest.mark.parametrize("anomaly", [False, True])
def test_a_stack_of_directions(anomaly: bool) -> None:
    """By vmap, and one by one in anomaly mode."""
    case, directions = linear(), double(5, 4, 2)
    with torch.autograd.set_detect_anomaly(anomaly), products(case.loss, [case.hessian], []):
        got = case.hessian.matvec(directions)
    expected = (directions.flatten(1) @ case.by_output()).reshape(directions.shape)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad  # kappa's gradient needs the product's own
    (slope,) = torch.autograd.grad((got * directions).sum(), case.layer.bias)
    assert (slope != 0).any()


class NoRule(torch.autograd.Function):
    """z^2; vmap has no rule for it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 2 * NoRuleOfProduct.apply(z, grad)


class NoRuleOfProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(b):
            raise RuntimeError("no batching rule")
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return NoRuleOfProduct.apply(grad, b), NoRuleOfProduct.apply(grad, a)


def test_directions_one_by_one_where_vmap_has_no_rule() -> None:
    case = Case(nn.Linear(3, 2), double(4, 3), lambda z: NoRule.apply(z).sum())
    directions = double(3, 4, 2)
    with products(case.loss, [case.hessian], []):
        torch.testing.assert_close(case.hessian.matvec(directions), 2 * directions)


def test_detached_products_carry_no_graph() -> None:
    for case in (linear(detached=True), convolution(detached=True)):
        with products(case.loss, [case.hessian], []):
            product = case.hessian.matvec(torch.randn_like(case.z).unsqueeze(0))
            assert not product.requires_grad and not case.hessian.features.requires_grad
            assert not case.hessian.weight_product(
                torch.randn_like(case.hessian.layer.canonical(case.layer.weight))
            ).requires_grad
    with torch.no_grad():
        layer = linear().hessian
        assert LayerHessian(layer.layer, layer.weight, layer.calls).detached


def test_a_loss_that_is_linear_or_knows_nothing_of_the_layer() -> None:
    for loss in (lambda z: z.sum(), lambda z: torch.zeros((), dtype=torch.float64, requires_grad=True) * 1):
        case = Case(nn.Linear(3, 2), double(4, 3), loss)
        with products(case.loss, [case.hessian], []):
            assert (case.hessian.matvec(double(2, 4, 2)) == 0).all()


def test_gradients_live_inside_the_block_alone() -> None:
    case = linear()
    with products(case.loss, [case.hessian], []):
        assert case.hessian.gradient is not None
    assert case.hessian.gradient is None
    with pytest.raises(ZeroDivisionError), products(case.loss, [case.hessian], []):
        raise ZeroDivisionError
    assert case.hessian.gradient is None


def test_two_layers_share_the_first_gradient() -> None:
    """A product of both at once holds the mixed second derivatives; one backward pass gives both gradients."""
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x, y = double(5, 3), torch.arange(5) % 2
    a = first(x)
    phi = a.tanh()
    b = second(phi)
    hessians = [
        LayerHessian(
            LinearMap("test", m),
            m.weight,
            [LayerCall(GradientEdge(t.grad_fn, 0), f, tuple(t.shape), t.dtype)],
        )
        for m, f, t in ((first, x, a), (second, phi, b))
    ]
    directions = [double(2, 5, 4), double(2, 5, 2)]

    def loss(da: Tensor, db: Tensor) -> Tensor:
        return F.cross_entropy(second((a.detach() + da).tanh()) + db, y)

    zeros = torch.zeros_like(a), torch.zeros_like(b)
    blocks: Any = torch.func.hessian(loss, argnums=(0, 1))(*zeros)
    with products(F.cross_entropy(b, y), hessians, []):
        got = matvec(hessians, directions)
    for j in range(2):
        want = sum(torch.einsum("abcd,kcd->kab", blocks[j][k], directions[k]) for k in range(2))
        torch.testing.assert_close(got[j], want)


def test_several_calls_are_taken_on_the_weight() -> None:
    layer, x = nn.Linear(3, 3).double(), double(4, 3)

    def loss(w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w).tanh(), w).exp().sum()

    z = F.linear(x, layer.weight)
    again = F.linear(z.tanh(), layer.weight)
    calls = [
        LayerCall(GradientEdge(t.grad_fn, 0), f, tuple(t.shape), t.dtype)
        for t, f in ((z, x), (again, z.tanh()))
    ]
    hessian = LayerHessian(LinearMap("test", layer), layer.weight, calls)
    assert hessian.on_weight and hessian.origin is layer.weight
    direction = double(1, 3, 3)
    with products(again.exp().sum(), [hessian], []):
        got = hessian.weight_product(direction)
    expected: Any = torch.func.hessian(loss)(layer.weight.detach())
    torch.testing.assert_close(got[0], torch.einsum("abcd,cd->ab", expected, direction[0]))


def test_the_dtype_of_products_is_at_least_float32() -> None:
    layer, x = nn.Linear(3, 2).bfloat16(), torch.randn(4, 3).bfloat16()
    z = layer(x)
    call = LayerCall(GradientEdge(z.grad_fn, 0), x, tuple(z.shape), z.dtype)
    hessian = LayerHessian(LinearMap("test", layer), layer.weight, [call])
    assert hessian.dtype == hessian.features.dtype == torch.float32
    with products(z.float().square().sum(), [hessian], []):
        direction = torch.randn(1, 4, 2).bfloat16().float()
        product = hessian.matvec(direction)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, 2 * direction)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("loss", [lambda z: Once.apply(z).sum(), lambda z: Once.apply(z).exp().sum()])
def test_operations_that_can_be_differentiated_once_only(loss: Callable[[Tensor], Tensor]) -> None:
    """They leave an error node, where what comes after them is linear too: it is looked for where an operation is doubtful."""
    case = Case(nn.Linear(3, 2), double(4, 3), loss)
    refused = pytest.raises(UnsupportedError, match=r"once only .one of OnceBackward.*finite_difference")
    with refused, products(case.loss, [case.hessian], [], ["OnceBackward"]):
        pass


def test_a_doubtful_operation_that_is_right() -> None:
    case = linear()
    directions = double(2, 4, 2)
    with products(case.loss, [case.hessian], [], ["OddBackward"]):
        got = case.hessian.matvec(directions)
    torch.testing.assert_close(got, (directions.flatten(1) @ case.by_output()).reshape(directions.shape))
