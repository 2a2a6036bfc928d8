"""CIFAR10, CIFAR100, SVHN and FashionMNIST by torchvision, with the published augmentation and a validation part."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import Parts, hold_out, need
from torch import Tensor

VALIDATION = 5000  # images held out of the training data


class Cutout:
    """Sets a square of the image to 0, its centre anywhere (DeVries & Taylor 2017); (C, H, W) in and out."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
        half = self.length // 2
        image = image.clone()
        image[..., max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return image


class Source(NamedTuple):
    """torchvision's class, the arguments of its two parts, and how images are prepared: for both parts, and for training."""

    kind: str
    train: dict[str, Any]
    test: dict[str, Any]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    augment: Callable[[Any], tuple[list[Any], list[Any]]]
    """From torchvision.transforms: steps on the image before it is a tensor, and on the tensor."""


def _three_channels(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1)


MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_PARTS: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
SOURCES = {
    **{
        kind.lower(): Source(
            kind, *_PARTS, MEAN, DEVIATION, lambda t: ([t.RandomCrop(32, padding=4), t.RandomHorizontalFlip()], [])
        )
        for kind in ("CIFAR10", "CIFAR100")
    },
    # The published code also mirrors house numbers at random; a mirrored digit is none, so that is left out.
    "svhn": Source(
        "SVHN", {"split": "train"}, {"split": "test"}, MEAN, DEVIATION,
        lambda t: ([t.AutoAugment(t.AutoAugmentPolicy.SVHN), t.RandomCrop(32, padding=4)], [Cutout(16)]),
    ),
    "fashion_mnist": Source(
        "FashionMNIST", *_PARTS, (0.5,) * 3, (0.5,) * 3, lambda t: ([], [Cutout(16)])
    ),
}  # fmt: skip


def load(name: str, options: argparse.Namespace, augment: bool = True) -> Parts:
    """3x32x32 images; downloaded to options.data when they are not there."""
    source = SOURCES[name]
    datasets = need("torchvision.datasets", "torchvision", f"The data set {source.kind}")
    t = need("torchvision.transforms", "torchvision", "Augmentation")
    grey = [t.Resize(32), _three_channels] if source.kind == "FashionMNIST" else []
    on_image, on_tensor = source.augment(t)
    plain = t.Compose([t.ToTensor(), *grey, t.Normalize(source.mean, source.deviation)])
    varied = t.Compose(
        [*on_image, t.ToTensor(), *grey, *on_tensor, t.Normalize(source.mean, source.deviation)]
    )
    varied = varied if augment else plain
    kind = getattr(datasets, source.kind)
    train, same, test = (
        kind(options.data, download=True, transform=transform, **part)
        for part, transform in ((source.train, varied), (source.train, plain), (source.test, plain))
    )
    return Parts(*hold_out(train, same, VALIDATION, options.seed), test)
