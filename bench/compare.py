"""What moved between two runs: python bench/run.py --compare old.csv (or a folder of them)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report import read_csv, time_text
from rich.console import Console
from rich.table import Table

Row = dict[str, str]
Key = tuple[str, str, str, str]
LEAST_CHANGE = 0.03  # smaller ones are no news, however steady


@dataclass(frozen=True)
class Move:
    """One variant in both runs. `factor` is new over old, of the time or (other machine) of the ratio to the baseline."""

    key: Key
    old: float
    new: float
    moved: bool

    @property
    def factor(self) -> float:
        return self.new / self.old


def same_machine(old: str, new: str) -> bool:
    """Whether two machine lines differ in the commit alone."""
    return re.sub(r"; commit .*", "", old) == re.sub(r"; commit .*", "", new)


def timed(rows: Sequence[Row]) -> dict[Key, Row]:
    """The rows that hold times, by operation, case, threads and variant."""
    return {(r["op"], r["case"], r["threads"], r["variant"]): r for r in rows if r.get("median_us")}


def moves(old_rows: Sequence[Row], new_rows: Sequence[Row]) -> tuple[list[Move], bool]:
    """Variants of both runs, and whether times are compared (one machine) rather than ratios to the baseline.

    A variant moved when the middle 60 % of its rounds lie apart in the two runs and the medians differ by 3 %.
    """
    old, new = timed(old_rows), timed(new_rows)
    both = [key for key in new if key in old]
    one_machine = all(same_machine(old[key].get("machine", ""), new[key].get("machine", "")) for key in both)
    names = ("p20_us", "median_us", "p80_us") if one_machine else ("ratio_p20", "ratio", "ratio_p80")
    found = []
    for key in both:
        (low, before, high), (new_low, after, new_high) = (
            [float(r[name]) for name in names] for r in (old[key], new[key])
        )
        apart = new_low > high or new_high < low
        found.append(Move(key, before, after, apart and abs(after / before - 1) >= LEAST_CHANGE))
    return found, one_machine


def show_moves(console: Console, old_path: Path, new_path: Path) -> None:
    """A table of what moved, the slower first."""
    old_rows, new_rows = read_csv(old_path), read_csv(new_path)
    found, one_machine = moves(old_rows, new_rows)
    what = "times" if one_machine else "ratios to the baseline: the machines differ"
    moved = sorted((m for m in found if m.moved), key=lambda m: -m.factor)
    if moved:
        table = Table(title=f"moved since {old_path} ({what})", title_justify="left", title_style="bold")
        for name in ("operation", "case", "threads", "variant"):
            table.add_column(name)
        for name in ("old", "new", "new / old"):
            table.add_column(name, justify="right", no_wrap=True)
        for m in moved:
            old, new = ((time_text(v) if one_machine else f"{v:.2f}") for v in (m.old, m.new))
            table.add_row(*m.key, old, new, f"[{'red' if m.factor > 1 else 'green'}]{m.factor:.2f}[/]")
        console.print(table)
    only_old, only_new = len(timed(old_rows)) - len(found), len(timed(new_rows)) - len(found)
    console.print(
        f"{len(found)} compared by {what}: {len(moved)} moved; {only_old} only in the old run, {only_new} only in the new one"
    )
