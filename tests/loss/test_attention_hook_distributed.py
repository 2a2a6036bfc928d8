"""Noise in nn.MultiheadAttention on two gloo processes: losses and steps are those of one process with the same draws."""

from __future__ import annotations

from typing import Any

import attention_runs
import pytest
import torch
from two_processes import in_two_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def ways() -> Any:
    """What each of two processes has computed, once for all tests."""
    return in_two_processes(attention_runs.two_processes)


def check_steps(ways: Any, key: Any, network: Any) -> None:
    losses, weights = attention_runs.alone(network)
    for of_rank, expected in zip(ways, losses, strict=True):
        taken, after = of_rank[key]
        assert taken == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(after, weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("layout", "network"), attention_runs.CASES)
def test_every_layout(ways: Any, layout: str, network: str) -> None:
    check_steps(ways, (layout, network), attention_runs.NETWORKS[network]())


@pytest.mark.parametrize("layout", attention_runs.LAYOUTS)
def test_a_criterion_made_before_the_wrapper(ways: Any, layout: str) -> None:
    check_steps(ways, f"made first, {layout}", attention_runs.Network())


def test_the_losses_are_perturbed_and_the_ranks_differ() -> None:
    losses, _ = attention_runs.alone(attention_runs.Network())
    plain, _ = attention_runs.alone(attention_runs.Network(), strength=0.0)
    for rank in (0, 1):
        assert abs(losses[rank][0] - plain[rank][0]) > 1e-3 * plain[rank][0]
    assert losses[0] != losses[1]


def test_refusals(ways: Any) -> None:
    for of_rank in ways:
        apart, split = of_rank["refused"]
        assert "out_proj" in apart and "fully_shard on the nn.MultiheadAttention" in apart
        assert "tensor parallelism" in split and "placements (R)" in split and "leave it out" in split
