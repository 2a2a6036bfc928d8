"""Drawn labels: their chances, enumerated on a grid of shares, and both forms against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fam_ext.hessian import label_draw
from fam_ext.ops import backends

DRAWN: Any = backends.native_function("drawn_factors")
compiled = pytest.mark.skipif(DRAWN is None, reason="needs the compiled library")


def natively(p: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """As `draw`, from the compiled library's factors of log p."""
    z, one = p.log().reshape(-1, p.shape[-1]), torch.ones(share.numel(), dtype=p.dtype)
    *_, labels, stretch = DRAWN(z.contiguous(), one, share.reshape(-1), one, None)
    return labels.view(share.shape), stretch.view(share.shape)


FORMS = pytest.mark.parametrize("draw", [label_draw.draw, pytest.param(natively, marks=compiled)])


def chances(p: Tensor) -> Tensor:
    """q_y ~ p_y |e_y - p|^2, (N, O)."""
    distance = (torch.eye(p.shape[1], dtype=p.dtype) - p[:, None]).square().sum(2)
    return p * distance / (p * distance).sum(1, keepdim=True)


@FORMS
@pytest.mark.parametrize("classes", [2, 3, 17])
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_every_label_has_its_share(draw: object, classes: int, spread: float) -> None:
    """Of M equally spaced shares, q_y M draw label y, but for one at each end; the root is sqrt(p_y / q_y)."""
    assert callable(draw)
    count = 4000
    p = (spread * torch.randn(3, classes, dtype=torch.float64)).softmax(1)
    share = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).repeat(3)[:, None]
    labels, stretch = draw(p.repeat_interleave(count, 0), share)
    q = chances(p)
    drawn = torch.stack([own.bincount(minlength=classes) for own in labels.reshape(3, count)]) / count
    assert (drawn - q).abs().max() <= 1.01 / count
    want = (p / q).repeat_interleave(count, 0).gather(1, labels).sqrt()
    torch.testing.assert_close(stretch, want, rtol=1e-9, atol=0)
    in_order = labels.reshape(3, count).diff(dim=1)
    assert (in_order >= 0).all()  # the first label whose sum of weights exceeds the share


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("spread", [0.0, 3.0, 200.0])
def test_both_forms_agree(dtype: torch.dtype, classes: int, spread: float) -> None:
    """Factors and gradients, but where a share lies within rounding of the border between two labels."""
    z = (spread * torch.randn(5, classes, 11, dtype=dtype)).requires_grad_()
    c, share = torch.rand(5, 11, dtype=dtype), torch.rand(5, 11, 1, dtype=dtype)
    sign, upstream = torch.rand(5, 11, 1).round() * 2 - 1, torch.randn_like(z)
    c[0, :3] = 0
    with torch.no_grad():
        z[0, :, :2] = torch.tensor([torch.nan, torch.inf])
    forms = [make(z, c, 1)(share, sign) for make in (label_draw.factors, label_draw.in_torch)]
    gradients = [torch.autograd.grad(u, z, upstream)[0] for u in forms]
    same = (forms[0].argmax(1) == forms[1].argmax(1)) & (forms[0].argmin(1) == forms[1].argmin(1))
    assert same.double().mean() >= 0.96 and forms[0].shape == z.shape
    near = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
    for ours, torchs in (forms, gradients):
        assert (ours[0, :, :3] == 0).all() and ours.isfinite().all()
        torch.testing.assert_close(ours.movedim(1, 2)[same], torchs.movedim(1, 2)[same], **near)


@FORMS
def test_a_label_without_probability_is_never_drawn(draw: object) -> None:
    assert callable(draw)
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    labels, _ = draw(p.expand(5, 5), shares[:, None])
    assert labels[:, 0].tolist() == [1, 1, 3, 3, 3]


@FORMS
def test_rows_without_curvature_and_rows_with_nan(draw: object) -> None:
    assert callable(draw)
    p = torch.tensor([[0.0, 1.0, 0.0], [torch.nan, torch.nan, torch.nan], [0.25, 0.5, 0.25]])
    labels, stretch = draw(p, torch.full((3, 1), 0.9))
    assert labels[0] == 1 and stretch[0] == 1 and stretch[1].isnan() and 0 <= labels[1] <= 2
    assert labels[2] == 2 and stretch[2].isfinite()


@FORMS
def test_confident_rows_keep_their_digits(draw: object) -> None:
    """1 - p of the likely label cancels: a factor's squared length, p_y |e_y - p|^2 / q_y, is the trace 1 - |p|^2 = 2 rest."""
    assert callable(draw)
    p = torch.tensor([[1e-12, 1.0, 2e-12]]).repeat(9, 1)
    labels, stretch = draw(p, torch.linspace(0, 0.999, 9)[:, None])
    assert set(labels[:, 0].tolist()) == {0, 2}
    rest = p[:, ::2].double().sum(1, keepdim=True)
    torch.testing.assert_close(2 * stretch.double().square(), 2 * rest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", [pytest.param("compiled", marks=compiled), "in torch"])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 4, 3)], ids=str)
def test_own_labels(shape: tuple[int, ...], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sqrt(c) times the gradient of the losses of the labels, and its derivative, by autograd; an ignored row gives zeros."""
    if form == "in torch":
        monkeypatch.setattr(label_draw, "_native", None)
    dim = min(1, len(shape) - 1)
    z = torch.randn(shape, dtype=torch.float64)
    rows = z.sum(dim).shape
    label, c = torch.randint(0, 4, rows), torch.rand(rows, dtype=torch.float64)
    sign = torch.rand(*rows, 1).round().double() * 2 - 1
    if len(shape) == 2:
        c[1], label[1], z[1] = 0, -100, torch.nan
    z.requires_grad_()
    u = label_draw.own_factors(z, c, dim, label)(sign)
    kept = torch.where((c == 0).unsqueeze(dim), 0.0, z)
    losses = torch.nn.functional.cross_entropy(kept, label.clamp(min=0), reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), kept, create_graph=True)
    expected = -gradient * (c.sqrt().unsqueeze(dim) * sign.movedim(-1, dim))
    torch.testing.assert_close(u, expected)
    upstream = torch.randn_like(u)
    got, want = (torch.autograd.grad(t, z, upstream)[0] for t in (u, expected))
    torch.testing.assert_close(got, want)


@compiled
def test_a_label_out_of_range_is_refused() -> None:
    z, one = torch.randn(2, 3), torch.ones(2)
    with pytest.raises(IndexError, match="label 3 is out of range for 3 classes"):
        label_draw.own_factors(z, one, 1, torch.tensor([0, 3]))(one)
