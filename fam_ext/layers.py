"""A layer as a linear map of its weight: a weight direction becomes a direction of the layer's output.

Canonical weight: (groups, O/groups, I), rows the neurons of a group, I the fan-in with the kernel flattened into it. Features are
the layer's input, outputs its pre-activation z without bias. Linear: (*rows, I) -> (*rows, O). ConvNd and ConvTransposeNd:
(B, C, *spatial) -> (B, O, *positions), or without B.
"""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext.errors import UnsupportedError
from fam_ext.ops.patch_sqnorm import patch_sqnorm

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = LINEAR + CONVOLUTIONS + TRANSPOSED

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_CONVOLVE_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class LayerMap:
    """z(weight) for the features of one call; everything is differentiable in the features and the direction."""

    def __init__(self, caller: str, module: nn.Module) -> None:
        if not isinstance(module, LAYERS):
            raise UnsupportedError(
                f"{caller}: layer must be nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, got "
                f"{type(module).__module__}.{type(module).__qualname__}"
            )
        self.module: Any = cast(Any, module)
        self.linear = isinstance(module, LINEAR)
        self.transposed = isinstance(module, TRANSPOSED)
        described: Any = module
        self.groups: int = 1 if self.linear else described.groups
        self.spatial: int = 0 if self.linear else len(described.kernel_size)

    @property
    def class_dim(self) -> int:
        """Dimension of z that holds the neurons, from the end."""
        return -1 - self.spatial

    def canonical(self, weight: Tensor) -> Tensor:
        """(groups, O/groups, I) from the module's layout."""
        if self.transposed:  # (C, O/groups, *kernel)
            neurons = weight.shape[1]
            by_group = weight.reshape(self.groups, weight.shape[0] // self.groups, neurons, -1)
            return by_group.transpose(1, 2).reshape(self.groups, neurons, -1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def to_module(self, direction: Tensor, shape: torch.Size) -> Tensor:
        """The module's layout, of `shape`, from the canonical one."""
        if self.transposed:
            neurons, inputs = direction.shape[1], shape[0] // self.groups
            return direction.reshape(self.groups, neurons, inputs, -1).transpose(1, 2).reshape(shape)
        return direction.reshape(shape)

    def divide_features(self, features: Tensor, scale: Tensor) -> Tensor:
        """Features over `scale`, one number for each input channel."""
        return features / scale.reshape(-1, *(1,) * self.spatial)

    def multiply_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight that gives the same output for features divided by `scale`."""
        if self.transposed:
            return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        by_group = weight.reshape(self.groups, -1, *weight.shape[1:])
        factor = scale.reshape(self.groups, 1, weight.shape[1], *(1,) * self.spatial)
        return (by_group * factor).reshape(weight.shape)

    def apply(self, features: Tensor, weight: Tensor) -> Tensor:
        """z without bias for a weight in the module's layout."""
        if self.linear:
            return F.linear(features, weight)
        batched = features if features.dim() == self.spatial + 2 else features.unsqueeze(0)
        out = self._convolve(batched, weight, self.groups)
        return out if batched is features else out.squeeze(0)

    def apply_each(self, features: Tensor, weights: Tensor) -> Tensor:
        """z where sample i meets weights[i], (B, *module layout)."""
        if self.linear:
            rows = features.reshape(len(weights), -1, features.shape[-1])
            return torch.bmm(rows, weights.transpose(1, 2)).reshape(*features.shape[:-1], weights.shape[1])
        samples = len(weights)
        together = features.reshape(1, -1, *features.shape[-self.spatial :])
        out = self._convolve(together, weights.flatten(0, 1), self.groups * samples)
        out = out.reshape(samples, -1, *out.shape[2:])
        return out if features.dim() == self.spatial + 2 else out.squeeze(0)

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        m = self.module
        if self.transposed:
            transposed: Any = _CONVOLVE_TRANSPOSED[self.spatial - 1]
            out: Tensor = transposed(
                x, weight, None, m.stride, m.padding, m.output_padding, groups, m.dilation
            )
            return out
        padding = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            padding = 0
        convolve: Any = _CONVOLVE[self.spatial - 1]
        out = convolve(x, weight, None, m.stride, padding, m.dilation, groups)
        return out

    def norms(self, features: Tensor, backend: str) -> Tensor:
        """|phi|^2 of every row and group, laid out like z with `groups` in place of its neurons."""
        if self.linear:
            square = patch_sqnorm(features.reshape(-1, features.shape[-1]), (), backend=backend)
            return square.reshape(*features.shape[:-1], 1)
        m = self.module
        if self.transposed:
            # a transposed convolution of the squares with ones
            ones = torch.ones(
                m.in_channels, 1, *m.kernel_size, dtype=_accumulation(features), device=features.device
            )
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return self.apply(features.to(ones.dtype).square(), ones)
        batched = features if features.dim() == self.spatial + 2 else features.unsqueeze(0)
        out = patch_sqnorm(
            batched, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode, backend=backend
        )
        return out if batched is features else out.squeeze(0)

    def spread(self, norms: Tensor, outputs: int) -> Tensor:
        """`norms` repeated over the neurons of each group, in the shape of z."""
        return norms.repeat_interleave(outputs // self.groups, self.class_dim)

    def mix(self, matrix: Tensor, z: Tensor) -> Tensor:
        """sum_t matrix[g, s, t] z[..., (g, t)]: (groups, n, m) on the neuron dimension of z, n neurons of each group out."""
        last = z.movedim(self.class_dim, -1)
        by_group = last.reshape(*last.shape[:-1], self.groups, last.shape[-1] // self.groups)
        mixed = torch.einsum("gst,...gt->...gs", matrix, by_group)
        return mixed.flatten(-2).movedim(-1, self.class_dim)

    def samples(self, shape: tuple[int, ...]) -> int:
        """Samples in an output of this shape: 1 for an unbatched one."""
        return shape[0] if len(shape) > 1 + self.spatial else 1

    def positions(self, shape: tuple[int, ...]) -> int:
        """Rows of z in one sample."""
        outputs = shape[self.class_dim]
        return prod(shape) // max(outputs * self.samples(shape), 1)


def _accumulation(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
