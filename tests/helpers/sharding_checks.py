"""What the processes of tests/layers/test_sharding.py do besides steps of training (spawned processes import it by name)."""

from __future__ import annotations

from typing import Any

import sharded_runs
import torch
from sharded_runs import EACH, RATE, Network, batch, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fam_ext import FAMLoss
from fam_ext.errors import UnsupportedError
from fam_ext.layers import sharding


def two_processes(rank: int) -> dict[Any, Any]:
    results = sharded_runs.two_processes(rank)
    results["held"], results["freed"] = settings_while_held(rank), freed_by(rank)
    results["texts"] = texts_and_exchange(rank)
    results["tied"] = tied_step(rank, True)
    return results


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(5, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(self.embedding(tokens))))
        return out


def tied_step(rank: int, sharded: bool) -> list[Tensor]:
    """Loss, kappa of the head and all gradients, of the same batch on every rank; sharded: the modules that own the weight."""
    network = Tied()
    model: Any = shard(["inner"], reshard_after_forward=True)(network) if sharded else network
    torch.manual_seed(2)
    tokens, targets = torch.randint(0, 5, (6,)), torch.randint(0, 5, (6,))
    criterion = FAMLoss(nn.CrossEntropyLoss(), network.head, 0.4)
    total = criterion(model(tokens), targets)
    total.backward()
    if sharded:
        assert sharding.owners(network.head) == sharding.owners(network.embedding) == (network,)
    assert criterion.last.flatness is not None
    gradients = [sharded_runs.full(p.grad) for p in network.parameters() if p.grad is not None]
    return [total.detach(), criterion.last.flatness, *gradients]


def settings_while_held(rank: int) -> list[list[bool]]:
    """FSDP2's settings of two models before `held`, within it and after it; the first one's are not the defaults."""
    models: list[Any] = [shard(EACH)(Network()) for _ in range(2)]
    x, _ = batch()
    for model in models:
        model(x)  # FSDP2 sets itself up
    models[0].set_requires_gradient_sync(False)
    models[0].set_reshard_after_backward(False)
    models[0].set_is_last_backward(False)

    def settings() -> list[bool]:
        states = [model._get_fsdp_state() for model in models]
        layers = [model.get_submodule(name) for model in models for name in EACH]
        groups = [group for layer in layers for group in sharding._groups(layer._get_fsdp_state())]
        return [
            *(getattr(g, name) for g in groups for name in ("reduce_grads", "reshard_after_backward")),
            *(state._state_ctx.is_last_backward for state in states),
        ]

    before = settings()
    with sharding.held():
        within = settings()
    return [before, within, settings()]


def freed_by(rank: int) -> dict[str, bool]:
    """Whether a gathered weight is a shard again after steps of optimizers."""
    network = Network()
    model: Any = shard(EACH)(network)
    own = torch.optim.SGD(model.parameters(), lr=RATE)
    number = nn.Parameter(torch.ones(()))
    other = torch.optim.SGD([number], lr=RATE)
    result = {}

    def within_a_backward_pass() -> None:
        doubled = 2 * number
        doubled.register_hook(lambda gradient: own.step())
        doubled.backward()

    for name, step in (("other", other.step), ("within", within_a_backward_pass), ("own", own.step)):
        sharding.gather(sharding.owners(network.second))
        step()
        result[name] = sharding.is_dtensor(network.second.weight)
    return result


def texts_and_exchange(rank: int) -> dict[str, Any]:
    """Refusals of DTensors, and which of the arguments of `exchange` it leaves."""
    network = Network()
    shard(EACH)(network)
    given = torch.ones(2), network.second.weight, None
    plain, weight, nothing = sharding.exchange(network.second, *given)
    mesh = init_device_mesh("cpu", (2,))
    whole = DTensor.from_local(torch.ones(2), mesh, [Replicate()], run_check=False)
    part = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    texts = []
    for refused in (
        lambda: sharding.add("caller", part.sum(), torch.ones(())),
        lambda: sharding.check_local("caller", torch.ones(2), whole),
    ):
        try:
            refused()
        except UnsupportedError as error:
            texts.append(str(error))
    left = plain is given[0] and nothing is None and not sharding.is_dtensor(weight)
    return {"texts": texts, "left": left, "shape": tuple(weight.shape)}
