"""The tables of docs/results.md and README are those of the committed results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from studies import comparison, flatness, summary
from studies.grids import CORE_METHODS, grids
from studies.store import RESULTS, Run, Store, Task


def test_the_page_shows_the_committed_results() -> None:
    for path in summary.PAGES:
        page = path.read_text()
        assert "<!-- study: " in page and summary.filled(page, grids()["full"], RESULTS) == page
        assert all((summary.PLOTS / f"study_{name}").exists() for name in summary._PLOT.findall(page))
    assert summary._PLOT.findall(summary.PAGES[0].read_text())


def test_the_smaller_grids_have_tables_where_they_are_finished(tmp_path: Path) -> None:
    assert summary.others(tmp_path) == {}
    for task in grids()["regression"].tasks:
        for method in CORE_METHODS:
            for seed in range(10):
                share = 0.5 + (method == "dropout") * 0.01 + seed / 100
                Store(tmp_path, task).add(
                    Run(method, "test", seed, {}, {"test_accuracy": share, "step_ms": 1.0})
                )
    made = summary.others(tmp_path)
    assert list(made) == ["regression"] and "mean R²" in made["regression"]
    assert "| dropout | 55.50 | +1.00 | 1 / 0 / 0 |" in made["regression"]


def test_ranks_by_kind_of_task() -> None:
    scores = {
        Task("a", "mlp", 0.4, 1000): {"x": {0: 0.5}, "y": {0: 0.6}},
        Task("b", "mlp", 0.4, 1000): {"x": {0: 0.5}, "y": {0: 0.6}},
        Task("b", "mlp", 0.0, 200): {"x": {0: 0.7}, "y": {0: 0.6}},
        Task("b", "cnn", 0.4, 500): {"x": {0: 0.7}, "y": {0: 0.6}},
    }
    table = comparison.ranks_by_kind(summary._kinds(scores))
    assert table.splitlines()[0] == "| method | MLP, 40 % wrong (2) | MLP, 200 samples (1) | CNN (1) |"
    assert table.splitlines()[2:] == ["| y | **1.00** | 2.00 | 2.00 |", "| x | 2.00 | **1.00** | **1.00** |"]


def test_kappa_beside_accuracy(tmp_path: Path) -> None:
    """x halves kappa on one task and takes an eighth on another, and is better on both; y is twice as sharp and worse."""
    for name, own in (("a", 0.5), ("b", 0.125)):
        store = Store(tmp_path, Task(name, "mlp", 0.4, 100))
        for method, share, accuracy in (("base", 1.0, 0.5), ("x", own, 0.6), ("y", 2.0, 0.4)):
            numbers = {
                "kappa_all": 8 * share,
                "kappa_head": 1.0,
                "train_nll": share,
                "test_accuracy": accuracy,
            }
            store.add(Run(method, "test", 0, {}, {**numbers, "step_ms": 1.0}))
    tasks = [Task(name, "mlp", 0.4, 100) for name in "ab"]
    lines = flatness.table(tmp_path, tasks, ["base", "x", "y"], "base").splitlines()
    assert lines[2:5] == [
        "| base | 1.00 | 1.00 | 1.00 |", "| x | 0.25 | 1.00 | 0.25 |", "| y | 2.00 | 1.00 | 2.00 |"
    ]  # fmt: skip
    assert lines[-1].endswith("wrong labels (2): -1.00 (2 of 2 negative).")


def test_only_what_stands_between_marks_is_written(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(summary, "sections", lambda grid, folder: {"all": "| new |", "clean": "| c |"})
    monkeypatch.setattr(summary.gaps, "table", lambda path: "| tau |")
    end = "<!-- study: end -->\n"
    page = f"before\n<!-- study: all -->\n\n| old |\n\n{end}between\n<!-- study: {{}} -->\n\nx\n\n{end}"
    filled = summary.filled(page.format("correlation"), grids()["quick"], tmp_path)
    assert filled == page.format("correlation").replace("| old |", "| new |").replace("\n\nx", "\n\n| tau |")
    with pytest.raises(KeyError, match="unknown"):
        summary.filled(page.format("unknown"), grids()["quick"], tmp_path)
