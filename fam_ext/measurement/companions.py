"""Measures of a whole network that are reported beside relative flatness, over a data set.

Throughout, L is the data set's loss as the criterion has it and w the vector of all parameters (for the two SAM measures and the
gradient in them: those that require one).

- "weight_norm": |w|_F over the weights, the parameters of two or more dimensions (no biases, no scales of normalization layers).
- "fisher_rao": the Fisher-Rao norm <w, I(w) w>, I the Fisher matrix over the data and its labels, in the closed form for a
  network of K linear or convolutional layers without biases and with ReLU (or linear) activations (Liang, Poggio, Rakhlin and
  Stokes 2019, Theorem 3.1): K^2 E[<dl/dz, z>^2], z the network's output and l the loss of one sample. For other networks it is
  that closed form, not the norm.
- "pac_bayes_sharpness": 1/sigma^2 for the largest sigma with E_u[L(w + sigma u)] - L(w) <= 0.1, u standard normal, by bisection
  to 1 % of sigma with `probes` fixed draws of u (Jiang et al. 2020, who take the error rate in place of the loss; Neyshabur et
  al. 2017). 0 where no sigma up to 1e6 reaches 0.1.
- "sam_sharpness": max L(w + e) - L(w) over |e| <= radius, the maximum by one ascent step: e = radius g / |g|, g the gradient of
  the data set's loss (Foret et al. 2021).
- "adaptive_sam_sharpness": the same over |e / |w|| <= adaptive_radius, elementwise: e = adaptive_radius w^2 g / |w g| (Kwon et
  al. 2021); unchanged by rescalings of layers that leave the function unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.layers.linear_map import LAYERS
from fam_ext.measurement.batches import NAME, DataSet, batch_weight, bound

_EXCESS = 0.1
_PRECISION = 1.01  # of sigma, a ratio
_LARGEST, _SMALLEST = 1e6, 1e-12


def check_radius(caller: str, **radii: Any) -> None:
    for name, radius in radii.items():
        if isinstance(radius, bool) or not isinstance(radius, (int, float)) or not 0 < radius < math.inf:
            _checks.bad_value(caller, name, "a positive number", radius)


def weight_norm(data: DataSet) -> float:
    return float(sum(p.detach().double().square().sum() for p in data.model.parameters() if p.dim() > 1) ** 0.5)  # fmt: skip


def fisher_rao(data: DataSet) -> float:
    layers = sum(isinstance(m, LAYERS) for m in data.model.modules())
    total, samples = 0.0, 0.0
    for inputs, targets in data.pairs():
        with torch.no_grad():
            outputs = data.call(inputs)
        if not isinstance(outputs, Tensor) or outputs.dim() == 0:
            _checks.bad_type(
                NAME, "model", "one that returns a tensor of samples for 'fisher_rao'", type(outputs)
            )
        z = outputs.detach().requires_grad_()
        weight, counted = batch_weight(data.criterion, z, targets)
        if weight == 0:
            continue
        (g,) = torch.autograd.grad(data.criterion(z, targets), z)
        # the gradient of a sample's own loss: that of the mean times the number the mean divides by
        loss_hessian, _ = bound(data.criterion, z, targets)
        ignored = None if loss_hessian is None else loss_hessian.ignored()
        by_row = ignored is not None and ignored.dim() == 1
        valid = float(len(targets) - (ignored.sum() if by_row and ignored is not None else 0))
        divided = 1.0 if counted is None else (weight if by_row else float(len(targets)))
        along = (g.double() * z.detach().double()).flatten(1).sum(1) * divided
        total += float(along.square().sum())
        samples += valid
    return layers**2 * total / samples if samples else math.nan


def sam_sharpness(data: DataSet, radius: float, adaptive: bool = False) -> float:
    parameters = [p for p in data.model.parameters() if p.requires_grad]
    if not parameters:
        _checks.bad_value(NAME, "model", "one with parameters that require grad for 'sam_sharpness'", "none")
    gradients = data.gradient(parameters)
    scaled = [p.detach().abs() * g if adaptive else g for p, g in zip(parameters, gradients, strict=True)]
    norm = math.sqrt(sum(float(s.double().square().sum()) for s in scaled))
    if norm == 0:
        return 0.0
    steps = [p.detach().abs() * s if adaptive else s for p, s in zip(parameters, scaled, strict=True)]
    before = data.loss()
    with _moved(parameters, lambda k: steps[k] * (radius / norm)):
        return data.loss() - before


def pac_bayes_sharpness(data: DataSet, probes: int, generator: torch.Generator | None) -> float:
    parameters = [p for p in data.model.parameters() if p.is_floating_point()]
    before = data.loss()
    seeds = torch.randint(2**62, (probes,), generator=_cpu(generator)).tolist()

    def exceeds(sigma: float) -> bool:
        losses = []
        for seed in seeds:  # the same directions for every sigma, drawn again rather than kept
            noise = torch.Generator().manual_seed(seed)
            with _moved(parameters, lambda k, noise=noise: sigma * _normal(parameters[k], noise)):  # type: ignore[misc]
                losses.append(data.loss())
        return not sum(losses) / len(losses) - before <= _EXCESS  # nan and inf exceed

    if math.isnan(before):
        return before
    low = high = 1e-2
    while exceeds(low):
        low, high = low / 4, low
        if low < _SMALLEST:
            return math.inf
    if low == high:
        while not exceeds(high):
            low, high = high, high * 4
            if low > _LARGEST:
                return 0.0
    while high > _PRECISION * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return 1 / low**2


def _cpu(generator: torch.Generator | None) -> torch.Generator:
    """The user's generator, or one of our own: torch's global random state is left alone."""
    if generator is None or generator.device.type != "cpu":
        return torch.Generator().manual_seed(0 if generator is None else generator.initial_seed())
    return generator


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], step: Callable[[int], Tensor]) -> Iterator[None]:
    """The parameters moved by `step(k)`; their very numbers are back afterwards."""
    originals = [p.data for p in parameters]
    try:
        for k, p in enumerate(parameters):
            p.data = originals[k] + step(k)
        yield
    finally:
        for p, original in zip(parameters, originals, strict=True):
            p.data = original


Companion = Callable[[DataSet, float, float, int, "torch.Generator | None"], float]

NETWORK: dict[str, Companion] = {
    "fisher_rao": lambda data, *_: fisher_rao(data),
    "pac_bayes_sharpness": lambda data, _, __, probes, generator: pac_bayes_sharpness(
        data, probes, generator
    ),
    "sam_sharpness": lambda data, radius, *_: sam_sharpness(data, radius),
    "adaptive_sam_sharpness": lambda data, _, radius, *__: sam_sharpness(data, radius, adaptive=True),
    "weight_norm": lambda data, *_: weight_norm(data),
}
