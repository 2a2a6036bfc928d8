"""tools/journey.py counts calls, files and stays, and fails when a step exceeds a number."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("rich")


def load(path: Path) -> ModuleType:
    """The module in this file, imported under the file's name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


journey = load(ROOT / "tools/journey.py")


def test_calls_and_stays(tmp_path: Path) -> None:
    (tmp_path / "below.py").write_text("def inner():\n    return sum(k for k in range(3))\n")
    above_source = (
        "import below\ndef helper(): pass\ndef outer(): helper(), below.inner(), below.inner(), helper()\n"
    )
    (tmp_path / "above.py").write_text(above_source)
    below = load(tmp_path / "below.py")
    above = load(tmp_path / "above.py")
    calls = journey.calls_of(above.outer, tmp_path)
    assert [(c.file, c.function) for c in calls] == [
        ("above.py", "outer"), ("above.py", "helper"), ("below.py", "inner"), ("below.py", "inner"), ("above.py", "helper"),
    ]  # fmt: skip
    assert journey.stays(calls) == ["above.py", "below.py", "above.py"]
    assert journey.calls_of(below.inner, tmp_path / "elsewhere") == []


@pytest.mark.parametrize("step", ["head", "hidden"])
def test_a_step_goes_from_the_hook_to_the_loss(step: str) -> None:
    visits = journey.stays(journey.journey(step))
    assert visits[0].startswith("capture/")
    assert any(file.startswith("loss/") for file in visits)
    assert any(file.startswith("hessian/") for file in visits) == (step == "hidden")


def test_a_step_that_exceeds_a_number_fails(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["journey.py", "head", "--max-files", "99", "--max-stays", "99"])
    journey.main()
    assert "files" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["journey.py", "head", "--max-files", "1"])
    with pytest.raises(SystemExit, match=r"head: \d+ files, at most 1"):
        journey.main()
