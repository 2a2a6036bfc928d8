"""python -m fam_ext: the facts of info() in tables, or as plain text where rich is not installed."""

from __future__ import annotations

import dataclasses
import runpy
import sys

import pytest

import fam_ext
from fam_ext import __main__ as command


@pytest.mark.parametrize("rich", [True, False])
def test_what_it_prints(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rich:
        pytest.importorskip("rich", reason="rich is not installed")
        monkeypatch.setenv("COLUMNS", "400")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    command.main()
    printed, facts = capsys.readouterr().out, fam_ext.info()
    for row in facts.rows():
        assert row[0] in printed and row[2] in printed
    for name, version in facts.versions.items():
        assert name in printed and str(version or "not installed") in printed
    assert facts.triton in printed
    if not rich:
        assert printed.strip() == str(facts).strip()


def test_text_in_brackets_is_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", "400")
    facts = dataclasses.replace(
        fam_ext.info(), native=False, reason="[red]missing[/red]", triton="[bold]none"
    )
    command._print_rich(facts)
    printed = capsys.readouterr().out
    assert "no: [red]missing[/red]" in printed and "[bold]none" in printed


def test_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "fam_ext.__main__")
    runpy.run_module("fam_ext", run_name="__main__")
    assert "head_cross_entropy" in capsys.readouterr().out
