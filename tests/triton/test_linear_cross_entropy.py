"""Row kernels of linear_cross_entropy in Triton's interpreter: a chunk's loss, curvature and gradients against float64."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import confident_logits, make_input
from tolerance import assert_accurate

pytest.importorskip("triton")
kernels = pytest.importorskip("fam_ext.kernels.linear_cross_entropy")

STRENGTH = 0.3


def shares(target, class_weight, classes, smoothing, ignore_index, mean):
    """h, f, c of every row, as the operation forms them."""
    omega = torch.ones(classes) if class_weight is None else class_weight
    kept = (target != ignore_index).float()
    safe = target.clamp(min=0)
    scale = kept / (omega[safe] * kept).sum() if mean else kept
    hard, soft = (1 - smoothing) * omega[safe] * scale, smoothing / classes * scale
    return safe, hard, soft, hard + soft * omega.sum(), omega


def exact(z, phi, w, target, class_weight, smoothing, ignore_index, mean):
    """Loss, kappa, dz, dphi, dW in float64, with z a variable of its own: what a chunk's rows contribute."""
    double = lambda t: None if t is None else t.double()  # noqa: E731
    z, phi, w = (t.detach().double().requires_grad_() for t in (z, phi, w))
    _, _, _, c, _ = shares(target, class_weight, len(w), smoothing, ignore_index, mean)
    loss = F.cross_entropy(
        z, target, double(class_weight), reduction="mean" if mean else "sum", label_smoothing=smoothing,
        ignore_index=ignore_index,
    )  # fmt: skip
    kappa = (c.double() * phi.square().sum(1) * oracle.softmax_trace(z, w)).sum()
    return loss, kappa, *torch.autograd.grad(loss + STRENGTH * kappa, (z, phi, w))


def by_kernels(z, phi, w, target, class_weight, smoothing, ignore_index, mean, held=torch.float32, pull=True):
    safe, hard, soft, c, omega = shares(target, class_weight, len(w), smoothing, ignore_index, mean)
    squares, norms = w.square().sum(1), phi.square().sum(1)
    p = torch.empty_like(z, dtype=held)
    loss, y, r, weighted = kernels.softmax(z, safe, hard, soft, c, class_weight, squares, p, smoothing > 0)
    shifts = p.float() @ w
    mean_rows = torch.empty_like(shifts)
    row = kernels.shift(shifts, w, y, r, weighted, mean_rows)
    g, v = STRENGTH * c * norms, row[0]
    x = mean_rows @ w.T
    kernels.gradient(p, x, safe, hard, soft, c, g, class_weight, float(omega.sum()), squares, y, r, row, pull)
    d_phi = (2 * STRENGTH * c * v).unsqueeze(1) * phi
    gp = p.float()
    d_w = 2 * (gp.sum(0).unsqueeze(1) * w - gp.T @ mean_rows)
    d_w.index_add_(0, y, -2 * g.unsqueeze(1) * shifts)
    return loss.sum(), (c * norms * v).sum(), x, d_phi, d_w


def by_torch(*args):
    """The plain formulas in float32, the textbook's v."""
    z, phi, w, target, class_weight, smoothing, ignore_index, mean = args
    z, phi, w = (t.detach().requires_grad_() for t in (z, phi, w))
    _, _, _, c, _ = shares(target, class_weight, len(w), smoothing, ignore_index, mean)
    loss = F.cross_entropy(
        z, target, class_weight, reduction="mean" if mean else "sum", label_smoothing=smoothing,
        ignore_index=ignore_index,
    )  # fmt: skip
    kappa = (c * phi.square().sum(1) * oracle.softmax_trace(z, w)).sum()
    return loss, kappa, *torch.autograd.grad(loss + STRENGTH * kappa, (z, phi, w))


CASES = {
    "plain": (5, 37, 7, False, 0.0, True),
    "weights-smoothing": (4, 33, 5, True, 0.1, True),
    "sum-smoothing": (4, 9, 6, False, 0.2, False),
    "one-row": (1, 2, 3, True, 0.0, False),
    "one-block": (2, 2048, 3, False, 0.0, True),
    "blocks": (3, 2049, 2100, True, 0.1, True),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    rows, classes, features, weighted, smoothing, mean = CASES[name]
    phi, w = make_input((rows, features)), make_input((classes, features), seed=1) / math.sqrt(features)
    z = make_input((rows, classes), seed=2) * 3
    target = torch.arange(rows) * 7 % classes
    if rows > 2:
        target[1] = -100
        z[1] = math.nan  # an ignored row may hold anything
    class_weight = torch.rand(classes) + 0.5 if weighted else None
    clean = z.clone().nan_to_num_(0.0)
    args = (phi, w, target, class_weight, smoothing, -100, mean)
    want, base = exact(clean, *args), by_torch(clean, *args)
    got = by_kernels(z, *args)
    for a, b, e in zip(got, base, want, strict=True):
        assert_accurate(a, b.detach(), e, classes + features)
    held = by_kernels(z, *args, pull=False)  # the Hessian held: dz of the loss alone
    double = clean.double().requires_grad_()
    weight64 = None if class_weight is None else class_weight.double()
    loss = F.cross_entropy(
        double, target, weight64, reduction="mean" if mean else "sum", label_smoothing=smoothing
    )
    (plain,) = torch.autograd.grad(loss, double)
    assert_accurate(held[2], plain.float(), plain, classes)


@pytest.mark.parametrize("doubt", [1e-2, 1e-6, 1e-8])
def test_confident_predictions(doubt):
    """max p = 1 - doubt: v and its gradients keep float32's digits, where 1 - p_y has lost them."""
    z, y = confident_logits(6, 50, doubt)
    phi, w = make_input((6, 8)), make_input((50, 8), seed=1)
    for target in (y, (y + 1) % 50):
        args = (z, phi, w, target, None, 0.0, -100, True)
        for a, e in zip(by_kernels(*args), exact(*args), strict=True):
            assert_accurate(a, e.float(), e, 50)


def test_p_in_half_precision_and_in_place():
    rows, classes, features = 4, 70, 6
    phi, w, z = (
        make_input((rows, features)),
        make_input((classes, features), seed=1),
        make_input((rows, classes), seed=2),
    )
    target = torch.arange(rows)
    args = (phi, w, target, None, 0.0, -100, True)
    want = exact(z, *args)
    for a, e in zip(by_kernels(z, *args, held=torch.bfloat16), want, strict=True):
        assert_accurate(a, e.float(), e, 1, roundings=2**18)  # cut to 8 bits, p~ and again g p~
    wide = torch.empty(rows, 2 * classes)[:, :classes]  # rows apart, p~ over z
    wide.copy_(z)
    safe, hard, soft, c, _ = shares(target, None, classes, 0.0, -100, True)
    squares = w.square().sum(1)
    apart = torch.empty_like(z)
    first = kernels.softmax(z, safe, hard, soft, c, None, squares, apart, False)
    second = kernels.softmax(wide, safe, hard, soft, c, None, squares, wide, False)
    assert torch.equal(wide, apart)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_bad_numbers_come_out():
    z = make_input((3, 40))
    z[1, 5] = math.nan
    safe, hard, soft, c, _ = shares(torch.zeros(3, dtype=torch.int64), None, 40, 0.0, -100, True)
    loss = kernels.softmax(z, safe, hard, soft, c, None, torch.ones(40), torch.empty_like(z), False)[0]
    assert loss.isnan().tolist() == [False, True, False]
