"""Runs of the examples, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example's script in a process of its own, in a terminal of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


def check_one_seed_is_refused(example: str, folder: Path) -> None:
    """A standard error needs two seeds."""
    done = run(example, "--seeds", "1", "--out", str(folder))
    assert done.returncode == 2
    assert "standard error" in done.stderr
    assert not list(folder.iterdir())
