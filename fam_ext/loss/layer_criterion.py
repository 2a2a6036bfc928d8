"""What FAMLoss and RelativeFlatness share: the layers, their hooks, and the way to each layer's term."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fam_ext import _checks, loss_hessians
from fam_ext.capture import graph_walk
from fam_ext.capture.calls import Capture, Captures, check_tensor, layer_weight
from fam_ext.capture.hook import LayerHook
from fam_ext.derivatives import verdicts
from fam_ext.errors import NotAHead, UnsupportedError
from fam_ext.head.closed_form import check_class_dim, flatness
from fam_ext.hessian.estimate import Estimate
from fam_ext.hessian.products import Curvature, LayerCall, products
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss.hidden import CLOSED_FORM, General, Plan
from fam_ext.loss.several import hessian_terms, positive_terms
from fam_ext.options import Options


class Taken(NamedTuple):
    """What one loss call works on: the layer's call, and how the criterion's input is laid out (see fam_ext.layout)."""

    capture: Capture
    features: Tensor
    weight: Tensor
    class_dim: int | None
    rows: Tensor | None
    bound: loss_hessians.Bound


class Found(NamedTuple):
    """A layer that is no head, its weight and calls, and the autograd nodes between the loss and them."""

    part: Part
    weight: Tensor
    calls: list[LayerCall]
    between: list[Any]


class Part:
    """One layer of a criterion: its hook, the calls captured, and the way its term is computed."""

    def __init__(self, options: Options, module: nn.Module) -> None:
        self.options = options
        self.module = module
        self.layer = LinearMap(options.caller, module)
        self.general = General(options, self.layer, module)
        self.captures = Captures(str(module), self.layer.class_dim, self.layer.unusual)
        self.factor = (
            1.0 if options.normalize is None else 1.0 / self.layer.fan_in
        )  # of the fused operations' kappa
        self.handle: Any = None
        self.not_a_head: NotAHead | None = None  # why the closed form did not serve the latest loss
        self.scale: Tensor | None = (
            None  # by input channel: take the term for features divided by it (fam_ext.measure)
        )

    def attach(self, owner: Any, index: int) -> None:
        """Put the hook on the layer; without effect while it is there."""
        if self.handle is not None:
            return
        hooks = self.module._forward_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, LayerHook) and hook.owner is None]:
            del hooks[key]  # left by a copy of the layer
            self.module._forward_hooks_with_kwargs.pop(key, None)
        self.handle = self.module.register_forward_hook(LayerHook(owner, index), with_kwargs=True)
        weakref.finalize(owner, self.handle.remove).atexit = False

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        self.captures.reset()

    def rescaled(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Features over `scale` and the weight times it; as they are without one."""
        if self.scale is None:
            return features, weight
        layer = self.layer
        return layer.divide_features(features, self.scale), layer.multiply_weight(weight, self.scale)

    def weight(self) -> Tensor:
        """The layer's weight now, rescaled, in canonical layout (fam_ext.layers)."""
        weight = layer_weight(self.module).detach()
        scaled = weight if self.scale is None else self.layer.multiply_weight(weight, self.scale)
        return self.layer.canonical(scaled)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "module": self.module, "attached": self.handle is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"], state["module"])  # type: ignore[misc]


