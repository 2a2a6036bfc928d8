"""The tables of docs/results.md are those of the committed results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from studies import summary
from studies.grids import grids
from studies.store import RESULTS


def test_the_page_shows_the_committed_results() -> None:
    page = summary.PAGE.read_text()
    assert summary.filled(page, grids()["full"], RESULTS) == page
    plots = summary._PLOT.findall(page)
    assert plots and all((summary.PLOTS / f"study_{name}").exists() for name in plots)


def test_only_what_stands_between_marks_is_written(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(summary, "sections", lambda grid, folder: {"all": "| new |", "clean": "| c |"})
    monkeypatch.setattr(summary.gaps, "table", lambda path: "| tau |")
    end = "<!-- study: end -->\n"
    page = f"before\n<!-- study: all -->\n\n| old |\n\n{end}between\n<!-- study: {{}} -->\n\nx\n\n{end}"
    filled = summary.filled(page.format("correlation"), grids()["quick"], tmp_path)
    assert filled == page.format("correlation").replace("| old |", "| new |").replace("\n\nx", "\n\n| tau |")
    with pytest.raises(KeyError, match="unknown"):
        summary.filled(page.format("unknown"), grids()["quick"], tmp_path)
