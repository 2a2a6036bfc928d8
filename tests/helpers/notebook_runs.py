"""A notebook's code cells, run in order in one namespace, as a kernel would after "run all"."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any


def cells(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"])


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def run(path: Path, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """(the names that are there at the end, the value of each cell that ends in an expression). Runs in `folder`.

    IPython's magics are Python no longer, so a cell with one is a syntax error here.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[Any] = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, cell in enumerate(cells(path)):
            if cell["cell_type"] != "code":
                continue
            tree = ast.parse(source(cell))
            name = f"{path.name}, cell {number}"
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
    finally:
        os.chdir(before)
    return names, shown
