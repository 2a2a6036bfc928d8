"""method="noise": the hook that perturbs a layer in the forward pass, one draw for all calls of a step."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fam_ext.capture.calls import layer_weight
from fam_ext.capture.hook import exporting, refuse_scripting
from fam_ext.errors import UnsupportedError
from fam_ext.hessian import noise, noise_draws, split_noise
from fam_ext.layers import sharding
from fam_ext.layers.linear_map import LinearMap

_KEY = "fam_ext_noise"  # in the metadata of an autograd node
_CALLS = 64  # that a backward pass may repeat


class _Token:
    """Lives as long as the graph of the call that it was made for."""


class _Call(NamedTuple):
    """What is remembered of a call, for recognizing its repetition in a backward pass."""

    drew: Tensor  # some of the numbers that it drew
    taken: noise_draws.Draw | None  # what it took in place of them
    positions: Tensor | None  # of the gate
    without_grad: bool


class Gate:
    """Which forward passes of a model are perturbed, and where: shared by its layers' hooks. Backward passes repeat what was."""

    def __init__(self) -> None:
        self.open = True  # as in training: torch.compile would compile the first step's graph again otherwise
        self.positions: Tensor | None = None  # (S, N), 0 where a token is padding; None: all count
        self.repeats_all = False  # a backward pass repeats the whole model


