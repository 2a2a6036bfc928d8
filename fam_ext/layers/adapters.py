"""Low-rank adapters, as PEFT wraps layers: the effective weight is what relative flatness is of.

LoRA: W + scaling * B A (Hu et al. 2021). DoRA (Liu et al. 2024): each row of that scaled to a magnitude that is trained, its own
norm held constant in the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fam_ext.errors import UnsupportedError


def is_adapter(module: object) -> bool:
    """Whether `module` wraps a base layer with low-rank matrices, by PEFT's attribute names.

    >>> is_adapter(nn.Linear(2, 2))
    False
    """
    # by the modules' own table: hasattr would form an error message at each forward call of a plain layer; one by one: torch
    # 2.11's compiler does not compare sets
    if not isinstance(module, nn.Module):
        return False
    parts = module._modules
    return "base_layer" in parts and "lora_A" in parts and "lora_B" in parts


def base_layer(module: Any) -> Any:
    """The layer itself, or the one that an adapter wraps."""
    return module.base_layer if is_adapter(module) else module


def effective_weight(module: Any) -> Tensor:
    """The weight that the adapter's forward pass multiplies with, differentiable in its low-rank matrices.

    It has the layout of the base layer's weight. Raises UnsupportedError for kinds of adapters whose forward pass is something
    else.
    """
    weight: Tensor = module.base_layer.weight
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight
    input_first = type(module.base_layer).__name__ == "Conv1D"  # transformers': its weight is (I, O)
    if not (input_first or isinstance(module.base_layer, nn.Linear)):
        raise UnsupportedError(
            f"an adapter is supported on nn.Linear only, got one on {type(module.base_layer).__name__}; merge it first"
        )
    if bool(getattr(module, "fan_in_fan_out", False)) != input_first:
        raise UnsupportedError(
            "an adapter's fan_in_fan_out must be True on transformers' Conv1D and False on nn.Linear; merge the adapter first"
        )
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        change = module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight  # (O, I)
        if name in getattr(module, "lora_magnitude_vector", ()):
            base = module.base_layer.weight.t() if input_first else module.base_layer.weight
            norm = torch.linalg.norm(base + change, dim=1).detach()
            scale = (module.lora_magnitude_vector[name].weight / norm).unsqueeze(1)
            change = (scale - 1) * base + scale * change
        weight = weight + (change.t() if input_first else change)
    return weight


def active_copy(module: Any) -> Any:
    """What runs in the place of a module that PEFT trains in full (modules_to_save): the active adapter's copy; else `module`.

    >>> layer = nn.Linear(2, 2)
    >>> active_copy(layer) is layer
    True
    """
    if not isinstance(module, nn.Module):
        return module
    copies = module._modules.get("modules_to_save")
    if not isinstance(copies, nn.ModuleDict):
        return module
    untyped: Any = module
    active = [] if getattr(module, "disable_adapters", False) else active_names(module)
    chosen = next((name for name in active if name in copies), None)
    return untyped.original_module if chosen is None else copies[chosen]


def active_names(module: Any) -> list[str]:
    """The adapters of a module of PEFT that are in use."""
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None) or ()
    return [active] if isinstance(active, str) else list(active)
