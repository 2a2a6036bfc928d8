"""How far a result may be from float64: no further than the plain reference in the same dtype, but for rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor, elementwise: bool = False) -> float:
    """|actual - exact| / |exact| as L2 norms; with `elementwise` the largest ratio of any entry. What the dtype of `actual`
    cannot hold with all its digits counts as an error no larger than its share of tiny / eps.

    Entries that are not finite must be the same in both, and count no further.
    """
    assert actual.shape == exact.shape
    floor = torch.finfo(actual.dtype).tiny / torch.finfo(actual.dtype).eps
    actual, exact = actual.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    error, size = (actual - exact)[finite], exact[finite]
    if not error.numel():
        return 0.0
    if not elementwise:
        error, size = error.norm(), size.norm()
    return float((error.abs() / (size.abs() + floor)).max())


# float64 results are rounded themselves: what loses three digits there is no error of the code under test
_OF_THE_TRUTH = 1000 * torch.finfo(torch.float64).eps


def assert_accurate(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    terms: int,
    eps: float | None = None,
    elementwise: bool = False,
) -> None:
    """The error of `actual` is at most that of `baseline` plus 2 eps sqrt(terms): a sum of `terms` rounded numbers, whose
    errors have no common sign, is off by about eps sqrt(terms).

    `eps` is that of the dtype of `actual`, or of the dtype it was made from where that is coarser. Entrywise errors suit
    sums of one sign, the norm suits gradients, whose entries may cancel.
    """
    eps = torch.finfo(actual.dtype).eps if eps is None else eps
    error = relative_error(actual, exact, elementwise)
    allowed = (
        relative_error(baseline, exact, elementwise) + 2 * eps * math.sqrt(max(terms, 1)) + _OF_THE_TRUTH
    )
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
