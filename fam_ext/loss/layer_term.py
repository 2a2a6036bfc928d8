"""One regularized layer of a criterion: its hook, its captured calls, and what is remembered about it between steps."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext.capture.calls import CapturedCalls, layer_weight
from fam_ext.capture.hook import LayerHook
from fam_ext.errors import NoClosedForm
from fam_ext.head.closed_form import weight_factor
from fam_ext.hessian.noise_draws import on_input
from fam_ext.layers import sharding
from fam_ext.layers.attention import Projection
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss import attention_hook
from fam_ext.loss.attention_hook import ProjectionHook
from fam_ext.loss.noise_hook import Gate, NoiseHook
from fam_ext.loss.plan import CouplingMemory, Plan
from fam_ext.options import Options

log = logging.getLogger("fam_ext")

_SEED = 0x5EED


class LayerTerm:
    """The layer, its hook and calls, and how its share of kappa was computed last."""

    def __init__(self, options: Options, module: Any) -> None:
        self.options = options
        self.module = module  # the layer, the adapter around it, or a projection of an attention
        inside = isinstance(module, Projection)
        self.layer = module.linear_map(options.caller) if inside else LinearMap(options.caller, module)
        self.captures = CapturedCalls(str(module), self.layer.class_dim, self.layer.unusual)
        self.set_share(1.0)
        self.hook: LayerHook | NoiseHook = LayerHook()
        # of the noise, kept here because a new hook is made whenever the term is attached
        self.gate: Gate | None = None
        self.handle: Any = None
        self._finalizer: Any = None  # takes the hook off when the criterion is collected
        self.name = ""  # in the model, where it was chosen by name
        self.plan: Plan | None = None
        self.memory = CouplingMemory()
        self.why_not_closed: NoClosedForm | None = None  # of the latest loss
        # by input channel: take the term for features divided by it (fam_ext.measure)
        self.scale: Tensor | None = None
        self.generators: dict[torch.device, torch.Generator] = {}
        self.loaded: dict[str, Tensor] = {}  # states of generators that are not made yet, by device
        if options.method == "noise" and options.generator is not None:  # its hook does not ask for it here
            self.generators[options.generator.device] = options.generator

    def set_share(self, share: float) -> None:
        """What the layer's kappa counts in the sum; `factor` is that over the fan-in, if kappa is to be divided by it."""
        self.share = share
        self.factor = share if self.options.normalize is None else share / max(self.layer.fan_in, 1)

    def attach(self, owner: Any) -> None:
        """Put the hook on the layer; without effect while it is there."""
        if self.handle is not None:
            return
        options, module = self.options, self.module
        shared = options.per_sample_probes is False
        if isinstance(module, Projection):
            hook = ProjectionHook(module, options.generator, shared, options.normalize is not None)
            self.hook, self.handle = hook, attention_hook.attach(module, hook)
        elif options.method == "noise":
            _remove_inert_hooks(module)
            self.hook = NoiseHook(self.layer, options.generator, shared)
            self.handle = _Handles([module.register_forward_pre_hook(self.hook, with_kwargs=True)])
            if not on_input(self.layer):
                # ahead of FSDP2's hook, which frees the weight
                self.handle.append(module.register_forward_hook(self.hook, with_kwargs=True, prepend=True))
        else:
            _remove_inert_hooks(module)
            self.hook = LayerHook(self.captures, owner.any_mode)
            self.handle = module.register_forward_hook(self.hook, with_kwargs=True)
        if isinstance(self.hook, NoiseHook):
            self.hook.gate = self.gate
        self.hook.active = owner.training
        self._finalizer = weakref.finalize(owner, self.handle.remove)
        self._finalizer.atexit = False

    def detach(self) -> None:
        if self.handle is not None:
            self._finalizer.detach()
            self.handle.remove()
            self.handle = None
            self.hook.active = False
        self.captures.reset()

    @property
    def device(self) -> torch.device:
        """Of the layer's weight."""
        module = self.module
        return (module.weight if isinstance(module, Projection) else layer_weight(module)).device

    def rescaled(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Features over `scale` and the weight times it."""
        layer, scale = self.layer, self.scale
        assert scale is not None
        return layer.divide_features(features, scale), layer.multiply_weight(weight, scale)

    def weight(self) -> Tensor:
        """The layer's weight now, rescaled, in canonical layout (fam_ext.layers.linear_map)."""
        sharding.gather(sharding.owners(self.module))
        weight = layer_weight(self.module).detach()
        scaled = weight if self.scale is None else self.layer.multiply_weight(weight, self.scale)
        return self.layer.canonical(scaled)

    def generator(self, device: torch.device) -> torch.Generator:
        """The user's, or one of our own: torch's global random state is left alone."""
        given = self.options.generator
        if given is not None:
            # a generator's device may lack the index
            if given.device.type != device.type or given.device.index not in (None, device.index):
                raise ValueError(
                    f"{self.options.caller}: generator must be on the layer's device ({device}), got one on {given.device}"
                )
            if given not in self.generators.values():
                self.generators[device] = given
            return given
        if device not in self.generators:
            made = torch.Generator(device).manual_seed(_SEED)
            name = _saved_for(device, self.loaded)
            if name is not None:
                made.set_state(self.loaded.pop(name))
            self.generators[device] = made
        return self.generators[device]

    def generator_states(self) -> dict[str, Tensor]:
        """By device; the user's generator is among them once it has been used, for noise from the start."""
        own = {str(device): generator.get_state() for device, generator in self.generators.items()}
        return {**self.loaded, **own}

    def load_generator_states(self, states: dict[str, Tensor]) -> None:
        """The inverse. A layer that is on another device of the same type now takes its state there, where that is the only one.

        The state of a device that the layer is not on, or that is not here, waits until it is.
        """
        given = self.options.generator
        if given is not None and given not in self.generators.values():
            self.generators[given.device] = given  # at once: layers may share it
        waiting = dict(states)
        for device in sorted(self.generators, key=lambda device: str(device) not in states):  # its own first
            name = _saved_for(device, waiting)
            if name is not None:
                self.generators[device].set_state(waiting.pop(name))
        self.loaded.update(waiting)

    def scale_to_measure(self, value: Tensor, weight: Tensor) -> Tensor:
        """The measure from the curvature: times the norm of the weight (any layout), over the fan-in."""
        options = self.options
        if options.measure != "neuronwise":
            factor = weight_factor(weight, options.measure, options.norm_power)
            if factor is not None:
                value = value * factor.to(value.dtype)
        return value if self.factor == 1.0 else value * self.factor

    def record_plan(self, plan: Plan) -> None:
        if plan is not self.plan and plan != self.plan:
            self.plan = plan
            log.info("%s on %s: %s", self.options.caller, type(self.layer.module).__name__, plan)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "module": self.module, "share": self.share, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"], state["module"])  # type: ignore[misc]
        self.set_share(state["share"])
        self.name = state["name"]


def _saved_for(device: torch.device, states: dict[str, Tensor]) -> str | None:
    """The device in `states` whose state is for one on `device`: the same, or the only one of its type.

    >>> _saved_for(torch.device("cuda:0"), {"cpu": torch.ones(1), "cuda:1": torch.ones(1)})
    'cuda:1'
    """
    if str(device) in states:
        return str(device)
    alike = [name for name in states if torch.device(name).type == device.type]
    return alike[0] if len(alike) == 1 or (alike and device.index is None) else None


class _Handles(list[Any]):
    """Several handles that are removed together."""

    def remove(self) -> None:  # type: ignore[override]
        for handle in self:
            handle.remove()


def _remove_inert_hooks(module: nn.Module) -> None:
    """Hooks that a copy of the layer carries, tied to no criterion."""
    untyped: Any = module
    for hooks, marks in (
        (untyped._forward_hooks, untyped._forward_hooks_with_kwargs),
        (untyped._forward_pre_hooks, untyped._forward_pre_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            inert = (isinstance(hook, LayerHook) and hook.captures is None) or (
                isinstance(hook, NoiseHook) and hook.layer is None
            )
            if inert:
                del hooks[key]
                marks.pop(key, None)
