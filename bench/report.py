"""Results as a table and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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


def table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str] | None]
) -> Table:
    """Columns of words (`left`), then columns of numbers (`right`); None among the rows is a line across."""
    made = Table(title=title, title_justify="left", title_style="bold", min_width=len(title))
    for k, name in enumerate((*left, *right)):
        made.add_column(name, justify="left" if k < len(left) else "right", no_wrap=True)
    for row in rows:
        if row is None:
            made.add_section()
        else:
            made.add_row(*row)
    return made


def show(console: Console, results: Sequence[Result]) -> None:
    """One table of an operation: a section for each case, a row for each variant, columns for each number of threads."""
    threads = sorted({r.threads for r in results})
    wide = console.width >= 120 + 40 * (len(threads) - 1)  # else medians alone
    spread = "\n(p20-p80)" if wide else ""
    columns = []
    for count in threads:
        columns += [
            f"{count} thread{'s' * (count > 1)}: time{spread}",
            f"ratio{spread}",
            "% of\nceiling",
        ]
    rows: list[Sequence[str] | None] = []
    for case in dict.fromkeys(r.case for r in results):
        of_case = [r for r in results if r.case == case]
        rows += [None, [f"[bold]{case}[/bold]"]]
        rows += [
            _cells([r for r in of_case if r.variant == name], threads, wide)
            for name in dict.fromkeys(r.variant for r in of_case)
        ]
    made = table(
        results[0].op, ["shape / variant"], [*columns, "peak\nMB", "relative\nerror", "ratio to"], rows
    )
    made.caption = "% of ceiling: counted FLOPs over time and the rate of a large matrix product (bytes and copy, without FLOPs)"
    made.caption_justify = "left"
    console.print(made)


def _cells(results: Sequence[Result], threads: Sequence[int], wide: bool) -> list[str]:
    """A row: one variant with every number of threads."""
    name, baseline = results[0].variant, results[0].baseline
    cells = [f"  {name}"]
    by_threads = {r.threads: r for r in results}
    for count in threads:
        r = by_threads.get(count)
        if r is None:
            cells += ["", "", ""]
            continue
        low, high = (
            f" ({time_text(r.p20_us)}-{time_text(r.p80_us)})",
            f" ({ratio_text(r.ratio_p20)}-{ratio_text(r.ratio_p80)})",
        )
        percent = r.percent_of_matmul or r.percent_of_copy
        cells += [
            time_text(r.median_us) + low * wide,
            "" if baseline == name else f"[bold]{ratio_text(r.ratio)}[/bold]" + high * wide,
            f"{percent:.0f}" if percent else "",
        ]
    peak, error = max(r.peak_mb for r in results), max(r.error for r in results)
    cells += [f"{peak:.2f}" if peak < 10 else f"{peak:.0f}", f"{error:.0e}" if error == error else ""]
    return [*cells, "" if baseline == name else baseline]


def faster_form(results: Sequence[Result]) -> str:
    """Of an operation with two forms: which one `auto` takes, marked so in its name, and which was faster here."""
    lines = []
    for threads in sorted({r.threads for r in results}):
        own = [r for r in results if r.threads == threads and r.variant.startswith("native")]
        times = {r.variant: r.median_us for r in own}
        if times:
            taken, fastest = next(n for n in times if n.endswith("(auto)")), min(times, key=times.__getitem__)
            lines.append(
                f"{threads} thread(s): auto takes {taken.split()[1]}, {fastest.split()[1]} is faster; "
                f"auto/fastest {times[taken] / times[fastest]:.2f}"
            )
    return "\n".join(lines)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """All results of one benchmark, one line each."""
    write_rows(path, [asdict(r) for r in results])


def replace_cases(path: Path, results: Sequence[Result], cases: Sequence[str]) -> None:
    """The results in place of those of the same cases in a CSV file; the others stay, with the machine they ran on.

    `cases` gives the order of all of them.
    """
    new = {r.case for r in results}
    rows: list[dict[str, Any]] = (
        [dict(r) for r in read_csv(path) if r["case"] not in new] if path.exists() else []
    )
    rows += [asdict(r) for r in results]
    write_rows(path, sorted(rows, key=lambda row: cases.index(row["case"])))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file; the columns are all keys in order of appearance, then the machine line where a row has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "machine"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "machine"])
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({"machine": machine_line(), **values})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
