"""What FAMLoss and RelativeFlatness share: the layer, its hook, and what one loss call takes from them."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

from fam_ext import _checks, criteria
from fam_ext.capture import Capture, Captures, LayerHook, check_tensor
from fam_ext.errors import UnsupportedError
from fam_ext.heads import Layer
from fam_ext.terms import Options, flatness, outer_class_dim


class Taken(NamedTuple):
    """What one loss call works on: the layer's call, and how the criterion's input is laid out (see fam_ext.layout)."""

    capture: Capture
    features: Tensor
    weight: Tensor
    class_dim: int | None
    rows: Tensor | None
    bound: criteria.Bound


class HeadCriterion(nn.Module):
    """What FAMLoss and RelativeFlatness share: the layer (no submodule of this one), its hook and its captures."""

    any_mode = False  # capture although the layer is in evaluation mode or grad is disabled
    layer: nn.Module

    def __init__(self, criterion: Any, layer: nn.Module, options: Options) -> None:
        super().__init__()
        self._bind = criteria.read(options.caller, criterion)
        self._layer = Layer(options.caller, layer)
        self.criterion = criterion
        self.options = options
        object.__setattr__(
            self, "layer", layer
        )  # parameters(), state_dict() and train() must not reach the model
        self.captures = Captures()
        self._handle: Any = None
        self.attach()

    def attach(self) -> None:
        """Put the hook on the layer (again); without effect while it is there."""
        if self._handle is not None:
            return
        hooks = self.layer._forward_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, LayerHook) and hook.owner is None]:
            del hooks[key]  # left by a copy of the layer
            self.layer._forward_hooks_with_kwargs.pop(key, None)
        self._handle = self.layer.register_forward_hook(LayerHook(self), with_kwargs=True)
        weakref.finalize(self, self._handle.remove).atexit = False

    def detach(self) -> None:
        """Take the hook off the layer. Evaluation mode still works, training raises until attach()."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.captures.reset()

    def reset(self) -> None:
        """Drop the features of forward calls that no loss follows."""
        self.captures.reset()

    def __enter__(self) -> Any:
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(captures=None, _bind=None, _layer=None, _handle=self._handle is not None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        caller = self.options.caller
        self.captures = Captures()
        self._bind = criteria.read(caller, self.criterion)
        self._layer = Layer(caller, self.layer)
        attached, self._handle = self._handle, None
        if attached:
            self.attach()

    def extra_repr(self) -> str:
        return f"layer={self.layer}, measure={self.options.measure}"

    def _take(self, outputs: Tensor, targets: tuple[Any, ...], kwargs: dict[str, Any]) -> Taken:
        caller = self.options.caller
        check_tensor(caller, outputs)
        if self._handle is None:
            raise UnsupportedError(
                f"{caller}: detached from its layer; call attach() first, or eval() for the plain loss"
            )
        bound = self._bind(*targets, **kwargs)
        self.options.check_bound(bound)
        layer = self._layer
        capture, features, found = self.captures.take(caller, outputs, layer.class_dim)
        weight: Tensor = capture.weight  # type: ignore[assignment]
        if found is None:
            class_dim: int | None = outputs.dim() + layer.class_dim
            rows = None
        else:
            class_dim, rows = found
        layer.check_call(caller, features, weight, capture.shape)
        outer_class_dim(caller, bound, class_dim, outputs)
        bound.check(caller, outputs)
        if features.device != outputs.device:
            _checks.bad_value(caller, "outputs", f"on the layer's device ({features.device})", outputs)
        if layer.unusual and rows is None and outputs.numel():
            by_row = outputs.unsqueeze(-1) if class_dim is None else outputs.movedim(class_dim, -1)
            first = by_row.reshape(-1, layer.outputs)[0]
            layer.check_unusual(caller, features, weight, first, capture.dtype)
        return Taken(capture, features, weight, class_dim, rows, bound)

    def _flatness(self, outputs: Tensor, taken: Taken, per_sample: bool = False) -> Tensor:
        capture, features, weight, class_dim, rows, bound = taken
        samples = capture.shape[0] if len(capture.shape) > 1 + self._layer.spatial else 1
        return flatness(
            self.options, self._layer, bound, outputs, class_dim, rows, features, weight, samples, per_sample
        )
