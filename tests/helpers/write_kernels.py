"""Writes the Triton part of docs/kernels.md from what the kernels compile to: python tests/helpers/write_kernels.py"""

from __future__ import annotations

from pathlib import Path

from kernel_builds import BUILDS, TARGETS, Compiled, compiled, triton_version

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- triton:begin -->", "<!-- triton:end -->"

_TITLE = """# GPU kernels

What each kernel compiles to, without a GPU at hand. None of them has ever run on one.
"""
_HEAD = """## Triton

Compiled ahead of time by {versions} with the launcher's own tile sizes; written by `python tests/helpers/write_kernels.py`,
kept up to date by `tests/packaging/test_kernels.py`, which refuses spills, too much shared memory, 32-bit offsets and
products off the matrix
units. Each cell: registers of a thread, shared memory of a block, instructions of the matrix units as they stand in the code.
"""


def versions() -> str:
    return f"Triton {triton_version()}"


def _cell(result: Compiled) -> str:
    code = ", ".join(f"{count} `{name}`" for name, count in sorted(result.instructions.items())) or "none"
    spills = "" if result.spilled == 0 else f", {result.spilled} SPILLED"
    return f"{result.registers}, {result.shared / 1024:.0f} KiB, {code}{spills}"


def table() -> str:
    lines = ["| kernel (operands) | " + " | ".join(t.name for t in TARGETS) + " |"]
    lines.append("|---" * (1 + len(TARGETS)) + "|")
    for number, build in enumerate(BUILDS):
        cells = [_cell(compiled(number, target)) for target in TARGETS]
        lines.append("| " + " | ".join((build.label, *cells)) + " |")
    return f"{BEGIN}\n{_HEAD.format(versions=versions())}\n" + "\n".join(lines) + f"\n{END}"


def with_table(document: str) -> str:
    """`document` with the Triton part replaced, or added where there is none."""
    if BEGIN not in document:
        return document.rstrip("\n") + f"\n\n{table()}\n"
    head, rest = document.split(BEGIN, 1)
    return head + table() + rest.split(END, 1)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text() if DOCUMENT.exists() else _TITLE))
