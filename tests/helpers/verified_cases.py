"""The table of verified operations, and how a row of it is verified.

A row puts an operation between a linear layer's output and a loss, forms kappa the way the package does, and compares

- kappa with second differences of the loss along weight directions, and
- its gradient, by the layer's weight and the operation's parameters, with differences of kappa.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import verified_cases_activations
import verified_cases_functions
import verified_cases_losses
import verified_cases_models
import verified_cases_norms
import verified_cases_refused
import verified_cases_spatial
import verified_cases_tensors
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from verified_cases_base import Case, Refused, smooth

from fam_ext.capture import graph_walk
from fam_ext.derivatives import verdicts
from fam_ext.derivatives.nodes import bare
from fam_ext.errors import UnsupportedError
from fam_ext.hessian import exact
from fam_ext.hessian.products import LayerCall, LayerHessian, products
from fam_ext.layers.linear_map import LinearMap

ALL: list[Case] = [
    *verified_cases_norms.CASES,
    *verified_cases_activations.CASES,
    *verified_cases_spatial.CASES,
    *verified_cases_functions.CASES,
    *verified_cases_tensors.CASES,
    *verified_cases_models.CASES,
    *verified_cases_losses.CASES,
]
CASES = [case for case in ALL if not case.missing]
REFUSED: list[Refused] = verified_cases_refused.CASES

# Differences of fourth order: truncation is of order step^4 in units of the distance to the next singularity, rounding eps / step
# and eps / step^2 of the numbers that are subtracted. With numbers of order one that is 1e-11 at most for first differences and
# 1e-9 for second ones; intermediate results are up to two or three orders larger than their differences.
STEP_FIRST, STEP_SECOND = 1e-4, 1e-3
TOLERANCE = 1e-6
# Where kappa or its slope is 0, differences leave the rounding of a loss of order ten: 1e-9 and less.
FLOOR = 1e-2
# float32 against float64: eps 1e-7, a hundred operations and their cancellations.
TOLERANCE_FLOAT32 = 1e-4


class Problem:
    """A case with its numbers: layer, input, operation."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow: it formats the stack
        self.case = case
        self.layer = nn.Linear(3, case.shape[-1])
        self.x = torch.randn(*case.shape[:-1], 3)
        with torch.no_grad():
            self.layer.weight.normal_()
        self.tail: Any = case.build()
        inside = self.tail.parameters() if isinstance(self.tail, nn.Module) else []
        self.params = [self.layer.weight, *(p for p in inside if p.requires_grad)]
        self.buffers = list(self.tail.buffers()) if isinstance(self.tail, nn.Module) else []

    def to_float32(self) -> None:
        """The same numbers, rounded; constants of the operation must be parameters or integers."""
        self.layer.float()
        self.x = self.x.float()
        if isinstance(self.tail, nn.Module):
            self.tail.float()

    def loss(self, z: Tensor) -> Tensor:
        """With the same random numbers in every evaluation, and leaving the operation as it was."""
        torch.default_generator.manual_seed(1)
        saved = [b.clone() for b in self.buffers]
        out = self.tail(z)
        for buffer, before in zip(self.buffers, saved, strict=True):
            buffer.data.copy_(before)  # without a new version number: the graph may hold the buffer
        loss: Tensor = out if self.case.is_loss else smooth(out)
        assert loss.dim() == 0
        return loss

    def forward(self) -> tuple[Tensor, LayerCall, list[Any]]:
        """The loss, the layer's call, and the nodes between them."""
        z = self.layer(self.x)
        key = object()
        z.grad_fn.metadata[(key, 0)] = None
        call = LayerCall(get_gradient_edge(z), self.x, tuple(z.shape), z.dtype)
        loss = self.loss(z)
        ((calls, between, *_),) = graph_walk.find(loss, [key])
        assert len(calls) == 1
        return loss, call, between

    def kappa(self, chunk: int = 64) -> Tensor:
        """kappa as the package forms it, `chunk` products at once."""
        loss, call, between = self.forward()
        correct, _ = verdicts.check("kappa", between)
        layer = LinearMap("kappa", self.layer)
        curvature = LayerHessian(layer, self.layer.weight, [call])
        with products(loss, [curvature], correct):
            parts = exact.exact(curvature, "batch", weighted=True, chunk=chunk, backend="auto")
            return torch.stack([part.sum() for part in parts]).sum()

    def kappa_by_differences(self, step: float) -> tuple[float, float]:
        """kappa from the loss alone, and the size of the terms it is a sum of.

        G = W W^T makes kappa the sum over columns w of W and features t of the second derivative along w e_t^T.
        """
        weight, bias = self.layer.weight.detach(), self.layer.bias
        total, size = 0.0, 0.0
        with torch.no_grad():
            center = float(self.loss(F.linear(self.x, weight, bias)))
            for column in weight.unbind(1):
                for t in range(weight.shape[1]):
                    direction = torch.zeros_like(weight)
                    direction[:, t] = step * column
                    at = [
                        float(self.loss(F.linear(self.x, weight + k * direction, bias)))
                        for k in (-2, -1, 1, 2)
                    ]
                    second = (-at[0] + 16 * at[1] - 30 * center + 16 * at[2] - at[3]) / (12 * step**2)
                    total, size = total + second, size + abs(second)
        return total, size

    def gradient(self, kappa: Tensor) -> list[Tensor]:
        if not kappa.requires_grad:
            return [torch.zeros_like(p) for p in self.params]
        return list(torch.autograd.grad(kappa, self.params, allow_unused=True, materialize_grads=True))

    def slope_by_differences(self, directions: list[Tensor], step: float, chunk: int) -> float:
        """The derivative of kappa when all parameters move along `directions`."""
        at, start = [], [p.detach().clone() for p in self.params]
        for k in (-2, -1, 1, 2, 0):
            with torch.no_grad():
                for p, p0, d in zip(self.params, start, directions, strict=True):
                    p.copy_(p0 + k * step * d)
            at.append(float(self.kappa(chunk)) if k else 0.0)
        return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)


