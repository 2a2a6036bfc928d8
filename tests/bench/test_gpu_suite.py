"""bench/gpu_suite.sh without a GPU: its bounds, a rehearsal on the CPU, parts that fail, machines that lack something."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).resolve().parents[2] / "bench/gpu_suite.sh"
PARTS = {"1": ["build", "info", "tests"], "2": ["build", "info", "triton", "memcheck", "racecheck", "bench"]}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash was found")


def run(*arguments: str, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "FAM_EXT_TEST"))}
    return subprocess.run(
        ["bash", str(SUITE), *arguments],
        env={**kept, "OUT": str(out), **env},
        capture_output=True,
        text=True,
        timeout=540,
    )


def results(said: str) -> dict[str, str]:
    """Part -> result, from the table at the end."""
    table = said[said.index("\npart ") :]
    return dict(re.findall(r"^(\w+) +(passed|failed \(\d+\)|out of time)", table, re.MULTILINE))


@pytest.mark.parametrize("call", PARTS)
def test_the_bounds_of_a_call_sum_to_nine_minutes_at_most(call: str, tmp_path: Path) -> None:
    done = run(call, "--dry", out=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = dict(re.findall(r"^(\w+) +(\d+) s  ", done.stdout, re.MULTILINE))
    assert list(parts) == PARTS[call]
    total = sum(map(int, parts.values()))
    assert total <= 540
    assert f"at most {total} s in all" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("call", PARTS)
def test_rehearsal(call: str, tmp_path: Path) -> None:
    """Every part with the CPU in the GPU's place; one archive comes back, with a log for each part and each file of tests."""
    done = run(call, "--rehearse", sys.executable, out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(done.stdout) == dict.fromkeys(PARTS[call], "passed")
    with tarfile.open(tmp_path / f"gpu-{call}.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {f"{part}.log" for part in PARTS[call]} | {f"summary-{call}.txt"} <= names
    if call == "1":
        assert len([name for name in names if "test_" in name]) == 2
        assert re.search(r"^tests +passed .* \d+ passed", done.stdout, re.MULTILINE)
    else:
        assert "gpu.csv" in names
        assert "rehearsal on the CPU" in done.stdout
        assert re.search(r"^memcheck +passed .* every kernel has run", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_rest(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *fam_ext) exit 3 ;;
    *collect-only*) exec sleep 60 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    done = run("1", "--rehearse", str(python), out=tmp_path / "out", SHORTEN="60")
    assert done.returncode == 1, done.stdout + done.stderr
    assert results(done.stdout) == {"build": "passed", "info": "failed (3)", "tests": "out of time"}
    assert (tmp_path / "out/gpu-1.tar.gz").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_what_it_lacks(tmp_path: Path) -> None:
    done = run("1", sys.executable, out=tmp_path / "results")
    assert done.returncode == 2
    assert re.search(r"this machine lacks\n.*  - (a GPU|torch with CUDA): ", done.stdout, re.DOTALL)
    assert not (tmp_path / "results").exists()
    done = run("2", "no-such-python", out=tmp_path / "results")
    assert done.returncode == 2
    assert "python: no-such-python is no command" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("3",), ("1", "--fast"), ("--dry",)])
def test_unknown_arguments(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, out=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr
