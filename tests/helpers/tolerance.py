"""How far a result may be from float64: no further than the plain reference in the same dtype, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# float64 results are rounded themselves: what loses three digits there is no error of the code under test
_OF_THE_TRUTH = 1000 * torch.finfo(torch.float64).eps
STEPS = 3  # root mean squares of an error that is normal, as sums of roundings are: more in 1 of 370 problems


def relative_error(
    actual: Tensor, exact: Tensor, elementwise: bool = False, parts: Tensor | None = None
) -> float:
    """|actual - exact| / |exact| as L2 norms; with `elementwise` the largest ratio of any entry.

    What the dtype of `actual` cannot hold with all its digits counts as an error no larger than its share of tiny / eps.
    Entries that are not finite must be the same in both, and count no further. `parts`: numbers of the size of those whose
    difference `exact` is, of the same shape, where they may cancel; the error then is relative to the larger of the two.
    """
    assert actual.shape == exact.shape
    floor = torch.finfo(actual.dtype).tiny / torch.finfo(actual.dtype).eps
    actual, exact = actual.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    error, size = (actual - exact)[finite], exact[finite]
    if not error.numel():
        return 0.0
    if parts is not None:
        size = torch.maximum(size.abs(), parts.detach().double()[finite].abs())
    if not elementwise:
        error, size = error.norm(), size.norm()
    return float((error.abs() / (size.abs() + floor)).max())


def total_parts(total: Tensor, flatness: Tensor, strength: float) -> Tensor:
    """|loss| + |strength kappa| where the total is loss + strength kappa: a negative strength lets the two cancel."""
    return (total - strength * flatness).abs() + (strength * flatness).abs()


def assert_accurate(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    terms: int,
    elementwise: bool = False,
    parts: Tensor | None = None,
    roundings: int = 4,
    spread: Callable[[], Iterable[Tensor]] | None = None,
) -> None:
    """The error of `actual` is at most that of `baseline` plus roundings eps / 2 sqrt(terms): each of the `terms` of a sum has
    been rounded `roundings` times on its way, by eps / 2 at most, and errors of different terms have no common sign.

    eps is that of the dtype of `actual`. Entrywise errors suit sums of one sign, the norm suits gradients, whose entries may
    cancel. `spread`: draws of `exact` after random roundings of the numbers it is made from, for what is
    sensitive to them; where their root mean square distance from `exact` is larger than the rounding above, STEPS times it is
    allowed instead.
    """
    error, of_baseline = (relative_error(t, exact, elementwise, parts) for t in (actual, baseline))
    rounding = roundings * torch.finfo(actual.dtype).eps / 2 * math.sqrt(max(terms, 1))
    allowed = of_baseline + rounding + _OF_THE_TRUTH
    if error > allowed and spread is not None:
        away = [relative_error(t, exact, elementwise, parts) for t in spread()]
        allowed = (
            of_baseline + max(rounding, STEPS * math.hypot(*away) / math.sqrt(len(away))) + _OF_THE_TRUTH
        )
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