class NoiseHook:
    """Adds the noise of one layer: to its input as a forward pre-hook; or to its output as a forward hook
    (`noise_draws.on_input`), where it may be a forward pre-hook as well, which makes the backward pass cheaper.

    All calls of the layer between two losses share one draw, since they share one weight. Every call takes the same amount of
    random numbers all the same, so that a checkpointed call replays the generator as its first pass found it, and is recognized
    by what it draws, whatever other steps came in between. Passes without grad need have no loss: a step with grad after them
    begins anew, unless a backward pass has shown that such calls are those of reentrant checkpointing.

    `active` is false in evaluation mode and where the strength is 0: nothing is drawn then.
    """

    __name__ = "fam_ext_noise_hook"

    def __init__(self, layer: LinearMap | None = None, generator: Any = None, shared: bool = False) -> None:
        self.layer = layer  # None: the inert hook of a copied module
        self.generator = generator
        self.shared = shared
        self.gate: Gate | None = None
        self._active = False
        self.called = False  # in this step
        self.seen = False  # in any step
        # the strength; as a tensor too, since a number that changes would make torch.compile compile again
        self.value = 0.0
        self.tensor: Tensor | None = None

        # this step's draw: of the first call, and of later ones where that differs
        self.drawn: noise_draws.Draw | None = None
        self.later: noise_draws.Draw | None = None
        # `later` without its graph, for calls that are repeated: what is remembered may not keep a skipped step's graph
        self._later_alone: noise_draws.Draw | None = None
        self._first: Tensor | None = None  # features of the first call, which `later` depends on
        self._token: Any = None  # weak reference: dead when the graph of the first call is
        self._without_grad = False  # `drawn` was made in a call without grad

        # for backward passes, which may call the layer again: (drawn, later) of the step before, and the latest calls
        self.kept: tuple[noise_draws.Draw | None, noise_draws.Draw | None] = (None, None)
        self._calls: deque[_Call] = deque(maxlen=_CALLS)
        self._reentrant = False  # a call without grad has been repeated: reentrant checkpointing

        # between the two hooks of one call: (features, draw, products of the two)
        self._aside: tuple[Tensor, noise_draws.Draw, Tensor | None] | None = None

    @property
    def active(self) -> bool:
        """Whether calls are perturbed."""
        return self._active and (self.gate is None or self.gate.open or _in_backward())

    @active.setter
    def active(self, value: bool) -> None:
        self._active = value

    def set(self, strength: float, device: torch.device) -> None:
        """Take the strength of the step to come."""
        if self.tensor is None or self.tensor.device != device or strength != self.value:
            # a new one: compiled code may keep the old one for the backward pass that is still to come
            self.tensor = torch.full((), strength, device=device)
        self.value = strength

    def finish(self) -> None:
        """A loss has been taken: the next call draws anew."""
        self.kept = (self.drawn, self._later_alone)
        self.drawn, self.later, self._token, self._first = None, None, None, None
        self._later_alone = None
        self.called = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook: the input is perturbed, or given back with its products set aside."""
        if not self.active or not module.training or exporting():
            return None
        layer, features = self._layer(), args[0] if args else kwargs["input"]
        if noise_draws.on_input(layer) and sharding.is_dtensor(features):
            split_noise.is_split("FAMLoss", features)
            like = features.to_local().new_empty(features.shape)  # of the whole width
            drawn = self._draw(like, features.device_mesh.get_group())
            given = split_noise.perturb("FAMLoss", drawn, features, self._strength())
            self._remember(given)
        else:
            self._check_plain(module)
            drawn = self._draw(features)
            if noise_draws.on_input(layer):
                given = noise.perturb_input(layer, drawn, features, self._strength())
                self._remember(given)
            else:
                given, inner = noise.products(layer, drawn, features)
                self._aside = (given, drawn, inner)
        if args:
            return (given, *args[1:]), kwargs
        return args, {**kwargs, "input": given}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook of a layer whose output is perturbed."""
        if not self.active or not module.training or exporting():
            return None
        layer, features = self._layer(), args[0] if args else kwargs["input"]
        aside, self._aside = self._aside, None
        if aside is None or aside[0] is not features:
            self._check_plain(module)
            aside = (features, self._draw(features), None)
        perturbed = noise.perturb_output(
            layer, aside[1], features, layer_weight(module), output, self._strength(), aside[2]
        )
        self._remember(perturbed)
        return perturbed

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        """`rest` is (kwargs,) before the layer and (kwargs, output) after it."""
        if not self.active:
            return None
        return self.before(module, args, *rest) if len(rest) == 1 else self.after(module, args, *rest)

    def _layer(self) -> LinearMap:
        assert self.layer is not None
        return self.layer

    def _strength(self) -> float | Tensor:
        compiling = torch.compiler.is_compiling()
        return self.tensor if compiling and self.tensor is not None else self.value

    @staticmethod
    def _check_plain(module: nn.Module) -> None:
        weight = module._parameters.get("weight")
        if sharding.is_dtensor(weight):
            raise UnsupportedError(
                f"FAMLoss: the layer's weight is split by tensor parallelism, {sharding.describe(weight)}, and its input is not "
                "yet where method='noise' sees it; make the criterion after parallelize_module, or call its detach() and "
                "attach()"
            )

    def _draw(self, features: Tensor, group: Any = None) -> noise_draws.Draw:
        """`group`: processes that share one draw."""
        generator = self.generator
        fresh = noise_draws.draw(self._layer(), features, generator, self.shared)
        if group is not None:
            fresh = split_noise.same_on_all(fresh, group)
        self.called = self.seen = True
        if _in_backward():
            return self._repeated(fresh)
        if self._begins(fresh):
            self.drawn, self.later, self._token, self._first = fresh, None, None, features
            self._without_grad = not torch.is_grad_enabled()
            return self._noted(fresh, None)
        assert self.drawn is not None
        if not torch.is_grad_enabled() and self.drawn.samples != fresh.samples:
            return self._noted(fresh, None)
        if torch.compiler.is_compiling():
            return self._at_positions(self._of_later_calls(fresh))
        if self.drawn.samples != fresh.samples:
            raise UnsupportedError(
                f"FAMLoss: method='noise' has one draw for all calls of a layer in a step, and this one has {fresh.samples} "
                f"samples where an earlier one had {self.drawn.samples}; share one draw in the batch "
                "(per_sample_probes=False), or call criterion.reset() after a forward pass that no loss follows"
            )
        if group is not None and self.drawn.channels is None:
            raise UnsupportedError(
                "FAMLoss: under tensor parallelism method='noise' is not for a layer of one row per sample that is called "
                "several times before a loss; share one draw in the batch (per_sample_probes=False)"
            )
        return self._noted(fresh, self._of_later_calls(fresh))

    def _begins(self, fresh: noise_draws.Draw) -> bool:
        """Whether a call is the first one of a step; a step without a loss ends with its graph."""
        if self.drawn is None:
            return True
        if self._without_grad:
            anew = torch.is_grad_enabled() and not self._reentrant
            return anew or self.drawn.samples != fresh.samples
        return not torch.compiler.is_compiling() and self._token is not None and self._token() is None

    def _at_positions(self, drawn: noise_draws.Draw) -> noise_draws.Draw:
        positions = None if self.gate is None else self.gate.positions
        return drawn if positions is None else drawn._replace(positions=positions)

    def _noted(self, fresh: noise_draws.Draw, taken: noise_draws.Draw | None) -> noise_draws.Draw:
        """`taken`, or the fresh draw, where it counts; kept for a backward pass that calls the layer again."""
        if not torch.compiler.is_compiling():
            positions = None if self.gate is None else self.gate.positions
            numbers = self._later_alone if taken is not None and taken is self.later else taken
            self._calls.append(_Call(_signs(fresh), numbers, positions, not torch.is_grad_enabled()))
        return self._at_positions(taken or fresh)

    def _repeated(self, fresh: noise_draws.Draw) -> noise_draws.Draw:
        """Checkpointing: what the call took that drew the same, its first pass."""
        if self.generator is None:
            own = _signs(fresh)
            for call in reversed(self._calls):
                if torch.equal(call.drew, own):
                    self._reentrant |= call.without_grad
                    if call.without_grad and call.taken is not None:
                        _check_whole(call.taken, fresh)
                    return (call.taken or fresh)._replace(positions=call.positions)
            if self.gate is not None and self.gate.repeats_all:
                raise UnsupportedError(
                    "FAMLoss: a checkpoint around the whole model repeats a pass that had no noise: a reentrant one runs it "
                    "without gradients, as evaluation does; use use_reentrant=False, or checkpoint the blocks"
                )
        first, later = (self.drawn, self.later) if self.drawn is not None else self.kept
        if first is None or torch.equal(first.left, fresh.left):
            return fresh
        if later is not None and any(call.without_grad for call in self._calls):
            _check_whole(later, fresh)
        return later or first

    def _of_later_calls(self, fresh: noise_draws.Draw) -> noise_draws.Draw:
        """The first call's draw; one that was made for its features alone (b = phi / |phi|) takes the second's signs too."""
        assert self.drawn is not None
        if self.drawn.channels is not None or self._first is None:
            return self.drawn
        if self.later is None:
            self.later = noise_draws.along(self._first, self.drawn.left, fresh.left)
            self._later_alone = _alone(self.later)
        return self.later

    def _remember(self, *perturbed: Tensor) -> None:
        """Tie the draw to the graph of its first call, from one of the tensors that it perturbed."""
        if self._token is not None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        token = _Token()
        node: Any = next((t.grad_fn for t in perturbed if t.grad_fn is not None), None)
        (perturbed[0].__dict__ if node is None else node.metadata)[_KEY] = token
        self._token = weakref.ref(token)

    def __getattr__(self, name: str) -> Any:
        refuse_scripting(name)
        raise AttributeError(name)

    def __reduce__(self) -> Any:
        return NoiseHook, ()


def _in_backward() -> bool:
    """Whether a backward pass calls the layer again (checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _alone(drawn: noise_draws.Draw) -> noise_draws.Draw:
    """The draw without its graph; it requires grad as before, so that a repeated call saves the same tensors."""
    b = drawn.channels
    return drawn if b is None else drawn._replace(channels=b.detach().requires_grad_(b.requires_grad))


def _check_whole(taken: noise_draws.Draw, fresh: noise_draws.Draw) -> None:
    """Refuse to repeat a call that had no grad with the draw of :func:`noise_draws.along`: its gradient in phi would be lost."""
    if fresh.channels is None and taken.channels is not None:
        raise UnsupportedError(
            "FAMLoss: with method='noise' a reentrant checkpoint is not for a layer of one row per sample that is called several "
            "times before a loss; use use_reentrant=False, or share one draw in the batch (per_sample_probes=False)"
        )


def _signs(drawn: noise_draws.Draw) -> Tensor:
    """Enough of a draw to recognize it."""
    left = drawn.left.flatten()[:64]
    if drawn.channels is None or len(left) == 64:
        return left.clone()
    return torch.cat([left, drawn.channels.flatten()[:64]])
