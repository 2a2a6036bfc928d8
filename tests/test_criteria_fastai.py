"""FAMLoss in fastai's Learner: the updates of a loop by hand, probabilities and losses from get_preds, MixUp."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FAMLoss

pytest.importorskip("fastai", reason="fastai is not installed")
learner = pytest.importorskip("fastai.learner", reason="fastai lacks what it imports")
mixup = pytest.importorskip("fastai.callback.mixup")
loaders = pytest.importorskip("fastai.data.load")
losses = pytest.importorskip("fastai.losses")
optimizer = pytest.importorskip("fastai.optimizer")

STRENGTH, RATE = 0.2, 0.1


class Batches:
    """What a Learner asks of its data."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.rows = [(torch.randn(4), torch.randint(0, 3, ())) for _ in range(12)]

    def loaders(self) -> Any:
        return learner.DataLoaders(*(loaders.DataLoader(self.rows, bs=size) for size in (6, 5)))

    def all(self) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in self.rows]), torch.stack([y for _, y in self.rows])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def by_row(net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """CE + strength * kappa of every row, as summands of a sum."""
    features = net[:2](x)
    z = net[2](features)
    kappa = features.square().sum(1) * oracle.softmax_trace(z, net[2].weight)
    return F.cross_entropy(z, y, reduction="none") + STRENGTH * kappa


def fitted(net: nn.Sequential, folder: Path, *callbacks: Any) -> tuple[Any, FAMLoss]:
    criterion = FAMLoss(losses.CrossEntropyLossFlat(), net[2], STRENGTH)
    learn = learner.Learner(
        Batches().loaders(),
        net,
        loss_func=criterion,
        opt_func=optimizer.SGD,
        lr=RATE,
        wd=0.0,
        path=folder,
        cbs=list(callbacks),
    )
    with learn.no_logging():
        learn.fit(2)
    return learn, criterion


def test_updates_and_predictions(tmp_path: Path) -> None:
    net = network()
    learn, criterion = fitted(net, tmp_path)
    assert criterion.plan.method == "closed_form" and criterion.step == 4
    expected = network().double()
    x, y = Batches().all()
    for _ in range(2):
        for rows in (slice(0, 6), slice(6, 12)):
            gradients = torch.autograd.grad(
                by_row(expected, x[rows].double(), y[rows]).mean(), list(expected.parameters())
            )
            with torch.no_grad():
                for p, g in zip(expected.parameters(), gradients, strict=True):
                    p -= RATE * g
    for got, e in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got.double(), e, rtol=1e-5, atol=1e-6)
    probabilities, targets, decoded, by_item = learn.get_preds(with_decoded=True, with_loss=True)
    z = expected(x.double()).detach()
    torch.testing.assert_close(torch.as_tensor(probabilities).double(), z.softmax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.as_tensor(decoded), z.argmax(-1)) and torch.equal(torch.as_tensor(targets), y)
    plain = F.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(torch.as_tensor(by_item).double(), plain, rtol=1e-4, atol=1e-5)
    assert criterion.reduction == "mean"


def test_mixup_mixes_the_losses_of_two_targets(tmp_path: Path) -> None:
    """MixUp asks whether targets are class indices, and for losses by row."""
    totals = []
    mixed = mixup.MixUp(0.4)

    class Watch(learner.Callback):  # type: ignore[misc, name-defined]
        order = 1000

        def after_loss(self) -> None:
            if self.training:
                z_net = copy.deepcopy(self.learn.model)
                x, first, second = self.learn.xb[0], mixed.yb1[0], self.learn.yb[0]
                rows = torch.lerp(by_row(z_net, x, first), by_row(z_net, x, second), mixed.lam)
                totals.append((torch.as_tensor(self.learn.loss).item(), torch.as_tensor(rows.mean()).item()))

    fitted(network(), tmp_path, mixed, Watch())
    assert len(totals) == 4
    for got, expected in totals:
        assert got == pytest.approx(expected, rel=1e-4)
