"""What FAMLoss and RelativeFlatness share: the layers with their hooks, the criterion, modes and copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks, criteria
from fam_ext.errors import UnsupportedError
from fam_ext.layers import adapters, attention, sharding
from fam_ext.layers.find import Selection
from fam_ext.loss.hidden import weight_product
from fam_ext.loss.layer_term import LayerTerm
from fam_ext.loss.one_call import distributed, hidden_calls
from fam_ext.loss.plan import Plan, Plans
from fam_ext.loss_hessians import LossHessian
from fam_ext.options import Options


class LayerCriterion(nn.Module):
    """A criterion and the layers that are regularized, which are no submodules of it."""

    left_out: Mapping[str, str] = MappingProxyType({})
    any_mode = False  # capture although the layer is in evaluation mode or grad is disabled

    def __init__(self, criterion: Any, layer: nn.Module | Sequence[nn.Module], options: Options) -> None:
        super().__init__()
        self.options = options
        self.criterion = criterion
        given: list[Any] = list(layer) if isinstance(layer, (list, tuple)) else [layer]
        if options.method == "noise":
            given = [part for module in given for part in attention.parts(options.caller, module)]
        modules = [adapters.active_copy(module) for module in given]
        if not modules or len({attention.identity(m) for m in modules}) != len(modules):
            _checks.bad_value(options.caller, "layer", "a module or a sequence of different modules", layer)
        # a tuple of plain objects: parameters(), state_dict() and train() must not reach the model
        self.terms = tuple(LayerTerm(options, m) for m in modules)
        self.attach()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "criterion":  # it may be replaced later: the closed form must be the new one's
            read = self._read_criterion(value)
            if not isinstance(value, nn.Module):
                self._modules.pop("criterion", None)  # a function may take a module's place
            super().__setattr__(name, value)
            self._flattened, self._bind, self._no_closed_form = read
            return
        super().__setattr__(name, value)
        if name == "training":  # train(), eval(), or a tool that sets it itself
            self._activate(value)

    def _activate(self, training: bool) -> None:
        """The hooks follow the mode."""
        for term in self.__dict__.get("terms", ()):
            term.hook.active = training and term.handle is not None

    def _read_criterion(self, criterion: Any) -> tuple[Any, Any, str]:
        """The flattened form of the criterion, how to bind its arguments where it has a closed form, and else why not."""
        bind: Any = None
        why_not = ""
        flattened = criteria.flattened(criterion)
        try:
            bind = criteria.read(self.options.caller, criterion if flattened is None else flattened.func)
        except UnsupportedError as error:
            if self.options.method == "closed_form" or self.options.curvature != "hessian":
                raise
            why_not = str(error)
        return flattened, bind, why_not

    @property
    def reduction(self) -> Any:
        """The criterion's, where it has one; may be set, as libraries do for a loss by sample."""
        return self.criterion.reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        if not hasattr(self.criterion, "reduction"):
            raise AttributeError(f"{self.options.caller}: the criterion has no reduction")
        self.criterion.reduction = value

    @property
    def activation(self) -> Any:
        """The criterion's map from outputs to probabilities, where it has one (fastai)."""
        return self.criterion.activation

    @property
    def decodes(self) -> Any:
        """The criterion's map from probabilities to classes, where it has one (fastai)."""
        return self.criterion.decodes

    @property
    def y_int(self) -> Any:
        """Whether the criterion's targets are class indices, where it tells (fastai's MixUp asks)."""
        return self.criterion.y_int

    @property
    def _orig_mod(self) -> Any:
        """The criterion, for skorch: it unwraps a compiled criterion by this name to see which activation its loss implies."""
        return criteria.uncompiled(self.criterion)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """As nn.Module's, for the tensors of a loss inside a criterion that is no module, too."""
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        inner = None if isinstance(self.criterion, nn.Module) else getattr(self.criterion, "func", None)
        if isinstance(inner, nn.Module):
            inner._apply(function)  # type: ignore[no-untyped-call]
        return self

    @property
    def layer(self) -> nn.Module:
        """The layer, the first one of several; of a projection, its nn.MultiheadAttention."""
        module: Any = self.terms[0].module
        layer: nn.Module = module.attention if isinstance(module, attention.Projection) else module
        return layer

    @property
    def plan(self) -> Plan | Plans | None:
        """How the latest term was computed and why, None before the first; a tuple of them for several layers."""
        if len(self.terms) == 1:
            return self.terms[0].plan
        names = [term.name or str(term.module) for term in self.terms]
        return Plans.of((term.plan for term in self.terms), names, self.left_out)

    def attach(self) -> None:
        """Put the hooks on the layers (again); without effect while they are there."""
        bare = [term for term in self.terms if term.handle is None]
        try:
            for term in bare:
                term.attach(self)
        except Exception:
            for term in bare:
                term.detach()
            raise

    def _take_names(self, selection: Selection) -> None:
        """How `for_model` chose the layers, for plans."""
        for term, name in zip(self.terms, selection.layers, strict=True):
            term.name = name
        self.left_out = selection.left_out

    def detach(self) -> None:
        """Take the hooks off the layers. Evaluation mode still works, training raises until attach()."""
        for term in self.terms:
            term.detach()

    def reset(self) -> None:
        """Drop the features of forward calls that no loss follows."""
        for term in self.terms:
            term.captures.reset()

    def __enter__(self) -> Any:
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_bind": None,
            "_flattened": None,
            "_attached": self.terms[0].handle is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._flattened, self._bind, self._no_closed_form = self._read_criterion(self.criterion)
        if attached:
            self.attach()

    def extra_repr(self) -> str:
        layers = ", ".join(str(term.module) for term in self.terms)
        return f"layer={layers}, measure={self.options.measure}"

    def _bind_arguments(self, targets: tuple[Any, ...], kwargs: dict[str, Any]) -> LossHessian | None:
        """The criterion with its arguments, where its second derivative is known."""
        return None if self._bind is None else self._bind(*targets, **kwargs)

    def weight_product(self, loss: Tensor, direction: Tensor) -> Tensor:
        """H D of one loss for the first layer, without graph; both in canonical layout (fam_ext.layers.linear_map)."""
        (hidden,) = hidden_calls(self.options, self.terms[:1], loss, loss, distributed())
        with sharding.held():
            return weight_product(self.options, loss, hidden, direction)


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    recursive=True,
    reason="FAMLoss and RelativeFlatness walk the autograd graph outside of compiled code: compile without fullgraph=True, or "
    "use fam_ext.functional, which compiles to one graph",
)
def outside_graph(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call `function` in a break of the graph that torch.compile traces."""
    return function(*arguments)
