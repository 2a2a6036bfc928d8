"""Every operation of the table, operations that are refused, corrected or unknown, and the files written from the table."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
import write_verified
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from verified_cases import ALL, CASES, REFUSED, Problem, nodes, verify
from verified_cases_base import Case, Refused, smooth
from verified_cases_refused import ELSEWHERE

from fam_ext import UnsupportedError
from fam_ext.capture import graph_walk
from fam_ext.derivatives import corrections, verdicts, verified
from fam_ext.derivatives.nodes import bare
from fam_ext.hessian import exact
from fam_ext.hessian.products import LayerCall, LayerHessian, products
from fam_ext.layers.linear_map import LinearMap

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


class Unknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_unknown_operation_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_warned", set())
    problem = Problem(Case("unknown", lambda: lambda z: Unknown.apply(Unknown.apply(z))))
    with pytest.warns(UserWarning, match=r"caller: .*UnknownBackward.* never been verified") as caught:
        verdicts.check("caller", problem.forward()[2])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts.check("caller", problem.forward()[2])
        verdicts.check("caller", Problem(BY_ID["ReLU"]).forward()[2])


def _layer_norm(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def _batch_norm(x: Tensor) -> Tensor:
    centered = x - x.mean((0, 2, 3), keepdim=True)
    return centered * (centered.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()


def _kappa(layer: Any, calls: list[tuple[Tensor, Tensor]], loss: Tensor, edges: list[Any]) -> Tensor:
    found = [
        LayerCall(edge, features, tuple(z.shape), z.dtype)
        for edge, (features, z) in zip(edges, calls, strict=True)
    ]
    ((_, between, *_),) = graph_walk.find(loss, [layer])
    curvature = LayerHessian(LinearMap("kappa", layer), layer.weight, found)
    with products(loss, [curvature], verdicts.check("kappa", between)[0]):
        return torch.stack([s.sum() for s in exact.exact(curvature, "batch", True, 16, "auto")]).sum()


def test_correction_between_two_calls_of_one_layer() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    calls, edges = [], []

    def called(features: Tensor) -> Tensor:
        z = layer(features)
        z.grad_fn.metadata[(layer, 0)] = None
        calls.append((features, z))
        edges.append(get_gradient_edge(z))
        return z

    loss = smooth(called(F.layer_norm(called(x), (3,))))
    kappa = _kappa(layer, calls, loss, edges)

    def written_out(weight: Tensor) -> Tensor:
        return smooth(F.linear(_layer_norm(F.linear(x, weight, layer.bias)), weight, layer.bias))

    expected = oracle.kappa(written_out, layer.weight)
    torch.testing.assert_close(kappa, expected)
    torch.testing.assert_close(
        torch.autograd.grad(kappa, layer.weight), torch.autograd.grad(expected, layer.weight)
    )


def test_convolution_before_batch_norm() -> None:
    layer, x, norm = (
        nn.Conv2d(2, 4, 2, groups=2),
        torch.randn(3, 2, 3, 3, requires_grad=True),
        nn.BatchNorm2d(4),
    )
    z = layer(x)
    z.grad_fn.metadata[(layer, 0)] = None
    edge = get_gradient_edge(z)
    kappa = _kappa(layer, [(x, z)], smooth(norm(z)), [edge])
    assert norm.num_batches_tracked == 1

    def written_out(weight: Tensor) -> Tensor:
        return smooth(_batch_norm(F.conv2d(x, weight, layer.bias, groups=2)))

    expected = oracle.kappa(written_out, layer.weight, groups=2)
    torch.testing.assert_close(kappa, expected)
    torch.testing.assert_close(
        torch.autograd.grad(kappa, [layer.weight, x]), torch.autograd.grad(expected, [layer.weight, x])
    )


def test_corrected_gradients_agree_with_torchs_and_end_with_the_block() -> None:
    problem = Problem(BY_ID["F.layer_norm"])
    loss, _, between = problem.forward()
    plain = torch.autograd.grad(loss, problem.params, retain_graph=True)
    replaced = []

    def formula(saved: Any, grad: Tensor) -> corrections.Gradients:
        replaced.append(grad)
        return corrections.layer_norm(saved, grad)

    correct, _ = verdicts.check("kappa", between)
    (name,) = {n.name() for n in correct}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corrections.REPLACED, name, corrections.CORRECTED[name]._replace(formula=formula))
        with corrections.corrected(correct):
            ours = torch.autograd.grad(loss, problem.params, retain_graph=True)
    assert len(replaced) == 1
    torch.testing.assert_close(ours, plain)
    again = torch.autograd.grad(loss, problem.params)
    assert len(replaced) == 1
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
