"""Layers under tensor parallelism in gloo processes, for several test files (spawned processes import it by name)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from two_processes import in_processes

from fam_ext import FAMLoss, RelativeFlatness
from fam_ext.errors import UnsupportedError
from fam_ext.hessian import split_noise
from fam_ext.hessian.noise_draws import Draw
from fam_ext.layers import collectives

CLASSES, ROWS = 5, 6


class Network(nn.Module):
    """Two inner layers and a head."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.head.weight.mul_(scale)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


def plan(layout: str) -> dict[str, Any]:
    """How parallelize_module splits the layers."""
    head: dict[str, Any] = {
        "classes": {"head": ColwiseParallel(output_layouts=Replicate())},
        "classes, split outputs": {"head": ColwiseParallel(use_local_output=False)},
        "inputs": {"head": RowwiseParallel(input_layouts=Replicate())},
        "all layers": {
            "first": ColwiseParallel(),
            "second": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
        },
    }
    return head[layout]


LAYOUTS = ("classes", "classes, split outputs", "inputs", "all layers")
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.1, 0.7], dtype=torch.float64)
Make = Callable[[], nn.Module]
CRITERIA: dict[str, tuple[Make, dict[str, Any]]] = {
    "mean": (nn.CrossEntropyLoss, {}),
    "sum, ignored": (lambda: nn.CrossEntropyLoss(reduction="sum", ignore_index=2), {}),
    "weighted": (lambda: nn.CrossEntropyLoss(weight=WEIGHT), {}),
    "by row": (lambda: nn.CrossEntropyLoss(reduction="none"), {}),
    "fan-in": (nn.CrossEntropyLoss, {"normalize": "fan_in"}),
    "held": (nn.CrossEntropyLoss, {"curvature_grad": False}),
    "layerwise": (nn.CrossEntropyLoss, {"measure": "layerwise"}),
    "layerwise, norm": (nn.CrossEntropyLoss, {"measure": "layerwise", "norm_power": 1}),
    "trace": (nn.CrossEntropyLoss, {"measure": "trace"}),
}
WHOLE: dict[str, tuple[Make, dict[str, Any]]] = {  # not under loss_parallel
    "smoothed": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), {}),
    "probabilities": (nn.CrossEntropyLoss, {}),
    "squares": (nn.MSELoss, {}),
    "binary": (lambda: nn.BCEWithLogitsLoss(reduction="sum"), {"measure": "layerwise"}),
}
CASES = [
    *((layout, name) for layout in LAYOUTS for name in CRITERIA),
    *((layout, name) for layout in LAYOUTS if "split" not in layout for name in WHOLE),
]


