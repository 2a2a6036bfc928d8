"""The demo runs, and its table, CSV and plot hold what they should."""

from __future__ import annotations

import csv
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import EXAMPLES, check_one_seed_is_refused, run

DEMO = "digits.py"
PACKAGES = ("matplotlib", "pytorch_optimizer", "rich", "sklearn", "tqdm")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
METHODS = {"SGD", "SAM", "FAM", "FAM, held", "FAM, noise", "FAM, Fisher"}

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the demo needs {', '.join(MISSING)}")


def test_quick(tmp_path: Path) -> None:
    done = run(DEMO, "--quick", "--out", str(tmp_path / "new" / "folder"))
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout, "a table does not fit 80 columns"
    with (tmp_path / "new" / "folder" / "digits.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    settings = {row["setting"] for row in rows}
    assert len(settings) == 2
    keys = [(row["setting"], row["method"], row["seed"]) for row in rows]
    assert sorted(keys) == sorted((s, m, seed) for s in settings for m in METHODS for seed in "01")
    for row in rows:
        assert 0.6 < float(row["accuracy"]) <= 1, row
        assert 0 < float(row["nll"]) < math.log(10), row
        assert 0 < float(row["kappa"]) < math.inf, row
        assert float(row["step_ms"]) > 0, row
        assert row["method"] != "SGD" or float(row["step_ratio"]) == 1, row
    image = (tmp_path / "new" / "folder" / "digits.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_one_seed_is_refused(tmp_path: Path) -> None:
    check_one_seed_is_refused(DEMO, tmp_path)


def test_missing_package(tmp_path: Path) -> None:
    """The message names the package and what to install."""
    code = f"import runpy, sys; sys.modules['tqdm'] = None; runpy.run_path({str(EXAMPLES / DEMO)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 1
    assert "tqdm" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
