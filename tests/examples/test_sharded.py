"""The example of several processes runs under torchrun, and its losses fall."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from example_runs import EXAMPLES

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def test_two_processes() -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(EXAMPLES / "sharded.py"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    fsdp, split = done.stdout.split("head split by class")
    for part in (fsdp, split):
        losses = [float(number) for number in re.findall(r"loss ([0-9.]+)", part)]
        kappas = [float(number) for number in re.findall(r"kappa of the head ([0-9.]+)", part)]
        assert len(losses) == len(kappas) == 5
        assert losses[-1] < 0.8 * losses[0]
        assert all(kappa > 0 for kappa in kappas)


def test_without_torchrun() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "sharded.py")], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2
    assert "torchrun" in done.stderr
