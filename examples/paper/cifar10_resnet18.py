"""CIFAR10 with ResNet-18: SGD, cosine schedule, 250 epochs, the relative flatness of the head.

python examples/paper/cifar10_resnet18.py                 # published settings
python examples/paper/cifar10_resnet18.py --strength 0    # the baseline, all else equal
python examples/paper/cifar10_resnet18.py --smoke         # a few steps on generated images
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import image_data
import networks
import torch
from torch import nn


def main(arguments: Sequence[str] | None = None) -> common.Log:
    parser = common.parser(__doc__, epochs=250, batch=64, lr=0.03, weight_decay=5e-4, strength=0.1)
    options = common.settled(parser, arguments)
    parts = common.generated((3, 32, 32), 10) if options.smoke else image_data.load("cifar10", options)
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    model = networks.ResNet18(10, width=8 if options.smoke else 64).to(device)
    criterion = common.fam_loss(nn.CrossEntropyLoss(), model, options)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    return common.train("cifar10_resnet18", model, parts, criterion, optimizer, schedule, options)


if __name__ == "__main__":
    main()
