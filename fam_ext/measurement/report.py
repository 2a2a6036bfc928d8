"""What `fam_ext.measure` returns: numbers by layer and measure, as text, for loggers, as CSV and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fam_ext.errors import UnsupportedError


class Entry(NamedTuple):
    """One number. `layer` is "" for a measure of the whole network; `standard_error` is None where the value is exact."""

    layer: str
    measure: str
    value: float
    standard_error: float | None
    computed: str


@dataclass(frozen=True)
class LayerRow:
    """The measures of one layer."""

    layer: str
    """The layer as text, such as Linear(in_features=64, out_features=10, bias=True)."""
    values: dict[str, float]
    standard_errors: dict[str, float | None]
    """None where the value is exact, nan where it comes from a single probe."""
    plans: dict[str, str] = field(default_factory=dict)
    """How each measure was computed, and why."""


@dataclass(frozen=True)
class Report:
    """What `measure` computed, for the loss over the whole data set.

    `rows` holds a row for each layer by its name in the model, `network` the measures of the whole network. `values`,
    `standard_errors` and `plans` are the same in one dictionary: by measure where there is one layer, by "layer/measure" where
    there are several.

    >>> row = LayerRow("Linear(2, 3)", {"trace": 1.5}, {"trace": None}, {"trace": "closed_form"})
    >>> report = Report({"fc": row}, {"weight_norm": 2.0}, loss=0.25, samples=8, batches=2)
    >>> report.as_dict()
    {'loss': 0.25, 'samples': 8.0, 'trace': 1.5, 'weight_norm': 2.0}
    >>> print(report.table())
    measure      value  standard error  computed
    trace        1.5    exact           closed_form
    weight_norm  2      exact           of the network
    """

    rows: dict[str, LayerRow]
    network: dict[str, float]
    loss: float
    samples: int
    batches: int
    notes: dict[str, str] = field(default_factory=dict)
    """How each measure of the network was computed."""

    def __iter__(self) -> Iterator[Entry]:
        for name, row in self.rows.items():
            for measure, value in row.values.items():
                yield Entry(name, measure, value, row.standard_errors[measure], row.plans.get(measure, ""))
        for measure, value in self.network.items():
            yield Entry("", measure, value, None, self.notes.get(measure, "of the network"))

    def __getitem__(self, layer: str) -> LayerRow:
        """The row of a layer, by its name in the model."""
        return self.rows[layer]

    @property
    def layer(self) -> str:
        """The layer as text; of several their names."""
        if len(self.rows) == 1:
            return next(iter(self.rows.values())).layer
        return ", ".join(self.rows)

    def _key(self, entry: Entry) -> str:
        return f"{entry.layer}/{entry.measure}" if entry.layer and len(self.rows) > 1 else entry.measure

    @property
    def values(self) -> dict[str, float]:
        return {self._key(entry): entry.value for entry in self}

    @property
    def standard_errors(self) -> dict[str, float | None]:
        """None where the value is exact, nan where it comes from a single probe."""
        return {self._key(entry): entry.standard_error for entry in self}

    @property
    def plans(self) -> dict[str, str]:
        """How each measure was computed, and why."""
        return {self._key(entry): entry.computed for entry in self}

    def as_dict(self) -> dict[str, float]:
        """Flat, for loggers: loss, samples, each measure, and <measure>_standard_error where it was estimated."""
        errors = {f"{k}_standard_error": e for k, e in self.standard_errors.items() if e is not None}
        return {"loss": self.loss, "samples": float(self.samples), **self.values, **errors}

    def table(self) -> str:
        """A text table, one line for each layer and measure."""
        several = len(self.rows) > 1
        rows = [("layer", "measure", "value", "standard error", "computed")]
        rows += [(e.layer, e.measure, f"{e.value:.6g}", _error(e), e.computed) for e in self]
        columns = range(0 if several else 1, 4)
        widths = {k: max(len(row[k]) for row in rows) for k in columns}
        return "\n".join("  ".join([*(row[k].ljust(widths[k]) for k in columns), row[4]]) for row in rows)

    def to_csv(self, path: str | Path) -> None:
        """Write columns layer, measure, value, standard_error (empty: exact), computed; layer is empty for the network's."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Entry._fields)
            for entry in self:
                error = "" if entry.standard_error is None else repr(entry.standard_error)
                writer.writerow((entry.layer, entry.measure, repr(entry.value), error, entry.computed))

    def plot(self, path: str | Path | None = None) -> Any:
        """Layers by measures: a panel for each measure with one bar for each layer. Returns the matplotlib Figure.

        Error bars show one standard error. `path` saves the figure. Raises UnsupportedError where matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UnsupportedError(
                f"Report.plot needs matplotlib: pip install matplotlib ({error}); or use to_csv()"
            ) from None
        measures = list(dict.fromkeys(entry.measure for entry in self if entry.layer))
        lines = len(self.rows)
        figure: Any = Figure(
            figsize=(1.5 + 2.8 * max(len(measures), 1), 1.2 + 0.3 * lines), layout="constrained"
        )
        axes = figure.subplots(1, max(len(measures), 1), sharey=True, squeeze=False)[0]
        for axis, measure in zip(axes, measures, strict=False):
            values = [row.values[measure] for row in self.rows.values()]
            errors = [row.standard_errors[measure] or 0.0 for row in self.rows.values()]
            axis.barh(range(lines), values, xerr=errors, color="#4477aa", ecolor="#222222")
            axis.set_title(measure, fontsize=9)
            axis.axvline(0, color="#222222", linewidth=0.6)
            axis.tick_params(labelsize=8)
        axes[0].set_yticks(range(lines), list(self.rows))
        axes[0].invert_yaxis()  # the first layer on top; shared by the other panels
        if path is not None:
            figure.savefig(path, dpi=150)
        figure._repr_png_ = partial(_png, figure)  # shown in a notebook that has not loaded pyplot, too
        return figure

    def __repr__(self) -> str:
        what = self.layer if len(self.rows) == 1 else f"{len(self.rows)} layers" if self.rows else "network"
        head = f"{what}: loss {self.loss:.6g} over {self.samples} samples in {self.batches} batches"
        return f"{head}\n{self.table()}"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _error(entry: Entry) -> str:
    return "exact" if entry.standard_error is None else f"{entry.standard_error:.2g}"
