"""How a measure of trained networks goes with their generalization gap: rank and linear correlation with bootstrap intervals."""

from __future__ import annotations

import csv
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fam_ext import _checks

_NAME = "correlation"


class Coefficient(NamedTuple):
    """A coefficient and its bootstrap interval; nan where a side is constant (Pearson's r: where one is infinite)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Correlation:
    """One measure against the gaps."""

    kendall: Coefficient
    pearson: Coefficient
    kendall_within: Coefficient | None
    """Over pairs of networks of one group; None without groups."""
    pearson_within: Coefficient | None
    """Of the deviations from each group's mean."""
    networks: int
    by_group: dict[Any, tuple[float, float, int]]
    """(tau, r, networks) of each group alone."""


@dataclass(frozen=True)
class Correlations:
    """A row for each measure; `report[name]` is one."""

    rows: dict[str, Correlation]
    confidence: float

    def __getitem__(self, measure: str) -> Correlation:
        return self.rows[measure]

    def _lines(self) -> Iterator[tuple[str, str, Coefficient, int]]:
        for name, row in self.rows.items():
            pairs = {
                "kendall": row.kendall, "pearson": row.pearson, "kendall within groups": row.kendall_within,
                "pearson within groups": row.pearson_within,
            }  # fmt: skip
            yield from ((name, kind, c, row.networks) for kind, c in pairs.items() if c is not None)

    def table(self) -> str:
        """A text table."""
        rows = [("measure", "coefficient", "value", f"{self.confidence:.0%} interval")]
        rows += [(n, k, f"{c.value:+.3f}", f"[{c.low:+.3f}, {c.high:+.3f}]") for n, k, c, _ in self._lines()]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )

    def to_csv(self, path: str | Path) -> None:
        """Write columns measure, coefficient, value, low, high, networks."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("measure", "coefficient", "value", "low", "high", "networks"))
            writer.writerows((name, kind, *map(repr, c), n) for name, kind, c, n in self._lines())

    def __repr__(self) -> str:
        return self.table()


def correlation(
    measures: Mapping[str, Sequence[float]] | Sequence[float],
    gaps: Sequence[float],
    groups: Sequence[Any] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Correlations:
    r"""Correlation of measures with the generalization gap over trained networks.

    Kendall's rank correlation with ties,

    .. math:: \tau_b = \frac{\sum_{i<j} \mathrm{sign}(x_i - x_j)\,\mathrm{sign}(y_i - y_j)}
              {\sqrt{\#\{i<j: x_i \neq x_j\}\; \#\{i<j: y_i \neq y_j\}}}

    and Pearson's r, each with a percentile bootstrap interval over networks. A correlation over all networks may come from a
    hyper-parameter that moves both sides (Simpson's paradox). `groups` tells which networks agree in it: within groups, tau takes
    only pairs of one group, and r deviations from the group's mean; networks are resampled within their group then (Jiang et al.
    2020 stratify for this reason).

    Args:
        measures: numbers by network, (n,), for each measure by its name; or those of one measure ("measure").
        gaps: the generalization gap of each network, (n,): test minus training loss, or training minus test accuracy.
        groups: a label for each network, or None.
        confidence: of the intervals.
        resamples, seed: of the bootstrap.

    Returns:
        Correlations: a row for each measure; table(), to_csv() and repr.

    Raises:
        TypeError, ValueError: lengths differ, fewer than 3 networks, nan among the numbers, or an argument does not fit.

    >>> result = correlation({"kappa": [1.0, 2.0, 3.0, 4.0]}, [0.1, 0.2, 0.4, 0.3])
    >>> round(result["kappa"].kendall.value, 4)
    0.6667
    """
    _checks.check_number(_NAME, "confidence", confidence)
    if not 0 < confidence < 1:
        _checks.bad_value(_NAME, "confidence", "between 0 and 1", confidence)
    _checks.check_positive(_NAME, "resamples", resamples)
    _checks.check_integer(_NAME, "seed", seed)
    named = dict(measures) if isinstance(measures, Mapping) else {"measure": measures}
    if not named:
        _checks.bad_value(_NAME, "measures", "at least one measure", measures)
    y = _numbers("gaps", gaps, None)
    columns = {name: _numbers(f"measures[{name!r}]", x, len(y)) for name, x in named.items()}
    if groups is not None and not isinstance(groups, Iterable):
        _checks.bad_type(_NAME, "groups", "a sequence of labels", groups)
    labels = None if groups is None else list(groups)
    if labels is not None and not all(isinstance(label, Hashable) for label in labels):
        _checks.bad_type(_NAME, "groups", "a sequence of labels that can be keys of a dict", groups)
    if labels is not None and len(labels) != len(y):
        _checks.bad_value(_NAME, "groups", f"a label for each of {len(y)} networks", labels)
    generator = torch.Generator().manual_seed(seed)
    whole = torch.zeros(len(y), dtype=torch.int64)
    draws = _bootstrap(whole, resamples, generator)
    inside, known = whole, []
    draws_inside = draws
    if labels is not None:
        known = list(dict.fromkeys(labels))
        inside = torch.tensor([known.index(label) for label in labels])
        draws_inside = _bootstrap(inside, resamples, generator)
    rows = {}
    for name, x in columns.items():
        within = labels is not None
        by_group = {}
        for k, label in enumerate(known):
            one = (inside == k).double().unsqueeze(0)
            tau, r = _tau(x, y, whole, one), _pearson(x, y, whole, one)
            by_group[label] = (float(tau), float(r), int(one.sum()))
        rows[name] = Correlation(
            _interval(_tau, x, y, whole, draws, confidence),
            _interval(_pearson, x, y, whole, draws, confidence),
            _interval(_tau, x, y, inside, draws_inside, confidence) if within else None,
            _interval(_pearson, x, y, inside, draws_inside, confidence) if within else None,
            len(y),
            by_group,
        )
    return Correlations(rows, confidence)


def _numbers(name: str, values: Any, length: int | None) -> Tensor:
    try:
        x = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        _checks.bad_type(_NAME, name, "a sequence of numbers", values)
    if x.dim() != 1 or len(x) < 3 or length not in (None, len(x)):
        what = (
            "3 or more numbers, one for each network" if length is None else f"{length} numbers, as gaps has"
        )
        _checks.bad_value(_NAME, name, what, x)
    if bool(x.isnan().any()):
        _checks.bad_value(_NAME, name, "without nan; leave out networks that have none", values)
    return x


def _bootstrap(group: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each network is drawn, (resamples, n), with replacement within its group."""
    counts = torch.zeros(resamples, len(group), dtype=torch.float64)
    for k in range(int(group.max()) + 1):
        members = (group == k).nonzero()[:, 0]
        drawn = torch.randint(len(members), (resamples, len(members)), generator=generator)
        counts.scatter_add_(1, members[drawn], torch.ones_like(drawn, dtype=torch.float64))
    return counts


def _interval(
    coefficient: Any, x: Tensor, y: Tensor, group: Tensor, draws: Tensor, confidence: float
) -> Coefficient:
    value = float(coefficient(x, y, group, torch.ones(1, len(x), dtype=torch.float64)))
    if math.isnan(value):
        return Coefficient(value, value, value)
    sampled = coefficient(x, y, group, draws)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = sampled.nanquantile(ends).tolist()  # a draw of one network only has no correlation
    return Coefficient(value, low, high)


def _tau(x: Tensor, y: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """tau-b over pairs within groups, networks counted `counts` times, (R,) for (R, n)."""
    same = (group[:, None] == group).double()
    # two infinities are a tie, not nan
    sx, sy = ((v[:, None] > v).double() - (v[:, None] < v).double() for v in (x, y))
    both, of_x, of_y = (((counts @ (m * same)) * counts).sum(1) for m in (sx * sy, sx.abs(), sy.abs()))
    return both / (of_x * of_y).sqrt()


def _pearson(x: Tensor, y: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """r of deviations from the group's mean, networks counted `counts` times."""
    member = torch.nn.functional.one_hot(group).double()  # (n, groups)
    size = counts @ member
    deviations = []
    for v in (x, y):
        mean = (counts * v) @ member / size
        deviations.append(v - mean[:, group])
    a, b = (torch.where(counts > 0, d, 0.0) for d in deviations)
    products = [(counts * p).sum(1) for p in (a * b, a * a, b * b)]
    spread = torch.stack([v.abs().max() for v in (x, y)])
    constant = (products[1] <= 1e-24 * spread[0] ** 2) | (products[2] <= 1e-24 * spread[1] ** 2)
    return torch.where(constant, torch.nan, products[0] / (products[1] * products[2]).sqrt())
