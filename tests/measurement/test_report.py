"""Reports as text, CSV and plot."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fam_ext.measurement import LayerRow, Report


def report(layers: int) -> Report:
    names = ("neuronwise", "trace")
    rows = {
        f"block.{k}": LayerRow(
            f"Linear({k})",
            dict.fromkeys(names, 1.0 + k),
            {"neuronwise": None, "trace": 0.25},
            {"trace": "plan"},
        )
        for k in range(layers)
    }
    return Report(rows, {"weight_norm": 3.0}, 0.5, 20, 2)


def test_one_layer_needs_no_names() -> None:
    one = report(1)
    assert one.values == {"neuronwise": 1.0, "trace": 1.0, "weight_norm": 3.0}
    assert one.standard_errors == {"neuronwise": None, "trace": 0.25, "weight_norm": None}
    assert one.layer == "Linear(0)" and repr(one).startswith(
        "Linear(0): loss 0.5 over 20 samples in 2 batches"
    )
    assert one.as_dict()["trace_standard_error"] == 0.25


def test_csv_holds_every_number(tmp_path: Path) -> None:
    report(2).to_csv(tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["layer", "measure", "value", "standard_error", "computed"]
    assert rows[2] == ["block.0", "trace", "1.0", "0.25", "plan"]
    assert rows[-1] == ["", "weight_norm", "3.0", "", "of the network"]
    assert len(rows) == 6


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_plot_has_a_panel_for_each_measure_and_a_bar_for_each_layer(layers: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = report(layers).plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    panels = [a for a in figure.axes if a.get_title()]
    assert [a.get_title() for a in panels] == (["neuronwise", "trace"] if layers else [])
    assert all(len(a.patches) == layers for a in panels)
    if layers:
        assert [p.get_width() for p in panels[0].patches] == [1.0 + k for k in range(layers)]
