"""The forward hook that hands a layer's calls to its criterion."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn


class LayerHook:
    """Forward hook of one criterion on its n-th layer. A copy of the layer carries an inert hook, tied to no criterion."""

    def __init__(self, owner: Any = None, index: int = 0) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.index = index
        self.any_mode = owner is not None and owner.any_mode

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            if module.training or self.any_mode:  # no graph break in evaluation
                _outside_graph(self, module, args, kwargs, output)
            return
        owner = None if self.owner is None else self.owner()
        if owner is None or not owner.training or not (module.training or owner.any_mode):
            return
        captures = owner.parts[self.index].captures
        features = args[0] if args else kwargs.get("input")
        check = len(module._forward_hooks) > 1 and self._follows_others(module)
        captures.record(module, features, output, owner.any_mode, check)

    def _follows_others(self, module: nn.Module) -> bool:
        """Whether a forward hook of somebody else ran before this one: it may have changed the output."""
        for hook in module._forward_hooks.values():
            if hook is self:
                return False
            if not isinstance(hook, LayerHook):
                return True
        return False

    def __reduce__(self) -> Any:
        return LayerHook, ()


@torch.compiler.disable(recursive=True)  # type: ignore[no-untyped-call, untyped-decorator]
def _outside_graph(
    hook: LayerHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    hook(module, args, kwargs, output)
