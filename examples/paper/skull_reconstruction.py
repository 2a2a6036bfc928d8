"""Skulls with a hole are completed by a 3-d autoencoder: 80 · Dice + strength · ‖W‖ Tr(H) / fan-in of a hidden layer.

    python examples/paper/skull_reconstruction.py --data skullrec_dataset   # published settings
    python examples/paper/skull_reconstruction.py --strength 0              # the baseline, all else equal
    python examples/paper/skull_reconstruction.py --measure neuronwise      # kappa itself, which rescaling leaves alone
    python examples/paper/skull_reconstruction.py --smoke                   # a few steps on generated hollow spheres

H is the Hessian of the Dice loss by the layer that leads out of the latent vector; its trace is Hutchinson's estimate. The data
folder holds train/cranial, train/ground_truth, test/cranial and test/ground_truth, each with the same number of .nii.gz files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import networks
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fam_ext

WEIGHT = 80.0  # of the Dice loss
SIZE = (256, 256, 128)
CHANNELS = (32, 64, 128, 64, 32, 8)
HELD_OUT = 10  # skulls


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """One minus the soft Dice coefficient, summed over samples and classes; (B, C, *size), (B, 1, *size) of class indices."""
    p = logits.softmax(1)
    q = torch.cat([(target == k).to(p) for k in range(p.shape[1])], 1)
    dims = tuple(range(2, p.dim()))
    return (1 - (2 * (p * q).sum(dims) + 1e-5) / (p.sum(dims) + q.sum(dims) + 1e-5)).sum()


class Volumes(Dataset[tuple[Tensor, Tensor]]):
    """(defective skull, complete skull), each (1, *SIZE), read and resized by MONAI."""

    def __init__(self, folder: Path) -> None:
        monai = common.need("monai.transforms", "monai", "Reading volumes")
        common.need("nibabel", "nibabel", "Reading .nii.gz files")
        keys = ("image", "label")
        self.read: Any = monai.Compose(
            [
                monai.LoadImaged(keys),
                monai.EnsureChannelFirstd(keys),
                monai.Resized(keys, SIZE, mode="nearest"),
            ]
        )
        self.files = list(
            zip(
                *(sorted((folder / part).glob("*.nii.gz")) for part in ("cranial", "ground_truth")),
                strict=True,
            )
        )
        if not self.files:
            raise SystemExit(f"{folder}/cranial holds no .nii.gz file: give the data set's folder as --data")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, label = self.files[number]
        volumes = self.read({"image": str(image), "label": str(label)})
        return volumes["image"].as_tensor().float(), volumes["label"].as_tensor()


def spheres(samples: int = 2, size: int = 16) -> TensorDataset:
    """Hollow spheres with a corner cut off, and whole."""
    axis = torch.linspace(-1, 1, size)
    radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
    inner = torch.rand(samples, 1, 1, 1, 1) * 0.3 + 0.3
    whole = ((radius > inner) & (radius < inner + 0.3)).float()
    cut = whole.clone()
    cut[..., : size // 2, : size // 2, : size // 2] = 0
    return TensorDataset(cut, whole)


@torch.no_grad()
def dice(model: nn.Module, data: Dataset[Any], options: argparse.Namespace) -> float:
    """Mean Dice coefficient of the predicted skulls."""
    device = next(model.parameters()).device
    model.eval()
    values = []
    for x, y in DataLoader(data, 1, num_workers=options.workers):
        predicted, whole = model(x.to(device)).argmax(1).bool(), y.to(device)[:, 0].bool()
        total = predicted.sum() + whole.sum()
        values.append(2 * (predicted & whole).sum() / total.clamp(min=1))
    return float(torch.stack(values).mean())


def fam_loss(model: nn.Module, options: argparse.Namespace, method: str = "hutchinson") -> fam_ext.FAMLoss:
    """WEIGHT · Dice + strength · the Dice loss's flatness / fan-in."""
    of_form: dict[str, Any] = {} if options.form == "noise" else {"method": method}
    if options.measure == "layerwise":
        of_form |= {"measure": "layerwise", "norm_power": 1}  # ‖W‖, not its square
    options = argparse.Namespace(**{**vars(options), "strength": options.strength / WEIGHT})
    return common.fam_loss(lambda z, y: WEIGHT * dice_loss(z, y), model, options, **of_form)


def main(arguments: Sequence[str] | None = None) -> common.Log:
    parser = common.parser(
        __doc__, epochs=200, batch=1, lr=1e-4, weight_decay=0.0, strength=0.1, layer="decode"
    )
    parser.add_argument(
        "--measure", choices=("layerwise", "neuronwise"), default="layerwise", help="of flatness"
    )
    options = common.settled(parser, arguments, batch=1)
    if options.form == "fisher" or (options.form, options.measure) == ("noise", "layerwise"):
        parser.error(
            "--form fisher has no meaning for the Dice loss; --form noise needs --measure neuronwise"
        )
    if options.smoke:
        parts = common.Parts(*(spheres() for _ in common.Parts._fields))
        model = networks.LinearLatentAutoencoder((16, 16, 16), (4, 8, 8), latent=8)
    else:
        training = Volumes(options.data / "train")
        parts = common.Parts(
            *common.hold_out(training, training, HELD_OUT, options.seed), Volumes(options.data / "test")
        )
        model = networks.LinearLatentAutoencoder(SIZE, CHANNELS)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    criterion = fam_loss(model, options)
    optimizer = torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return common.train("skull_reconstruction", model, parts, criterion, optimizer, schedule, options, dice)


if __name__ == "__main__":
    main()
