"""Results as a table and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from machine import machine_line
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One variant of one case, over all rounds. A line of a CSV file, which adds the machine line."""

    op: str
    case: str
    threads: int
    variant: str
    baseline: str
    median_us: float
    p20_us: float
    p80_us: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    error: float
    gigabytes_per_second: float
    percent_of_copy: float
    gigaflops_per_second: float
    percent_of_matmul: float
    peak_mb: float = float("nan")


def time_text(microseconds: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def ratio_text(ratio: float) -> str:
    """Two decimals, three near 1, where a percent matters."""
    return f"{ratio:.3f}" if abs(ratio - 1) < 0.1 else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"


def show(console: Console, rows: Sequence[Result]) -> None:
    """One table of an operation: a section for each case, a row for each variant, columns for each number of threads."""
    threads = sorted({r.threads for r in rows})
    wide = console.width >= 120 + 40 * (len(threads) - 1)  # else medians alone
    table = Table(title=rows[0].op, title_justify="left", title_style="bold")
    table.add_column("shape / variant", no_wrap=True)
    for count in threads:
        spread = "\n(p20-p80)" if wide else ""
        table.add_column(f"{count} thread{'s' * (count > 1)}: time{spread}", justify="right", no_wrap=True)
        table.add_column(f"ratio{spread}", justify="right", no_wrap=True)
        table.add_column("% of\nceiling", justify="right", no_wrap=True)
    table.add_column("peak\nMB", justify="right", no_wrap=True)
    table.add_column("relative\nerror", justify="right", no_wrap=True)
    table.add_column("ratio to", no_wrap=True)
    for case in dict.fromkeys(r.case for r in rows):
        of_case = [r for r in rows if r.case == case]
        table.add_section()
        table.add_row(f"[bold]{case}[/bold]")
        for name in dict.fromkeys(r.variant for r in of_case):
            table.add_row(*_cells(name, [r for r in of_case if r.variant == name], threads, wide))
    table.caption = "% of ceiling: counted FLOPs over time and the rate of a large matrix product (bytes and copy, without FLOPs)"
    table.caption_justify = "left"
    console.print(table)


def _cells(name: str, rows: Sequence[Result], threads: Sequence[int], wide: bool) -> list[str]:
    cells = [f"  {name}"]
    by_threads = {r.threads: r for r in rows}
    for count in threads:
        r = by_threads.get(count)
        if r is None:
            cells += ["", "", ""]
            continue
        low, high = (time_text(v).split()[0] for v in (r.p20_us, r.p80_us))
        same_unit = len({time_text(v).split()[1] for v in (r.p20_us, r.median_us, r.p80_us)}) == 1
        spread = f"{low}-{high}" if same_unit else f"{time_text(r.p20_us)}-{time_text(r.p80_us)}"
        cells.append(f"{time_text(r.median_us)} ({spread})")
        own = r.baseline == r.variant
        cells.append(
            ""
            if own
            else f"[bold]{ratio_text(r.ratio)}[/bold] ({ratio_text(r.ratio_p20)}-{ratio_text(r.ratio_p80)})"
        )
        percent = r.percent_of_matmul or r.percent_of_copy
        cells.append(f"{percent:.0f}" if percent else "")
    baseline = rows[0].baseline
    peak, error = max(r.peak_mb for r in rows), max(r.error for r in rows)
    cells += [f"{peak:.2f}" if peak < 10 else f"{peak:.0f}", f"{error:.0e}" if error == error else ""]
    return [*cells, "" if baseline == name else baseline]


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """All results of one benchmark, one line each, with the machine line in the last column."""
    names = [f.name for f in fields(Result)]
    rows = [{name: getattr(r, name) for name in names} for r in results]
    write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The same for any rows; the columns are all keys in order of appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "machine"])
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**values, "machine": machine_line()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, or of all CSV files of a folder."""
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    rows: list[dict[str, str]] = []
    for file in files:
        with file.open(newline="") as stream:
            rows += csv.DictReader(stream)
    return rows
