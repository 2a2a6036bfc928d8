"""The example of a language model runs, and its noise changes the training."""

from __future__ import annotations

import re

import pytest
from example_runs import run

pytest.importorskip("transformers", reason="the example needs transformers")


def test_two_steps() -> None:
    done = run("language_model.py", "--steps", "2")
    assert done.returncode == 0, done.stderr
    lines = re.findall(
        r"strength (\S+): training loss (\d\.\d{3}), on another package (\d\.\d{3})", done.stdout
    )
    assert [line[0] for line in lines] == ["0", "0.0001", "0.001"]
    assert all(4 < float(loss) < 6 for line in lines for loss in line[1:])  # log 256 is 5.545
    assert len({line[1:] for line in lines}) > 1
