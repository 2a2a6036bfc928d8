"""A layer as a linear map of its weight: a weight direction becomes a direction of the layer's output.

Canonical weight: (groups, O/groups, I), rows the neurons of a group, I the fan-in with the kernel flattened into it. Features are
the layer's input, outputs its pre-activation z without bias. Linear: (*rows, I) -> (*rows, O). ConvNd and ConvTransposeNd:
(B, C, *spatial) -> (B, O, *positions), or without B.
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype, without_autocast
from fam_ext.errors import UnsupportedError
from fam_ext.layers import adapters
from fam_ext.ops import backends
from fam_ext.ops.patch_sqnorm import patch_sqnorm

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = LINEAR + CONVOLUTIONS + TRANSPOSED
_NEVER_CALLED = getattr(torch.nn.modules.linear, "NonDynamicallyQuantizableLinear", ())

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_CONVOLVE_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def squared_norms(features: Tensor, backend: str = "auto") -> Tensor:
    """|phi|^2 of each row, (*rows, 1) for (*rows, I), in the accumulation dtype.

    It needs no operation of its own; a backend asked for by name must be there all the same.
    """
    if backend != "auto":
        backends.choose("patch_sqnorm", backend, features)
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.to(dtype).square().sum(-1, keepdim=True)


def transformers_conv1d() -> tuple[type[nn.Module], ...]:
    """The Conv1D of transformers (GPT-2 and relatives), a linear layer whose weight is (I, O); () where it is not loaded."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    kind = getattr(loaded, "Conv1D", None)
    return () if kind is None else (kind,)


def is_layer(module: object) -> bool:
    """Whether `module` is of a kind that LinearMap takes: Linear, ConvNd, ConvTransposeNd, transformers' Conv1D."""
    return isinstance(module, LAYERS + transformers_conv1d())


