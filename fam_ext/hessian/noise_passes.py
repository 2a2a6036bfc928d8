"""The noise's passes over activations in C++ (csrc/noise_python.cpp): ordinary tensors on the CPU, outside of compiled code.

Each function returns None where fam_ext.hessian.noise has to take its form in plain PyTorch, which computes the same. A pass
reads an activation once; where a gradient is added to one that nothing else holds, it is added in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fam_ext.layers.linear_map import LinearMap
from fam_ext.ops import backends
from fam_ext.ops._conv_args import PADDING_MODES

_signs: Any = backends.native_function("noise_signs")
_with_length: Any = backends.native_function("noise_with_length")
_rank_one: Any = backends.native_function("noise_rank_one")
_project: Any = backends.native_function("noise_project")
_outer: Any = backends.native_function("noise_outer")


def _here(scale: Any = 0.0) -> bool:
    """Whether there is compiled code and it may be called."""
    return (
        _outer is not None
        and type(scale) is float
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None  # a trace by torch.jit would take the result for a constant
    )


def signs(numbers: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """+1 and -1 of the dtype of `like` by the bits of random 64-bit integers: 56 of each."""
    return None if _signs is None else _signs(numbers, shape, like)


def with_length(features: Tensor, signs: Tensor, scale: float | Tensor) -> Tensor | None:
    """phi + scale |phi| signs for rows phi, (N, I) or (I,)."""
    return _with_length(features, signs, scale) if _here(scale) else None


def rank_one(
    layer: LinearMap,
    features: Tensor,
    left: Tensor,
    right: Tensor,
    positions: Tensor | None,
    scale: float | Tensor,
) -> Tensor | None:
    """x + scale left <right, x> positions: left, right (S, groups, C), positions (S, N)."""
    return _rank_one(features, left, right, positions, scale, layer.linear) if _here(scale) else None


def project(features: Tensor, vector: Tensor) -> tuple[Tensor, Tensor] | None:
    """(x, <vector, x>) for x (B, C, *spatial) and vector (S, groups, C/groups): the products are (B, groups, *spatial)."""
    return _project(features, vector) if _here() else None


def outer(
    layer: LinearMap,
    output: Tensor,
    weight: Tensor,
    inner: Tensor,
    left: Tensor,
    place: Tensor,
    scale: float | Tensor,
) -> Tensor | None:
    """z + (scale W a) (the convolution of `inner` with the kernel `place`): one pass forward, one backward."""
    if not _here(scale):
        return None
    m = layer.module
    if layer.transposed:
        weight, before, mode = layer.canonical(weight), m.padding, 0
    else:
        before, mode = m._reversed_padding_repeated_twice[-2::-2], PADDING_MODES.index(m.padding_mode)
    return _outer(  # type: ignore[no-any-return]
        output, weight, inner, left, place, scale, m.stride, before, m.dilation, mode, layer.transposed
    )
