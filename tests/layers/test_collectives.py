"""Sums over processes and their gradients."""

from __future__ import annotations

import pytest
import tensor_parallel_runs as runs
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def test_total_and_shared() -> None:
    """s = sum_r (r + 1) t_r 3 u with t = 2, u = 5: s = 90, d(s^2)/dt_r = 2 s (r + 1) 15, d(s^2)/du = 2 s 18."""
    for rank, of_rank in enumerate(runs.results(2)):
        expected = torch.tensor([90.0, 180.0 * 15 * (rank + 1), 180.0 * 18], dtype=torch.float64)
        torch.testing.assert_close(torch.stack(of_rank["sums"]), expected)
