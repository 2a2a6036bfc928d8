"""Noise in a language model on two gloo processes: each rank has its own draws, and the gradients are the ranks' mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import language_runs
import pytest
import torch
from two_processes import in_two_processes

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.mark.parametrize("function", [language_runs.data_parallel, language_runs.fully_sharded])
def test_gradients_are_the_mean_of_the_ranks(function: Callable[..., Any]) -> None:
    alone = [language_runs.one_process(rank) for rank in (0, 1)]
    expected = [(a + b) / 2 for a, b in zip(*alone, strict=True)]
    for gradients in in_two_processes(function):
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    plain = language_runs.one_process(0, strength=0.0)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, alone[0], strict=True)) > 1e-3
