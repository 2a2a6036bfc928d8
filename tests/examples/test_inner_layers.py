"""The example of inner layers runs, and its tables, CSV and plot hold what they should."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import pytest
from example_runs import check_one_seed_is_refused, run

EXAMPLE = "inner_layers.py"
PACKAGES = ("matplotlib", "rich", "sklearn", "tqdm")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the example needs {', '.join(MISSING)}")


def test_quick(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    done = run(EXAMPLE, "--quick", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.split("\n") if "Warning" in line]
    assert all("said once" in line for line in told)  # of a negative kappa, which the example is about
    assert "…" not in done.stdout, "a table does not fit 80 columns"
    for plan in ("hutchinson (batch independent)", "fisher (samples independent)", "closed_form"):
        assert plan in done.stdout
    with (folder / "inner_layers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tasks, steps = {row["task"] for row in rows}, {row["step"] for row in rows}
    assert len(tasks) == 3
    assert len(steps) >= 3
    keys = [(row["task"], row["method"], row["seed"], row["step"]) for row in rows]
    methods = ("plain", "FAM")
    expected = [(t, m, seed, step) for t in tasks for m in methods for seed in "01" for step in steps]
    assert sorted(keys) == sorted(expected)
    for row in rows:
        assert math.isfinite(float(row["kappa"])), row
        assert 0 <= float(row["accuracy"]) <= 1, row
    # the same start: without a step taken, kappa is the same
    start = {key: float(row["kappa"]) for key, row in zip(keys, rows, strict=True) if row["step"] == "0"}
    for (task, method, seed, step), kappa in start.items():
        assert method == "plain" or kappa == pytest.approx(start[task, "plain", seed, step], rel=1e-4)
    image = (folder / "inner_layers.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_one_seed_is_refused(tmp_path: Path) -> None:
    check_one_seed_is_refused(EXAMPLE, tmp_path)
