"""The code on every page runs as it stands, in order, and says what a page says; links, images and `make` targets exist.

A block that cannot run in a test (several processes, a package that tests lack) has a comment before it,
<!-- notest: why -->, and is compiled only.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import CodeType

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
OPTIONAL = ("transformers", "scipy")
MOST_BLOCKS_NOT_RUN = 0.25  # of all blocks: more would leave the pages unchecked


def blocks(page: Path) -> list[tuple[bool, CodeType]]:
    """(runs, code) of each Python block, with the page's line numbers, so that an error points to it."""
    text = page.read_text()
    listed = []
    for match in re.finditer(
        r"(<!-- notest: .*? -->\n\n)?^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    ):
        lines_before = text[: match.start(2)].count("\n")
        name = str(page.relative_to(ROOT))
        listed.append((match[1] is None, compile("\n" * lines_before + match[2], name, "exec")))
    assert len(listed) == len(re.findall(r"^ *```\w", text, re.MULTILINE)), (
        f"{page.name}: a block that no test reads"
    )
    return listed


IN_SECTIONS = ROOT / "docs/stacks.md"  # its sections run apart: tests/docs/test_stacks.py
WITH_CODE = [page for page in PAGES if blocks(page) and page != IN_SECTIONS]


@pytest.fixture
def restored() -> object:
    """A page may change the default dtype for its own code."""
    dtype = torch.get_default_dtype()
    yield None
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("restored")
def test_code_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = [code for runs, code in blocks(page) if runs]
    for package in OPTIONAL:
        if any(name.split(".")[0] == package for code in codes for name in code.co_names):
            pytest.importorskip(package)
    names: dict[str, object] = {"__name__": "page"}
    for code in codes:
        exec(code, names)
    assert "nan" not in capsys.readouterr().out


def test_most_blocks_run() -> None:
    runs = [one for page in WITH_CODE for one, _ in blocks(page)]
    assert len(runs) - sum(runs) <= MOST_BLOCKS_NOT_RUN * len(runs)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        if "://" in target:
            continue
        there = page.parent / target if target else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(f"{target}#{anchor}")
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?= *(?:[`#A-Z]|$))", page.read_text(), re.MULTILINE)) <= rules
