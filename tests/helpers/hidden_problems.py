"""One captured layer and a loss of its output, with kappa and the trace from the full float64 Hessian by the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fam_ext.hessian.products import LayerCall, LayerHessian, products
from fam_ext.layers.linear_map import LinearMap


class HiddenProblem:
    """x -> layer -> loss. `level` is how far the loss couples the rows of the layer's output."""

    def __init__(self, layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], level: str) -> None:
        self.layer, self.x, self.level, self._loss = layer.double(), x.double().requires_grad_(), level, loss
        z = self.layer(self.x)
        self.linear_map = LinearMap("test", self.layer)
        call = LayerCall(GradientEdge(z.grad_fn, 0), self.x, tuple(z.shape), z.dtype)
        self.hessian = LayerHessian(self.linear_map, self.layer.weight, [call])  # type: ignore[arg-type]
        self.loss = loss(z)
        self.parameters = [*self.layer.parameters(), self.x]

    def products(self) -> Any:
        return products(self.loss, [self.hessian], [])

    def expected(self, measure: str = "neuronwise") -> Tensor:
        weight: Any = self.layer.weight
        shape = self.linear_map.canonical(weight).shape

        def loss(rows: Tensor) -> Tensor:
            w = self.linear_map.to_module(rows.reshape(shape), weight.shape)
            return self._loss(torch.func.functional_call(self.layer, {"weight": w}, (self.x,)))

        rows = self.linear_map.canonical(weight).flatten(0, 1)
        return oracle.kappa(loss, rows, measure, groups=self.linear_map.groups)


def mlp() -> HiddenProblem:
    return HiddenProblem(nn.Linear(3, 2), torch.randn(4, 3), lambda z: z.tanh().sum(1).exp().sum(), "rows")


def tokens() -> HiddenProblem:
    x = torch.randn(3, 2, 4)
    return HiddenProblem(nn.Linear(4, 2), x, lambda z: z.tanh().flatten(1).sum(1).exp().sum(), "samples")


def many_tokens() -> HiddenProblem:
    """More positions than the fan-in."""
    x = torch.randn(2, 4, 2)
    return HiddenProblem(nn.Linear(2, 3), x, lambda z: z.tanh().flatten(1).sum(1).exp().sum(), "samples")


def coupled_samples() -> HiddenProblem:
    return HiddenProblem(nn.Linear(3, 2), torch.randn(4, 3), lambda z: z.tanh().sum().exp(), "batch")


def convolution() -> HiddenProblem:
    layer = nn.Conv1d(4, 4, 2, groups=2)
    return HiddenProblem(
        layer, torch.randn(2, 4, 3), lambda z: z.tanh().flatten(1).sum(1).exp().sum(), "samples"
    )


def convolution_rows() -> HiddenProblem:
    layer = nn.Conv1d(4, 4, 2, groups=2, padding=1)
    return HiddenProblem(layer, torch.randn(2, 4, 3), lambda z: z.tanh().sum(1).exp().sum(), "rows")


def transposed() -> HiddenProblem:
    layer = nn.ConvTranspose1d(4, 2, 2, groups=2, stride=2)
    return HiddenProblem(
        layer, torch.randn(2, 4, 2), lambda z: z.tanh().flatten(1).sum(1).exp().sum(), "samples"
    )


def transposed_rows() -> HiddenProblem:
    layer = nn.ConvTranspose1d(4, 4, 2, groups=2, stride=1)
    return HiddenProblem(layer, torch.randn(2, 4, 2), lambda z: z.tanh().sum(1).exp().sum(), "rows")


PROBLEMS = [
    mlp,
    tokens,
    many_tokens,
    coupled_samples,
    convolution,
    convolution_rows,
    transposed,
    transposed_rows,
]