@dataclass(frozen=True)
class Errors:
    """Relative errors of kappa, of kappa from products taken one by one, of its slope, and of its gradient in float32."""

    value: float
    one_by_one: float
    slope: float
    float32: float

    @property
    def right(self) -> bool:
        # written so that NaN is wrong
        close = all(e <= TOLERANCE for e in (self.value, self.one_by_one, self.slope))
        return close and self.float32 <= TOLERANCE_FLOAT32


def verify(case: Case) -> Errors:
    """Raises what torch or the package raises where products are taken one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(5):
            errors, smooth_here = _verify(case, seed)
            if errors.right or smooth_here:
                break
    return errors


def _verify(case: Case, seed: int) -> tuple[Errors, bool]:
    """The errors for numbers drawn with this seed, and whether they can be believed.

    At a kink, or close to a singularity, differences say nothing: those with half the step are others, whatever the derivatives
    are. Looked at only where something seems wrong.
    """
    problem = Problem(case, seed)
    chunk = 64
    try:
        kappa = problem.kappa(chunk)
    except UnsupportedError:
        raise
    except RuntimeError:  # products cannot be taken together: a batching rule of torch is missing
        chunk = 1
        kappa = problem.kappa(chunk)
    gradient = problem.gradient(kappa)
    value, alone = kappa.item(), problem.kappa(1).item()
    directions = [torch.randn_like(p) for p in problem.params]
    terms = torch.cat([(g * d).flatten() for g, d in zip(gradient, directions, strict=True)])

    second, size = problem.kappa_by_differences(STEP_SECOND)
    first = problem.slope_by_differences(directions, STEP_FIRST, chunk)
    value_scale, slope_scale = max(size, FLOOR), max(terms.abs().sum().item(), FLOOR)
    errors = Errors(
        abs(value - second) / value_scale,
        abs(value - alone) / value_scale,
        abs(terms.sum().item() - first) / slope_scale,
        _float32_error(case, seed, gradient) if case.float32 else 0.0,
    )
    if errors.right:
        return errors, True
    second_again, _ = problem.kappa_by_differences(STEP_SECOND / 2)
    first_again = problem.slope_by_differences(directions, STEP_FIRST / 2, chunk)
    agree = abs(second - second_again) <= TOLERANCE * value_scale
    return errors, agree and abs(first - first_again) <= TOLERANCE * max(abs(first), FLOOR)


def _float32_error(case: Case, seed: int, exact: list[Tensor]) -> float:
    problem = Problem(case, seed)
    problem.to_float32()
    ours = problem.gradient(problem.kappa())
    error, size = (
        torch.cat([t.flatten() for t in tensors])
        for tensors in ([a - b for a, b in zip(ours, exact, strict=True)], exact)
    )
    return float(error.norm() / size.norm())


def nodes(case: Case) -> tuple[set[str], set[str]]:
    """Names of the autograd nodes between layer and loss: those that torch differentiates, and those that are corrected."""
    torchs: set[str] = set()
    corrected: set[str] = set()
    for float32 in (False, True) if case.float32 else (False,):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = Problem(case)
            if float32:
                problem.to_float32()
            between = problem.forward()[2]
            correct, _ = verdicts.check("nodes", between)
        for node in between:
            (corrected if any(node is c for c in correct) else torchs).add(bare(node.name()))
    return torchs, corrected
