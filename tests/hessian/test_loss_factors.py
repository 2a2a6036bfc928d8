"""Factors of the criterion's Hessian: their outer products against torch's own second derivatives, in float64.

What is random is summed over every draw, weighted with its probability.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fam_ext import criteria
from fam_ext.hessian import loss_factors
from fam_ext.loss_hessians import LossHessian


def cross_entropy() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.CrossEntropyLoss(), logits(3, 4), torch.tensor([0, 3, 3])


def of_one_sample() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.CrossEntropyLoss(reduction="sum"), logits(4), torch.tensor(2)


def by_position() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.CrossEntropyLoss(ignore_index=1), logits(2, 3, 2), torch.tensor([[0, 1], [2, 2]])


def weighted() -> tuple[Any, Tensor, Tensor]:
    omega = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    criterion = torch.nn.CrossEntropyLoss(weight=omega, label_smoothing=0.3)
    return criterion, logits(2, 3), torch.tensor([0, 2])


def bce() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.BCEWithLogitsLoss(), logits(2, 2), torch.rand(2, 2, dtype=torch.float64)


def poisson() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.PoissonNLLLoss(reduction="sum"), logits(3, 1), torch.rand(3, 1, dtype=torch.float64)


def mse() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.MSELoss(), logits(2, 3), logits(2, 3)


PROBLEMS = [cross_entropy, of_one_sample, by_position, weighted, bce, poisson, mse]
LIKELIHOODS = [cross_entropy, of_one_sample, by_position, bce, poisson]


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def known(criterion: Any, target: Tensor) -> LossHessian:
    return criteria.read("test", criterion)(target)


def hessian(criterion: Any, z: Tensor, target: Tensor) -> Tensor:
    second: Any = torch.func.hessian(lambda f: criterion(f, target))(z)
    return second.reshape(z.numel(), z.numel())


def outer(u: Tensor) -> Tensor:
    return u.flatten()[:, None] * u.flatten()


@pytest.mark.parametrize("make", PROBLEMS)
def test_exact_factors(make: Any) -> None:
    """sum u u^T is the Hessian within every sample, and each factor has one row of every sample."""
    criterion, z, target = make()
    samples = 1 if z.dim() == 1 else len(z)
    factors = list(loss_factors.output_factors(known(criterion, target), z, samples))
    of_sample = torch.arange(z.numel()) // (z.numel() // samples)
    within = of_sample[:, None] == of_sample
    total = torch.stack([outer(u) for u in factors]).sum(0)
    torch.testing.assert_close(total * within, hessian(criterion, z, target), rtol=1e-12, atol=1e-14)
    assert all(u.shape == z.shape for u in factors)


def one_by_one(patterns: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    drawn: Iterator[Any] = iter(patterns)
    monkeypatch.setattr(module, name, lambda *args, **options: next(drawn))


def all_signs(shape: tuple[int, ...]) -> list[Tensor]:
    count = math.prod(shape)
    return [
        torch.tensor(signs, dtype=torch.float64).reshape(shape)
        for signs in itertools.product((1.0, -1.0), repeat=count)
    ]


def all_labels(z: Tensor) -> tuple[list[Tensor], Tensor]:
    """Shares that draw every label of every row, of the rows' shape and 1, and the probability of each choice.

    A row's label is drawn from q_y ~ p_y |e_y - p|^2; classes are moved last.
    """
    classes = min(1, z.dim() - 1)
    p = z.softmax(classes).movedim(classes, -1).reshape(-1, z.shape[classes])
    distance = (torch.eye(p.shape[1], dtype=p.dtype) - p[:, None]).square().sum(2)
    q = p * distance / (p * distance).sum(1, keepdim=True)
    choices = [torch.tensor(c)[:, None] for c in itertools.product(range(p.shape[1]), repeat=len(p))]
    middle = q.cumsum(1) - q / 2
    of_rows = (*z.movedim(classes, -1).shape[:-1], 1)
    return [middle.gather(1, c).reshape(of_rows) for c in choices], torch.stack(
        [q.gather(1, c).prod() for c in choices]
    )


@pytest.mark.parametrize("make", LIKELIHOODS)
def test_sampled_factors_in_the_mean(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """E[u u^T] is the whole Hessian, terms between rows vanish, and so does the gradient's mean: dE = E[d]."""
    criterion, z, target = make()
    z.requires_grad_()
    if make in (bce, poisson):
        draws = all_signs(tuple(z.shape))
        chances = torch.full((len(draws),), 1 / len(draws), dtype=torch.float64)
        one_by_one(draws, monkeypatch, "rademacher", loss_factors)
    else:
        shares, of_labels = all_labels(z.detach())
        rows = z.numel() // z.shape[min(1, z.dim() - 1)]
        classes_last = z.movedim(min(1, z.dim() - 1), -1)
        signs = [sign.reshape(*classes_last.shape[:-1], 1) for sign in all_signs((rows,))]
        draws = list(itertools.product(shares, signs))
        chances = of_labels.repeat_interleave(len(signs)) / len(signs)
        one_by_one([share for share, _ in draws], monkeypatch, "rand", torch)
        one_by_one([sign for _, sign in draws], monkeypatch, "rademacher", loss_factors)
    factors = loss_factors.sampled_factors(known(criterion, target), z, len(draws), torch.Generator())
    total = sum(chance * outer(u) for chance, u in zip(chances, factors, strict=True))
    expected = hessian(criterion, z, target)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)
    along = torch.randn_like(expected)
    got, want = (torch.autograd.grad((along * m).sum(), z)[0] for m in (total, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("margin", [0.0, 5.0, 12.0, 40.0, 200.0])
def test_sampled_factors_of_a_row_have_one_length(margin: float) -> None:
    """|u|^2 is the trace of the Hessian for every draw, however confident the row: nothing rare is huge."""
    z = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    z[:, 1] += margin
    trace = hessian_traces(z.double())
    generator, criterion = torch.Generator().manual_seed(0), torch.nn.CrossEntropyLoss(reduction="sum")
    for u in loss_factors.sampled_factors(known(criterion, torch.zeros(64).long()), z, 20, generator):
        torch.testing.assert_close(u.square().sum(1).double(), trace, rtol=1e-4, atol=1e-30)
        assert u.isfinite().all()


def hessian_traces(z: Tensor) -> Tensor:
    """1 - |p|^2 of every row, without cancellation."""
    p, top = z.softmax(1), z.argmax(1, keepdim=True)
    others = p.scatter(1, top, 0.0)
    rest = others.sum(1)
    return rest * (1 + p.gather(1, top)[:, 0]) - others.square().sum(1)


def bce_sum() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.BCEWithLogitsLoss(reduction="sum"), logits(2, 2), torch.rand(2, 2, dtype=torch.float64)


def poisson_mean() -> tuple[Any, Tensor, Tensor]:
    return torch.nn.PoissonNLLLoss(), logits(3, 1), torch.rand(3, 1, dtype=torch.float64)


@pytest.mark.parametrize("make", [*LIKELIHOODS, bce_sum, poisson_mean])
def test_factors_of_the_batch_s_own_labels(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """sum c (dl/dz)(dl/dz)^T over the terms l of the loss; signs are summed over where a sample has several terms."""
    criterion, z, target = make()
    samples = 1 if z.dim() == 1 else len(z)
    (gradient,) = torch.autograd.grad(criterion(f := z.clone().requires_grad_(), target), f)  # c dl/dz
    classes = None if make in (bce, bce_sum, poisson, poisson_mean) else min(1, z.dim() - 1)
    terms = tuple(1 if d == classes else size for d, size in enumerate(z.shape))
    term = torch.arange(math.prod(terms)).reshape(terms).expand(z.shape).flatten()  # the term of every number
    counted = int((target != getattr(criterion, "ignore_index", torch.nan)).sum())
    c = 1 / counted if criterion.reduction == "mean" else 1.0
    expected = outer(gradient) / c * (term[:, None] == term)
    draws = all_signs(terms) if math.prod(terms) > samples else []
    if draws:
        one_by_one(draws, monkeypatch, "rademacher", loss_factors)
    known_loss, generator = known(criterion, target), torch.Generator()
    factors = list(loss_factors.empirical_factors(known_loss, z, samples, len(draws), generator))
    total = torch.stack([outer(u) for u in factors]).mean(0)
    if not draws:  # a sample has one term: nobody multiplies numbers of different samples
        assert len(factors) == 1
        total = total * (term[:, None] == term)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)


def test_an_ignored_row_counts_nothing_whatever_it_holds() -> None:
    """NaN in it reaches no factor, of any kind, and no gradient."""
    z, target = logits(3, 4), torch.tensor([0, -100, 3])
    z[1] = torch.nan
    z.requires_grad_()
    loss_hessian, generator = known(torch.nn.CrossEntropyLoss(), target), torch.Generator()
    for factors in (
        loss_factors.output_factors(loss_hessian, z, 3),
        loss_factors.sampled_factors(loss_hessian, z, 1, generator),
        loss_factors.empirical_factors(loss_hessian, z, 3, 1, generator),
    ):
        for u in factors:
            assert (u[1] == 0).all() and u.isfinite().all() and (u[0] != 0).any()
            (gradient,) = torch.autograd.grad(u.square().sum(), z, retain_graph=True)
            assert gradient.isfinite().all() and (gradient[1] == 0).all()


def test_a_row_that_counts_and_holds_nan_gives_nan() -> None:
    """As the loss does: drawing its label raises nothing."""
    z, target = logits(2, 3), torch.tensor([0, 1])
    z[1] = torch.nan
    (u,) = loss_factors.sampled_factors(known(torch.nn.CrossEntropyLoss(), target), z, 1, torch.Generator())
    assert u[0].isfinite().all() and u[1].isnan().all()


def test_draws_come_from_the_generator() -> None:
    criterion, z, target = cross_entropy()
    loss_hessian = known(criterion, target)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(list(loss_factors.sampled_factors(loss_hessian, z, 4, generator)))

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(*draw(1)[:2])
