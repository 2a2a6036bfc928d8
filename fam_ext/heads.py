"""Closed form of relative flatness where the layer's output is what the criterion receives.

z is linear in the weight there, so for a loss that is a sum over rows of l_i(z_i), with Lambda_i the Hessian of l_i,
kappa = sum_i |phi_i|^2 Tr(W^T Lambda_i W). Layers are read here (features -> |phi|^2, fan-in, groups) and each measure is
formed from a criterion's row coefficients or Hessian diagonal, which fam_ext.criteria provides.

Shapes: rows (*rows), channel-first logits (B, O, *positions), norms |phi|^2 (*rows, groups), weight (O, I) with a
convolution's kernel flattened into I.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fam_ext import _checks, adapters
from fam_ext.errors import UnsupportedError
from fam_ext.layers import LAYERS, LayerMap
from fam_ext.ops.softmax_trace import softmax_trace
from fam_ext.reference.softmax_trace import accumulation_dtype

MEASURES = ("neuronwise", "layerwise", "trace")
EIGENVALUE_MEASURES = ("layerwise_eigenvalue", "neuronwise_eigenvalue")


class Layer(LayerMap):
    """A layer with what the closed form and the checks of a call need besides its map."""

    def __init__(self, caller: str, module: object) -> None:
        if not isinstance(module, nn.Module):
            _checks.bad_type(caller, "layer", "a module (for its name use for_model)", module)
        self.kind = kind = type(module).__name__
        super().__init__(caller, adapters.base_layer(module))
        if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
            raise UnsupportedError(
                f"{caller}: layer is a {kind} whose weight has no shape yet; run one batch through the model first"
            )
        self.inputs: int = self.module.in_features if self.linear else self.module.in_channels
        self.outputs: int = self.module.out_features if self.linear else self.module.out_channels
        if self.linear:
            self.shape: tuple[int, ...] = (self.outputs, self.inputs)
        elif self.transposed:
            self.shape = (self.inputs, self.outputs // self.groups, *self.module.kernel_size)
        else:
            self.shape = (self.outputs, self.inputs // self.groups, *self.module.kernel_size)
        self.fan_in = self.inputs // self.groups * (1 if self.linear else prod(self.module.kernel_size))
        if adapters.is_adapter(module):
            self.unusual = True
            return
        base = next(c for c in LAYERS if isinstance(module, c))
        # another forward may do more than multiply by the weight: it is compared on a sample at every call
        self.unusual = (
            type(module).forward is not base.forward
            or "forward" in vars(module)
            or (
                type(module) is not base
                and getattr(type(module), "_conv_forward", None) is not getattr(base, "_conv_forward", None)
            )
            or getattr(module, "parametrizations", None) is not None
        )

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
        with torch.autocast(device_type=features.device.type, enabled=False):
            batched = features.dim() > self.spatial + 1
            x = (
                features.reshape(-1, self.inputs)[0] if self.linear else features[:1] if batched else features
            ).double()
            z = self.apply(x, weight.double()).movedim(self.class_dim, -1).reshape(-1, self.outputs)[0]
            expected = z if bias is None else z + bias.double()
        scale = weight.double().norm() * x.norm() + expected.abs().max()
        error = (got.double() - expected).abs()
        if bool(got.isfinite().all()) and bool((error > 8 * eps * scale + 1e-30).any()):
            raise UnsupportedError(
                f"{caller}: the output of layer ({self.kind}) is not its input times its weight plus its bias: its forward does "
                "something else, or a forward hook on it (an adapter's dropout must be 0); pass a plain Linear or Conv layer"
            )


def softmax_variance(logits: Tensor) -> Tensor:
    """p_s (1 - p_s) for channel-first logits, every term formed from positive numbers (no 1 - p near p = 1)."""
    z = logits.to(accumulation_dtype(logits))
    if z.numel() == 0:
        return z * 0
    y = z.detach().argmax(1, keepdim=True)
    e = torch.exp(z - z.gather(1, y)).scatter(1, y, 0.0)
    rest = e.sum(1, keepdim=True)
    total = 1 + rest
    p = e / total
    # the likeliest class: (1 - r) r with r = rest / total
    return (p * (1 - p)).scatter(1, y, rest / total.square())


def row_traces(logits: Tensor, weight: Tensor, norms: Tensor, measure: str, backend: str) -> Tensor:
    """|phi_i|^2 Tr(W^T (diag(p) - p p^T) W) of every row ("neuronwise"), or without the weight: its share of Tr(H).

    logits (B, O, *positions), norms (B, *positions, groups). In a grouped convolution neurons pair within their group: the
    covariance of a weight that is zero outside the group, under the full distribution.
    """
    groups = norms.shape[-1]
    if measure != "neuronwise":
        variance = softmax_variance(logits).movedim(1, -1)
        by_group = variance.reshape(*norms.shape, weight.shape[0] // groups).sum(-1)
        return (by_group * norms).sum(-1)
    w = weight.flatten(1)
    if groups == 1:
        return softmax_trace(logits, w, backend=backend) * norms[..., 0]
    size = w.shape[0] // groups
    total = torch.zeros_like(norms[..., 0])
    for g in range(groups):
        outside = w.shape[0] - (g + 1) * size
        own = nn.functional.pad(w[g * size : (g + 1) * size], (0, 0, g * size, outside))
        total = total + softmax_trace(logits, own, backend=backend) * norms[..., g]
    return total


def element_traces(diagonal: Tensor, weight: Tensor, norms: Tensor, measure: str) -> Tensor:
    """h_is |w_s|^2 |phi_i|^2 of every element ("neuronwise"), or h_is |phi_i|^2; diagonal (*rows, O), norms (*rows, groups)."""
    groups = norms.shape[-1]
    h = diagonal
    if measure == "neuronwise":
        h = h * weight.flatten(1).to(accumulation_dtype(weight, diagonal)).square().sum(1)
    if groups == 1:
        return h * norms
    return (h.reshape(*norms.shape, weight.shape[0] // groups) * norms.unsqueeze(-1)).flatten(-2)


def weight_factor(weight: Tensor, measure: str, norm_power: int) -> Tensor | None:
    """|W|_F^norm_power for the layerwise measures, which the curvature is multiplied with."""
    if not measure.startswith("layerwise"):
        return None
    square = weight.to(accumulation_dtype(weight)).square().sum()
    return square if norm_power == 2 else square.sqrt()
