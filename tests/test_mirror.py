"""tests/ mirrors fam_ext/: fam_ext/a/b.py has tests/a/test_b.py, or test_b_<aspect>.py beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
# Nothing of their own to break: a docstring, or names that other modules' tests import.
WITHOUT = {
    "__init__.py": "tests/test_public.py reads its names",
    "_version.py": "tests/packaging/test_version.py compares it with the project's",
}


def without_tests(package: Path, tests: Path) -> list[str]:
    """Modules of `package` that no test file is named after; underscores around the name may be left out."""
    missing = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if path.name == "__init__.py" or str(place) in WITHOUT:
            continue
        names = {path.stem, path.stem.strip("_")}
        files = [p.stem for p in (tests / place.parent).glob("test_*.py")]
        if not any(f == f"test_{n}" or f.startswith(f"test_{n}_") for n in names for f in files):
            missing.append(str(place))
    return missing


def test_every_module_has_a_test_file_of_its_name() -> None:
    missing = without_tests(ROOT / "fam_ext", ROOT / "tests")
    assert not missing, f"no tests/<package>/test_<module>.py for {', '.join(missing)}"


def test_exceptions_are_modules() -> None:
    assert all((ROOT / "fam_ext" / name).exists() for name in WITHOUT)


def test_a_missing_file_is_seen(tmp_path: Path) -> None:
    for name in ("p/__init__.py", "p/a.py", "p/_b.py", "p/c.py", "p/sub/a.py", "p/sub/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "t/sub").mkdir(parents=True)
    for name in ("t/test_a_aspect.py", "t/test_b.py", "t/test_cc.py", "t/sub/test_d.py", "t/test_d.py"):
        (tmp_path / name).touch()
    assert without_tests(tmp_path / "p", tmp_path / "t") == ["c.py", "sub/a.py"]
