"""Draws of the noise that fam_ext.hessian.noise adds: signs, directions and places of the kernel, by sample or shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.hessian import noise_passes
from fam_ext.layers.linear_map import LinearMap

# Different a in a batch, where W a costs a product: samples with the same a still have uncorrelated draws, by b. Estimates of
# kappa spread no more with 16 than with one for each of 64 samples.
DIFFERENT = 16
# the signs that the bits of a byte stand for, (256, 8)
_BYTE_SIGNS = torch.tensor(
    [[1.0 - 2 * (byte >> k & 1) for k in range(8)] for byte in range(256)], device="cpu"
)


class Draw(NamedTuple):
    """eps / sqrt(2 strength) = a b^T of S samples, S = 1 where all share it. What :func:`draw` returns requires no grad.

    left: a, (S, groups, I); where the output is perturbed (at most DIFFERENT, groups, I), and sample i has row i % len.
    channels: b, or its factor r of the input channels, (S, groups, C/groups); None: b = phi / |phi|.
    place: b's factor of the kernel, sqrt(K) u, (S, groups, 1, *kernel), where the output is perturbed.
    positions: (S, N), 0 for rows of linear layers that get no noise; None: all rows get it.
    """

    left: Tensor
    channels: Tensor | None
    place: Tensor | None
    positions: Tensor | None = None

    @property
    def samples(self) -> int:
        """S."""
        return len(self.left if self.channels is None else self.channels)


def on_input(layer: LinearMap) -> bool:
    """Whether it is the layer's input that is perturbed rather than its output."""
    return layer.linear or math.prod(layer.module.kernel_size) == 1


def one_row(layer: LinearMap, features: Tensor) -> bool:
    """Whether each sample is one row of a linear layer."""
    return layer.linear and features.dim() <= 2


def draw(
    layer: LinearMap, features: Tensor, generator: torch.Generator | None = None, shared: bool = False
) -> Draw:
    """Random numbers for the samples of `features`, of their device and dtype.

    `generator` None is the device's global one. With `shared` all samples have the same eps.
    """
    samples = 1 if shared else layer.samples(features.shape)
    groups, channels = layer.groups, layer.inputs // layer.groups
    if one_row(layer, features) and not shared:
        return Draw(signs((samples, 1, channels), features, generator), None, None)
    if on_input(layer):
        both = signs((2, samples, groups, channels), features, generator)
        return Draw(both[0], both[1], None)
    of_left, of_channels = (min(samples, DIFFERENT), groups, layer.fan_in), (samples, groups, channels)
    count = math.prod(of_left)
    both = signs((count + math.prod(of_channels),), features, generator)
    chosen = kernel_places(layer, samples, features, generator)
    return Draw(both[:count].reshape(of_left), both[count:].reshape(of_channels), chosen)


def kernel_places(layer: LinearMap, samples: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """sqrt(K) u for u that picks one of the K places of the kernel, (S, groups, 1, *kernel)."""
    kernel, groups = layer.module.kernel_size, layer.groups
    places = math.prod(kernel)
    index = torch.randint(0, places, (samples, groups, 1), device=like.device, **_given(generator))
    chosen = like.new_zeros(samples, groups, places).scatter_(2, index, math.sqrt(places))
    return chosen.reshape(samples, groups, 1, *kernel)


def along(features: Tensor, left: Tensor, signs: Tensor) -> Draw:
    """The eps of a draw without b, whose a was multiplied with |phi| of these features, so that it applies to others, too.

    b = u + (1 - u u^T) signs with u = phi / |phi|: b^T phi = |phi|, and E[b b^T] = 1. It is differentiable in phi, and must be:
    what a |phi| has of the derivative of phi is that along u, and the rest comes from here.
    """
    phi = features.reshape(left.shape)
    unit = F.normalize(phi, dim=2, eps=torch.finfo(phi.dtype).tiny)
    return Draw(left, signs + (1 - (unit * signs).sum(2, keepdim=True)) * unit, None)


def signs(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """+1 and -1 with equal probability, of the device and dtype of `like`."""
    if type(like) is Tensor and like.device.type == "cpu" and not torch.compiler.is_compiling():
        # 56 signs from one random number: the CPU's generator is what costs
        count, size = math.prod(shape), tuple(shape)
        numbers = torch.empty(-(-count // 56), dtype=torch.int64, device="cpu").random_(generator=generator)
        made = noise_passes.signs(numbers, size, like)
        if made is not None:
            return made
        # seven of eight bytes: the last holds the number's sign, which is never set
        bytes_ = numbers.view(torch.uint8).reshape(-1, 8)[:, :7]
        return F.embedding(bytes_.int(), _BYTE_SIGNS).flatten()[:count].reshape(size).to(like.dtype)
    bits = torch.randint(0, 2, tuple(shape), device=like.device, dtype=like.dtype, **_given(generator))
    return bits.mul_(2).sub_(1)


def _given(generator: torch.Generator | None) -> dict[str, Any]:
    """Without the argument the shape may vary in a compiled graph."""
    return {} if generator is None else {"generator": generator}
