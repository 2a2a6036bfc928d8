"""Random directions: their second moment exactly, over every sign, and the estimates they give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense_factors import compare
from hidden_problems import PROBLEMS, coupled_samples, mlp, transposed_rows
from torch import Tensor, nn

from fam_ext.hessian import hutchinson
from fam_ext.hessian.hutchinson import gram_root, probe_root, rademacher

pytestmark = pytest.mark.on_devices


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 1000])
def test_roots(columns: int) -> None:
    """R R^T = W W^T, W itself for few columns, Cholesky's factor for many; the trace takes the identity."""
    weight = double(2, 3, 50)
    root = gram_root(weight, columns)
    torch.testing.assert_close(root @ root.transpose(1, 2), weight @ weight.transpose(1, 2))
    assert (root is weight) == (columns == 1)
    assert root.shape[2] == (50 if columns == 1 else 3)
    trace = probe_root(weight, columns, False)
    assert torch.equal(trace @ trace.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_a_weight_without_full_row_rank_is_its_own_root() -> None:
    weight = double(2, 3, 50)
    weight[1, 2] = weight[1, 0]  # one group of the two is enough
    assert gram_root(weight, 1000) is weight
    for apart, root_is_weight in ((1e-12, True), (1e-6, True), (1e-2, False)):
        nearly = double(1, 3, 50)
        nearly[0, 2] = nearly[0, 0] + apart * double(50)
        assert (gram_root(nearly, 1000) is nearly) == root_is_weight
    assert gram_root(torch.full((1, 2, 9), torch.nan), 1000).isnan().all()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("make", PROBLEMS)
def test_the_mean_over_every_sign(make: Any, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate is e^T Q e in the signs e, and its mean Tr Q: the sum of u^T Q u over the unit vectors u."""
    case = make()
    generator = torch.Generator(case.x.device)
    with case.products():
        drawn: list[tuple[int, ...]] = []

        def of_shape(shape: Any, like: Tensor, generator: Any) -> Tensor:
            drawn.append(tuple(shape))
            return torch.zeros(tuple(shape), dtype=like.dtype)

        monkeypatch.setattr(hutchinson, "rademacher", of_shape)
        hutchinson.draw(case.hessian, case.level, weighted, 1, generator, "auto")
        (shape,) = drawn
        size = math.prod(shape)

        def units(shape: Any, like: Tensor, generator: Any) -> Tensor:
            return torch.eye(size, dtype=like.dtype).reshape(size, *shape[1:])

        monkeypatch.setattr(hutchinson, "rademacher", units)
        probe = hutchinson.draw(case.hessian, case.level, weighted, 1, generator, "auto")
        assert len(probe.directions) == size
        (summands,) = hutchinson.hutchinson([probe])
        total = summands.sum()
    compare(total, case.expected("neuronwise" if weighted else "trace"), case.parameters)


@pytest.mark.parametrize("level", ["rows", "samples", "batch"])
def test_probes_are_independent_and_follow_the_generator(level: str) -> None:
    case = transposed_rows()

    def values(seed: int) -> Tensor:
        generator = torch.Generator(case.x.device).manual_seed(seed)
        with case.products():
            probe = hutchinson.draw(case.hessian, level, True, 6, generator, "auto")
            (summands,) = hutchinson.hutchinson([probe])
        return summands.flatten(1).sum(1).detach()

    state = torch.get_rng_state()
    assert torch.equal(values(0), values(0)) and not torch.equal(values(0), values(1))
    assert len(values(0).unique()) == 6
    assert torch.equal(torch.get_rng_state(), state)


def test_directions_differ_between_samples_but_where_samples_are_coupled() -> None:
    layer = nn.Linear(3, 2).double()
    x = double(1, 3).expand(4, 3)
    case: Any = type(mlp())(layer, x.detach().clone(), lambda z: z.exp().sum(), "rows")
    for level, distinct in (("rows", True), ("samples", True), ("batch", False)):
        generator = torch.Generator(case.x.device).manual_seed(1)
        probe = hutchinson.draw(case.hessian, level, True, 8, generator, "auto")
        first, second = probe.directions[:, 0], probe.directions[:, 1]
        assert torch.equal(first, second) != distinct


@pytest.mark.parametrize("make", [mlp, coupled_samples])
def test_with_the_hessian_held(make: Any) -> None:
    """The value stays, and its gradient is that of <Delta, H Delta> with H constant: twice that of the first factor."""
    case = make()
    case.hessian.detached = True
    weight = case.layer.weight
    with case.products():
        generator = torch.Generator(case.x.device).manual_seed(0)
        probe = hutchinson.draw(case.hessian, case.level, True, 1, generator, "auto")
        (held,) = hutchinson.hutchinson([probe])
        products = case.hessian.matvec(probe.directions.detach())
    factor = 1.0 if probe.scale is None else probe.scale
    constant = (factor * probe.directions * products.detach()).sum()
    torch.testing.assert_close(held.sum().detach(), constant.detach())
    got, want = (torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (held.sum(), constant))
    torch.testing.assert_close(got, 2 * want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs(dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)

    def draw(seed: int) -> Tensor:
        return rademacher((50, 40), like, torch.Generator(like.device).manual_seed(seed))

    signs = draw(0)
    assert signs.dtype == dtype and signs.shape == (50, 40) and (signs.abs() == 1).all()
    assert abs(float(signs.float().mean())) < 4 / 2000**0.5
    assert torch.equal(draw(0), signs) and not torch.equal(draw(1), signs)
