"""What the two processes of tests/loss/test_attention_hook_distributed.py do (spawned processes import it by name)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from sharded_runs import flat, full, inner, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fam_ext import FAMLoss, UnsupportedError

HALF, STEPS, RATE, STRENGTH = 3, 2, 0.2, 0.1
Wrap = Callable[[nn.Module], nn.Module]


class Network(nn.Module):
    """A layer, attention and a head; `separate`: keys and values of sizes of their own; `recompute`: checkpointing, reentrant or
    not."""

    def __init__(self, separate: bool = False, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"kdim": 3, "vdim": 2} if separate else {}
        self.first = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **sizes)
        self.head = nn.Linear(4, 3)
        self.separate, self.recompute = separate, recompute
        self.double()

    def inner(self, x: Tensor) -> Tensor:
        query = torch.tanh(self.first(x))
        keys, values = (x[..., :3], x[..., :2]) if self.separate else (query, query)
        z: Tensor = self.attention(query, keys, values, need_weights=False)[0]
        return z

    def forward(self, x: Tensor) -> Tensor:
        reentrant = self.recompute
        z = (
            self.inner(x)
            if reentrant is None
            else checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)
        )
        out: Tensor = self.head(torch.sin(z)).flatten(0, 1)
        return out


NETWORKS: dict[str, Callable[[], Network]] = {
    "packed": Network,
    "separate": lambda: Network(separate=True),
    "checkpointed": lambda: Network(recompute=False),
    "checkpointed, reentrant": lambda: Network(recompute=True),
}
EACH = ["first", "attention", "head"]
LAYOUTS: dict[str, Wrap] = {
    "DDP": DistributedDataParallel,
    "FSDP2, one group": shard([]),
    "FSDP2, freed": shard([], reshard_after_forward=True),
    "FSDP2, each apart": shard(EACH),
    "FSDP1": flat([]),
    "FSDP1, attention apart": flat(["attention"]),
}
CASES = [
    (layout, network)
    for layout in LAYOUTS
    for network in NETWORKS
    # torch's own limit, with or without noise: a checkpoint cannot hold an attention that is a group of FSDP2
    if (layout, network) != ("FSDP2, each apart", "checkpointed")
]


def batch(rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(10 + rank)
    return torch.randn(HALF, 5, 4, dtype=torch.float64), torch.randint(0, 3, (HALF * 5,))


def noisy(network: Any) -> FAMLoss:
    return FAMLoss(nn.CrossEntropyLoss(), inner(network.attention), STRENGTH, method="noise")


def alone(network: Network, strength: float = STRENGTH) -> tuple[list[list[float]], list[Tensor]]:
    """Losses of both ranks' steps, and the weights after them, of one process: gradients are the mean over ranks."""
    criteria = [noisy(network) for _ in range(2)]
    for criterion in criteria:
        criterion.strength = strength
        criterion.detach()
    random = [torch.Generator().manual_seed(rank).get_state() for rank in range(2)]
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    losses: list[list[float]] = [[], []]
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rank, criterion in enumerate(criteria):
            x, y = batch(rank)
            criterion.attach()
            torch.set_rng_state(random[rank])
            loss = criterion(network(x), y)
            (loss / 2).backward()
            random[rank] = torch.get_rng_state()
            criterion.detach()
            losses[rank].append(loss.item())
        optimizer.step()
    return losses, [full(p) for p in network.parameters()]


def steps(
    network: Network, wrap: Wrap, rank: int, made_first: bool = False
) -> tuple[list[float], list[Tensor]]:
    """The same of one of two processes; `made_first`: the criterion is older than the wrapper."""
    criterion = noisy(network) if made_first else None
    model = wrap(network)
    criterion = criterion or noisy(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y = batch(rank)
    torch.manual_seed(rank)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    criterion.detach()
    whole = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if whole else nullcontext():
        return losses, [full(p) for p in network.parameters()]


def refusals(rank: int) -> list[str]:
    """The messages where out_proj is a group of FSDP2, which nothing gathers, and under tensor parallelism."""
    apart, split = Network(), Network()
    messages = []
    for network, model in (
        (apart, shard(["attention.out_proj"])(apart)),
        (split, distribute_module(split, init_device_mesh("cpu", (2,)))),
    ):
        criterion = noisy(network)
        x, _ = batch(rank)
        try:
            model(x) if network is apart else network.attention(x, x, x)
        except UnsupportedError as error:
            messages.append(str(error))
        criterion.detach()
    return messages


def two_processes(rank: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {
        (layout, network): steps(NETWORKS[network](), LAYOUTS[layout], rank) for layout, network in CASES
    }
    for layout, wrap in LAYOUTS.items():
        results[f"made first, {layout}"] = steps(Network(), wrap, rank, made_first=True)
    results["refused"] = refusals(rank)
    return results
