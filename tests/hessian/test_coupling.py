"""How far rows are coupled after the layer: networks whose coupling is known, and what one check may not see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fam_ext.hessian import coupling
from fam_ext.hessian.coupling import coupling_level
from fam_ext.hessian.products import LayerCall, LayerHessian, products
from fam_ext.layers.linear_map import LinearMap

pytestmark = pytest.mark.on_devices


def level(layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], check: int = 0) -> str | None:
    layer, x = layer.double(), x.double()
    z = layer(x)
    call = LayerCall(GradientEdge(z.grad_fn, 0), x, tuple(z.shape), z.dtype)
    hessian = LayerHessian(LinearMap("test", layer), layer.weight, [call])
    with products(loss(z), [hessian], []):
        return coupling_level(hessian, check)


def linear(*shape: int, loss: Callable[[Tensor], Tensor], check: int = 0) -> str | None:
    return level(nn.Linear(2, 3), torch.randn(*shape, 2), loss, check)


def apart(z: Tensor) -> Tensor:
    return z.exp().sum()


def across_neurons(z: Tensor) -> Tensor:
    return z.sum(-1).exp().sum()


def between_positions(z: Tensor) -> Tensor:
    return z.flatten(1).sum(1).exp().sum()


def between_samples(z: Tensor) -> Tensor:
    return z.sum(0).exp().sum()


@pytest.mark.parametrize(
    ("shape", "loss", "expected"),
    [
        ((4,), apart, "rows"),
        ((4,), across_neurons, "rows"),
        ((4,), between_samples, "batch"),
        ((4, 3), across_neurons, "rows"),
        ((4, 3), between_positions, "samples"),
        ((4, 3), between_samples, "batch"),
        ((1, 3), between_positions, "samples"),
        ((), apart, "rows"),
    ],
)
def test_linear_layers(shape: tuple[int, ...], loss: Callable[[Tensor], Tensor], expected: str) -> None:
    assert linear(*shape, loss=loss) == expected


def test_samples_coupled_by_batch_norm() -> None:
    norm = nn.BatchNorm1d(3).double()
    assert linear(5, loss=lambda z: norm(z).exp().sum()) == "batch"
    assert linear(5, loss=lambda z: norm.eval()(z).exp().sum()) == "rows"


def test_convolutions() -> None:
    """Positions of an unbatched sample; pooling couples them, a kernel of one position does not."""
    layer = nn.Conv1d(2, 3, 2)
    for shape, pooled in (((2, 5), "samples"), ((4, 2, 5), "samples")):
        x = torch.randn(shape)
        assert level(layer, x, lambda z: z.exp().sum()) == "rows"
        assert level(layer, x, lambda z: z.mean(-1).exp().sum()) == pooled
    assert level(layer, torch.randn(4, 2, 5), lambda z: z.mean(0).exp().sum()) == "batch"


def test_products_of_zero_tell_nothing() -> None:
    gate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert linear(4, loss=lambda z: (gate * z.sum(0)).exp().sum()) is None
    assert linear(4, loss=lambda z: z.sum()) is None  # linear: there is no second derivative at all
    assert linear(1, loss=lambda z: (gate * z).exp().sum()) == "rows"  # one row: nothing to be coupled with


def test_no_rows() -> None:
    assert linear(0, loss=apart) is None
    assert linear(3, 0, loss=lambda z: z.exp().sum()) is None


def test_several_calls() -> None:
    layer, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    z = layer(x)
    loss = layer(z.tanh()).exp().sum()
    calls = [LayerCall(GradientEdge(z.grad_fn, 0), x, (4, 3), z.dtype)] * 2
    hessian = LayerHessian(LinearMap("test", layer), layer.weight, calls)
    with products(loss, [hessian], []):
        assert coupling_level(hessian) == "batch"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_tell_nothing(bad: float) -> None:
    """As in a step that diverged, or whose gradients a loss scaler throws away."""
    assert linear(4, loss=lambda z: (bad * z.exp()).sum()) is None
    scale = torch.ones(4, 1, dtype=torch.float64).index_fill(0, torch.tensor(2), bad)
    assert linear(4, loss=lambda z: (scale * z.exp()).sum()) is None
    assert (
        linear(4, loss=lambda z: (scale * z).exp().sum() + (z[0] * z[1] * z[3]).sum()) == "batch"
    )  # seen in finite ones


def pair_of_samples(z: Tensor) -> Tensor:
    """Rows 0 and 1 with each other, and nothing else."""
    return z[2:].exp().sum() + (z[0] * z[1]).sum()


def pair_of_positions(z: Tensor) -> Tensor:
    return z[:, 2:].exp().sum() + (z[:, 0] * z[:, 1]).sum()


@pytest.mark.parametrize(
    ("shape", "loss", "coupled"), [((6,), pair_of_samples, "batch"), ((1, 6), pair_of_positions, "samples")]
)
def test_another_check_sees_a_pair_that_one_half_hides(
    shape: tuple[int, ...], loss: Callable[[Tensor], Tensor], coupled: str
) -> None:
    seen = [linear(*shape, loss=loss, check=check) for check in range(12)]
    assert set(seen) == {coupled, "rows"}  # some halves hold both of the pair, others one of them
    assert seen == [
        linear(*shape, loss=loss, check=check) for check in range(12)
    ]  # the check's number decides


def test_every_position_pair_of_many_samples_is_seen_at_once() -> None:
    """Each sample has a half of its own: with twelve samples the pair is in one half of all of them once in 10^4 checks."""
    assert all(linear(12, 4, loss=pair_of_positions, check=check) == "samples" for check in range(20))


def test_halves() -> None:
    def halves(check: int, size: int = 7) -> Tensor:
        return coupling._halves(5, size, torch.Generator(torch.get_default_device()).manual_seed(check))

    assert (halves(0).sum(1) == 4).all() and (halves(0, 6).sum(1) == 3).all()
    assert len({tuple(row) for row in halves(0).tolist()}) > 1
    assert torch.equal(halves(3), halves(3)) and not torch.equal(halves(3), halves(4))


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    state = torch.get_rng_state()
    assert level(layer, x, between_samples) == "batch"
    assert torch.equal(torch.get_rng_state(), state)
