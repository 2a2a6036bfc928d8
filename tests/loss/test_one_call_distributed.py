"""Layers inside DistributedDataParallel on two gloo processes: the update of one process, or an error."""

from __future__ import annotations

import data_parallel_runs
import pytest
import torch
from two_processes import in_two_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
UNUSED = {"find_unused_parameters": True}
STATIC = {"static_graph": True}


@pytest.mark.parametrize("options", [{}, {"curvature": "ggn"}], ids=["hessian", "ggn"])
@pytest.mark.parametrize("layer", ["head", "hidden"])
def test_unused_parameters(layer: str, options: dict[str, str]) -> None:
    """The means of two halves are the mean of the batch; their kappas likewise, samples being independent."""
    network = data_parallel_runs.Network()
    expected = data_parallel_runs.train(network, network, layer, options, slice(None))
    for weights in in_two_processes(data_parallel_runs.data_parallel, layer, options, UNUSED):
        torch.testing.assert_close(weights, expected)


def test_static_graph_with_a_head() -> None:
    network = data_parallel_runs.Network()
    expected = data_parallel_runs.train(network, network, "head", {}, slice(None))
    for weights in in_two_processes(data_parallel_runs.data_parallel, "head", {}, STATIC):
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("options", [{}, {"curvature": "ggn"}], ids=["hessian", "ggn"])
def test_static_graph_with_a_hidden_layer_is_refused(options: dict[str, str]) -> None:
    for text in in_two_processes(data_parallel_runs.data_parallel, "hidden", options, STATIC):
        assert "static_graph=True" in text and "Leave static_graph out" in text
