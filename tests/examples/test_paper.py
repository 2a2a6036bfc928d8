"""The paper's recipes: each runs on generated data, has the published settings, and keeps the test data for the end."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import EXAMPLES, run
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("tqdm", reason="the recipes show their progress by tqdm")

IMAGES = ("cifar10_resnet18", "svhn_wrn", "fashion_mnist_wrn", "cifar100_efficientnet")
WITH_TRANSFORMERS = pytest.param(
    "glue_bert",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None,
        reason="transformers.Trainer is not installed",
    ),
)
# epochs, batch size, learning rate, strength, layer, and how many inputs and outputs that has
PUBLISHED = {
    "cifar10_resnet18": (250, 64, 0.03, 0.1),
    "svhn_wrn": (100, 128, 0.1, 0.2),
    "fashion_mnist_wrn": (200, 64, 0.05, 0.1),
    "cifar100_efficientnet": (200, 32, 1e-6, 1.0),
    "glue_bert": (20, 32, 2e-5, 1.0),
    "skull_reconstruction": (200, 1, 1e-4, 0.1),
}
MODULES = ("common", "image_data", "networks", "wrn", "correlation_study", "grokking", *PUBLISHED)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipes import each other by name; the names are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "paper"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def recipe(name: str) -> Any:
    return importlib.import_module(name)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", [*IMAGES, WITH_TRANSFORMERS, "skull_reconstruction"])
def test_smoke(name: str, tmp_path: Path) -> None:
    log = recipe(name).main(["--smoke", "--test", "--out", str(tmp_path)])
    assert [row["epoch"] for row in log] == [1, 2]
    for row in log:
        assert math.isfinite(row["loss"]) and 0 <= row["validation"] <= 1
        assert math.isfinite(row["flatness"]) and row["flatness"] != 0
        assert row["strength"] > 0
        assert name == "skull_reconstruction" or row["flatness"] > 0
    assert "test" in log[1] and "test" not in log[0]
    (path,) = tmp_path.glob("*.csv")
    assert [float(row["loss"]) for row in rows_of(path)] == [row["loss"] for row in log]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cifar10_resnet18", ["--form", "held"]),
        ("fashion_mnist_wrn", ["--form", "noise", "--layer", "*"]),
        ("cifar100_efficientnet", ["--form", "fisher", "--layer", "1"]),
        ("skull_reconstruction", ["--form", "noise", "--measure", "neuronwise"]),
    ],
)
def test_other_forms(name: str, more: list[str], tmp_path: Path) -> None:
    log = recipe(name).main(["--smoke", "--out", str(tmp_path), *more])
    assert all(math.isfinite(row["loss"]) for row in log)
    assert ("flatness" in log[0]) == ("noise" not in more)


def test_the_baseline_is_the_same_training_without_the_term(tmp_path: Path) -> None:
    module, common = recipe("cifar10_resnet18"), recipe("common")
    log = module.main(["--smoke", "--strength", "0", "--out", str(tmp_path)])
    assert "flatness" not in log[0] and log[0]["strength"] == 0
    plain: list[Any] = []

    class Recorded(nn.CrossEntropyLoss):
        def forward(self, outputs: Any, targets: Any) -> Any:
            loss = super().forward(outputs, targets)
            plain.append(loss.item())
            self.last = argparse.Namespace(as_dict=lambda: {"loss": loss.item()})
            return loss

    common.fam_loss = lambda criterion, model, options: Recorded()
    again = module.main(["--smoke", "--strength", "0", "--out", str(tmp_path)])
    assert len(plain) == 4
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in log], rel=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_the_defaults(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, common = recipe(name), recipe("common")

    class Stop(Exception):
        pass

    def settled(parser: argparse.ArgumentParser, given: Any, **smoke: Any) -> Any:
        raise Stop(parser.parse_args([]))

    monkeypatch.setattr(common, "settled", settled)
    with pytest.raises(Stop) as stopped:
        module.main([])
    options = stopped.value.args[0]
    assert (options.epochs, options.batch, options.lr, options.strength) == PUBLISHED[name]
    assert not options.smoke and not options.test and options.form == "auto"


def test_the_test_data_is_not_read_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, common = recipe("svhn_wrn"), recipe("common")
    generated = common.generated

    class Sealed(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("the test data was read")

    def with_sealed(*arguments: Any, **more: Any) -> Any:
        parts = generated(*arguments, **more)
        return parts._replace(test=Sealed(*parts.test.tensors))

    monkeypatch.setattr(common, "generated", with_sealed)
    module.main(["--smoke", "--out", str(tmp_path)])
    with pytest.raises(AssertionError, match="was read"):
        module.main(["--smoke", "--out", str(tmp_path), "--test"])


def test_held_out_samples_are_not_trained_on_and_not_augmented() -> None:
    common = recipe("common")
    augmented, plain = TensorDataset(torch.arange(20)), TensorDataset(torch.arange(20) + 100)
    train, validation = common.hold_out(augmented, plain, 6, seed=3)
    trained, held = [int(x) for (x,) in train], [int(x) - 100 for (x,) in validation]
    assert len(held) == 6 and sorted(trained + held) == list(range(20))
    assert common.hold_out(augmented, plain, 6, seed=3)[1].indices == validation.indices
    assert common.hold_out(augmented, plain, 6, seed=4)[1].indices != validation.indices


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        *((name, "torchvision", "pip install torchvision") for name in IMAGES),
        ("correlation_study", "torchvision", "pip install torchvision"),
        ("skull_reconstruction", "monai", "pip install monai"),
        ("glue_bert", "transformers", "pip install transformers accelerate"),
        ("grokking", "tqdm", "pip install tqdm"),
    ],
)
def test_a_missing_package_is_named(
    name: str, module: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (module, f"{module}.datasets", f"{module}.models", f"{module}.transforms"):
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(SystemExit, match=command):
        recipe(name).main(["--data", str(tmp_path), "--out", str(tmp_path)])


def test_networks_have_the_published_sizes() -> None:
    networks = recipe("networks")
    with torch.device("meta"):
        resnet, wide = networks.ResNet18(), networks.WideResNet()
        skull = recipe("skull_reconstruction")
        autoencoder = networks.LinearLatentAutoencoder(skull.SIZE, skull.CHANNELS)
        images = torch.empty(2, 3, 32, 32)
        assert resnet(images).shape == wide(images).shape == (2, 10)
        assert autoencoder(torch.empty(1, 1, *skull.SIZE)).shape == (1, 2, *skull.SIZE)
    assert round(sum(p.numel() for p in resnet.parameters()) / 1e6, 1) == 11.2
    assert round(sum(p.numel() for p in wide.parameters()) / 1e6, 1) == 36.5
    for model, inputs in ((resnet, 512), (wide, 640)):
        assert model.bottleneck.weight.shape == (64, inputs) and model.head.weight.shape == (10, 64)
    assert autoencoder.decode.weight.shape == (256, 32)


def test_torchvisions_transforms_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of the four data sets' modes and sizes go through both pipelines."""
    datasets = pytest.importorskip("torchvision.datasets", exc_type=Exception)
    numpy, pillow, image_data = (importlib.import_module(m) for m in ("numpy", "PIL.Image", "image_data"))
    for name, source in image_data.SOURCES.items():
        shape = (28, 28) if source.kind == "FashionMNIST" else (32, 32, 3)
        picture = pillow.fromarray(numpy.full(shape, 128, dtype=numpy.uint8))

        class Kind:
            def __init__(self, root: Any, download: bool, transform: Any, **part: Any) -> None:
                self.transform = transform

            def __len__(self) -> int:
                return 5008

            def __getitem__(self, number: int, picture: Any = picture) -> Any:
                return self.transform(picture), 0

        monkeypatch.setattr(datasets, source.kind, Kind)
        train, validation, test = image_data.load(name, argparse.Namespace(data="", seed=0))
        assert (len(train), len(validation)) == (8, 5000)
        for part in (train, validation, test):
            assert part[0][0].shape == (3, 32, 32)
        assert torch.equal(validation[0][0], test[0][0])


