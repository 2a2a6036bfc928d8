"""The forward hook that hands a layer's calls to its criterion."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from fam_ext.errors import UnsupportedError


class _NotScriptable(UnsupportedError, AttributeError):
    """hasattr() answers False."""


def refuse_scripting(attribute: str) -> None:
    """Raise where a hook is asked for `attribute` because TorchScript is about to compile it."""
    if attribute == "__globals__":
        raise _NotScriptable(
            "torch.jit.script compiles a module's forward hooks, and fam_ext's cannot be: call criterion.detach() first"
        )


class LayerHook:
    """Forward hook of one criterion on one of its layers. A copy of the layer carries an inert hook, tied to no criterion.

    `active` follows the criterion's training mode: an inactive hook does nothing at all, under tracing and export too.
    """

    __name__ = "fam_ext_layer_hook"  # TorchScript asks for one

    def __init__(self, captures: Any = None, any_mode: bool = False) -> None:
        # CapturedCalls (fam_ext.capture.calls); weakly, a layer must not keep the criterion's data alive
        self.captures = None if captures is None else weakref.ref(captures)
        self.any_mode = any_mode  # capture although the layer is in evaluation mode
        self.active = captures is not None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """`rest` is (kwargs, output); (output,) where a tool has copied the hook without its mark, as quantization does."""
        if not self.active or not (module.training or self.any_mode):
            return
        if exporting():
            return
        if torch.compiler.is_compiling():
            _outside_graph(self, module, args, rest)
        else:
            self.record(module, args, rest)

    def record(self, module: nn.Module, args: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
        captures = None if self.captures is None else self.captures()
        if captures is None:
            return
        features = args[0] if args else rest[0].get("input")
        check = len(module._forward_hooks) > 1 and self._follows_others(module)
        captures.record(module, features, rest[-1], self.any_mode, check)

    def _follows_others(self, module: nn.Module) -> bool:
        """Whether a forward hook of somebody else ran before this one: it may have changed the output."""
        for hook in module._forward_hooks.values():
            if hook is self:
                return False
            if not isinstance(hook, LayerHook):
                return True
        return False

    def __getattr__(self, name: str) -> Any:
        refuse_scripting(name)
        raise AttributeError(name)

    def __reduce__(self) -> Any:
        return LayerHook, ()


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    recursive=True,
    reason="fam_ext keeps a layer's input on the autograd graph outside of compiled code: compile without fullgraph=True, or "
    "call criterion.eval() or detach() first",
)
def _outside_graph(hook: LayerHook, module: nn.Module, args: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
    hook.record(module, args, rest)


# torch 2.11 takes torch.compiler.is_exporting() for true in all that torch.compile compiles
_TELLS_EXPORT_APART = torch.__version__ >= "2.12"


def exporting() -> bool:
    """Whether torch.export or a trace of torch.jit is at work: what they make has no loss."""
    if not torch.compiler.is_compiling():
        return torch._C._get_tracing_state() is not None
    return torch.compiler.is_exporting() if _TELLS_EXPORT_APART else torch.compiler._is_exporting_flag
