"""The tables of costs in docs/performance.md and its plots, from the committed run: python bench/readme.py

bench/results holds the CSV files of one run of `make bench BENCH_ARGS="--out bench/results"` on a quiet machine. What stands
between the two marks in the page is written by this script, and the run's plots go to docs/plots; tests/bench/test_bench.py
compares them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from report import ratio_text, read_csv, time_text

ROOT = Path(__file__).parents[1]
RESULTS = Path("bench/results")
PAGE = Path("docs/performance.md")
PLOTS = Path("docs/plots")
MARKS = ("<!-- bench: begin (make bench-readme) -->", "<!-- bench: end -->")
HEAD_COLUMNS = (
    ("`head_cross_entropy`", "head_cross_entropy"),
    ("`FAMLoss`", "FAMLoss"),
    ("plain PyTorch, stable: eager", "stable, eager"),
    ("compiled", "stable, compiled"),
    ("textbook: eager", "textbook, eager"),
    ("compiled", "textbook, compiled"),
    ("full Hessian", "full Hessian (torch.func)"),
    ("Hutchinson to 1 %", "Hutchinson to 1 %"),
)
TRAINING_COLUMNS = (
    ("FAM, head", "FAM (head)"),
    ("the same, by parts", "FAM (head), by parts"),
    ("FAM, head, from features", "FAM (head, from features)"),
    ("FAM, a middle layer, 1 probe", "FAM (middle layer, 1 probe)"),
    ("noise, a middle layer", "FAM noise (middle layer)"),
    ("all layers", "FAM noise (all layers)"),
    ("Fisher, a middle layer", "FAM Fisher (middle layer)"),
    ("all layers", "FAM Fisher (all layers)"),
    ("SAM", "SAM"),
    ("paper's procedure", "paper's procedure (head)"),
)
LANGUAGE_COLUMNS = (
    ("noise, all layers of the blocks", "FAM noise (all layers of the blocks)"),
    ("Fisher, one block", "FAM Fisher (one block)"),
    ("FAM, head, logits never formed", "FAM head, exact, no logits"),
    ("the same, parts=1", "FAM head, parts=1"),
    ("SAM", "SAM"),
)
Row = dict[str, str]


def table(
    rows: Sequence[Row], columns: Sequence[tuple[str, str]], baseline: str, first: str, peaks: bool = False
) -> list[str]:
    """Markdown: a line for each case, the baseline's time, and each column's ratio to it; columns of no row are left out.

    `peaks`: the peak memory stands beside each.
    """
    columns = [c for c in columns if any(_is(r, c[1]) for r in rows)]
    lines = [
        "| " + " | ".join([first, baseline, *(title for title, _ in columns)]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for case in dict.fromkeys(r["case"] for r in rows):
        own = [r for r in rows if r["case"] == case]
        cells = [re.sub(r", forward \+ backward$", "", case)]
        plain = next(r for r in own if r["variant"] == baseline)
        cells.append(time_text(float(plain["median_us"])) + _peak(plain, peaks))
        for _, variant in columns:
            row = next((r for r in own if _is(r, variant)), None)
            cells.append("" if row is None else ratio_text(float(row["ratio"])) + _peak(row, peaks))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _peak(row: Row, shown: bool) -> str:
    return f" ({float(row['peak_mb']):.0f} MB)" if shown else ""


def _is(row: Row, variant: str) -> bool:
    """Whether the row is this variant's; an estimate's name ends with its number of probes."""
    return re.sub(r" \(\d+ probes\)$", "", row["variant"]) == variant


def text(folder: Path) -> str:
    """What stands between the marks."""
    operations = ("head_cross_entropy", "training", "language_model")
    heads, training, language = (read_csv(folder / f"{op}.csv") for op in operations)
    one = [r for r in heads if r["threads"] == min(heads, key=lambda r: int(r["threads"]))["threads"]]
    threads = training[0]["threads"]
    lines = [
        "### Heads",
        "",
        f"Measured on: {heads[0]['machine']}. Times of the step without FAM; ratios to it of",
        f"linear layer + cross-entropy + FAM, forward and backward, {one[0]['threads']} thread:",
        "",
        *table(one, HEAD_COLUMNS, "linear + CE (functions)", "N, I, O"),
        "",
        "### Whole training steps",
        "",
        f"Optimizer included, {threads} thread{'s' * (threads != '1')}:",
        "",
        *table(training, TRAINING_COLUMNS, "plain", "network"),
        "",
        "### Language models",
        "",
        f"Forward and backward, without an optimizer, {language[0]['threads']} threads; in brackets peak memory over what was",
        "there before:",
        "",
        *table(language, LANGUAGE_COLUMNS, "plain", "model", peaks=True),
        "",
        f"![Cost against size, with fitted exponents]({PLOTS.name}/scaling.png)",
    ]
    return "\n".join(lines)


def split(document: str) -> tuple[str, str, str]:
    """(up to the first mark, what stands between the marks, from the second mark on)."""
    begin, end = document.index(MARKS[0]) + len(MARKS[0]), document.index(MARKS[1])
    return document[:begin], document[begin:end], document[end:]


def main() -> None:
    folder, page = ROOT / RESULTS, ROOT / PAGE
    if not list(folder.glob("*.csv")):
        sys.exit(f'no run in {RESULTS}: make bench BENCH_ARGS="--out {RESULTS}" writes one')
    before, _, after = split(page.read_text())
    page.write_text(f"{before}\n\n{text(folder)}\n\n{after}")
    for plot in folder.glob("*.png"):  # the site shows only what lies in docs
        plot.replace(ROOT / PLOTS / plot.name)


if __name__ == "__main__":
    main()
