"""Random networks, layers and criteria, with kappa of a layer from the full float64 Hessian of the criterion by its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from full_hessian import from_traces
from fuzz_draws import Draws, Kwargs
from torch import Tensor, nn

from fam_ext.layers.linear_map import LinearMap

D = torch.float64


class LayerNorm(nn.Module):
    """Written out: torch's own layer_norm has a wrong third derivative, and the oracle must not."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        result: Tensor = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return result


class BatchNorm(nn.Module):
    """Of (B, C), by the batch's statistics, written out; `held` takes them for constants."""

    held = False

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
        if self.held:
            mean, variance = mean.detach(), variance.detach()
        result: Tensor = (x - mean) * (variance + 1e-5).rsqrt()
        return result


# what follows a hidden layer: how it is called, and how the oracle calls it
TAILS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "tanh": (lambda n: nn.Tanh(), lambda n: nn.Tanh()),
    "gelu": (lambda n: nn.GELU(), lambda n: nn.GELU()),
    "softplus": (lambda n: nn.Softplus(), lambda n: nn.Softplus()),
    "layer_norm": (lambda n: nn.LayerNorm(n, elementwise_affine=False), lambda n: LayerNorm()),
    "batch_norm": (
        lambda n: nn.BatchNorm1d(n, affine=False, track_running_stats=False),
        lambda n: BatchNorm(),
    ),
}


