"""c_i of every variant of cross-entropy: from the Hessian of torch's own loss by each row's logits, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.ops.row_coefficients import clear_rows, cross_entropy_coefficients

pytestmark = pytest.mark.on_devices

OMEGA = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
OPTIONS: list[dict[str, Any]] = [
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"class_weight": OMEGA}, {"label_smoothing": 0.3},
    {"class_weight": OMEGA, "label_smoothing": 0.3, "reduction": "sum"}, {"class_weight": OMEGA, "label_smoothing": 0.3},
    {"ignore_index": 1}, {"ignore_index": 1, "class_weight": OMEGA, "label_smoothing": 0.3},
]  # fmt: skip


def from_the_hessian(z: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Tr H of each row over Tr(diag p - p p^T)."""
    named = {"weight" if k == "class_weight" else k: v for k, v in options.items()}

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, **named).sum()

    second: Any = torch.func.hessian(loss)(z)
    traces = second.reshape(z.numel(), z.numel()).diagonal().reshape(z.shape).sum(1)
    p = z.softmax(1)
    return traces / (p * (1 - p)).sum(1)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any], positions: tuple[int, ...], soft: bool) -> None:
    if soft and "ignore_index" in options:
        options = {k: v for k, v in options.items() if k != "ignore_index"}
    z = torch.randn(4, 3, *positions, dtype=torch.float64)
    y = torch.rand(4, 3, *positions).softmax(1).double() if soft else torch.randint(0, 3, (4, *positions))
    c = cross_entropy_coefficients(z, y, **options)
    torch.testing.assert_close(c, from_the_hessian(z, y, **options))
    assert c.shape == (4, *positions) and c.dtype == torch.float64


def test_one_sample_without_a_batch() -> None:
    z = torch.randn(3)
    assert cross_entropy_coefficients(z, torch.tensor(2)) == 1.0
    assert cross_entropy_coefficients(z, torch.tensor(2), class_weight=OMEGA.float(), reduction="sum") == 2.0


def test_means_over_nothing() -> None:
    """As torch's loss: not finite where class weights sum to 0, and 0 for rows that are ignored anyhow."""
    z, y = torch.randn(3, 3), torch.tensor([0, 0, -100])
    c = cross_entropy_coefficients(z, y, class_weight=torch.tensor([0.0, 1.0, 1.0]))
    assert not c[:2].isfinite().any() and c[2] == 0
    assert (cross_entropy_coefficients(z, torch.full((3,), -100)) == 0).all()


def test_dtypes() -> None:
    y = torch.tensor([0, 1])
    assert cross_entropy_coefficients(torch.randn(2, 3).bfloat16(), y).dtype == torch.float32
    weight = torch.ones(3, dtype=torch.float64)
    assert cross_entropy_coefficients(torch.randn(2, 3), y, class_weight=weight).dtype == torch.float64


def test_rows_without_a_coefficient_are_cleared() -> None:
    rows = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0], [3.0, 4.0]], requires_grad=True)
    c = torch.tensor([0.0, 0.0, 0.5])
    cleared = clear_rows(rows, c, 1)
    assert cleared.tolist() == [[0, 0], [0, 0], [3, 4]]
    (gradient,) = torch.autograd.grad((cleared * torch.tensor([torch.nan, 1.0])).sum(), rows)
    assert (gradient[:2] == 0).all()
    assert torch.equal(clear_rows(rows.detach().T, c, 0), cleared.detach().T)
