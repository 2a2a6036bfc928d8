"""method="noise" under tensor parallelism: the noise of one process, on whole and on split features."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tensor_parallel_runs as runs
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from fam_ext.errors import UnsupportedError
from fam_ext.hessian.split_noise import is_split

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.mark.parametrize(("layout", "case"), runs.NOISE_CASES)
def test_the_noise_of_one_process(layout: str, case: Any) -> None:
    """Processes with generators in different states: the draw is the first one's."""
    expected = runs.noise(runs.Network(), *case)
    for of_rank in runs.results(2):
        torch.testing.assert_close(of_rank["noise"][layout, case], expected, rtol=1e-9, atol=1e-12)


def features(dim: int, placement: Any, mesh_dims: int = 1) -> Any:
    """What is asked of a DTensor."""
    mesh = SimpleNamespace(ndim=mesh_dims)
    return SimpleNamespace(placements=(placement,) * mesh_dims, device_mesh=mesh, dim=lambda: dim)


def test_layouts_of_features() -> None:
    assert is_split("caller", features(2, Shard(1))) and is_split("caller", features(3, Shard(2)))
    assert not is_split("caller", features(3, Replicate()))
    for wrong in (
        features(2, Shard(0)),
        features(3, Shard(1)),
        features(2, Partial()),
        features(2, Replicate(), 2),
        features(2, Shard(1), 2),
    ):
        with pytest.raises(
            UnsupportedError, match=r"caller: .*whole on every process.*split along the features"
        ):
            is_split("caller", wrong)


def test_a_layer_of_one_row_called_twice() -> None:
    """Its calls need one draw, which is not made for split features; one for the batch is, as in one process."""
    expected = runs.twice(runs.Network(), 0, False)
    for of_rank in runs.results(2):
        text, *shared = of_rank["twice"]
        assert "tensor parallelism" in text and "per_sample_probes=False" in text
        torch.testing.assert_close(shared, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 3])
def test_features_that_do_not_divide(tokens: int) -> None:
    expected = runs.odd(runs.odd_layer(), tokens, 0)
    for of_rank in runs.results(2):
        torch.testing.assert_close(of_rank["odd"][bool(tokens)], expected, rtol=1e-9, atol=1e-12)


def test_lengths_in_half_precision() -> None:
    """|phi| = 600 in float16, whose square is none of its numbers."""
    for of_rank in runs.results(2):
        torch.testing.assert_close(of_rank["large"], torch.full((2, 4), 900.0, dtype=torch.float16))
