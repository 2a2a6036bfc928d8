"""FAMCallback in the real Lightning: the update of a loop written by hand, steps, logs, checkpoints, and a term not taken."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fam_ext import FAMLoss
from fam_ext.schedules import TargetRatio, Warmup

pytest.importorskip("lightning", reason="Lightning is not installed")
import lightning
from lightning.pytorch.loggers.logger import Logger

from fam_ext.integrations.lightning import FAMCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore:.*isinstance.*treespec")


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({k: v for k, v in metrics.items() if k != "epoch"})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Classifier(lightning.LightningModule):
    def __init__(self, strength: Any, layer: int = 2, inside: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        criterion = FAMLoss(nn.CrossEntropyLoss(), self.net[layer], strength, **options)
        self.holder = criterion if inside else [criterion]
        self.lbfgs = False

    @property
    def criterion(self) -> FAMLoss:
        return self.holder if isinstance(self.holder, FAMLoss) else self.holder[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.criterion(self.net(x), y)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.criterion(self.net(x), y), batch_size=len(x))

    def configure_optimizers(self) -> Any:
        if self.lbfgs:
            return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3)
        return torch.optim.SGD(self.net.parameters(), lr=0.2, momentum=0.5)


def data(batches: int = 6) -> DataLoader:
    torch.manual_seed(1)
    rows = [(torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 3, (5,))) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    given: dict[str, Any] = {
        "default_root_dir": folder, "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "callbacks": list(callbacks), "log_every_n_steps": 1,
        "precision": "64-true",
    }  # fmt: skip
    return lightning.Trainer(**{**given, **options})


def by_hand(module: Classifier, strengths: list[float], accumulate: int) -> tuple[nn.Module, list[float]]:
    """Weights after the updates, and each batch's kappa, from the full Hessian."""
    net = copy.deepcopy(module.net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5)
    kappas = []
    for number, (x, y) in enumerate(data()):

        def loss(weight: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, {"2.weight": weight}, (x,)), y)

        kappa = oracle.kappa(loss, net[2].weight)
        kappas.append(kappa.item())
        total = F.cross_entropy(net(x), y) + strengths[number // accumulate] * kappa
        (total / accumulate).backward()
        if number % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return net, kappas


@pytest.mark.parametrize("inside", [True, False])
def test_updates_steps_and_logs(inside: bool, tmp_path: Path) -> None:
    """A Warmup over updates of two batches; the first one has no kappa to log."""
    module = Classifier(Warmup(0.6, steps=3), inside=inside)
    expected, kappas = by_hand(module, [0.0, 0.2, 0.4], 2)
    memory = Memory()
    callback = FAMCallback() if inside else FAMCallback(module.criterion)
    trainer(tmp_path, callback, accumulate_grad_batches=2, logger=memory).fit(module, data())
    torch.testing.assert_close(dict(module.net.named_parameters()), dict(expected.named_parameters()))
    assert module.criterion.step == 3
    logged = [row for row in memory.rows if "fam_loss" in row]
    assert [row["fam_strength"] for row in logged] == pytest.approx([0.0, 0.2, 0.4])
    assert "fam_flatness" not in logged[0]
    assert [row["fam_flatness"] for row in logged[1:]] == pytest.approx([kappas[3], kappas[5]], rel=1e-5)
    assert all(row["fam_loss"] > 0 for row in logged)


def test_closures_are_one_step(tmp_path: Path) -> None:
    module = Classifier(Warmup(0.6, steps=3))
    module.lbfgs = True
    trainer(tmp_path, FAMCallback(prog_bar=True)).fit(module, data())
    assert module.criterion.step == 6


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["hutchinson", "ratio"])
def test_a_resumed_run_is_the_run_bit_for_bit(kind: str, inside: bool, tmp_path: Path) -> None:
    def module() -> Classifier:
        if kind == "ratio":
            return Classifier(TargetRatio(0.3, maximum=1.0), inside=inside)
        return Classifier(
            Warmup(0.2, steps=8), 0, inside, curvature="hessian", method="hutchinson", per_sample_probes=True
        )

    def callback(own: Classifier) -> Any:
        return FAMCallback() if inside else FAMCallback(own.criterion)

    whole = module()
    trainer(tmp_path, callback(whole), max_epochs=2).fit(whole, data())
    first = module()
    run = trainer(tmp_path, callback(first), max_epochs=1)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    trainer(tmp_path, callback(resumed), max_epochs=2).fit(
        resumed, data(), ckpt_path=str(tmp_path / "half.ckpt")
    )
    assert resumed.criterion.step == 12
    for (name, got), expected in zip(resumed.net.named_parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_validation_has_the_plain_loss(tmp_path: Path) -> None:
    module = Classifier(0.5)
    run = trainer(tmp_path, FAMCallback(), limit_train_batches=1)
    run.fit(module, data(), data(2))
    with torch.no_grad():
        plain = [F.cross_entropy(module.net(x), y).item() for x, y in data(2)]
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(sum(plain) / 2)


def test_a_first_step_without_the_term_is_refused(tmp_path: Path) -> None:
    class Plain(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    expect(
        "the first training step took no term",
        lambda: trainer(tmp_path, FAMCallback()).fit(Plain(0.1), data()),
    )
    silent = Classifier(0.1)
    silent.criterion.eval()
    expect("in evaluation mode", lambda: trainer(tmp_path, FAMCallback()).fit(silent, data()))

    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    skips = Skips(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, FAMCallback()).fit(skips, data())
    assert skips.criterion.step == 6  # Lightning calls the optimizer for the batch that was left out, too


def test_two_optimizers_and_manual_steps(tmp_path: Path) -> None:
    """The optimizer that trains the layer is the one that is followed."""

    class Two(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()  # type: ignore[misc]
            self.manual_backward(super().training_step(batch, batch_idx))
            first.step()
            if batch_idx % 3 == 0:
                second.step()
            first.zero_grad()
            second.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[k].parameters(), lr=0.1) for k in (0, 2)]

    module = Two(Warmup(0.1, steps=3))
    trainer(tmp_path, FAMCallback()).fit(module, data())
    assert module.criterion.step == 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="FAMCallback: criterion must be a FAMLoss, or what patch_causal_lm returned"
    ):
        FAMCallback(nn.CrossEntropyLoss())
    module = Classifier(0.1, inside=False)
    with pytest.raises(ValueError, match=r"exactly one FAMLoss \(Classifier has 0\)"):
        trainer(tmp_path, FAMCallback()).fit(module, data())
    run = trainer(tmp_path)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    resumed = trainer(tmp_path, FAMCallback(module.criterion), max_epochs=2)
    expect(
        "the checkpoint was saved without the criterion",
        lambda: resumed.fit(module, data(), ckpt_path=str(tmp_path / "plain.ckpt")),
    )


def test_the_other_package_takes_it(tmp_path: Path) -> None:
    """pytorch_lightning has classes of its own; a trainer calls what is in its list."""
    other = pytest.importorskip("pytorch_lightning")

    class Small(other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.criterion = FAMLoss(nn.CrossEntropyLoss(), self.fc, 0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.criterion(self.fc(batch[0].float()), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Small()
    run = other.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[FAMCallback()],
    )  # fmt: skip
    run.fit(module, data())
    assert module.criterion.step == 6 and float(run.callback_metrics["fam_flatness"]) > 0