def batch(name: str, tokens: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    shape = (ROWS, tokens) if tokens else (ROWS,)
    x = torch.randn(*shape, 4, dtype=torch.float64)
    if name in ("squares", "binary", "probabilities"):
        return x, torch.rand(*shape, CLASSES, dtype=torch.float64).softmax(-1)
    return x, torch.randint(0, CLASSES, shape)


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def step(model: Any, name: str) -> list[Tensor]:
    """Loss, kappa and gradients of a step."""
    make, options = {**CRITERIA, **WHOLE}[name]
    criterion = FAMLoss(make(), model.head, 0.4, **options)
    x, y = batch(name)
    loss = criterion(model(x), y)
    loss.sum().backward()
    assert criterion.plan.method == "closed_form"  # type: ignore[union-attr]
    kappa: Any = criterion.last.flatness
    criterion.detach()
    return [whole(loss), kappa, *(whole(p.grad) for p in model.parameters())]


def context(layout: str) -> AbstractContextManager[Any]:
    return loss_parallel() if "split" in layout else nullcontext()


def split(layout: str, network: nn.Module | None = None) -> Any:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(Network() if network is None else network, mesh, plan(layout))


def whole_outputs(rank: int) -> dict[Any, Any]:
    """Steps and noise where every process has all outputs; of four processes the last has no class."""
    results: dict[Any, Any] = {
        case: step(split(case[0]), case[1]) for case in CASES if "split" not in case[0]
    }
    results["noise"] = {(layout, case): noise(split(layout), *case) for layout, case in NOISE_CASES}
    return results


def heads(rank: int) -> dict[Any, Any]:
    results = whole_outputs(rank)
    for layout, name in CASES:
        if "split" in layout:
            with context(layout):
                results[layout, name] = step(split(layout), name)
    for layout in LAYOUTS:
        results["confident", layout] = confident(split(layout, Network(20.0).float()), layout)
        results["tokens", layout] = tokens(split(layout), layout)
        results["made first", layout] = made_first(layout)
        if layout in ("classes", "inputs"):
            results["precise", layout] = precise(split(layout, Network().float()))
    results["refused"] = refusals()
    results["sums"] = sums(rank)
    results["twice"] = called_twice(rank)
    results["odd"], results["large"] = split_odd(rank), large_half(rank)
    return results


def confident(model: Any, layout: str) -> list[Tensor]:
    """Predictions so confident that the textbook form has no digit left in float32."""
    criterion = FAMLoss(nn.CrossEntropyLoss(), model.head, 1.0)
    dtype = model.first.weight.dtype
    with context(layout):
        x, y = batch("mean")
        criterion(model(3 * x.to(dtype)), y).backward()
    kappa: Any = criterion.last.flatness
    criterion.detach()
    return [kappa, *(whole(p.grad) for p in model.parameters())]


def precise(model: Any) -> tuple[Tensor, Tensor]:
    """kappa of a float32 head under float64 weights of the loss, and the same by hand in float64 from the same numbers."""
    loss = nn.BCEWithLogitsLoss(pos_weight=WEIGHT)
    criterion = RelativeFlatness(loss, model.head)
    x, y = batch("binary")
    out = model(x.float())
    kappa = criterion(out, y)
    criterion.detach()
    phi = torch.tanh(model.second(torch.tanh(model.first(x.float())))).detach().double()
    p = out.detach().double().sigmoid()
    curvature = (1 + (WEIGHT - 1) * y) * p * (1 - p) / y.numel()
    squares = whole(model.head.weight).double().square().sum(1)
    return kappa.detach(), (curvature * squares * phi.square().sum(1, keepdim=True)).sum()


def tokens(model: Any, layout: str) -> list[Tensor]:
    """Shares by sample, for several rows each, some of which are left out; and their gradients."""
    measure = RelativeFlatness(nn.CrossEntropyLoss(), model.head)
    x, y = batch("tokens", tokens=3)
    with context(layout):
        out = model(x)
        kept = out.flatten(0, 1) if "split" in layout else out[:, 1:].flatten(0, 1)
        value = measure(kept, y.flatten() if "split" in layout else y[:, 1:].flatten(), per_sample=True)
        value.square().sum().backward()
    measure.detach()
    return [value.detach(), *(whole(p.grad) for p in model.parameters() if p.grad is not None)]


def made_first(layout: str) -> list[Tensor]:
    """A step with a criterion that is older than the split, whose hook sees the output before it is communicated."""
    model: Any = Network()
    criterion = FAMLoss(nn.CrossEntropyLoss(), model.head, 0.4)
    split(layout, model)
    x, y = batch("mean")
    with context(layout):
        loss = criterion(model(x), y)
        loss.backward()
    kappa: Any = criterion.last.flatness
    return [whole(loss), kappa, *(whole(p.grad) for p in model.parameters())]


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except UnsupportedError as error:
        return str(error)
    return "no error"


def refusals() -> dict[Any, str]:
    """The texts of errors, by what was tried."""
    found: dict[Any, str] = {}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "exact": ("first", {"method": "exact"}),
        "hutchinson": ("first", {"method": "hutchinson"}),
        "ggn": ("second", {"curvature": "ggn"}),
        "fisher": ("first", {"curvature": "fisher"}),
        "exact head": ("head", {"method": "exact"}),
    }
    for name, (layer, options) in methods.items():
        for layout in ("classes", "all layers"):
            found[layout, name] = error_of(functools.partial(inside, layout, layer, options))
    x, y = batch("mean")

    def mixed() -> None:
        """The layer's own outputs, of which each process keeps its classes alone."""
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        model: Any = parallelize_module(Network(), mesh, {"head": ColwiseParallel()})
        FAMLoss(nn.CrossEntropyLoss(), model.head, 0.4)(model(x), y % 2)

    def differences() -> None:
        model = split("classes")
        criterion = FAMLoss(nn.CrossEntropyLoss(), model.head, 0.4, method="finite_difference")
        criterion(model(x), y, closure=lambda: nn.functional.cross_entropy(model(x), y))

    def early() -> None:
        network = Network()
        criterion = FAMLoss(nn.CrossEntropyLoss(), network.head, 0.4, method="noise")
        criterion(split("classes", network)(x), y)

    found |= {
        name: error_of(run)
        for name, run in (("shard", mixed), ("differences", differences), ("early", early))
    }
    return found


