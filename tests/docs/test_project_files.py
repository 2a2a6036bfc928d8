"""Licence, citation, changelog and workflows agree with the package and with each other."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

import fam_ext

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TORCH = ["2.11", "2.13", "2.14"]


def read(path: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text())


def test_licence_is_the_standard_text() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_one_version_everywhere() -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert citation[1] == fam_ext.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_citation_names_what_the_format_requires() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all({"type", "title", "authors"} <= set(reference) for reference in citation["references"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path: Path) -> None:
    """It parses, has only what it needs the right to do, and calls make targets that exist."""
    workflow = read(path)
    assert {"name", True, "permissions", "jobs"} <= set(workflow)  # True: YAML 1.1 reads the key `on` so
    assert workflow["permissions"] == {"contents": "read"}
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        for step in job.get("steps", []):
            assert ("uses" in step) != ("run" in step)
            target = re.match(r"make ([a-z-]+)", step.get("run", ""))
            assert target is None or target[1] in rules
            assert "@" in step.get("uses", "@")


def test_workflows_try_three_releases_of_torch_with_and_without_the_library() -> None:
    matrix = read(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["torch"] == TORCH
    assert len(matrix["library"]) == 2
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    assert (
        read(ROOT / ".github/workflows/wheels.yml")["jobs"]["compiled"]["strategy"]["matrix"]["torch"]
        == TORCH
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name
)
def test_issue_template_parses(path: Path) -> None:
    template = read(path)
    assert path.name == "config.yml" or {"name", "description", "body"} <= set(template)


def test_every_page_is_in_the_navigation() -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("**/*.md")}
    listed = set(re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == pages


def test_every_public_name_is_on_the_api_page() -> None:
    """Functions and classes of fam_ext, fam_ext.functional and fam_ext.typing; fam_ext.schedules lists its own."""
    page = (ROOT / "docs/api.md").read_text()
    shown = set(re.findall(r"^::: \S+\.(\w+)$", page, re.MULTILINE))
    modules = {"functional", "integrations", "schedules", "typing"}
    public = {*fam_ext.__all__, *fam_ext.functional.__all__, *fam_ext.typing.__all__} - modules
    assert public - shown == {"__version__", "Schedule"}
