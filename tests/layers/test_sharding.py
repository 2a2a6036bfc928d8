"""Layers under FSDP2, DDP and FSDP1 on gloo processes: steps as of one process, or an error that names the layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sharded_runs
import sharding_checks
import torch
from two_processes import in_processes, in_two_processes

from fam_ext.errors import UnsupportedError
from fam_ext.layers import sharding

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def ways() -> Any:
    """What each of two processes has computed, once for all tests."""
    return in_two_processes(sharding_checks.two_processes)


@pytest.mark.parametrize("method", sharded_runs.METHODS)
@pytest.mark.parametrize("layout", sharded_runs.LAYOUTS)
def test_every_layout(ways: Any, layout: str, method: str) -> None:
    expected = sharded_runs.alone(sharded_runs.Network(), method)
    for of_rank in ways:
        torch.testing.assert_close(of_rank[layout, method], expected, **EXACT)


@pytest.mark.parametrize("method", ["noise", "noise in all", "exact"])
def test_checkpointing(ways: Any, method: str) -> None:
    expected = sharded_runs.alone(sharded_runs.Network(), method, own_generator=False)
    for of_rank in ways:
        torch.testing.assert_close(of_rank[f"checkpointing False {method}"], expected, **EXACT)


@pytest.mark.parametrize("method", ["noise", "noise in all"])
def test_reentrant_checkpointing(ways: Any, method: str) -> None:
    expected = sharded_runs.alone(sharded_runs.Network(), method, own_generator=False)
    for of_rank in ways:
        torch.testing.assert_close(of_rank[f"checkpointing True {method}"], expected, **EXACT)
        assert "use_reentrant=False" in of_rank["checkpointing True exact"]


@pytest.mark.parametrize("method", ["head", "exact", "noise"])
def test_accumulation(ways: Any, method: str) -> None:
    """Micro-batches without reduction before the last one: the term's own passes reduce nothing before its time."""
    expected = sharded_runs.alone(sharded_runs.Network(), method, accumulate=2)
    for of_rank in ways:
        torch.testing.assert_close(of_rank[f"accumulation {method}"], expected, **EXACT)


def test_noise_on_the_output_of_a_convolution(ways: Any) -> None:
    expected = sharded_runs.alone(sharded_runs.ConvNetwork(), "noise")
    for of_rank in ways:
        torch.testing.assert_close(of_rank["convolution"], expected, **EXACT)


@pytest.mark.parametrize("layer", ["first", "second", "head"])
def test_weights_that_no_backward_pass_frees_are_new_after_an_optimizer_step(ways: Any, layer: str) -> None:
    for of_rank in ways:
        before, after, expected = of_rank["old weights"][layer]
        assert after == pytest.approx(expected, rel=1e-9)
        assert abs(before - after) > 1e-3 * abs(before)


def test_linear_cross_entropy_gathers_a_head_that_is_not_called(ways: Any) -> None:
    expected = sharded_runs.alone(sharded_runs.Network(), "head")
    for of_rank in ways:
        torch.testing.assert_close(of_rank["features"], expected, **EXACT)


def test_a_head_whose_weight_an_embedding_shares(ways: Any) -> None:
    expected = sharding_checks.tied_step(0, False)
    assert len(expected) == 5
    for of_rank in ways:
        torch.testing.assert_close(of_rank["tied"], expected, **EXACT)


@pytest.mark.parametrize("method", ["head", "exact", "noise in all"])
def test_a_criterion_made_before_the_groups(ways: Any, method: str) -> None:
    expected = sharded_runs.alone(sharded_runs.Network(), method)
    for of_rank in ways:
        torch.testing.assert_close(of_rank["made first"][method], expected, **EXACT)


def test_a_penalty_on_a_shard_is_refused(ways: Any) -> None:
    for of_rank in ways:
        assert "by way of the shards" in of_rank["penalty"]


def test_measure(ways: Any) -> None:
    network = sharded_runs.Network()
    expected = sharded_runs.measured(network, network)
    for of_rank in ways:
        assert of_rank["measured"] == pytest.approx(expected, rel=1e-6)


