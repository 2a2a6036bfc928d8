"""Corrected gradients: right to any order, torch's own to the first, and gone with the block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from verified_cases import CASES, Problem
from verified_cases_base import smooth

from fam_ext.capture import graph_walk
from fam_ext.derivatives import corrections, verdicts
from fam_ext.hessian import exact
from fam_ext.hessian.products import LayerCall, LayerHessian, products
from fam_ext.layers.linear_map import LinearMap

BY_ID = {case.id: case for case in CASES}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


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
