"""What the processes of tests/layers/test_sharding.py do (spawned processes import it by name)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fam_ext
from fam_ext import FAMLoss, RelativeFlatness
from fam_ext.errors import UnsupportedError

HALF, STEPS, RATE = 6, 2, 0.2


class Network(nn.Module):
    """Two inner layers and a head; `recompute`: checkpointing of the inner layers, reentrant or not."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.recompute = recompute
        self.double()

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute is None:
            features = self.inner(x)
        else:
            features = checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.recompute)
        out: Tensor = self.head(features)
        return out


class ConvNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv1d(1, 3, 3, padding=1), nn.Linear(12, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.first(x.unsqueeze(1))).flatten(1))
        return out


Wrap = Callable[[nn.Module], nn.Module]


def shard(groups: Sequence[str], **options: Any) -> Wrap:
    """fully_shard on these layers, and on the network."""

    def wrap(network: nn.Module) -> nn.Module:
        for name in groups:
            fully_shard(network.get_submodule(name), **options)
        return fully_shard(network, **options)

    return wrap


def shard_and_replicate(network: nn.Module) -> nn.Module:
    """Shards over one dimension of the mesh, replicas over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return shard(["first", "second", "head"], mesh=mesh)(network)


def flat(groups: Sequence[str], **options: Any) -> Wrap:
    """FSDP1 around these layers, and around the network."""

    def wrap(network: nn.Module) -> nn.Module:
        cpu: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True, **options}
        for name in groups:
            setattr(network, name, FullyShardedDataParallel(getattr(network, name), **cpu))
        return FullyShardedDataParallel(network, **cpu)

    return wrap


EACH = ["first", "second", "head"]
LAYOUTS: dict[str, Wrap] = {
    "DDP": DistributedDataParallel,
    "one group": shard([]),
    "one group, freed": shard([], reshard_after_forward=True),
    "head apart": shard(["head"]),
    "each layer apart": shard(EACH),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("head", {}),
    "head, layerwise": ("head", {"measure": "layerwise"}),
    "head and inner layer": ("head first", {}),
    "exact": ("first", {"method": "exact"}),
    "hutchinson": ("first", {"method": "hutchinson"}),
    "ggn": ("second", {"curvature": "ggn"}),
    "ggn in all": ("first second head", {"curvature": "ggn"}),
    "fisher": ("first", {"curvature": "fisher"}),
    "noise": ("first", {"method": "noise"}),
    "noise in all": ("first second head", {"method": "noise"}),
    "eigenvalue": ("second", {"measure": "layerwise_eigenvalue"}),
}


def batch(ranks: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(ranks * HALF, 4, dtype=torch.float64), torch.randint(0, 5, (ranks * HALF,))


def criterion_for(network: nn.Module, method: str, rank: int, own_generator: bool = True) -> FAMLoss:
    names, options = METHODS[method]
    if own_generator and options.get("method") in ("noise", "hutchinson"):
        options = {**options, "generator": torch.Generator().manual_seed(rank)}
    return FAMLoss(
        nn.CrossEntropyLoss(), [inner(network.get_submodule(n)) for n in names.split()], 0.4, **options
    )


def inner(module: nn.Module) -> nn.Module:
    """The layer in FSDP1's wrapper."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module


def full(parameter: Tensor) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore[attr-defined]
    return whole.detach().clone()


def alone(
    network: nn.Module, method: str, ranks: int = 2, accumulate: int = 1, own_generator: bool = True
) -> list[Tensor]:
    """The weights after the steps of one process: the mean of what `ranks` processes compute of their parts."""
    criteria = [criterion_for(network, method, rank, own_generator) for rank in range(ranks)]
    random = [torch.Generator().manual_seed(rank).get_state() for rank in range(ranks)]
    for criterion in criteria:
        criterion.detach()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    x, y = batch(ranks)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rank, criterion in enumerate(criteria):
            rows = slice(rank * HALF, (rank + 1) * HALF)
            criterion.attach()
            torch.set_rng_state(random[rank])
            for _ in range(accumulate):
                (criterion(network(x[rows]), y[rows]) / ranks).backward()
            criterion.detach()
            random[rank] = torch.get_rng_state()
        optimizer.step()
    return [full(p) for p in network.parameters()]