def inside(layout: str, layer: str, options: dict[str, Any]) -> None:
    model = split(layout)
    criterion = FAMLoss(nn.CrossEntropyLoss(), getattr(model, layer), 0.4, **options)
    x, y = batch("mean")
    criterion(model(x), y)


NOISE_CASES = [
    (layout, case)
    for layout in ("classes", "inputs", "all layers")
    for case in (
        ("head", 0, None),
        ("head", 3, None),
        ("head", 3, False),
        ("first", 0, None),
        ("second", 3, None),
    )
]


def noise(
    model: Any, layer: str, tokens: int, per_sample: bool | None, rank: int | None = None
) -> list[Tensor]:
    """Loss and gradients under noise; each process is seeded for itself, the first one's draw is all of them's."""
    own = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    split_up = isinstance(getattr(model, layer).weight, DTensor)
    generator = torch.Generator().manual_seed(own if split_up else 0)
    criterion = FAMLoss(
        nn.CrossEntropyLoss(),
        getattr(model, layer),
        0.4,
        method="noise",
        generator=generator,
        per_sample_probes=per_sample,
    )
    x, y = batch("tokens", tokens)
    loss = criterion(model(x).reshape(-1, CLASSES), y.flatten())
    loss.backward()
    criterion.detach()
    return [whole(loss), *(whole(p.grad) for p in model.parameters())]


def twice(model: Any, seed: int, per_sample: bool | None) -> list[Tensor]:
    """Loss and gradients under noise in a layer that is called twice."""
    generator = torch.Generator().manual_seed(seed)
    criterion = FAMLoss(
        nn.CrossEntropyLoss(),
        model.second,
        0.4,
        method="noise",
        generator=generator,
        per_sample_probes=per_sample,
    )
    x, y = batch("mean")
    try:
        hidden = torch.tanh(model.second(torch.tanh(model.first(x))))
        loss = criterion(model.head(torch.tanh(model.second(hidden))), y)
    finally:
        criterion.detach()
    loss.backward()
    return [whole(loss), *(whole(p.grad) for p in model.parameters())]


def called_twice(rank: int) -> list[Any]:
    """What is refused with draws by sample, and the numbers of a shared draw."""

    def model() -> Any:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        rowwise = RowwiseParallel(input_layouts=Replicate())
        return parallelize_module(Network(), mesh, {"second": rowwise})

    return [error_of(lambda: twice(model(), rank, None)), *twice(model(), rank, False)]


def odd(layer: nn.Module, tokens: int, rank: int) -> list[Tensor]:
    """Loss and gradients under noise in a layer of five features, of which the first process has three."""
    generator = torch.Generator().manual_seed(rank)
    criterion = FAMLoss(nn.MSELoss(), layer, 0.4, method="noise", generator=generator)
    torch.manual_seed(1)
    x = torch.randn(*((ROWS, tokens, 5) if tokens else (ROWS, 5)), dtype=torch.float64, requires_grad=True)
    loss = criterion(layer(x), torch.zeros(*x.shape[:-1], 3, dtype=torch.float64))
    loss.backward()
    criterion.detach()
    return [whole(loss), whole(x.grad), *(whole(p.grad) for p in layer.parameters())]


def odd_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def split_odd(rank: int) -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    style = RowwiseParallel(input_layouts=Replicate())
    return [odd(parallelize_module(odd_layer(), mesh, style), tokens, rank) for tokens in (0, 3)]


def large_half(rank: int) -> Tensor:
    """phi + |phi| a in float16, where |phi|^2 is no number any more."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    phi = torch.full((2, 4), 300.0, dtype=torch.float16)
    drawn = Draw(torch.ones(2, 1, 4, dtype=torch.float16), None, None)
    features = DTensor.from_local(phi, mesh, [Replicate()], run_check=False)
    return whole(split_noise.perturb("caller", drawn, features, 0.5))


def sums(rank: int) -> list[Tensor]:
    """(sum_r a_r b)^2 of shares a_r = (r + 1) t and b = 3 u: value, gradients by t and u."""
    group = torch.distributed.group.WORLD
    t, u = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 5.0))
    total = collectives.total((rank + 1) * t * collectives.shared(3 * u, group), group)
    total.square().backward()
    assert t.grad is not None and u.grad is not None
    return [total.detach(), t.grad, u.grad]


@functools.cache
def results(ranks: int) -> list[dict[Any, Any]]:
    """What each of the processes has computed; they run once in a test session."""
    return in_processes(ranks, heads if ranks == 2 else whole_outputs)
