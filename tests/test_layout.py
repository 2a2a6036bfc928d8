"""fam_ext is built in floors: a module imports from its own floor or from below, and no two modules need each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fam_ext"

# What lies on each floor, the lowest first: modules, and packages with everything in them.
FLOORS = (
    ("errors", "_checks", "_dtypes", "_version"),
    ("kernels", "ops", "derivatives", "schedules"),
    ("layers", "criteria", "loss_hessians", "options"),
    ("capture", "head", "hessian", "flatness_noise"),
    ("loss", "functional"),
    ("measurement", "integrations", "correlation", "rescaling"),
    ("__init__", "__main__", "typing"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS, 1) for name in names}

Arrows = dict[str, dict[str, int]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; a package's own module ends in __init__."""
    return {".".join(p.relative_to(root).with_suffix("").parts): p for p in sorted(root.rglob("*.py"))}


def imported(name: str, tree: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module below fam_ext, line) for each import in `tree`, wherever it stands: in a function, under a condition."""

    def module(path: list[str]) -> str:
        """The module that `import fam_ext.PATH` runs, or that holds the last name of the path."""
        for candidate in (path, [*path, "__init__"], path[:-1], [*path[:-1], "__init__"]):
            if ".".join(candidate) in known:
                return ".".join(candidate)
        return ".".join(path)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *path = alias.name.split(".")
                if top == "fam_ext":
                    yield module(path or ["__init__"]), node.lineno
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".") if node.module else []
            if node.level:
                path = ["fam_ext", *name.split(".")[: -node.level], *path]
            if path[:1] == ["fam_ext"]:
                for alias in node.names:
                    yield module([*path[1:], alias.name]), node.lineno


def arrows(root: Path) -> Arrows:
    """Module -> module that it imports -> line."""
    known = modules(root)
    return {
        name: {
            target: line
            for target, line in imported(name, ast.parse(path.read_text()), known)
            if target != name
        }
        for name, path in known.items()
    }


def upward(found: Arrows) -> list[str]:
    """Imports of a module from a higher floor, as "fam_ext/a.py:3 (floor 1) imports b (floor 2)"."""
    return [
        f"fam_ext/{name.replace('.', '/')}.py:{line} (floor {FLOOR[name.split('.')[0]]}) imports {target} "
        f"(floor {FLOOR[target.split('.')[0]]})"
        for name, targets in found.items()
        for target, line in targets.items()
        if FLOOR[name.split(".")[0]] < FLOOR[target.split(".")[0]]
    ]


def circle(found: Arrows) -> list[str]:
    """The modules of one circle in order, the first one again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in found.get(name, ()):
            if back := visit(target, [*way, name]):
                return back
        done.add(name)
        return []

    return next((back for name in found if (back := visit(name, []))), [])


def test_every_module_has_a_floor() -> None:
    unplaced = {name for name in modules(ROOT) if name.split(".")[0] not in FLOOR}
    assert not unplaced, "put these on a floor"
    targets = {target.split(".")[0] for targets in arrows(ROOT).values() for target in targets}
    assert targets <= set(FLOOR) | {"_C"}


def test_imports_go_down() -> None:
    found = upward(arrows(ROOT))
    assert not found, "\n".join(found)


def test_no_circle() -> None:
    found = circle(arrows(ROOT))
    assert not found, " -> ".join(found)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {
        "__init__.py": "from fam_ext.loss import FAMLoss\n",
        "errors.py": "",
        "_checks.py": "from fam_ext import errors\n",
        "options.py": "from fam_ext.ops.trace import trace\nfrom . import _checks\n",
        "ops/__init__.py": "",
        "ops/trace.py": "import torch\nfrom fam_ext.errors import Unsupported\n",
        "loss/__init__.py": "from .fam_loss import FAMLoss\n",
        "loss/fam_loss.py": "def f():\n    from ..options import Options\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_arrows_are_read(package: Path) -> None:
    assert {name: {*targets} for name, targets in arrows(package).items() if targets} == {
        "__init__": {"loss.__init__"},
        "_checks": {"errors"},
        "options": {"ops.trace", "_checks"},
        "ops.trace": {"errors"},
        "loss.__init__": {"loss.fam_loss"},
        "loss.fam_loss": {"options"},
    }
    assert not upward(arrows(package)) and not circle(arrows(package))


@pytest.mark.parametrize(
    ("text", "arrow"),
    [
        ("def f():\n    from fam_ext.loss.fam_loss import FAMLoss\n", "imports loss.fam_loss (floor 5)"),
        ("if TYPE_CHECKING:\n    import fam_ext.options\n", "imports options (floor 3)"),
        ("x = 1\nfrom .. import FAMLoss\n", "imports __init__ (floor 7)"),
        ("y = 1\nimport fam_ext\n", "imports __init__ (floor 7)"),
    ],
)
def test_an_import_upward_is_named(package: Path, text: str, arrow: str) -> None:
    (package / "ops/trace.py").write_text(text)
    assert upward(arrows(package)) == [f"fam_ext/ops/trace.py:2 (floor 2) {arrow}"]


def test_a_circle_is_named(package: Path) -> None:
    (package / "_checks.py").write_text("def f():\n    from fam_ext import _dtypes\n")
    (package / "_dtypes.py").write_text("from fam_ext._checks import x\n")
    assert circle(arrows(package)) == ["_checks", "_dtypes", "_checks"]
