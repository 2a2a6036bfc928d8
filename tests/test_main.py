"""python -m fam_ext: the facts of info() in words for a person, and as JSON for a program."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys

import pytest

import fam_ext
from fam_ext import __main__ as command


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_words_say_all_that_info_knows(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    printed, facts = unwrapped(capsys.readouterr().out), fam_ext.info()
    for op, _, _, why in facts.rows():
        assert op in printed and unwrapped(why) in printed
    for name, version in facts.versions.items():
        assert f"{name} {version or 'not installed'}" in printed
    assert unwrapped(facts.triton) in printed
    assert ("is loaded" in printed) == facts.native


def test_words_say_why_the_library_is_not_loaded() -> None:
    facts = fam_ext.info()
    answers = {op: {"cpu": ("reference", "it was not built")} for op in facts.operations}
    without = dataclasses.replace(
        facts, native=False, reason="compiled for torch 1.0", build={}, operations=answers
    )
    said = unwrapped(command.in_words(without))
    assert (
        "not loaded: plain PyTorch computes the same numbers, slower. The reason: compiled for torch 1.0."
        in said
    )
    assert f"On the CPU plain PyTorch computes {', '.join(facts.operations)} (it was not built)." in said


def test_words_of_a_gpu() -> None:
    facts = fam_ext.info()
    answers = {"gram_trace": {"cpu": ("native", "Python"), "cuda": ("triton", "Triton kernel")}}
    build = {"torch": "2", "compiler": "c++", "simd": "avx2", "arch_list": ["8.0", "9.0+PTX"]}
    said = unwrapped(
        command.in_words(dataclasses.replace(facts, native=True, build=build, operations=answers))
    )
    assert "with CUDA kernels for 8.0, 9.0+PTX." in said
    assert "On the GPU a Triton kernel computes gram_trace (Triton kernel)." in said
    assert "no GPU" not in said


@pytest.mark.parametrize("columns", [40, 80, 400])
def test_words_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    facts = dataclasses.replace(
        fam_ext.info(), native=False, reason="of many words " * 20, operations={}, triton="none, " * 20
    )
    lines = command.in_words(facts).splitlines()
    assert len(lines) > 6
    assert max(map(len, lines)) <= min(columns, 100)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--json"])
    printed, facts = json.loads(capsys.readouterr().out), fam_ext.info()
    assert set(printed) == {field.name for field in dataclasses.fields(facts)}
    for name in ("versions", "native", "reason", "build", "triton"):
        assert printed[name] == getattr(facts, name)
    rows = [
        (op, device, answer["backend"], answer["why"])
        for op, devices in printed["operations"].items()
        for device, answer in devices.items()
    ]
    assert rows == facts.rows()


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--yaml"])
    assert "--json" in capsys.readouterr().err


def test_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fam_ext"])
    monkeypatch.delitem(sys.modules, "fam_ext.__main__")
    runpy.run_module("fam_ext", run_name="__main__")
    assert "head_cross_entropy" in capsys.readouterr().out
