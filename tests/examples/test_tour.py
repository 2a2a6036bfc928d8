"""The notebook runs from the first cell to the last, and shows what its text says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from example_runs import EXAMPLES
from notebook_runs import cells, run, source

NOTEBOOK = EXAMPLES / "tour.ipynb"
MISSING = [name for name in ("matplotlib", "sklearn", "tqdm") if importlib.util.find_spec(name) is None]


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.skipif(bool(MISSING), reason=f"the notebook needs {', '.join(MISSING)}")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    threads = torch.get_num_threads()
    try:
        names, shown = run(NOTEBOOK, tmp_path)
    finally:
        torch.set_num_threads(threads)
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figures = [value for value in shown if isinstance(value, Figure)]
    assert len(figures) == 2, "the report's plots"
    figures += [plt.figure(number) for number in plt.get_fignums()]
    assert len(figures) == 5
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
    plt.close("all")
    # what the text claims
    accuracy, best, by_strength = names["accuracy"], names["best"], names["by_strength"]
    validation = names["validation_x"], names["validation_y"]
    assert accuracy(names["flat"], *validation) == max(accuracy(m, *validation) for m in by_strength.values())
    assert min(by_strength) < best < max(by_strength), "the best strength is inside the range"
    test = names["test_x"], names["test_y"]
    assert accuracy(names["flat"], *test) > accuracy(names["plain"], *test) + 0.05
    before, after = names["before"].values, names["after"].values
    assert after["neuronwise"] == pytest.approx(before["neuronwise"], rel=1e-3)
    assert after["trace"] == pytest.approx(before["trace"] * 100, rel=1e-3)
    kappas = {
        name: sum(r.values["neuronwise"] for r in report.rows.values())
        for name, report in names["reports"].items()
    }
    assert kappas["FAM"] < kappas["plain"]
    assert len(names["gaps"]) == 12
    for name, curve in names["curves"].items():  # the parabola is tangent to the mean of the slices
        rise = names["landscape"][name].mean(0) - curve[0]
        assert float(rise[2] / (curve[2] - curve[0])) == pytest.approx(1, abs=0.2), name


def test_it_is_small_and_holds_no_machine_path() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert not re.search(r"/(home|root|work|tmp)/", text)
    identifiers = [cell["id"] for cell in cells(NOTEBOOK)]
    assert len(set(identifiers)) == len(identifiers)


def test_its_links_exist() -> None:
    for cell in cells(NOTEBOOK):
        for target in re.findall(r"\]\(([^)#\s]+)", source(cell)):
            assert (EXAMPLES / target).exists(), target