class LinearMap:
    """z(weight) for the features of one call, differentiable in both; and the checks of a call.

    Raises TypeError or UnsupportedError where `module` is no layer that is linear in its weight.

    >>> layer = LinearMap("example", nn.Conv2d(4, 6, 3, groups=2))
    >>> layer.shape, layer.fan_in, tuple(layer.canonical(torch.zeros(layer.shape)).shape)
    ((6, 2, 3, 3), 18, (2, 3, 18))
    """

    def __init__(self, caller: str, module: object) -> None:
        if not isinstance(module, nn.Module):
            _checks.bad_type(caller, "layer", "a module (for its name use for_model)", module)
        base: Any = adapters.base_layer(module)
        if isinstance(base, nn.MultiheadAttention):
            raise UnsupportedError(
                f"{caller}: layer is an nn.MultiheadAttention, which multiplies with its weights without calling a layer, so "
                "that the inputs of these are never seen; method='noise' has it, else choose another layer"
            )
        if not is_layer(base):
            raise UnsupportedError(
                f"{caller}: layer must be nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d or transformers' Conv1D, got "
                f"{type(base).__module__}.{type(base).__qualname__}"
                + ("; for layers of a PeftModel use for_model" if hasattr(base, "get_base_model") else "")
            )
        if isinstance(base, _NEVER_CALLED):
            raise UnsupportedError(
                f"{caller}: layer is the out_proj of nn.MultiheadAttention, which multiplies with its weight without calling it, "
                "so that its input is never seen; pass the nn.MultiheadAttention with method='noise', else choose another layer"
            )
        self.kind = kind = type(module).__name__
        self.module: Any = base
        described: Any = base  # mypy takes the attribute for an nn.Module again
        self.transposed = isinstance(base, TRANSPOSED)
        self.linear = not isinstance(base, CONVOLUTIONS + TRANSPOSED)
        input_first = self.linear and not isinstance(base, LINEAR)
        self.input_first = input_first or self.transposed  # the weight's first dimension is the input's
        self.groups: int = 1 if self.linear else described.groups
        self.spatial: int = 0 if self.linear else len(described.kernel_size)
        self.class_dim = -1 - self.spatial  # dimension of z that holds the neurons, from the end
        if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
            raise UnsupportedError(
                f"{caller}: layer is a {kind} whose weight has no shape yet; run one batch through the model first"
            )
        weight = base._parameters.get("weight")  # a parametrized weight would be evaluated by its attribute
        if weight is not None and not weight.is_floating_point():
            raise UnsupportedError(
                f"{caller}: layer is a {type(base).__name__} whose weight is packed or quantized ({weight.dtype}); choose a "
                "layer with a floating weight"
            )
        sizes = ("nx", "nf") if input_first else ("in_features", "out_features")
        sizes = sizes if self.linear else ("in_channels", "out_channels")
        self.inputs: int = getattr(described, sizes[0])
        self.outputs: int = getattr(described, sizes[1])
        if self.linear:
            self.shape: tuple[int, ...] = (self.outputs, self.inputs)[:: -1 if input_first else 1]
        elif self.transposed:
            self.shape = (self.inputs, self.outputs // self.groups, *described.kernel_size)
        else:
            self.shape = (self.outputs, self.inputs // self.groups, *described.kernel_size)
        self.fan_in = self.inputs // self.groups * (1 if self.linear else prod(described.kernel_size))
        if adapters.is_adapter(module):
            self.unusual = True
            return
        kind_of_layer = next(c for c in LAYERS + transformers_conv1d() if isinstance(module, c))
        # another forward may do more than multiply by the weight: it is compared on a sample at every call
        self.unusual = (
            type(module).forward is not kind_of_layer.forward
            or "forward" in vars(module)
            or (
                type(module) is not kind_of_layer
                and getattr(type(module), "_conv_forward", None)
                is not getattr(kind_of_layer, "_conv_forward", None)
            )
            or getattr(module, "parametrizations", None) is not None
        )

    def canonical(self, weight: Tensor) -> Tensor:
        """(groups, O/groups, I) from the module's layout."""
        if self.linear:
            return (weight.t() if self.input_first else weight).unsqueeze(0)
        if self.transposed:  # (C, O/groups, *kernel)
            neurons = weight.shape[1]
            by_group = weight.reshape(self.groups, weight.shape[0] // self.groups, neurons, -1)
            return by_group.transpose(1, 2).reshape(self.groups, neurons, -1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def to_module(self, direction: Tensor, shape: torch.Size) -> Tensor:
        """The module's layout, of `shape`, from the canonical one."""
        if self.linear:
            return direction[0].t() if self.input_first else direction[0]
        if self.transposed:
            neurons, inputs = direction.shape[1], shape[0] // self.groups
            return direction.reshape(self.groups, neurons, inputs, -1).transpose(1, 2).reshape(shape)
        return direction.reshape(shape)

    def divide_features(self, features: Tensor, scale: Tensor) -> Tensor:
        """Features over `scale`, one number for each input channel; a channel of scale 0 is left out: it becomes 0."""
        divisor = scale.masked_fill(scale == 0, torch.inf)
        return features / divisor.reshape(-1, *(1,) * self.spatial)

    def multiply_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight that gives the same output for features divided by `scale`."""
        if self.input_first:
            return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        by_group = weight.reshape(self.groups, -1, *weight.shape[1:])
        factor = scale.reshape(self.groups, 1, weight.shape[1], *(1,) * self.spatial)
        return (by_group * factor).reshape(weight.shape)

    def apply(self, features: Tensor, weight: Tensor) -> Tensor:
        """z without bias for a weight in the module's layout."""
        if self.linear:
            return F.linear(features, weight.t() if self.input_first else weight)
        batched = features if features.dim() == self.spatial + 2 else features.unsqueeze(0)
        out = self._convolve(batched, weight, self.groups)
        return out if batched is features else out.squeeze(0)

    def apply_each(self, features: Tensor, weights: Tensor) -> Tensor:
        """z where sample i meets weights[i], (B, *module layout)."""
        if self.linear:
            rows = features.reshape(len(weights), -1, features.shape[-1])
            each = weights if self.input_first else weights.transpose(1, 2)  # (B, I, O)
            return torch.bmm(rows, each).reshape(*features.shape[:-1], self.outputs)
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
            # one input position stands in several places: in bfloat16 the sum of its gradients would lose digits
            wide = F.pad(x.to(accumulation_dtype(x)), m._reversed_padding_repeated_twice, mode=m.padding_mode)
            x, padding = wide.to(x.dtype), 0
        convolve: Any = _CONVOLVE[self.spatial - 1]
        out = convolve(x, weight, None, m.stride, padding, m.dilation, groups)
        return out

    def norms(self, features: Tensor, backend: str) -> Tensor:
        """|phi|^2 of every row and group, laid out like z with `groups` in place of its neurons."""
        if self.linear:
            return squared_norms(features, backend)
        m = self.module
        if self.transposed:
            # a transposed convolution of the squares with ones
            ones = torch.ones(
                m.in_channels, 1, *m.kernel_size, dtype=accumulation_dtype(features), device=features.device
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

    def row_norms(self, features: Tensor, backend: str) -> Tensor:
        """|phi|^2 of every row of the layer's output, (rows, groups), rows in row-major order."""
        return self.norms(features, backend).movedim(self.class_dim, -1).reshape(-1, self.groups)

    def check_call(self, caller: str, features: Tensor, weight: Tensor, shape: tuple[int, ...]) -> None:
        """Refuse a forward whose output is not the layer's linear map of its features."""
        if weight.shape != self.shape:
            raise UnsupportedError(
                f"{caller}: the weight of layer has shape {tuple(weight.shape)} instead of {self.shape} (sharded or packed?); "
                "gather it before the loss"
            )
        if features.shape[self.class_dim] != self.inputs:
            _checks.bad_value(caller, "layer", f"called with {self.inputs} features", features)
        if len(shape) != features.dim():
            raise UnsupportedError(f"{caller}: the output of layer has another rank than its input")
        if self.transposed and tuple(shape[-self.spatial :]) != self._transposed_positions(features):
            raise UnsupportedError(
                f"{caller}: a transposed convolution called with output_size is not supported; set output_padding instead"
            )

    def _transposed_positions(self, features: Tensor) -> tuple[int, ...]:
        m = self.module
        axes = zip(
            features.shape[-self.spatial :],
            m.kernel_size,
            m.stride,
            m.padding,
            m.dilation,
            m.output_padding,
            strict=True,
        )
        return tuple((size - 1) * s - 2 * p + d * (k - 1) + extra + 1 for size, k, s, p, d, extra in axes)

    @torch.no_grad()
    def check_unusual(
        self, caller: str, features: Tensor, weight: Tensor, got: Tensor, dtype: torch.dtype
    ) -> None:
        """Compare `got`, (O,), the first row of the output of `dtype`, with the layer's own map of the features."""
        bias = self.module.bias
        eps = max(torch.finfo(d).eps for d in (dtype, got.dtype, features.dtype, weight.dtype))
        with without_autocast(features):
            batched = features.dim() > self.spatial + 1
            x = (
                features.reshape(-1, self.inputs)[0] if self.linear else features[:1] if batched else features
            ).double()
            z = self.apply(x, weight.double()).movedim(self.class_dim, -1).reshape(-1, self.outputs)[0]
            expected = z if bias is None else z + bias.double()
        self.check_row(caller, got, expected, weight.double().norm() * x.norm(), eps)

    def check_row(self, caller: str, got: Tensor, expected: Tensor, scale: Tensor, eps: float) -> None:
        """Refuse a row of the layer's output that differs from `expected`, of numbers of size `scale` and precision `eps`."""
        scale = scale + expected.abs().max()
        error = (got.double() - expected).abs()
        if bool(got.isfinite().all()) and bool((error > 8 * eps * scale + 1e-30).any()):
            raise UnsupportedError(
                f"{caller}: the output of layer ({self.kind}) is not its input times its weight plus its bias: its forward does "
                "something else, or a forward hook on it (an adapter's dropout must be 0); pass a plain Linear or Conv layer"
            )