class LayerCriterion(nn.Module):
    """The layers (no submodules of this one), their hooks and captures."""

    any_mode = False  # capture although the layer is in evaluation mode or grad is disabled

    def __init__(self, criterion: Any, layer: nn.Module | Sequence[nn.Module], options: Options) -> None:
        super().__init__()
        self.options = options
        self.criterion = criterion
        modules: list[Any] = list(layer) if isinstance(layer, (list, tuple)) else [layer]
        if not modules or len({id(m) for m in modules}) != len(modules):
            _checks.bad_value(options.caller, "layer", "a module or a sequence of different modules", layer)
        # a tuple of plain objects: parameters(), state_dict() and train() must not reach the model
        self.parts = tuple(Part(options, m) for m in modules)
        self.attach()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "criterion":  # it may be replaced later: the closed form must be the new one's
            self._read_criterion()

    def _read_criterion(self) -> None:
        """How to bind the criterion's arguments, where it has a closed form; else why not."""
        self._bind: Any = None
        self._no_closed_form = ""
        try:
            self._bind = loss_hessians.read(self.options.caller, self.criterion)
        except UnsupportedError as error:
            if self.options.method == "closed_form" or self.options.curvature != "hessian":
                raise
            self._no_closed_form = str(error)

    @property
    def layer(self) -> nn.Module:
        """The layer, the first one of several."""
        return self.parts[0].module

    @property
    def plan(self) -> Plan | tuple[Plan | None, ...] | None:
        """How the latest term was computed and why; one for each of several layers. None before the first."""
        plans = tuple(part.general.plan for part in self.parts)
        return plans[0] if len(plans) == 1 else plans

    def attach(self) -> None:
        """Put the hooks on the layers (again); without effect while they are there."""
        for index, part in enumerate(self.parts):
            part.attach(self, index)

    def detach(self) -> None:
        """Take the hooks off the layers. Evaluation mode still works, training raises until attach()."""
        for part in self.parts:
            part.detach()

    def reset(self) -> None:
        """Drop the features of forward calls that no loss follows."""
        for part in self.parts:
            part.captures.reset()

    def __enter__(self) -> Any:
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bind": None, "_attached": self.parts[0].handle is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._read_criterion()
        if attached:
            self.attach()

    def extra_repr(self) -> str:
        layers = ", ".join(str(part.module) for part in self.parts)
        return f"layer={layers}, measure={self.options.measure}"

    def _bound(self, targets: tuple[Any, ...], kwargs: dict[str, Any]) -> loss_hessians.Bound | None:
        return None if self._bind is None else self._bind(*targets, **kwargs)

    def _check_ready(self) -> None:
        for part in self.parts:  # a loop costs a third of any() here and in _layers_train
            if part.handle is None:
                raise UnsupportedError(
                    f"{self.options.caller}: detached from its layer; call attach() first, or eval() for the plain loss"
                )

    def _layers_train(self) -> bool:
        """Whether all layers are in training mode."""
        for part in self.parts:  # noqa: SIM110
            if not part.module.training:
                return False
        return True

    def _take(self, part: Part, outputs: Any, bound: loss_hessians.Bound | None) -> Taken | None:
        """What the closed form works on; None where another method must serve. Raises where nothing can."""
        if not self.options.closed_form:
            return None
        try:
            return self._take_head(part, outputs, bound)
        except NotAHead as error:
            if self.options.method == "closed_form":
                raise
            part.not_a_head = error.with_traceback(None)  # its frames would keep the batch alive
            return None

    def _take_head(self, part: Part, outputs: Any, bound: loss_hessians.Bound | None) -> Taken:
        caller, layer = self.options.caller, part.layer
        if bound is None:
            raise NotAHead(self._no_closed_form)
        check_tensor(caller, outputs)
        self.options.check_bound(bound)
        self._check_constant(part, bound)
        capture, features, found = part.captures.take(caller, outputs, layer.class_dim)
        weight: Tensor = capture.weight  # type: ignore[assignment]
        if found is None:
            class_dim: int | None = outputs.dim() + layer.class_dim
            rows = None
        else:
            class_dim, rows = found
        layer.check_call(caller, features, weight, capture.shape)
        check_class_dim(caller, bound, class_dim, outputs)
        bound.check(caller, outputs)
        if features.device != outputs.device:
            _checks.bad_value(caller, "outputs", f"on the layer's device ({features.device})", outputs)
        if capture.first is not None:
            layer.check_unusual(caller, features, weight, capture.first, capture.dtype)
        part.general.note(CLOSED_FORM)
        features, weight = part.rescaled(features, weight)
        return Taken(capture, features, weight, class_dim, rows, bound)

    def _check_constant(self, part: Part, bound: loss_hessians.Bound) -> None:
        """The closed forms hold the criterion's target, variance and weights constant: the layer's output may not be in them."""
        for name, value in vars(bound).items():
            if not isinstance(value, Tensor) or value.grad_fn is None:
                continue
            if graph_walk.find(value, [part.captures])[0][0]:
                raise NotAHead(
                    f"{self.options.caller}: the criterion's {name} depends on the layer's output as well, which the closed form "
                    "takes for constant; detach it, or use method='auto'"
                )

    def hooked(self) -> bool:
        """Whether hooks stand on the criterion, which see its calls and may change its loss."""
        criterion: Any = self._modules.get("criterion")  # None: a function
        return criterion is not None and bool(criterion._forward_hooks or criterion._forward_pre_hooks)

    def _check_hooks(
        self, loss: Tensor, outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse a hook on the criterion that changes its loss: the closed form is that of the criterion alone."""
        if not self.hooked():
            return
        with torch.no_grad():
            alone = self.criterion.forward(outputs, *targets, **kwargs)
        if alone.shape != loss.shape or not torch.allclose(loss, alone, rtol=0, atol=0, equal_nan=True):
            raise UnsupportedError(
                f"{self.options.caller}: a forward hook on the criterion changes its loss, which has no closed form then; remove "
                "it, or use method='exact' or 'hutchinson'"
            )

    def _closed(self, part: Part, outputs: Tensor, taken: Taken, per_sample: bool = False) -> Tensor:
        capture, features, weight, class_dim, rows, bound = taken
        samples = part.layer.samples(capture.shape)
        return flatness(
            self.options, part.layer, bound, outputs, class_dim, rows, features, weight, samples, per_sample
        )

    def _found(self, parts: Sequence[Part], loss: Tensor) -> list[Found]:
        """The calls of layers that `loss` depends on, by one walk of its graph; raises where a layer has none."""
        caller = self.options.caller
        if loss.dim() != 0:
            raise UnsupportedError(
                f"{caller}: the criterion must return one number where the layer is no head, got shape {tuple(loss.shape)}; use "
                "reduction='mean' or 'sum'"
            )
        if not loss.requires_grad:
            raise UnsupportedError(
                f"{caller}: this layer is no head, its curvature needs gradients: {self._no_graph(parts[0])}"
            )
        walked = graph_walk.find(loss, [part.captures for part in parts])
        return [
            Found(part, *self._calls(part, calls), between)
            for part, (calls, between) in zip(parts, walked, strict=True)
        ]

    def _calls(self, part: Part, found: Sequence[graph_walk.Call]) -> tuple[Tensor, list[LayerCall]]:
        """The layer's weight and its calls, checked."""
        caller = self.options.caller
        if not found:
            raise part.not_a_head or UnsupportedError(f"{caller}: {self._no_graph(part)}")
        calls, weight = [], None
        for call in found:
            capture: Capture = call.stored
            features = capture.take(caller)
            capture.used[0] = True
            weight = capture.weight
            part.layer.check_call(caller, features, weight, capture.shape)  # type: ignore[arg-type]
            if capture.first is not None:
                part.layer.check_unusual(caller, features, weight, capture.first, capture.dtype)  # type: ignore[arg-type]
            features, weight = part.rescaled(features, weight)  # type: ignore[arg-type]
            calls.append(
                LayerCall(GradientEdge(call.node, call.number), features, capture.shape, capture.dtype)
            )
        part.captures.done()
        assert weight is not None
        return weight, calls

    def _hessian_terms(self, loss: Tensor, found: Sequence[Found], per_sample: bool) -> list[Estimate]:
        """The terms of layers that are no heads, from products that share the first gradient of the loss."""
        wanted = torch.is_grad_enabled()
        curvatures = [f.part.general.curvature(f.weight, f.calls) for f in found]
        with self._products(loss, found, curvatures):
            layers = [(f.part.general, c, f.between) for f, c in zip(found, curvatures, strict=True)]
            terms = hessian_terms(layers, per_sample)
        return terms if wanted else [Estimate(term.value.detach(), term.standard_error) for term in terms]

    @contextmanager
    def _products(
        self, loss: Tensor, found: Sequence[Found], curvatures: Sequence[Curvature]
    ) -> Iterator[None]:
        between = dict.fromkeys(node for f in found for node in f.between)  # a set with an order
        correct, doubtful = verdicts.check(self.options.caller, between)
        with (
            torch.autocast(loss.device.type, enabled=False),
            products(loss, curvatures, correct, doubtful),
        ):
            yield

    def weight_product(self, loss: Tensor, direction: Tensor) -> Tensor:
        """H D of one loss for the first layer, D and the result in canonical layout (fam_ext.layers), without graph."""
        found = self._found(self.parts[:1], loss)
        curvature = Curvature(found[0].part.layer, found[0].weight, found[0].calls, hold=True)
        with self._products(loss, found, [curvature]):
            return curvature.weight_product(direction).detach()

    def _terms(
        self,
        taken: Sequence[Taken | None],
        loss: Tensor | None,
        outputs: Any,
        bound: loss_hessians.Bound | None,
        closure: Any = None,
        per_sample: bool = False,
    ) -> Estimate:
        """The sum of the layers' terms. `loss` may be None where no term needs its graph."""
        terms = [
            Estimate(self._closed(part, outputs, head, per_sample), None)
            for part, head in zip(self.parts, taken, strict=True)
            if head is not None
        ]
        others = [part for part, head in zip(self.parts, taken, strict=True) if head is None]
        if others and self.options.method == "finite_difference":
            for part in others:
                part.captures.done()
                terms.append(part.general.by_differences(closure, per_sample))
        elif others:
            assert loss is not None
            found = self._found(others, loss)
            if self.options.curvature == "hessian":
                terms += self._hessian_terms(loss, found, per_sample)
            else:
                places = [(f.part.general, f.weight, f.calls, f.between) for f in found]
                terms += positive_terms(places, outputs, bound, per_sample)
        return Estimate.total(terms)

    @staticmethod
    def _no_graph(part: Part) -> str:
        if part.captures.called_without_grad:
            return "the layer was called under torch.no_grad or inference_mode; call the model with gradients enabled"
        return (
            f"the loss does not depend on a call of {part.module} in training mode; check that `layer` is the very module the "
            "model uses, and that it or something before it requires grad"
        )
