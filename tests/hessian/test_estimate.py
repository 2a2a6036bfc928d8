"""Means of estimates with their standard errors."""

from __future__ import annotations

import pytest
import torch

from fam_ext.hessian.estimate import Estimate

pytestmark = pytest.mark.on_devices


def test_the_mean_of_estimates() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    estimate = Estimate.of(values)
    assert estimate.value.item() == 3.0
    # sqrt(((1 - 3)^2 + (2 - 3)^2 + (6 - 3)^2) / 2 / 3)
    torch.testing.assert_close(estimate.standard_error, torch.tensor(7 / 3).sqrt())
    assert estimate.value.requires_grad and not estimate.standard_error.requires_grad
    by_sample = Estimate.of(torch.tensor([[1.0, 4.0], [3.0, 4.0]]))
    assert by_sample.value.tolist() == [2.0, 4.0] and by_sample.standard_error.tolist() == [1.0, 0.0]


def test_one_estimate_has_no_error() -> None:
    assert Estimate.of(torch.tensor([5.0])) == (5.0, None)


def test_the_sum_of_independent_estimates() -> None:
    terms = [
        Estimate(torch.tensor(v), None if e is None else torch.tensor(e))
        for v, e in ((1.0, 3.0), (2.0, None), (4.0, 4.0))
    ]
    total = Estimate.total(terms)
    assert float(total.value) == 7.0 and float(total.standard_error) == 5.0
    assert Estimate.total(terms[1:2]) is terms[1]
    assert Estimate.total([terms[1], terms[1]]) == (4.0, None)
