"""A layer with the hook of method="noise" on it, without a criterion."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss.noise_hook import NoiseHook

CONV = "conv"


def hooked(
    kind: str = "linear", layer: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, NoiseHook]:
    if layer is None:
        layer = nn.Conv1d(3, 2, 2) if kind == CONV else nn.Linear(3, 2)
    hook = NoiseHook(LinearMap("FAMLoss", layer), **options)
    if kind == CONV:
        layer.register_forward_hook(hook, with_kwargs=True)
    else:
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    hook.active = True
    hook.set(0.1, torch.device("cpu"))
    return layer, hook


def x(kind: str = "linear") -> Tensor:
    return torch.randn(4, 3, 5) if kind == CONV else torch.randn(4, 3)


def plain(layer: nn.Module, features: Tensor) -> Tensor:
    """What the layer returns without the hook."""
    clean = copy.deepcopy(layer)
    return clean(features)