def steps(
    network: nn.Module,
    model: Any,
    method: str,
    rank: int,
    ranks: int = 2,
    accumulate: int = 1,
    own_generator: bool = True,
) -> list[Tensor]:
    """The weights after the steps of one of several processes; noise from torch's own generator is seeded by rank."""
    criterion = criterion_for(network, method, rank, own_generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y = batch(ranks)
    torch.manual_seed(rank)
    rows = slice(rank * HALF, (rank + 1) * HALF)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for k in range(accumulate):
            if accumulate > 1:
                model.set_requires_gradient_sync(k == accumulate - 1)
            criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    criterion.detach()
    return [full(p) for p in network.parameters()]


def every_layout(rank: int) -> dict[tuple[str, str], list[Tensor]]:
    results = {}
    for layout, wrap in LAYOUTS.items():
        for method in METHODS:
            network = Network()
            results[layout, method] = steps(network, wrap(network), method, rank)
    return results


def two_processes(rank: int) -> dict[Any, Any]:
    """Plain steps in every layout, and what else is done with sharded models."""
    results: dict[Any, Any] = {**every_layout(rank)}
    for reentrant in (False, True):
        for method in ("noise", "noise in all", "exact"):
            network = Network(recompute=reentrant)
            try:
                taken: Any = steps(network, shard(EACH)(network), method, rank, own_generator=False)
            except UnsupportedError as error:
                taken = str(error)
            results[f"checkpointing {reentrant} {method}"] = taken
    for method in ("head", "exact", "noise"):
        network = Network()
        results[f"accumulation {method}"] = steps(network, shard(EACH)(network), method, rank, accumulate=2)
    conv = ConvNetwork()
    results["convolution"] = steps(conv, shard(["first", "head"])(conv), "noise", rank)
    results["old weights"] = {layer: old_weights(rank, layer) for layer in ("first", "second", "head")}
    results["features"] = from_features(rank)
    results["made first"] = {method: made_first(rank, method) for method in ("head", "exact", "noise in all")}
    network = Network()
    results["measured"] = measured(network, shard(EACH)(network))
    results["penalty"] = penalty(rank)
    results["low precision"] = low_precision(rank)
    results["FSDP1"] = {groups: {m: by_fsdp1(rank, groups, m) for m in METHODS} for groups in ("", "head")}
    results["FSDP1, kept"] = by_fsdp1(rank, "head", "head", sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
    results["draws"] = draws(rank)
    return results


def old_weights(rank: int, layer: str) -> list[float]:
    """A value that no backward pass follows; the value after an optimizer's step, and the one of a plain network."""
    network = Network()
    model: Any = shard(EACH)(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    measure = RelativeFlatness(nn.CrossEntropyLoss(), network.get_submodule(layer))
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    before = measure(model(x), y)
    optimizer.step()
    after = measure(model(x), y)
    measure.detach()
    plain = Network()
    plain.load_state_dict({name: full(p) for name, p in network.named_parameters()})
    expected = RelativeFlatness(nn.CrossEntropyLoss(), plain.get_submodule(layer))(plain(x), y)
    return [before.item(), after.item(), expected.item()]


def from_features(rank: int) -> list[Tensor]:
    """The weights after steps of linear_cross_entropy, with a head in a group of its own that is not called."""
    network = Network()
    network.head, head = nn.Identity(), network.head
    network.last = head
    model: Any = shard(["first", "second", "last"])(network)
    criterion = FAMLoss(nn.CrossEntropyLoss(), head, 0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y = batch()
    rows = slice(rank * HALF, (rank + 1) * HALF)
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion.linear_cross_entropy(model(x[rows]), head.weight, y[rows], head.bias).backward()
        optimizer.step()
    return [full(p) for p in network.parameters()]


def made_first(rank: int, method: str) -> list[Tensor]:
    """A criterion that is older than the groups."""
    network = Network()
    criterion = criterion_for(network, method, rank)
    model: Any = shard(EACH)(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y = batch()
    rows = slice(rank * HALF, (rank + 1) * HALF)
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return [full(p) for p in network.parameters()]


def measured(network: nn.Module, model: nn.Module) -> dict[str, float]:
    """Every measure of an inner layer and of the head, over the same batches on every process."""
    x, y = batch()
    data = list(zip(x.split(4), y.split(4), strict=True))
    measures = ("neuronwise", "trace", "layerwise_eigenvalue", "largest_eigenvalue")
    report = fam_ext.measure(model, data, ["second", "head"], nn.CrossEntropyLoss(), measures, progress=False)
    return report.as_dict()


def penalty(rank: int) -> str:
    """A criterion with a penalty on the layer's weight, which is a shard between the calls."""
    network = Network()
    model: Any = shard(EACH)(network)
    x, y = batch()

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        weight: Any = network.second.weight
        squares = (
            weight.square().sum().full_tensor() if hasattr(weight, "full_tensor") else weight.square().sum()
        )
        return nn.functional.cross_entropy(out, target) + squares

    try:
        FAMLoss(criterion, network.second, 0.4, method="exact")(model(x), y)
    except UnsupportedError as error:
        return str(error)
    return "no error"


def low_precision(rank: int) -> list[float]:
    """kappa of a head whose weights are gathered in bfloat16, and of those weights in one process."""
    network = Network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(EACH, mp_policy=policy)(network)
    x, y = batch()
    measure = RelativeFlatness(nn.CrossEntropyLoss(), network.head)
    value = measure(model(x.float()), y)
    measure.detach()
    plain = Network().bfloat16()
    expected = RelativeFlatness(nn.CrossEntropyLoss(), plain.head)(plain(x.bfloat16()), y)
    return [value.item(), expected.item()]


def by_fsdp1(rank: int, groups: str, method: str, **options: Any) -> Any:
    """The weights after the steps, or the refusal."""
    network = Network()
    model = flat(groups.split(), **options)(network)
    try:
        steps(network, model, method, rank)
    except UnsupportedError as error:
        return str(error)
    with FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().clone() for p in network.parameters()]


def draws(rank: int) -> Tensor:
    """What noise adds to the output of a layer of this rank, seeded by rank as dropout is to be."""
    network = Network()
    model = DistributedDataParallel(network)
    criterion = FAMLoss(nn.CrossEntropyLoss(), network.first, 0.4, method="noise")
    torch.manual_seed(rank)
    x, _ = batch()
    with torch.no_grad():
        torch.manual_seed(rank)
        noisy = model(x[:HALF])
        criterion.eval()
        clean = model(x[:HALF])
    difference: Tensor = noisy - clean
    return difference


def replicas(rank: int) -> dict[str, list[Tensor]]:
    """Four processes: shards and replicas of shards."""
    results = {f"both dimensions {split}": both_dimensions(rank, split) for split in (False, True)}
    for method in ("head", "exact", "ggn", "noise"):
        network = Network()
        results[method] = steps(network, shard_and_replicate(network), method, rank, ranks=4)
    return results


def both_dimensions(rank: int, split_outputs: bool) -> list[Tensor]:
    """Four processes: a head whose classes two of them split, in groups of FSDP2 over the other dimension of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    network = Network()
    by_class = (
        ColwiseParallel(use_local_output=False)
        if split_outputs
        else ColwiseParallel(output_layouts=Replicate())
    )
    parallelize_module(network, mesh["tensor"], {"head": by_class})
    model = shard(EACH, mesh=mesh["data"])(network)
    with loss_parallel() if split_outputs else nullcontext():
        return steps(network, model, "head", mesh["data"].get_local_rank())
