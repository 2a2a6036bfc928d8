"""Every Triton kernel compiles for every GPU of docs/kernels.md: onto its matrix units, without spills, in its shared memory."""

from __future__ import annotations

import re
import sys

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

import write_kernels
from kernel_builds import BUILDS, TARGETS, Target, compiled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's assemblers are for Linux only")
EACH = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
NUMBERS = pytest.mark.parametrize("number", range(len(BUILDS)), ids=lambda n: BUILDS[n].label)


@EACH
@NUMBERS
def test_build(number: int, target: Target) -> None:
    result = compiled(number, target)
    assert result.spilled == 0
    assert result.shared <= target.shared
    assert result.shared > 0 or not BUILDS[number].matrix_units
    assert bool(result.instructions) == BUILDS[number].matrix_units


@NUMBERS
def test_offsets_have_64_bits(number: int) -> None:
    """Pointers move by 64-bit integers, or by a stride that is an argument: a product of 32-bit ones could overflow."""
    text = compiled(number, TARGETS[0]).ttir
    moves = re.findall(r"tt\.addptr %[\w#]+, %([\w#]+) : [^,]+, (\S+)", text)
    assert moves
    arguments = set(re.findall(r"%(\w+): (?:i32|i64)", text))
    for offset, kind in moves:
        assert kind.rstrip(">").endswith("i64") or (kind == "i32" and offset in arguments), (offset, kind)


def test_table_is_up_to_date() -> None:
    """Compared only where the versions are those that wrote it: registers are the assembler's business."""
    written = write_kernels.DOCUMENT.read_text()
    part = written[written.index(write_kernels.BEGIN) : written.index(write_kernels.END)]
    for build in BUILDS:
        assert build.label in part, "a kernel is missing: run python tests/helpers/write_kernels.py"
    if write_kernels.versions() not in part:
        pytest.skip("written with another version of Triton")
    assert write_kernels.with_table(written) == written, "run python tests/helpers/write_kernels.py"
