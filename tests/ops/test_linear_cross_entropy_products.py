"""Rows of a chunk, and products of bfloat16 factors: what stays float32, and how far kappa's gradient is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import needs_native
from torch import Tensor

import fam_ext
from fam_ext.functional import linear_cross_entropy
from fam_ext.ops import _linear_cross_entropy_chunks as chunks
from fam_ext.ops import _linear_cross_entropy_products as module
from fam_ext.ops._linear_cross_entropy_targets import SUM

EPS = 2.0**-8  # of bfloat16
OPTIONS: dict[str, Any] = {
    "ignore_index": -100, "label_smoothing": 0.1, "reduction": SUM, "curvature_grad": True, "max_bytes": 2**15,
    "accumulate_in_weight_dtype": False, "triton": False, "parts": 2, "grad_input": True, "grad_weight": True, "grad_bias": True,
}  # fmt: skip


def test_rows_of_a_chunk() -> None:
    """No more than the bound, whole tiles of a product where there are so many, and no chunk more than the bound needs."""
    for count in (0, 1, 40, 255, 256, 1000, 8192, 8193, 100_000):
        for most in (0, 1, 17, 255, 256, 456, 1908, 10_000_000):
            rows = module.rows_per_chunk(count, most)
            bound = max(16, min(most, 8192) // (256 if most >= 256 else 16) * (256 if most >= 256 else 16))
            assert 1 <= rows <= bound
            assert rows == max(count, 1) or rows % (256 if most >= 256 else 16) == 0
            assert -(-count // rows) <= -(-count // bound)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that multiplies bfloat16 numbers."""
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: device.type == "cpu")


def problem(spread: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of one confident and one doubtful half, some of them ignored."""
    x, w, bias = torch.randn(60, 24), torch.randn(130, 24), torch.randn(130)
    x[::2] *= spread
    y = torch.randint(0, 130, (60,))
    y[::7] = -100
    return x.to(dtype), w.to(dtype), bias.to(dtype), y


def gradients(tensors: tuple[Tensor, ...], strength: float, **options: Any) -> list[Tensor]:
    """[kappa, loss, the three gradients] in float64."""
    x, w, bias, y = tensors
    given = OPTIONS | {"strength": strength} | options
    loss, kappa, *made = chunks.forward(x, w, bias, y, None, None, chunks.Options(**given))
    return [t.double() for t in (kappa, loss, *made)]


@needs_native
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    "options", [{}, {"curvature_grad": False}, {"ignore_index": 3, "label_smoothing": 0.0}], ids=str
)
def test_one_part_rounds_the_gradient_of_kappa_alone(spread: float, options: dict[str, Any]) -> None:
    tensors = problem(spread)
    if "ignore_index" in options:
        tensors[3][tensors[3] == -100] = 3
    wide = tuple(t.double() for t in tensors[:3])
    exact = gradients((*wide, tensors[3]), 1.0, **options)
    without = gradients((*wide, tensors[3]), 0.0, **options)
    got = gradients(tensors, 1.0, parts=1, **options)
    torch.testing.assert_close(got[:2], exact[:2], rtol=1e-5, atol=0)  # kappa and loss
    torch.testing.assert_close(gradients(tensors, 0.0, parts=1, **options), without, rtol=1e-4, atol=1e-4)
    for one, other, plain in zip(got[2:], exact[2:], without[2:], strict=True):
        assert (one - other).norm() < EPS * (other - plain).norm() + 1e-6 * other.norm()
    off = [(one - other).norm() / other.norm() for one, other in zip(got[2:4], exact[2:4], strict=True)]
    assert max(off) > 1e-5  # the products are narrow


@needs_native
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_narrow_products_of_a_narrow_weight(dtype: torch.dtype, accumulate: bool) -> None:
    tensors = problem(1.0, dtype)
    exact = gradients((*(t.double() for t in tensors[:3]), tensors[3]), 1.0)
    got = gradients(tensors, 1.0, parts=1, accumulate_in_weight_dtype=accumulate)
    for one, other in zip(got, exact, strict=True):
        assert (one - other).norm() / other.norm() < 2 * EPS


@needs_native
@pytest.mark.usefixtures("narrow")
def test_float64_keeps_its_digits() -> None:
    tensors = problem(1.0, torch.float64)
    for one, other in zip(gradients(tensors, 1.0, parts=1), gradients(tensors, 1.0), strict=True):
        assert torch.equal(one, other)
    assert module.narrow_weight(tensors[1].float(), torch.float32) is not None
    assert module.narrow_weight(tensors[1].float(), torch.float64) is None


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_where_bfloat16_is_multiplied(flags: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: flags[0])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: flags[1])
    assert module.multiplies_bfloat16(torch.device("cpu")) == (torch._C._has_mkldnn and any(flags))
    assert not module.multiplies_bfloat16(torch.device("cuda"))


@needs_native
@pytest.mark.usefixtures("narrow")
def test_the_loss_hands_it_on() -> None:
    """FAMLoss.linear_cross_entropy(parts=1) is the operation's."""
    x, w, _, y = problem(1.0)
    head = torch.nn.Linear(24, 130, bias=False)
    head.weight.data.copy_(w)
    criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), head, strength=0.5)
    results = {}
    for parts in (1, 2):
        head.weight.grad = None
        criterion.linear_cross_entropy(x, head.weight, y, parts=parts).backward()
        weight = w.clone().requires_grad_()
        linear_cross_entropy(x, weight, y, strength=0.5, parts=parts)[0].backward()
        assert head.weight.grad is not None and weight.grad is not None
        torch.testing.assert_close(head.weight.grad, weight.grad, rtol=0, atol=0)
        results[parts] = weight.grad
    assert not torch.equal(results[1], results[2])
    with pytest.raises(ValueError, match="parts"):
        criterion.linear_cross_entropy(x, head.weight, y, parts=3)
