"""What the two processes of tests/loss/test_noise_hook_stacks.py do (spawned processes import it by name), and its network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fam_ext import FAMLoss

HALF, STRENGTH = 4, 1e-3


class Network(nn.Module):
    """A linear layer, a convolution and a head; `attention` puts torch's attention behind the first two."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.head = nn.Linear(3, 8), nn.Conv1d(2, 4, 3), nn.Linear(8, 3)
        self.attention = attention

    def body(self, x: Tensor) -> Tensor:
        z = self.conv(torch.tanh(self.first(x)).reshape(len(x), 2, 4))
        if self.attention:
            z = F.scaled_dot_product_attention(*(z[:, None],) * 3)[:, 0]
        return z.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.sin(self.body(x)))
        return out


def batch(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs, and for targets the outputs without noise: the term of first order vanishes, so that few draws decide."""
    torch.manual_seed(1)
    x = torch.randn(2 * HALF, 3)
    with torch.no_grad():
        return x, network(x)


def noisy(network: nn.Module, strength: Any = STRENGTH, **options: Any) -> FAMLoss:
    return FAMLoss.for_model(nn.MSELoss(), network, "*", strength=strength, method="noise", **options)


def gradients(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def draw_many(network: nn.Module, model: Any, x: Tensor, y: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Losses, and gradients of all parameters, of independent draws."""
    criterion = noisy(network)
    losses, grads = [], []
    for _ in range(draws):
        network.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(network))
    return torch.stack(losses), torch.stack(grads)


def data_parallel(rank: int, draws: int) -> tuple[Tensor, Tensor]:
    """Losses of this process and the gradients after all-reduce, for its half of the batch; its own random numbers."""
    network = Network()
    x, y = batch(network)
    model = DistributedDataParallel(network)
    rows = slice(rank * HALF, (rank + 1) * HALF)
    torch.manual_seed(100 + rank)
    return draw_many(network, model, x[rows], y[rows], draws)
