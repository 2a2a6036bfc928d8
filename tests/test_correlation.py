"""fam_ext.correlation against SciPy, by hand within groups, and its intervals against repeated samples."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fam_ext

stats = pytest.importorskip("scipy.stats")


def sample(n: int = 40, seed: int = 0) -> tuple[list[float], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    y = 0.6 * x + 0.8 * torch.randn(n, generator=generator, dtype=torch.float64)
    return x.tolist(), y.tolist()


@pytest.mark.parametrize("ties", [False, True])
def test_coefficients_are_scipys(ties: bool) -> None:
    x, y = sample()
    if ties:
        x, y = [round(v) for v in x], [round(2 * v) for v in y]
    row = fam_ext.correlation(x, y)["measure"]
    assert row.kendall.value == pytest.approx(stats.kendalltau(x, y).statistic, rel=1e-12)
    assert row.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
    assert row.kendall.low < row.kendall.value < row.kendall.high
    assert row.networks == 40 and row.kendall_within is None and row.by_group == {}


def test_a_resample_counts_as_scipy_counts_repeated_networks() -> None:
    x, y = (torch.tensor(v, dtype=torch.float64) for v in sample(12))
    index = torch.randint(12, (12,), generator=torch.Generator().manual_seed(3))
    counts = torch.bincount(index, minlength=12).double().unsqueeze(0)
    from fam_ext.correlation import _pearson, _tau

    whole = torch.zeros(12, dtype=torch.int64)
    tau, r = _tau(x, y, whole, counts), _pearson(x, y, whole, counts)
    assert float(tau) == pytest.approx(stats.kendalltau(x[index], y[index]).statistic, rel=1e-12)
    assert float(r) == pytest.approx(stats.pearsonr(x[index], y[index]).statistic, rel=1e-12)


def test_within_groups_turns_simpsons_paradox() -> None:
    """In each group the measure falls with the gap; a group's level moves both up."""
    measures, gaps, groups = [], [], []
    for level in range(4):
        for k in range(6):
            measures.append(10.0 * level + k)
            gaps.append(20.0 * level - k + 0.1 * (k % 2))
            groups.append(f"lr {level}")
    result = fam_ext.correlation({"kappa": measures}, gaps, groups)["kappa"]
    assert result.kendall.value > 0.5 and result.pearson.value > 0.9
    assert result.kendall_within is not None and result.pearson_within is not None
    assert result.kendall_within.value == result.kendall_within.high == -1
    assert result.pearson_within.value == pytest.approx(stats.pearsonr(measures[:6], gaps[:6]).statistic)
    assert set(result.by_group) == set(groups)
    tau, r, n = result.by_group["lr 2"]
    assert (tau, n) == (-1, 6) and r == pytest.approx(result.pearson_within.value)


def test_within_groups_takes_pairs_of_a_group() -> None:
    x, y = sample(30)
    groups = [k % 3 for k in range(30)]
    result = fam_ext.correlation(x, y, groups)["measure"]
    concordant = both = 0
    for i in range(30):
        for j in range(i):
            if groups[i] == groups[j]:
                concordant += int(math.copysign(1, (x[i] - x[j]) * (y[i] - y[j])))
                both += 1
    assert result.kendall_within is not None and result.kendall_within.value == pytest.approx(
        concordant / both
    )


@pytest.mark.parametrize("kind", ["kendall", "pearson"])
def test_intervals_hold_the_true_value_as_often_as_they_say(kind: str) -> None:
    truth = 0.6 if kind == "pearson" else 2 / math.pi * math.asin(0.6)
    hits = 0
    for seed in range(200):
        row = fam_ext.correlation(*sample(60, seed), resamples=300, confidence=0.9)["measure"]
        c = getattr(row, kind)
        hits += c.low <= truth <= c.high
    assert (
        0.82 <= hits / 200 <= 0.96
    )  # 0.9, four standard errors of 0.021 and the percentile interval's own bias


def test_what_has_no_correlation_is_nan() -> None:
    row = fam_ext.correlation({"flat": [1.0, 1.0, 1.0, 1.0]}, [1.0, 2.0, 3.0, 4.0])["flat"]
    assert math.isnan(row.kendall.value) and math.isnan(row.pearson.value) and math.isnan(row.pearson.low)
    infinite = fam_ext.correlation([1.0, 2.0, math.inf, math.inf], [1.0, 2.0, 3.0, 4.0])["measure"]
    assert infinite.kendall.value == pytest.approx(5 / math.sqrt(5 * 6)) and math.isnan(
        infinite.pearson.value
    )


def test_results_repeat_and_are_written(tmp_path: Path) -> None:
    x, y = sample()
    groups = [k % 2 for k in range(40)]
    first = fam_ext.correlation({"a": x, "b": y}, y, groups)
    assert first == fam_ext.correlation({"a": x, "b": y}, y, groups)
    assert first != fam_ext.correlation({"a": x, "b": y}, y, groups, seed=1)
    first.to_csv(tmp_path / "c.csv")
    with open(tmp_path / "c.csv") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 2 * 4 and rows[1][:2] == ["a", "kendall"]
    assert float(rows[1][2]) == first["a"].kendall.value
    assert "95% interval" in repr(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0, 3.0], [1.0, 2.0]), "gaps must be 3 or more numbers"),
        (([1.0, 2.0], [1.0, 2.0, 3.0]), r"measures\['measure'\] must be 3 numbers, as gaps has"),
        (([1.0, 2.0, math.nan], [1.0, 2.0, 3.0]), "without nan"),
        (([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ["a"]), "groups must be a label for each of 3 networks"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fam_ext.correlation(*arguments)


def test_more_bad_arguments() -> None:
    with pytest.raises(TypeError, match="gaps must be a sequence of numbers"):
        fam_ext.correlation([1.0, 2.0, 3.0], ["a", "b", "c"])  # type: ignore[list-item]
    for wrong in (
        {"confidence": "0.5"},
        {"confidence": None},
        {"seed": "0"},
        {"groups": 3},
        {"groups": [[1], [1], [2]]},
    ):
        with pytest.raises(TypeError, match="correlation: " + next(iter(wrong))):
            fam_ext.correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measures must be at least one measure"):
        fam_ext.correlation({}, [1.0, 2.0, 3.0])
    for wrong in ({"confidence": 1.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fam_ext.correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], **wrong)  # type: ignore[arg-type]
