"""The count of what Hessian products take, against the profiler's, and max_bytes of exact values in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_memory
from torch import Tensor, nn

from fam_ext import RelativeFlatness, UnsupportedError
from fam_ext.hessian.memory import LiveBytes, ProductBytes, at_once, count


def test_live_bytes_of_views_and_results_in_place() -> None:
    before = torch.zeros(100)
    with LiveBytes() as live:
        before.view(10, 10).mul_(2)
        assert live.now == 0
        x = torch.ones(50)
        y = x.view(5, 10)
        del x
        assert live.now == 200
        del y
    assert (live.now, live.peak) == (0, 200)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "classes": (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 20_000)), torch.randn(2, 4)),
        "layers": (
            nn.Sequential(nn.Linear(9, 64), nn.GELU(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)),
            torch.randn(64, 9),
        ),
        "batch_norm": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
            ),
            torch.randn(8, 1, 16, 16),
        ),
    }


def products(name: str, graph: bool) -> Callable[[int], Tensor]:
    net, x = networks()[name]
    z = net[0](x)  # type: ignore[index]
    loss = F.cross_entropy(net[1:](z), torch.arange(len(x)) % 10)  # type: ignore[index]
    (g,) = torch.autograd.grad(loss, z, create_graph=True)

    def take(k: int) -> Tensor:
        v = torch.ones(k, *z.shape)
        batched, v = k > 1, v if k > 1 else v[0]
        (p,) = torch.autograd.grad(g, z, v, create_graph=graph, retain_graph=True, is_grads_batched=batched)
        return p

    return take


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ["classes", "layers", "batch_norm"])
def test_a_count_is_the_profilers(name: str, graph: bool) -> None:
    take = products(name, graph)
    assert count(take, 1).peak == pytest.approx(peak_memory(lambda: take(1)), rel=0.02)
    counted, held = count(take, 2), []

    def keep() -> None:
        held.append(take(8))

    # eight at once from a count of two
    assert peak_memory(keep) < 1.05 * 8 * counted.peak
    assert counted.kept <= counted.peak


@pytest.mark.parametrize(("max_bytes", "expected"), [(99, None), (199, 1), (300, 3), (10**6, 7)])
def test_as_many_as_fit(max_bytes: int, expected: int | None) -> None:
    def take(k: int) -> Tensor:
        return torch.empty(100 * k, dtype=torch.uint8)

    if expected is None:
        with pytest.raises(UnsupportedError, match=r"f: one Hessian product takes .* over max_bytes=99"):
            at_once("f", take, 7, max_bytes)
    else:
        assert at_once("f", take, 7, max_bytes) == expected


def test_the_total_of_graphs_that_are_kept() -> None:
    assert ProductBytes(10.0, 4.0).total(20, 16) == 20 * 4 + 16 * 6


@pytest.mark.parametrize("name", ["classes", "layers", "batch_norm"])
def test_exact_values_in_training_are_bounded_by_what_they_take(name: str) -> None:
    """A value is refused where its graph is over max_bytes, and taken where it is below."""
    net: Any
    net, x = networks()[name]
    target = torch.arange(len(x)) % 10

    def step(max_bytes: int) -> Tensor:
        term = RelativeFlatness(nn.CrossEntropyLoss(), net[0], method="exact", max_bytes=max_bytes)
        with term:
            return term(net(x), target)

    plain = peak_memory(lambda: F.cross_entropy(net(x), target))
    low, high = 2**10, 2**34
    while high > 1.02 * low:  # the smallest bound that is enough
        middle = int((low * high) ** 0.5)
        try:
            step(middle)
            high = middle
        except UnsupportedError as error:
            assert "over max_bytes" in str(error)
            low = middle
    peak = peak_memory(lambda: step(high)) - plain
    assert 0.5 * high < peak < 1.3 * high