def test_cutout() -> None:
    image_data = recipe("image_data")
    torch.manual_seed(0)
    image = torch.rand(3, 32, 32) + 0.1
    before = image.clone()
    sizes = set()
    for _ in range(50):
        hole = (image_data.Cutout(16)(image) == 0).all(0)
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns and 8 <= rows <= 16 and 8 <= columns <= 16
        sizes.add(int(rows))
    assert max(sizes) == 16 and len(sizes) > 2
    assert torch.equal(image, before)


@pytest.mark.parametrize("plain_kappa", [False, True])
def test_skulls_term_is_that_of_the_full_hessian(plain_kappa: bool) -> None:
    """80 · Dice + strength · ‖W‖ · Tr(H) / fan-in, H the Hessian of the Dice loss itself, from the full Hessian in float64."""
    module, networks = recipe("skull_reconstruction"), recipe("networks")
    torch.manual_seed(0)
    model = networks.LinearLatentAutoencoder((8, 8, 8), (2, 3), latent=2).double()
    x, y = torch.rand(2, 1, 8, 8, 8, dtype=torch.float64), torch.randint(0, 2, (2, 1, 8, 8, 8)).double()
    options = argparse.Namespace(
        form="auto", measure="layerwise", strength=0.1, layer="decode", plain_kappa=plain_kappa
    )
    total = module.fam_loss(model, options, method="exact")(model(x), y)

    weight = model.decode.weight.detach()

    def loss_of(w: torch.Tensor) -> torch.Tensor:
        return module.dice_loss(torch.func.functional_call(model, {"decode.weight": w}, x), y)

    hessian = torch.autograd.functional.hessian(loss_of, weight).reshape(weight.numel(), -1)
    expected = 80 * loss_of(weight) + 0.1 * weight.norm() * hessian.trace() / (1 if plain_kappa else 2)
    torch.testing.assert_close(total, expected)


