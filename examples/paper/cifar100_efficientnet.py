"""CIFAR100 with EfficientNet-B7 from ImageNet weights: Adam at 1e-6, 200 epochs, the relative flatness of the head.

    python examples/paper/cifar100_efficientnet.py                           # published settings, FAM on 500 -> 100
    python examples/paper/cifar100_efficientnet.py --layer 1 --form fisher   # on 1000 -> 500, the layer that was meant
    python examples/paper/cifar100_efficientnet.py --smoke                   # a few steps on generated images

torchvision downloads the weights. The classifier is EfficientNet's 1000 ImageNet outputs, then 1000 -> 500 -> 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import image_data
import networks
import torch
from torch import nn


def build(smoke: bool) -> nn.Sequential:
    """The network with its layers "0" (to 1000), "1" and "2", the head."""
    if smoke:
        body: nn.Module = networks.small_efficientnet()
    else:
        models = common.need("torchvision.models", "torchvision", "EfficientNet-B7")
        body = models.efficientnet_b7(weights=models.EfficientNet_B7_Weights.IMAGENET1K_V1)
    return nn.Sequential(body, nn.Linear(1000, 500), nn.Linear(500, 100))


def main(arguments: Sequence[str] | None = None) -> common.Log:
    parser = common.parser(__doc__, epochs=200, batch=32, lr=1e-6, weight_decay=1e-5, strength=1.0, layer="2")
    options = common.settled(parser, arguments)
    parts = common.generated((3, 32, 32), 100) if options.smoke else image_data.load("cifar100", options)
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    model = build(options.smoke).to(device)
    criterion = common.fam_loss(nn.CrossEntropyLoss(), model, options)
    optimizer = torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    return common.train("cifar100_efficientnet", model, parts, criterion, optimizer, schedule, options)


if __name__ == "__main__":
    main()
