"""One call of gram_trace's operations: what is refused, chunks within a memory bound, and products that keep layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fam_ext.ops import _gram_problem as module
from fam_ext.ops._gram_problem import Problem

WINDOW = ((2,), (1,), (0,), (1,))
POINT = ((1,), (1,), (0,), (1,))


def problem(
    form: str = "direct",
    window: Any = WINDOW,
    max_bytes: int = 2**27,
    gram: Tensor | None = None,
    **shapes: Any,
) -> Problem:
    x = shapes.get("x", torch.randn(4, 2, 3, 6))
    s = shapes.get("s", torch.randn(5, 4, 2, 2, 5 if window == WINDOW else 6))
    return Problem("op", x, s, gram, window, form, max_bytes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.randn(4, 2, 3)}, ValueError, "op: input .B, g, C, .in. and factors"),
        ({"s": torch.randn(5, 3, 2, 2, 5)}, ValueError, "the same B and g"),
        ({"window": ((2,), (0,), (0,), (1,))}, ValueError, "op: stride must be 1 integers from 1 to"),
        ({"window": ((2,), (1,), (0,), (1, 1))}, ValueError, "op: dilation"),
        ({"form": "other"}, ValueError, "op: form"),
        ({"x": torch.ones(4, 2, 3, 6, dtype=torch.int64)}, TypeError, "op: input"),
        (
            {"gram": torch.randn(2, 3, 3)},
            ValueError,
            r"op: gram must have shape \(2, 2, 2\), got \(2, 3, 3\)",
        ),
        (
            {"gram": torch.empty(2, 2, 2, device="meta")},
            ValueError,
            "op: gram must have device cpu, got meta",
        ),
        (
            {"form": "gram_tiles", "x": torch.randn(4, 2, 3, 6).double()},
            ValueError,
            "another one for float64",
        ),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        problem(**options)


@pytest.mark.parametrize("form", ["direct", "gram_shifts", "gram_patches", "gram_tiles"])
def test_chunks_of_samples(form: str) -> None:
    """All samples once, in order, in the accumulation dtype; fewer at a time under a smaller bound, at least one."""
    x, s = torch.randn(4, 2, 3, 6).bfloat16(), torch.randn(5, 4, 2, 2, 5).bfloat16()
    sizes = []
    for max_bytes in (2**27, 2**12, 1):
        p = problem(form, max_bytes=max_bytes, x=x, s=s)
        parts = list(p.chunks())
        kept = torch.bfloat16 if form == "gram_tiles" else torch.float32
        assert (
            torch.equal(torch.cat([c for _, c, _ in parts]).float(), x.float()) and parts[0][1].dtype == kept
        )
        factors = torch.cat([f for _, _, f in parts])  # (b, g, K, O, Q)
        assert torch.equal(factors.float(), s.permute(1, 2, 0, 3, 4).float())
        starts = [0 if part is None else part.start for part, _, _ in parts]  # None: all samples
        assert starts == list(range(0, 4, len(parts[0][1])))
        sizes.append(len(parts[0][1]))
    assert sizes[0] == 4 >= sizes[1] >= sizes[2] == 1


def test_what_is_kept_for_the_backward_pass() -> None:
    assert problem("direct").kept_shape == (4, 2, 5, 2, 6)  # Gamma (B, g, K, O, I)
    assert problem("gram_shifts").kept_shape == (4, 2, 5, 2, 5)  # E (B, g, K, O, Q)
    assert problem("gram_patches", POINT).kept_shape == (4, 2, 6, 5, 2)  # E in rows, (B, g, Q, K, O)
    assert problem("gram_tiles").kept_shape == (0,)
    for p in (problem("direct"), problem("gram_patches", POINT)):
        product = torch.randn(4, 2, 5, 2, 6)
        stored = p.store(product)
        assert stored.shape == p.kept_shape and torch.equal(p.load(stored), product)


def test_products_with_the_gram_matrix() -> None:
    """For every layout of rows, one group and several."""
    for groups in (1, 2):
        rows = torch.randn(groups, 2, 3)
        gram = rows @ rows.transpose(1, 2)
        p = problem(gram=gram, x=torch.randn(4, groups, 3, 6), s=torch.randn(5, 4, groups, 2, 5))
        t = torch.randn(4, groups, 5, 2, 7)
        expected = torch.einsum("gst,bgktm->bgksm", gram, t)
        for order in ((0, 1, 2, 3, 4), (0, 1, 4, 2, 3), (2, 0, 1, 4, 3)):
            back = sorted(range(5), key=order.__getitem__)
            laid_out = t.permute(order).contiguous().permute(back)
            torch.testing.assert_close(p.times_gram(laid_out), expected)
    assert problem().times_gram(t) is t


def test_axes() -> None:
    p, t = problem(), torch.randn(4, 2, 5, 2, 7)
    joined = module.together(t)
    assert torch.equal(joined, t.reshape(8, 10, 7)) and torch.equal(p.apart(joined), t)
    assert torch.equal(module.positions_first(t), t.permute(0, 1, 4, 2, 3).reshape(8, 7, 5, 2))


def test_put() -> None:
    whole = torch.zeros(4, 3)
    assert module.put(whole, 0, slice(1, 3), torch.ones(2, 3)) is whole and whole.sum() == 6
    assert module.put(whole, 1, slice(0, 1), torch.full((4,), 2.0)) is whole and (whole[:, 0] == 2).all()
    everything = torch.ones(4, 3)
    assert module.put(whole, 0, None, everything).data_ptr() == everything.data_ptr()
    transposed = torch.ones(3, 4).t()
    assert module.put(whole, 0, None, transposed) is whole  # laid out otherwise: copied
    assert module.put(whole, 0, None, everything.double()) is whole and (whole == 1).all()