def test_dice_by_hand() -> None:
    module = recipe("skull_reconstruction")
    z = torch.full((1, 2, 1, 1, 4), -40.0)
    z[0, 1, 0, 0, :3], z[0, 0, 0, 0, 3] = 40.0, 40.0  # 1 1 1 0 for sure
    y = torch.tensor([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 1, 4)
    assert module.dice_loss(z, y).item() == pytest.approx((1 - 4 / 5) + (1 - 2 / 3), abs=1e-4)


def test_correlation_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe("correlation_study")
    rows = module.main(["--smoke", "--out", str(tmp_path)])
    assert len(rows) == 8 and len({row["gap"] for row in rows}) == 8
    for row in rows:  # the function is the same: kappa too, the trace is not
        assert row["rescaled_neuronwise"] == pytest.approx(row["neuronwise"], rel=1e-3)
        assert row["rescaled_trace"] == pytest.approx(row["trace"] / 25, rel=1e-3)
    assert "neuronwise" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "correlation.csv")) == 4 * 7
    module.trained = None  # a network that is in the log is not trained again
    assert len(module.main(["--smoke", "--out", str(tmp_path)])) == 8
    assert len(rows_of(tmp_path / "correlation_networks.csv")) == 8


def test_grokking(tmp_path: Path) -> None:
    module = recipe("grokking")
    rows = module.main(["--smoke", "--out", str(tmp_path), "--strengths", "0", "-5"])
    assert [row["step"] for row in rows] == [20, 40, 60] * 2
    plain, sharp = ([row["kappa"] for row in rows if row["strength"] == s] for s in (0.0, -5.0))
    assert sharp[0] > plain[0], "a negative strength rewards sharpness"
    (x, y), (new_x, new_y) = module.split(11, 0.4, 0)
    pairs = [tuple(p) for p in torch.cat([x, new_x]).tolist()]
    assert len(y) == 48 and len(set(pairs)) == len(pairs) == 121
    assert torch.equal((new_x[:, 0] + new_x[:, 1]) % 11, new_y)
    model = module.ModularSum(11, 8, temperature=0.1)
    seen: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    model(x)
    torch.testing.assert_close(seen[0].norm(dim=1), torch.full((48,), 10.0))


def test_as_a_command(tmp_path: Path) -> None:
    done = run("paper/cifar10_resnet18.py", "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "cifar10_resnet18: epoch 2, loss" in done.stdout and "Warning" not in done.stderr
    assert run("paper/grokking.py", "--help").stdout.startswith("usage:")