def test_weights_gathered_in_low_precision(ways: Any) -> None:
    """kappa is that of the numbers which the layer has multiplied with."""
    for of_rank in ways:
        value, expected = of_rank["low precision"]
        assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["head", "head, layerwise", "noise", "noise in all"])
def test_fsdp1(ways: Any, method: str) -> None:
    expected = sharded_runs.alone(sharded_runs.Network(), method)
    for of_rank in ways:
        torch.testing.assert_close(of_rank["FSDP1"][""][method], expected, **EXACT)
        if method == "head":
            torch.testing.assert_close(of_rank["FSDP1, kept"], expected, **EXACT)
        apart = of_rank["FSDP1"]["head"][method]
        if "noise" in method:
            torch.testing.assert_close(apart, expected, **EXACT)
        else:
            assert "FSDP1" in apart and "SHARD_GRAD_OP" in apart


@pytest.mark.parametrize(
    "method", ["exact", "hutchinson", "ggn", "fisher", "eigenvalue", "head and inner layer"]
)
def test_fsdp1_with_an_inner_layer_is_refused(ways: Any, method: str) -> None:
    for of_rank in ways:
        text = of_rank["FSDP1"][""][method]
        assert "FSDP1" in text and "fully_shard" in text and "method='noise'" in text


def test_samples_of_different_ranks_have_draws_of_their_own(ways: Any) -> None:
    first, second = (of_rank["draws"] for of_rank in ways)
    assert first.abs().min() > 0
    assert not torch.isclose(first, second).any()


@pytest.mark.slow
def test_shards_and_their_replicas() -> None:
    for of_rank in in_processes(4, sharded_runs.replicas):
        for method, weights in of_rank.items():
            parts = ("head", 2) if "both dimensions" in method else (method, 4)
            expected = sharded_runs.alone(sharded_runs.Network(), *parts)
            torch.testing.assert_close(weights, expected, **EXACT)


def test_settings_are_off_while_held_and_come_back(ways: Any) -> None:
    for of_rank in ways:
        before, within, after = of_rank["held"]
        assert not any(within) and after == before and any(before) and not all(before)


def test_weights_are_freed_by_a_step_of_their_own_optimizer(ways: Any) -> None:
    """Not by another one's, nor within a backward pass, where FSDP2 does it."""
    for of_rank in ways:
        assert of_rank["freed"] == {"other": False, "within": False, "own": True}


def test_dtensors_that_are_refused_and_what_is_left_alone(ways: Any) -> None:
    for of_rank in ways:
        loss, features = of_rank["texts"]["texts"]
        assert "must be the same on every process" in loss and "tensor parallelism" in features
        assert of_rank["texts"]["left"] and of_rank["texts"]["shape"] == (8, 8)


@pytest.mark.parametrize(
    "name",
    [
        "RedistributeBackward",
        "NestedRedistributeBackward",
        "_ToTorchTensorBackward",
        "_FromTorchTensorBackward",
    ],
)
def test_communication_between_the_layer_and_the_loss(name: str) -> None:
    nodes = [SimpleNamespace(name=lambda own=own: own) for own in ("TanhBackward0", name)]
    sharding.check_between("caller", nodes[:1])
    with pytest.raises(UnsupportedError, match=name.strip("_").removesuffix("Backward")):
        sharding.check_between("caller", nodes)


def test_an_empty_weight_is_whole() -> None:
    sharding.check_whole("caller", torch.nn.Parameter(torch.ones(2, 0)))


def test_without_fsdp_there_is_nothing_to_gather() -> None:
    layer = torch.nn.Linear(2, 2)
    assert sharding.owners(layer) == ()
    with sharding.held():
        pass
    sharding.check_whole("caller", layer.weight)


def test_a_freed_weight_is_refused() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedError, match=r"caller: the layer's weight, of shape \(2, 2\), was freed"):
        sharding.check_whole("caller", layer.weight)
