"""Tr(H) of a head's weight, the number alone: ours beside the tools that estimate traces.

Forward pass included, no gradient of the number (the tools give none). Estimates are taken to a relative standard error of about
1 %: PyHessian's procedure is timed with a few probes and multiplied to their number; curvlinops' Hutch++ with as many products
as that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from baselines import curvlinops, curvlinops_trace, probes_for, pyhessian_trace
from case import Build, Case, Variant
from torch import Tensor, nn

import fam_ext

OP = "hessian_trace"
SHAPES = ((64, 64, 10), (128, 512, 10))
PROBES = 4
OURS = "RelativeFlatness, measure='trace'"
Shape = tuple[int, int, int]


def by_hessian(layer: nn.Linear, x: Tensor, t: Tensor) -> Tensor:
    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, layer.bias), t)

    return torch.einsum("aiai->", torch.func.hessian(loss)(layer.weight.detach()))


def case(shape: Shape, compiled: bool) -> Case:
    rows, fan_in, classes = shape
    torch.manual_seed(0)
    layer = nn.Linear(fan_in, classes)
    x, t = torch.randn(rows, fan_in), torch.randint(classes, (rows,))
    ours = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), layer, measure="trace")
    with torch.no_grad():
        p = F.linear(x.double(), layer.weight.double(), layer.bias.double()).softmax(1)
        exact = ((1 - p.square().sum(1)) * x.double().square().sum(1)).mean()

    def variant(name: str, trace: Callable[[], Tensor], tolerance: float, **options: float | bool) -> Variant:
        return Variant(name, lambda: (trace().detach(),), OURS, tolerance, (exact,), **options)

    draws = pyhessian_trace(layer, x, t, 64, [layer.weight])
    probes, deviation = probes_for(draws, float(exact))
    few = partial(pyhessian_trace, layer, x, t, PROBES, [layer.weight])
    variants = [
        variant(OURS, lambda: ours(layer(x), t), 2e-6),
        variant("full Hessian (torch.func)", partial(by_hessian, layer, x, t), 1e-5, thin=True),
        variant(
            f"PyHessian's procedure to 1 % ({probes} probes)", lambda: few().mean(), 5 * deviation / PROBES**0.5,
            scale=probes / PROBES, thin=True,
        ),
    ]  # fmt: skip
    if curvlinops() is not None:
        products = _products(layer, x, t, float(exact))
        hutchpp = partial(curvlinops_trace, layer, x, t, products)
        variants.append(variant(f"curvlinops, Hutch++ ({products} products)", hutchpp, 0.06, thin=True))
    return Case(f"N={rows} I={fan_in} O={classes}, value only", variants)


def _products(layer: nn.Linear, x: Tensor, t: Tensor, exact: float) -> int:
    """The least of few numbers of products that brings the root mean square error of three draws to 1 %; at most 192."""
    for products in (12, 24, 48, 96, 192):
        values = torch.stack([curvlinops_trace(layer, x, t, products) for _ in range(3)]).detach()
        if float((values / exact - 1).square().mean().sqrt()) <= 0.01:
            break
    return products


def cases(quick: bool = False) -> list[Build]:
    return [partial(case, shape) for shape in (SHAPES[:1] if quick else SHAPES)]
