"""What the two processes of tests/loss/test_one_call_distributed.py do (spawned processes import it by name)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fam_ext import FAMLoss
from fam_ext.errors import UnsupportedError

HALF = 6


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(x)))
        return out


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2 * HALF, 4, dtype=torch.float64), torch.randint(0, 3, (2 * HALF,))


def train(network: Network, model: Any, layer: str, options: dict[str, Any], rows: slice) -> list[Tensor]:
    criterion = FAMLoss(nn.CrossEntropyLoss(), getattr(network, layer), 0.4, **options)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return [p.detach() for p in network.parameters()]


def data_parallel(rank: int, layer: str, options: dict[str, Any], wrapping: dict[str, Any]) -> Any:
    """The weights after three steps, or the error's text."""
    network = Network()
    model = DistributedDataParallel(network, **wrapping)
    rows = slice(rank * HALF, (rank + 1) * HALF)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fam_ext|.*FAMLoss")
        warnings.filterwarnings("ignore", message=".*inside the network is negative")
        try:
            return train(network, model, layer, options, rows)
        except UnsupportedError as error:
            return str(error)
