"""gram_trace's products: float32's digits from bfloat16 parts, as a GPU's matrix units multiply them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gram_problems import check, tensors
from inputs import needs_native
from tolerance import relative_error
from torch import Tensor

from fam_ext.ops import _gram_problem, _gram_products
from fam_ext.ops._gram_products import product


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2],
    ids=str,
)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_a_bfloat16_factor_costs_no_digit(dtypes: Any, batch: tuple[int, ...]) -> None:
    """The float32 factor has numbers of many sizes and both signs."""
    sizes = ((*batch, 9, 40), (*batch, 40, 7))
    a, b = (
        (torch.randn(s) * torch.exp(4 * torch.randn(s))).to(d) for s, d in zip(sizes, dtypes, strict=True)
    )
    exact = a.double() @ b.double()
    got = product(a, b)
    assert got.dtype == torch.float32
    assert relative_error(got, exact) <= relative_error(a.float() @ b.float(), exact) + 1e-7


def test_other_factors_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gram_products, "_exact", None)
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
        assert torch.equal(product(a, b), a.bmm(b))
        assert torch.equal(product(a[0], b[0]), a[0].mm(b[0]))


def test_parts_are_the_number() -> None:
    x = torch.tensor([1 / 3, -(2.0**100) / 7, 1 + 2.0**-23, 0.0])
    parts = _gram_products._split(x)
    assert torch.equal(sum(p.double() for p in parts), x.double())
    assert all(p.dtype == torch.bfloat16 for p in parts)


@needs_native
@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("name", ["tokens", "tokens-narrow", "2d-all", "2d-pointwise", "1d-skips-inputs"])
def test_gram_trace_on_matrix_units(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: bfloat16 tensors reach the products as they are, and values and gradients keep float32's accuracy."""
    calls = 0

    def exact(a: Tensor, b: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert a.dtype == b.dtype == torch.bfloat16
        return a.float() @ b.float()

    monkeypatch.setattr(_gram_problem, "on_matrix_units", lambda tensor: True)
    monkeypatch.setattr(_gram_products, "_exact", exact)
    for stacked, layout in ((2, "contiguous"), (None, "transposed")):
        x, factors, weight, options = tensors(name, stacked, torch.bfloat16, layout)
        check(x, factors, weight, options, "native", form)
        check(x.float(), factors, weight, options, "native", form)
    assert calls > 0
