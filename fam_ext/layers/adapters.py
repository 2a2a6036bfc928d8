"""Low-rank adapters (LoRA, as PEFT wraps layers): the effective weight W + sum scaling * B A is what relative flatness is of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fam_ext.errors import UnsupportedError

_PARTS = {"base_layer", "lora_A", "lora_B"}


def is_adapter(module: object) -> bool:
    """Whether `module` wraps a base layer with low-rank matrices, by PEFT's attribute names.

    >>> is_adapter(nn.Linear(2, 2))
    False
    """
    # by the modules' own table: hasattr would form an error message at each forward call of a plain layer
    return isinstance(module, nn.Module) and module._modules.keys() >= _PARTS


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
        low = module.lora_B[name].weight @ module.lora_A[name].weight  # (O, I)
        weight = weight + module.scaling[name] * (low.t() if input_first else low)
    return weight
