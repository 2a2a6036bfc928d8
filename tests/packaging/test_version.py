"""One version: fam_ext/_version.py, which pyproject.toml reads, and the newest heading of the CHANGELOG."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

import fam_ext

ROOT = Path(__file__).parents[2]


def newest(changelog: str) -> str:
    """The version of the first heading, "## 1.2.0" or "## 1.2.0 (unreleased)"; an error where it names none."""
    heading = re.search(r"^## (.*)$", changelog, re.MULTILINE)
    assert heading is not None, "CHANGELOG.md has no heading"
    version = re.match(r"\[?(\d+\.\d+\.\d+[a-z0-9.]*)", heading.group(1))
    assert version is not None, f"the newest heading of CHANGELOG.md names no version: {heading.group(1)}"
    return version.group(1)


def test_one_version() -> None:
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    assert project["version"] == fam_ext.__version__
    assert newest((ROOT / "CHANGELOG.md").read_text()) == fam_ext.__version__


@pytest.mark.parametrize(
    "heading", ["## 1.2.0", "## 1.2.0 (unreleased)", "## [1.2.0] - 2026-01-01", "## 1.2.0, unreleased"]
)
def test_headings(heading: str) -> None:
    assert newest(f"# Changelog\n\n{heading}\n\n## 1.1.0\n") == "1.2.0"


def test_a_heading_without_a_version() -> None:
    with pytest.raises(AssertionError, match="names no version: Unreleased"):
        newest("# Changelog\n\n## Unreleased\n\n## 1.1.0\n")
