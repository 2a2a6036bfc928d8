"""bench/gpu_suite.sh without a GPU: its bounds, what it does when a part fails, what it says where something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).resolve().parents[2] / "bench/gpu_suite.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash was found")


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SUITE), *arguments],
        env={**os.environ, "OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_bounds_sum_to_nine_minutes_at_most(tmp_path: Path) -> None:
    done = run("--dry", out=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = dict(re.findall(r"^(\w+) +(\d+) s  ", done.stdout, re.MULTILINE))
    assert list(parts) == ["build", "info", "tests", "memcheck", "racecheck", "bench"]
    total = sum(map(int, parts.values()))
    assert total <= 540
    assert f"at most {total} s in all" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_or_hangs_does_not_stop_the_rest(tmp_path: Path) -> None:
    done = run("--rehearse", out=tmp_path)
    assert done.returncode == 1
    table = done.stdout[done.stdout.index("\npart ") :]
    results = dict(re.findall(r"^(\w+) +(passed|failed \(\d+\)|out of time)", table, re.MULTILINE))
    assert results == {"first": "passed", "second": "failed (3)", "third": "out of time", "fourth": "passed"}
    assert table.rstrip().endswith("one that comes after them")
    assert (tmp_path / "second.log").read_text() == "one that fails\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_what_it_lacks(tmp_path: Path) -> None:
    done = run(sys.executable, out=tmp_path / "results")
    assert done.returncode == 2
    assert re.search(r"this machine lacks\n.*  - (a GPU|torch with CUDA): ", done.stdout, re.DOTALL)
    assert not (tmp_path / "results").exists()
    done = run("no-such-python", out=tmp_path / "results")
    assert done.returncode == 2
    assert "python: no-such-python is no command" in done.stdout


def test_unknown_option(tmp_path: Path) -> None:
    done = run("--fast", out=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr
