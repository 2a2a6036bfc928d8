"""The closed form of a head split over processes: loss, kappa and gradients of one process, or an error that names the layout."""

from __future__ import annotations

from typing import Any

import pytest
import tensor_parallel_runs as runs
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
# a process has 3 classes and the other 2
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize(("layout", "name"), runs.CASES)
def test_loss_kappa_and_gradients(layout: str, name: str) -> None:
    expected = runs.step(runs.Network(), name)
    for of_rank in runs.results(2):
        torch.testing.assert_close(of_rank[layout, name], expected, **EXACT)


@pytest.mark.slow
def test_four_processes() -> None:
    """Of five classes the last process has none."""
    for of_rank in runs.results(4):
        for layout, name in runs.CASES:
            if "split" not in layout:
                torch.testing.assert_close(of_rank[layout, name], runs.step(runs.Network(), name), **EXACT)
        for layout, case in runs.NOISE_CASES:
            expected = runs.noise(runs.Network(), *case)
            torch.testing.assert_close(of_rank["noise"][layout, case], expected, **EXACT)


@pytest.mark.parametrize("layout", runs.LAYOUTS)
def test_confident_predictions_in_float32(layout: str) -> None:
    """max p is beyond 1 - 1e-8 for some rows."""
    expected = runs.confident(runs.Network(20.0), "classes")
    for of_rank in runs.results(2):
        for got, right in zip(of_rank["confident", layout], expected, strict=True):
            assert (got.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("layout", ["classes", "inputs"])
def test_float64_weights_of_the_loss_keep_their_digits(layout: str) -> None:
    for of_rank in runs.results(2):
        kappa, by_hand = of_rank["precise", layout]
        assert kappa.dtype == torch.float64
        torch.testing.assert_close(kappa, by_hand, rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", runs.LAYOUTS)
def test_a_criterion_made_before_the_split(layout: str) -> None:
    expected = runs.step(runs.Network(), "mean")
    for of_rank in runs.results(2):
        torch.testing.assert_close(of_rank["made first", layout], expected, **EXACT)


@pytest.mark.parametrize("layout", runs.LAYOUTS)
def test_tokens_and_shares_by_sample(layout: str) -> None:
    expected = runs.tokens(runs.Network(), layout)
    for of_rank in runs.results(2):
        torch.testing.assert_close(of_rank["tokens", layout], expected, **EXACT)


@pytest.mark.parametrize("layer", ["exact", "hutchinson", "ggn", "fisher"])
@pytest.mark.parametrize("layout", ["classes", "all layers"])
def test_second_derivatives_through_communication_are_refused(layout: str, layer: str) -> None:
    """They would be wrong: torch's redistribution cannot be differentiated three times."""
    for of_rank in runs.results(2):
        text = of_rank["refused"][layout, layer]
        assert "tensor parallelism" in text and "method='noise'" in text


def test_other_layouts_are_refused_by_name() -> None:
    for of_rank in runs.results(2):
        texts = of_rank["refused"]
        assert "(S(0))" in texts["classes", "exact head"] and "DeviceMesh" in texts["classes", "exact head"]
        assert "a shard without a layout" in texts["shard"] and "loss_parallel()" in texts["shard"]
        assert "finite_difference" in texts["differences"] and "tensor parallelism" in texts["differences"]
        assert "after parallelize_module" in texts["early"]
