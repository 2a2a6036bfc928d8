"""Second differences of a closure's loss: against the Hessian, and what they leave as it was."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from fam_ext import FAMLoss, UnsupportedError
from fam_ext.hessian import finite_difference
from fam_ext.layers.linear_map import LinearMap

pytestmark = pytest.mark.on_devices


def quadratic() -> tuple[nn.Module, Tensor, Any]:
    """A loss that is quadratic in the weight: second differences are exact but for rounding."""
    layer, x, y = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2).double()
    return layer, x, lambda: F.mse_loss(layer(x), y, reduction="sum")


@pytest.mark.parametrize("weighted", [True, False])
def test_a_quadratic_loss_along_each_direction(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """D^T H D = 2 |X D^T|^2 with D = W E: the value and its gradient for given signs, without any truncation error."""
    layer, x, closure = quadratic()
    signs = [torch.tensor([s, 1, -1] * 3).double().reshape(1, 3, 3) for s in (1, -1)]
    signs = signs if weighted else [s[:, :2] for s in signs]
    given = iter(signs)
    monkeypatch.setattr(finite_difference, "rademacher", lambda *args: next(given))
    estimate, rounding = finite_difference.hutchinson(
        "test", closure, LinearMap("test", layer), weighted, 2, torch.Generator()
    )
    directions = [layer.weight @ e[0] if weighted else e[0] for e in signs]
    values = torch.stack([2 * (x @ d.T).square().sum() for d in directions])
    torch.testing.assert_close(estimate.value, values.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(estimate.standard_error, values.std() / 2**0.5, rtol=1e-5, atol=1e-8)
    assert 0 < rounding < 1e-5
    if weighted:
        got, want = (torch.autograd.grad(v, layer.weight)[0] for v in (estimate.value, values.mean()))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_estimate_converges_to_kappa() -> None:
    """In the mean over every sign of a tiny layer, of a loss that is not quadratic."""
    layer, x = nn.Linear(2, 2).double(), torch.randn(4, 2, dtype=torch.float64)
    layer_map = LinearMap("test", layer)
    y = torch.tensor([0, 1, 1, 0])
    second: Any = torch.func.hessian(lambda w: F.cross_entropy(F.linear(x, w, layer.bias), y))(
        layer.weight.detach()
    )
    kappa = torch.einsum("st,siti->", layer.weight @ layer.weight.T, second)
    values = []
    for number in range(16):
        e = torch.tensor([1.0 - 2 * (number >> k & 1) for k in range(4)]).double().reshape(1, 2, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finite_difference, "rademacher", lambda *args, e=e: e)
            estimate, _ = finite_difference.hutchinson(
                "test", lambda: F.cross_entropy(layer(x), y), layer_map, True, 1, torch.Generator()
            )
        values.append(estimate.value)
        assert estimate.standard_error is None
    torch.testing.assert_close(torch.stack(values).mean(), kappa, rtol=1e-5, atol=1e-8)


def test_evaluations_see_the_same_random_numbers_and_change_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, seen = torch.randn(6, 3, dtype=torch.float64), []
    plain = copy.deepcopy(net.state_dict())
    weight = net[0].weight

    def closure() -> Tensor:
        seen.append(
            (float(torch.rand(())), net[0].weight.detach().clone(), float(net[1].num_batches_tracked))
        )
        return net(x).square().sum()

    torch.manual_seed(3)
    state = torch.get_rng_state()
    finite_difference.hutchinson("test", closure, LinearMap("test", net[0]), True, 2, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 5 and len({numbers for numbers, _, _ in seen}) == 1
    middle, plus, minus = (w for _, w, _ in seen[:3])
    assert torch.equal(middle, weight)
    torch.testing.assert_close(plus + minus, 2 * middle)
    assert not torch.equal(plus, middle)
    assert net[0].weight is weight and all(torch.equal(v, plain[k]) for k, v in net.state_dict().items())


def test_other_threads_keep_their_updates() -> None:
    """A model that is trained meanwhile tracks its batches; a replica of data parallelism belongs to the closure."""
    layer, other = nn.Linear(3, 3), nn.BatchNorm1d(3)
    replicated = nn.BatchNorm1d(3)
    replica: Any = replicated._replicate_for_data_parallel()
    x = torch.randn(6, 3)

    def closure() -> Tensor:
        for module in (other, replica):
            thread = threading.Thread(target=module, args=(x,))
            thread.start()
            thread.join()
        return layer(x).square().sum()

    finite_difference.hutchinson("test", closure, LinearMap("test", layer), True, 1, torch.Generator())
    assert (int(other.num_batches_tracked), int(replicated.num_batches_tracked)) == (3, 0)


def test_an_error_in_the_closure_leaves_weight_and_buffers() -> None:
    layer = nn.Linear(3, 2)
    weight, calls = layer.weight, []

    def closure() -> Tensor:
        calls.append(0)
        if len(calls) == 2:
            raise ZeroDivisionError
        return layer(torch.ones(3)).sum()

    with pytest.raises(ZeroDivisionError):
        finite_difference.hutchinson("test", closure, LinearMap("test", layer), True, 1, torch.Generator())
    assert layer.weight is weight and "weight" not in vars(layer)


@pytest.mark.parametrize("loss", [torch.ones(2), 1.0, None])
def test_a_closure_without_a_loss_is_refused(loss: Any) -> None:
    with pytest.raises(
        ValueError, match="test: closure must be a function that returns the criterion's loss, a 0-d tensor"
    ):
        finite_difference.hutchinson(
            "test", lambda: loss, LinearMap("test", nn.Linear(2, 2)), True, 1, torch.Generator()
        )


@pytest.mark.parametrize("kind", ["pruned", "weight_norm", "parametrized"])
def test_finite_differences_refuse_a_weight_that_is_computed(kind: str) -> None:
    layer: Any = nn.Linear(3, 4).double()
    if kind == "pruned":
        torch.nn.utils.prune.random_unstructured(layer, "weight", 0.3)
    elif kind == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = torch.nn.utils.weight_norm(layer)
    else:
        torch.nn.utils.parametrizations.orthogonal(layer)
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3).double())
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0])
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.1, method="finite_difference")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UnsupportedError, match="computes its weight at every call"):
        criterion(net(x), y, closure=lambda: nn.functional.cross_entropy(net(x), y))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
