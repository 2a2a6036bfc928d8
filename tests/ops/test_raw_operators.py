"""torch.ops.fam_ext.* called past the public functions: what does not fit is refused, since kernels trust shapes and strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import needs_native
from operator_samples import SAMPLES
from torch import Tensor

pytestmark = needs_native
OPERATIONS = [
    op for op in SAMPLES if op.startswith(("softmax_trace", "head_cross_entropy", "linear_cross_entropy"))
]
# arguments whose first dimension nothing else says: rows of logits, classes without a bias, those that add_rows writes
FREE = {("softmax_trace", 0), ("linear_cross_entropy", 1), ("linear_cross_entropy_add_rows", 2)}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one dimension more": lambda t: t.unsqueeze(0),
    "shorter": lambda t: t[:-1],
    "longer": lambda t: torch.cat([t, t[:1]]),
    "no dimensions": lambda t: t.flatten()[0] if t.numel() else t.new_zeros(()),
}


def changed(op: str, change: str) -> Iterator[tuple[int, list[Any]]]:
    for sample in SAMPLES[op]:
        arguments = list(sample())
        for k, value in enumerate(arguments):
            if not isinstance(value, Tensor) or value.numel() == 0:
                continue
            if change in ("shorter", "longer") and (op, k) in FREE:
                continue
            yield k, [*arguments[:k], CHANGES[change](value.detach()), *arguments[k + 1 :]]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_wrong_shapes_are_refused(op: str, change: str) -> None:
    operator = getattr(torch.ops.fam_ext, op)
    for k, arguments in changed(op, change):
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            pytest.fail(f"argument {k} was taken: {operator(*arguments)}")


@pytest.mark.parametrize("op", OPERATIONS)
def test_wrong_dtypes_are_refused(op: str) -> None:
    operator = getattr(torch.ops.fam_ext, op)
    for sample in SAMPLES[op]:
        arguments = list(sample())
        for k, value in enumerate(arguments):
            if isinstance(value, Tensor):
                other = torch.zeros(value.shape, dtype=torch.int32)
                with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
                    pytest.fail(
                        f"argument {k} was taken: {operator(*arguments[:k], other, *arguments[k + 1 :])}"
                    )


def test_targets_out_of_range_are_refused() -> None:
    z, squares, best, stats = (
        torch.rand(3, 5),
        torch.rand(5),
        torch.zeros(3, dtype=torch.int64),
        torch.empty(4, 3),
    )
    for bad in (-1, 5):
        target = torch.tensor([0, bad, 1])
        with pytest.raises(IndexError, match="target out of range"):
            torch.ops.fam_ext.linear_cross_entropy_softmax_rows(
                z, None, squares, None, target, False, best, stats
            )
