"""What the two recipes of WRN-28-10 share: Nesterov's SGD, a learning rate that falls to a fifth three times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import image_data
import networks
import torch
from torch import nn


def main(
    name: str,
    description: str | None,
    arguments: Sequence[str] | None,
    falls: tuple[float, ...],
    **settings: Any,
) -> common.Log:
    """Train on the image set `name`; the learning rate falls after these shares of the epochs."""
    options = common.settled(common.parser(description, weight_decay=5e-4, **settings), arguments)
    parts = common.generated((3, 32, 32), 10) if options.smoke else image_data.load(name, options)
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    model = networks.WideResNet(10, **({"depth": 10, "widen": 1} if options.smoke else {})).to(device)
    criterion = common.fam_loss(nn.CrossEntropyLoss(), model, options)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, weight_decay=options.weight_decay, nesterov=True
    )
    epochs = [int(share * options.epochs) for share in falls]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, epochs, gamma=0.2)
    return common.train(f"{name}_wrn", model, parts, criterion, optimizer, schedule, options)
