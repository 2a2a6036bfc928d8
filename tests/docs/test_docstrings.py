"""The examples in docstrings (>>>) run and print what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import fam_ext

ROOT = Path(__file__).parents[2]
NEEDS = {
    "fam_ext.kernels": "triton",
    "fam_ext.integrations.huggingface": "transformers",
    "fam_ext.integrations.lightning": "lightning",
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def with_examples(folder: Path, package: str) -> list[tuple[str, str]]:
    """(module, name in it) of every docstring below `folder` that holds an example, without importing anything."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

        def visit(node: ast.AST, name: str, module: str = module) -> None:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                if ">>>" in (ast.get_docstring(node) or ""):
                    found.append((module, name))
                for child in node.body:
                    visit(child, ".".join(filter(None, [name, getattr(child, "name", "")])))

        visit(ast.parse(path.read_text()), "")
    return found


EXAMPLES = [*with_examples(ROOT / "fam_ext", "fam_ext"), *with_examples(ROOT / "kernels", "fam_ext.kernels")]


def run(module: str, name: str) -> str:
    """What doctest says of the examples of one docstring, nothing where all are right; each starts with the module's names."""
    loaded = importlib.import_module(module)
    full = ".".join(filter(None, [module, name]))
    tests = [t for t in doctest.DocTestFinder(recurse=True).find(loaded) if t.name == full]
    assert len(tests) == 1, f"doctest does not see {full}"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(tests[0], out=said.append)
    return "".join(said)


@pytest.mark.parametrize(("module", "name"), EXAMPLES, ids=lambda value: value or "module")
def test_example(module: str, name: str) -> None:
    for start, package in NEEDS.items():
        if module.startswith(start):
            pytest.importorskip(package, reason=f"{package} is not installed")
    said = run(module, name)
    assert not said, said


def test_every_public_name_has_an_example() -> None:
    """Classes and functions of the package, of functional and of schedules."""
    named = {name.split(".")[-1] for module, name in EXAMPLES if module.startswith("fam_ext.")}
    public = [getattr(fam_ext, name) for name in fam_ext.__all__]
    public += [getattr(fam_ext.functional, name) for name in fam_ext.functional.__all__]
    public += [v for v in vars(fam_ext.schedules).values() if isinstance(v, type)]
    ours = {v.__name__ for v in public if callable(v) and v.__module__.startswith("fam_ext")}
    assert {"FAMLoss", "gram_trace", "TargetRatio"} < ours
    assert not ours - named, "docstrings without an example"


def test_a_wrong_example_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_with_examples").mkdir()
    (tmp_path / "package_with_examples/sums.py").write_text(
        'class Sum:\n    """\n    >>> 1 + 1\n    2\n    """\n'
        '    def of(self):\n        """\n        >>> 1 + 1\n        3\n        """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = with_examples(tmp_path / "package_with_examples", "package_with_examples")
    assert found == [("package_with_examples.sums", "Sum"), ("package_with_examples.sums", "Sum.of")]
    assert not run(*found[0])
    assert "Expected:\n    3\nGot:\n    2" in run(*found[1])
