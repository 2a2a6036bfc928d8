"""Every operation of the table, operations that are refused, corrected or unknown, and the files written from the table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import write_verified
from verified_cases import ALL, CASES, REFUSED, Problem, nodes, verify
from verified_cases_base import Case, Refused
from verified_cases_refused import ELSEWHERE

from fam_ext import UnsupportedError
from fam_ext.derivatives import corrections, verdicts, verified
from fam_ext.derivatives.nodes import bare

BY_ID = {case.id: case for case in CASES}
HERE = "torch " + ".".join(torch.__version__.split(".")[:2])
EACH = [
    pytest.param(
        case,
        id=case.id,
        marks=[pytest.mark.skip(reason=f"{HERE} has no F.{case.needs}")] if case.missing else [],
    )
    for case in ALL
]


@pytest.fixture(autouse=True)
def double_on_one_thread() -> Iterator[None]:
    """Tiny tensors: threads would wait for each other."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def test_names_are_unique() -> None:
    assert len({*BY_ID, *(r.case.id for r in REFUSED)}) == len(CASES) + len(REFUSED)


def refused_here(case: Case) -> bool:
    """Whether this torch is too old for the case."""
    try:
        nodes(case)
    except UnsupportedError:
        return True
    return False


def torch_is_wrong(case: Case) -> bool:
    """Whether this torch, left alone, fails or is wrong."""
    try:
        return not verify(case).right
    except RuntimeError:
        return True


@pytest.mark.parametrize("case", EACH)
def test_verified(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch that is older than what the table was written with, right or refused by name."""
    try:
        errors = verify(case)
    except UnsupportedError as error:
        assert tuple(map(int, HERE.split()[1].split("."))) < tuple(map(int, verified.TORCH.split(".")))
        names = [name for name in verdicts.REFUSED if name.removesuffix("Backward") in str(error)]
        assert names
        monkeypatch.setattr(verdicts, "REFUSED", {})
        assert torch_is_wrong(case)
    else:
        assert errors.right, errors


@pytest.mark.parametrize("refused", REFUSED, ids=lambda r: r.case.id)
def test_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    if refused.node in verdicts.SINCE and refused.node not in verdicts.REFUSED:
        assert verify(refused.case).right  # this torch can do it
        return
    why, way_out = verdicts.REFUSED[refused.node]
    with pytest.raises(UnsupportedError) as error:
        Problem(refused.case).kappa()
    message = str(error.value)
    assert refused.node.removesuffix("Backward") in message and why in message and way_out in message
    assert "use" in way_out or "write" in way_out
    if refused.instead:
        assert refused.instead.replace(" ", "_") in BY_ID  # verified above
    # an operation that torch can do by now is not to be refused
    monkeypatch.delitem(verdicts.REFUSED, refused.node)
    assert torch_is_wrong(refused.case), "put it into verdicts.SINCE"


def test_refused_nodes_are_all_reached() -> None:
    always = set(verdicts.REFUSED) - set(verdicts.SINCE)
    assert always == {r.node for r in REFUSED} - set(verdicts.SINCE) | ELSEWHERE
    reached = set().union(*({bare(n.name()) for n in Problem(case).forward()[2]} for case in CASES))
    assert set(verdicts.SINCE) <= reached | {r.node for r in REFUSED}


@pytest.mark.parametrize(
    "name",
    [
        "BatchNorm2d training",
        "F.batch_norm training",
        "LayerNorm 1 dimension",
        "F.layer_norm",
        "InstanceNorm1d affine",
        "F.instance_norm",
        "GroupNorm one sample",
        "Hardsigmoid",
        "F.scaled_dot_product_attention FLASH",
        "TransformerEncoderLayer",
    ],
)
def test_torch_alone_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A correction that the torch of the table no longer needs is one to remove; newer ones may be right by themselves."""
    monkeypatch.setattr(corrections, "needs_correction", lambda node: False)
    monkeypatch.setattr(verdicts, "REFUSED", {})
    try:
        errors = verify(BY_ID[name.replace(" ", "_")])
    except RuntimeError as error:
        assert "not implemented" in str(error) or "does not support" in str(error)
        return
    if errors.right and write_verified.TORCH != verified.TORCH:
        pytest.skip(f"{HERE} is right by itself")
    assert max(errors.slope, errors.one_by_one) > 1e-4


def test_written_files_are_up_to_date() -> None:
    table = write_verified.collect(case for case in CASES if not refused_here(case))
    if write_verified.TORCH == verified.TORCH:
        assert write_verified.MODULE.read_text() == write_verified.module(table), (
            "run tests/helpers/write_verified.py"
        )
        assert write_verified.DOCUMENT.read_text() == write_verified.document(table), (
            "run tests/helpers/write_verified.py"
        )
    covered = set().union(*(torchs for _, torchs, _ in table))
    assert not verdicts.TRUSTED & set(verdicts.REFUSED)
    assert not verified.VERIFIED - verdicts.TRUSTED - set(verdicts.SINCE)
    assert covered <= verdicts.TRUSTED


def test_corrections_are_all_reached() -> None:
    reached = set().union(*(nodes(case)[1] for case in CASES if not refused_here(case)))
    elsewhere = {"CudnnBatchNormBackward", "MiopenBatchNormBackward"}
    assert {bare(name) for name in corrections.CORRECTED} == reached | elsewhere
    assert {bare(name) for name in corrections.CORRECTED} == set(write_verified.CORRECTIONS)
