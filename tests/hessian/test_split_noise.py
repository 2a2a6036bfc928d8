"""method="noise" under tensor parallelism: the noise of one process, on whole and on split features."""

from __future__ import annotations

from typing import Any

import pytest
import tensor_parallel_runs as runs
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.mark.parametrize(("layout", "case"), runs.NOISE_CASES)
def test_the_noise_of_one_process(layout: str, case: Any) -> None:
    """Processes with generators in different states: the draw is the first one's."""
    expected = runs.noise(runs.Network(), *case)
    for of_rank in runs.results(2):
        torch.testing.assert_close(of_rank["noise"][layout, case], expected, rtol=1e-9, atol=1e-12)
