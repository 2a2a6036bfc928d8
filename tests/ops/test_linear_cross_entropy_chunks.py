"""The loop over chunks of rows: no bound on memory, dtype of sums or flag changes a number; what is skipped stays empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import needs_native
from torch import Tensor

from fam_ext.ops import _linear_cross_entropy_chunks as module
from fam_ext.ops._linear_cross_entropy_targets import MEAN, NONE, SUM
from fam_ext.ops.reference.linear_cross_entropy import linear_cross_entropy as reference

pytestmark = needs_native

NAMES = {NONE: "none", MEAN: "mean", SUM: "sum"}
OPTIONS: dict[str, Any] = {
    "ignore_index": -100, "label_smoothing": 0.1, "reduction": MEAN, "strength": 0.3, "curvature_grad": True,
    "max_bytes": 2**27, "accumulate_in_weight_dtype": False, "triton": False, "parts": 2, "grad_input": True, "grad_weight": True,
    "grad_bias": True,
}  # fmt: skip


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, bias = (torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((40, 6), (90, 6), (90,)))
    y = torch.randint(0, 90, (40,))
    y[::7] = -100
    return x, w, bias, y


def run(x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return module.forward(x, w, bias, y, None, None, module.Options(**OPTIONS | options))


def expected(x: Tensor, w: Tensor, bias: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    chosen = OPTIONS | options
    tensors = [t.double().requires_grad_() for t in (x, w, bias)]
    total, kappa = reference(
        tensors[0], tensors[1], y, tensors[2], None, chosen["ignore_index"], chosen["label_smoothing"],
        NAMES[chosen["reduction"]], chosen["strength"], chosen["curvature_grad"],
    )  # fmt: skip
    if chosen["reduction"] == NONE:
        return [total.detach(), kappa]
    return [total.detach(), kappa, *torch.autograd.grad(total, tensors)]


@pytest.mark.parametrize("max_bytes", [1, 2**14, 2**27])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": SUM, "strength": 0.0}, {"curvature_grad": False}], ids=str
)
def test_any_bound_on_memory(max_bytes: int, options: dict[str, Any]) -> None:
    """One row of chunks of 16, some, or all at once."""
    got = run(*problem(), max_bytes=max_bytes, **options)
    for g, e in zip(got, expected(*problem_again(), **options), strict=True):
        torch.testing.assert_close(g, e)


def problem_again() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return problem()


@pytest.fixture(autouse=True)
def seed(seeded: None) -> None:
    """After the session's own seed: `problem` starts from it."""
    torch.manual_seed(0)


def test_several_chunks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    chunk = module._Chunks._chunk

    def counted(self: Any, part: slice, count: int) -> Any:
        rows.append(count)
        return chunk(self, part, count)

    monkeypatch.setattr(module._Chunks, "_chunk", counted)
    run(*problem(), max_bytes=1)
    assert sum(rows) == 34 and max(rows) <= 16 and len(rows) == 3  # ignored rows are not among them


def test_rows_of_their_own() -> None:
    got = run(*problem(), reduction=NONE, grad_input=False, grad_weight=False, grad_bias=False)
    for g, e in zip(got[:2], expected(*problem_again(), reduction=NONE), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("wanted", ["grad_input", "grad_weight", "grad_bias"])
def test_one_gradient_alone(wanted: str) -> None:
    flags = {name: name == wanted for name in ("grad_input", "grad_weight", "grad_bias")}
    got = run(*problem(), **flags)
    whole = expected(*problem_again())
    for g, e, flag in zip(got[2:], whole[2:], flags.values(), strict=True):
        assert g.numel() == (e.numel() if flag else 0)
        if flag:
            torch.testing.assert_close(g, e)


def test_a_weight_of_less_than_float32() -> None:
    """Converted a block of classes at a time; the gradient's sums are float32 unless asked otherwise."""
    x, w, bias, y = problem(torch.bfloat16)
    want = expected(x, w, bias, y)
    for in_weight_dtype, dtype, rtol in ((False, torch.float32, 1e-4), (True, torch.bfloat16, 2e-2)):
        got = run(x, w, bias, y, max_bytes=2**12, accumulate_in_weight_dtype=in_weight_dtype)
        assert got[3].dtype == module.weight_grad_dtype(w, torch.float32, in_weight_dtype) == dtype
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=0)
        error = (got[3].double() - want[3]).norm() / want[3].norm()
        assert error < rtol
    assert module.weight_grad_dtype(w.half(), torch.float32, True) == torch.float32  # its range is too small
    assert module.weight_grad_dtype(w.double(), torch.float64, True) == torch.float64


def test_the_kernels() -> None:
    assert all(callable(getattr(module.row_kernels(False), name)) for name in module.ROW_KERNELS)