class Outputs(nn.Module):
    """(B, T, O) as cross-entropy takes it: classes second, or one row for each token."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, z: Tensor) -> Tensor:
        if self.how == "transposed":
            return z.transpose(1, -1) if z.dim() > 2 else z
        return z.flatten(0, -2) if self.how == "rows" else z


class Network:
    """`model` is what is called, `oracle` the same function with derivatives that are right; `layer` names the layer."""

    def __init__(self, parts: list[Any], at: int, x: Tensor) -> None:
        pairs = [p if isinstance(p, tuple) else (p, p) for p in parts]
        self.model = nn.Sequential(*(a for a, _ in pairs)).to(D)
        self.oracle = nn.Sequential(*(b for _, b in pairs)).to(D)
        self.x = x.to(D).requires_grad_()
        self.at = at
        self.layer: Any = self.model[at]
        self.parts = 0.0  # of the latest kappa: the sum of the sizes of what it adds up
        with torch.no_grad():
            self.outputs = self.oracle(self.x)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), self.x]

    def before(self) -> Tensor:
        result: Tensor = self.oracle[: self.at](self.x)
        return result

    def tail(self, z: Tensor) -> Tensor:
        result: Tensor = self.oracle[self.at + 1 :](z)
        return result

    def hessian(self, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, LinearMap]:
        """(rows, rows of I, rows, rows of I) by the canonical weight, its rows, and the map; differentiable."""
        layer_map, phi = LinearMap("oracle", self.layer), self.before()
        shape = layer_map.canonical(self.layer.weight).shape

        def of_rows(rows: Tensor) -> Tensor:
            w = layer_map.to_module(rows.reshape(shape), self.layer.weight.shape)
            return loss(self.tail(torch.func.functional_call(self.layer, {"weight": w}, (phi,))))

        rows = layer_map.canonical(self.layer.weight).flatten(0, 1)
        return torch.func.hessian(of_rows)(rows), rows, layer_map

    def kappa(self, loss: Callable[[Tensor], Tensor], settings: Kwargs) -> Tensor:
        hessian, rows, layer_map = self.hessian(loss)
        if not settings.get("curvature_grad", True):
            hessian = hessian.detach()
        measure, power = settings.get("measure", "neuronwise"), settings.get("norm_power", 2)
        if measure == "layerwise_eigenvalue":
            square = hessian.reshape(rows.numel(), rows.numel())
            kappa = torch.linalg.eigvalsh(square)[-1] * rows.square().sum().pow(power / 2)
        elif measure == "neuronwise_eigenvalue":
            own = torch.stack([hessian[s, :, s] for s in range(len(rows))])
            kappa = (torch.linalg.eigvalsh(own)[:, -1] * rows.square().sum(1)).sum()
        else:
            traces = torch.einsum("aibi->ab", hessian)
            kappa = from_traces(traces, rows, measure, layer_map.groups, power)
            sizes = torch.einsum("aibi->ab", hessian.detach().abs()).nan_to_num()
            self.parts = float(from_traces(sizes, rows.detach().abs(), measure, layer_map.groups, power))
        return kappa / (layer_map.fan_in if settings.get("normalize") else 1)


def network(d: Draws, hidden: bool) -> Network:
    """A layer inside a network, or a head; few numbers, for a full Hessian is formed."""
    samples, outputs = d.between(1, 4), d.between(1, 3)
    parts: list[Any] = []
    kind = d.one_of("linear", "linear", "tokens", "conv1d", "conv2d", "transposed")
    if kind in ("linear", "tokens"):
        fan_in = d.between(1, 3)
        x = torch.randn(samples, *([d.between(1, 3)] if kind == "tokens" else []), fan_in)
        if d.chance(0.3):
            parts += [nn.Linear(fan_in, fan_in), nn.Tanh()]
        neurons = d.between(1, 3) if hidden else outputs
        layer: nn.Module = nn.Linear(fan_in, neurons, bias=d.chance(0.7))
        flat = neurons * (x.shape[1] if kind == "tokens" else 1)
    else:
        groups = d.one_of(1, 1, 2)
        options: Kwargs = {"stride": d.between(1, 2), "groups": groups, "bias": d.chance(0.7)}
        channels, neurons = groups * d.between(1, 2), groups * (d.between(1, 2) if hidden else 1)
        rank = 2 if kind == "conv2d" else 1
        if kind == "transposed":
            layer = nn.ConvTranspose1d(channels, neurons, 2, **options)
        else:
            options |= {
                "padding": d.between(0, 1),
                "padding_mode": d.one_of("zeros", "replicate", "circular"),
            }
            layer = (nn.Conv1d, nn.Conv2d)[rank - 1](channels, neurons, d.between(1, 2), **options)
        x = torch.randn(samples, channels, *(d.between(2, 3) for _ in range(rank)))
        flat = layer(x)[0].numel()
    at = len(parts)
    parts.append(layer)
    if hidden:
        if kind == "linear":
            tail = d.one_of(*TAILS) if neurons > 1 and samples > 1 else d.one_of("tanh", "gelu", "softplus")
            makes = TAILS[tail]
            parts.append((makes[0](neurons), makes[1](neurons)))
            if tail in ("layer_norm", "batch_norm"):
                parts.append(nn.Tanh())
        else:
            parts += [nn.Tanh(), nn.Flatten()]
        parts.append(nn.Linear(flat, d.between(1, 3)))
    elif kind == "tokens":
        parts.append(Outputs(d.one_of("transposed", "rows")))
    return Network(parts, at, x)


def criterion(d: Draws, outputs: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """A criterion with a closed form, and what it takes beside the outputs, (B, O, *positions)."""
    rows, classes = (outputs.shape[0], *outputs.shape[2:]), outputs.shape[1]
    reduction = d.one_of("mean", "mean", "sum")
    kind = d.one_of("ce", "ce", "ce", "mse", "bce", "poisson", "gaussian")
    if kind == "ce":
        target = torch.randint(0, classes, rows)
        options: Kwargs = {"reduction": reduction}
        if d.chance(0.3):
            options["weight"] = torch.rand(classes, dtype=D) + 0.1
        if d.chance(0.3):
            options["label_smoothing"] = d.one_of(0.1, 1.0)
        if d.chance(0.3):
            target.view(-1)[1::2] = -100
        if d.chance(0.2):
            target = torch.rand(outputs.shape, dtype=D)
        return nn.CrossEntropyLoss(**options), (target,)
    target = torch.rand(outputs.shape, dtype=D)
    if kind == "mse":
        return d.one_of(nn.MSELoss(reduction=reduction), F.mse_loss), (target,)
    if kind == "bce":
        weight = torch.rand(outputs.shape[1:], dtype=D) if d.chance(0.4) else None
        positive = torch.rand(outputs.shape[1:], dtype=D) + 0.5 if d.chance(0.4) else None
        return nn.BCEWithLogitsLoss(weight, reduction=reduction, pos_weight=positive), (target,)
    if kind == "poisson":
        return nn.PoissonNLLLoss(reduction=reduction), (target,)
    return nn.GaussianNLLLoss(reduction=reduction), (target, torch.rand(outputs.shape, dtype=D) + 0.1)
