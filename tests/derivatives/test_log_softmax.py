"""log_softmax over a vocabulary: its own derivatives are torch's, to every order, whatever the blocks of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verified_cases import CASES, nodes, verify

from fam_ext import FAMLoss, UnsupportedError
from fam_ext.derivatives import log_softmax


def uses_log_softmax(case: Any) -> bool:
    try:
        return "LogSoftmaxBackward" in nodes(case)[0]
    except UnsupportedError:  # this torch is too old for it
        return False


USING = [case for case in CASES if uses_log_softmax(case)]


@pytest.fixture(autouse=True)
def every_size_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_softmax, "LEAST", 0)
    monkeypatch.setattr(log_softmax, "_BLOCK", 20)  # two to four rows


def gradient(logs: Tensor, grad: Tensor) -> Tensor:
    return log_softmax._Gradient.apply(logs, grad)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 5), (1, 9), (3, 1)])
def test_derivatives(shape: tuple[int, ...]) -> None:
    """Towards both arguments and each alone, twice and a third time."""
    logs = torch.randn(shape, dtype=torch.float64).log_softmax(-1).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient, (logs, grad))
    assert torch.autograd.gradgradcheck(gradient, (logs, grad))
    assert torch.autograd.gradgradcheck(gradient, (logs, grad.detach()))
    assert torch.autograd.gradgradcheck(gradient, (logs.detach(), grad))
    u = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    total = grad.detach().sum(-1, keepdim=True).requires_grad_()

    def weighted(logs: Tensor, total: Tensor, u: Tensor) -> Tensor:
        return log_softmax._Weighted.apply(logs, total, u)  # type: ignore[no-any-return,no-untyped-call]

    assert torch.autograd.gradcheck(weighted, (logs, total, u))
    assert torch.autograd.gradgradcheck(weighted, (logs, total, u))
    once, more = (
        torch.autograd.grad(weighted(logs, total, u), (logs, total, u), grad, create_graph=c)
        for c in (False, True)
    )
    torch.testing.assert_close(once, more)


def test_strides_and_masked_classes() -> None:
    logs = torch.randn(6, 5, dtype=torch.float64).T
    logs = logs.masked_fill(torch.eye(5, 6, dtype=torch.bool), -torch.inf).log_softmax(-1)
    grad = torch.randn(1, 6, dtype=torch.float64).expand(5, 6)
    torch.testing.assert_close(gradient(logs, grad), grad - logs.exp() * grad.sum(-1, keepdim=True))


@pytest.mark.parametrize("case", USING, ids=lambda c: c.id)
def test_operations_and_losses(case: Any) -> None:
    """Against differences of the loss, one product and several at a time."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert verify(case).right
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "exact"},
        {"method": "hutchinson", "probes": 2},
        {"curvature": "ggn"},
        {"curvature": "fisher"},
    ],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_same_step_as_with_torchs(
    smoothing: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if smoothing and options.get("curvature") == "fisher":
        pytest.skip("not defined there")

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7)).double()
        criterion = FAMLoss(nn.CrossEntropyLoss(label_smoothing=smoothing), net[0], 0.5, **options)
        x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 7
        total = criterion(net(x), y)
        return [total, *torch.autograd.grad(total, list(net.parameters()))]

    ours = step()
    called: list[Any] = []
    monkeypatch.setattr(log_softmax, "pays", lambda node: called.append(node))
    theirs = step()
    assert called
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_only_a_large_matrix_with_the_classes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_softmax, "LEAST", 60)
    z = torch.randn(10, 6, requires_grad=True)
    for logs, expected in (
        (F.log_softmax(z, 1), True),
        (F.log_softmax(z, -1), True),
        (F.log_softmax(z, 0), False),
        (F.log_softmax(z.bfloat16(), 1), False),
        (F.log_softmax(z[1:], 1), False),
        (F.log_softmax(z.reshape(2, 5, 6), -1), True),
        (F.log_softmax(z.reshape(2, 6, 5), 1), False),
    ):
        assert log_softmax.pays(logs.grad_fn) == expected
