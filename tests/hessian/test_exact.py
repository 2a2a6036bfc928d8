"""The exact value from products with a basis, against the full Hessian; how many products that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_factors import compare
from hidden_problems import PROBLEMS, convolution, coupled_samples, many_tokens, mlp, tokens
from torch import Tensor

from fam_ext.hessian.coupling import LEVELS
from fam_ext.hessian.exact import exact, exact_products

pytestmark = pytest.mark.on_devices


def summed(case: Any, level: str, weighted: bool = True, chunk: int = 16) -> Tensor:
    with case.products():
        return torch.stack([s.sum() for s in exact(case.hessian, level, weighted, chunk, "auto")]).sum()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("make", PROBLEMS)
def test_every_level_that_holds(make: Any, weighted: bool) -> None:
    """The level of the coupling and any wider one: values and gradients of the full Hessian's."""
    case = make()
    expected = case.expected("neuronwise" if weighted else "trace")
    for level in LEVELS[LEVELS.index(case.level) :]:
        compare(summed(case, level, weighted), expected, case.parameters)


@pytest.mark.parametrize("make", [mlp, tokens, convolution])
def test_chunks_of_products(make: Any) -> None:
    """The number taken together changes nothing, and no chunk is larger."""
    case = make()
    products = exact_products(case.hessian, case.level)
    whole = summed(case, case.level, chunk=products)
    for chunk in (1, 3, products + 5):
        torch.testing.assert_close(summed(case, case.level, chunk=chunk), whole)
        with case.products():
            taken = []
            inner = case.hessian.matvec
            case.hessian.matvec = lambda d, inner=inner, taken=taken: taken.append(len(d)) or inner(d)
            list(exact(case.hessian, case.level, True, chunk, "auto"))
            del case.hessian.matvec
        assert sum(taken) == products and max(taken) == min(chunk, products)


def test_a_level_that_is_too_narrow_leaves_terms_out() -> None:
    """So the level matters: with samples that are coupled, "rows" is another number."""
    case = coupled_samples()
    assert not torch.isclose(summed(case, "rows"), summed(case, "batch"), rtol=0.05)


def test_number_of_products() -> None:
    case = mlp()
    assert [exact_products(case.hessian, level) for level in LEVELS] == [2, 2, 6]  # O; O by position; O I
    assert exact_products(tokens().hessian, "samples") == 2 * 2  # positions are fewer than the fan-in of 4
    assert exact_products(many_tokens().hessian, "samples") == 3 * 2
    assert [exact_products(convolution().hessian, level) for level in LEVELS] == [4, 16, 16]
