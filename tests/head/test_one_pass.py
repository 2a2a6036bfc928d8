"""The operation that stands for criterion and term: where it applies, and where an ordinary step leaves it to the long way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import softmax_trace
from torch import Tensor, nn

from fam_ext.capture.calls import CapturedCalls
from fam_ext.head import one_pass
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss_hessians import CrossEntropy, MeanSquaredError
from fam_ext.ops import backends
from fam_ext.options import Options


def test_where_it_applies() -> None:
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    soft, weight = z.softmax(1), torch.ones(3)
    for loss_hessian, outputs, expected in (
        (CrossEntropy(y), z, True),
        (CrossEntropy(y.byte()), z, True),
        (CrossEntropy(soft), z, True),
        (CrossEntropy(soft.double()), z, False),
        (CrossEntropy(soft, ignore_index=0), z, False),
        (CrossEntropy(soft.clone().requires_grad_()), z, False),
        (CrossEntropy(None), z, False),
        (CrossEntropy(y[0]), z[0], False),
        (CrossEntropy(y), "z", False),
        (MeanSquaredError(z), z, False),
        (None, z, False),
        (CrossEntropy(y, weight=weight), z, True),
        (CrossEntropy(y, weight=weight.double()), z, False),
        (CrossEntropy(y, weight=torch.ones(3, requires_grad=True)), z, False),
    ):
        assert one_pass.applies(None, loss_hessian, outputs) is expected, loss_hessian
    criterion = nn.CrossEntropyLoss()
    assert one_pass.applies(criterion, CrossEntropy(y), z)
    criterion.register_forward_hook(lambda *args: None)  # which would not run
    assert not one_pass.applies(criterion, CrossEntropy(y), z)
    with torch.autocast("cpu"):
        assert one_pass.applies(None, CrossEntropy(y, weight=weight), z.bfloat16())


class Step:
    def __init__(self, curvature_grad: bool = True, backend: str = "auto") -> None:
        self.layer = nn.Linear(3, 4).double()
        self.options = Options("test", curvature_grad=curvature_grad, backend=backend)
        self.calls = CapturedCalls("layer", -1, False)
        self.x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        self.z = self.layer(self.x)
        self.calls.record(self.layer, self.x, self.z, False)
        self.y = torch.tensor([0, 3, 1, 2, 2])

    def __call__(self, outputs: Tensor | None = None, factor: float = 1.0) -> Any:
        outputs = self.z if outputs is None else outputs
        return one_pass.ordinary_step(
            self.options,
            LinearMap("test", self.layer),
            self.calls,
            outputs,
            CrossEntropy(self.y),
            0.3,
            factor,
        )

    def kappa(self) -> Tensor:
        """From the definition, in features, weight and logits."""
        return (self.x.square().sum(1) * softmax_trace(self.z, self.layer.weight)).mean()

    def compare(self, result: tuple[Tensor, Tensor], factor: float = 1.0) -> None:
        total = F.cross_entropy(self.z, self.y) + 0.3 * factor * self.kappa()
        torch.testing.assert_close(result[0], total)
        torch.testing.assert_close(result[1], factor * self.kappa().detach())
        tensors = [self.x, *self.layer.parameters()]
        got, want = (torch.autograd.grad(v, tensors, retain_graph=True) for v in (result[0], total))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_an_ordinary_step(factor: float) -> None:
    if not backends.native_loaded():
        pytest.skip("the short way is the compiled library's")
    step = Step()
    result = step(factor=factor)
    assert result is not None and not step.calls.pending
    step.compare(result, factor)


def test_a_step_out_of_the_ordinary_leaves_everything_as_it_was() -> None:
    step = Step()
    assert step(step.z.view(5, 4)) is None
    assert step(step.z.unsqueeze(2)) is None
    with torch.no_grad():
        assert step(step.z.clone()) is None
    assert len(step.calls.pending) == 1 and step.calls.pending[0]().waits()
    other = Step()
    other.y = other.y.double()  # no class indices
    assert other() is None and other.calls.pending[0]().waits()


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_from_logits(backend: str, factor: float) -> None:
    step = Step(backend=backend)
    loss_hessian = CrossEntropy(step.y)
    result = one_pass.from_logits(
        step.options, step.z, step.x, step.layer.weight, None, loss_hessian, 0.3, factor
    )
    step.compare(result, factor)
    rows = torch.tensor([4, 0])
    some = one_pass.from_logits(
        step.options, step.z[rows], step.x, step.layer.weight, rows, CrossEntropy(step.y[rows]), 0.3, 1.0
    )
    kappa = (step.x[rows].square().sum(1) * softmax_trace(step.z[rows], step.layer.weight)).mean()
    torch.testing.assert_close(some[1], kappa.detach())
    torch.testing.assert_close(some[0], F.cross_entropy(step.z[rows], step.y[rows]) + 0.3 * kappa)
