"""The noise of one layer in a training step: all calls of the layer in a step share one draw, as they share the weight.

A step ends when its loss is taken. Forward calls that activation checkpointing repeats in the backward pass come after that, and
take the draw of the step they repeat: by the random state that checkpointing restores, or, where the layer was called several
times, by comparing what is drawn from it with what the step's calls drew. So every call draws the same amount.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.errors import UnsupportedError
from fam_ext.hessian import noise
from fam_ext.hessian.noise import Draw
from fam_ext.layers.linear_map import LinearMap

_MARKS = 64  # signs of a call by which it is told from others


class _Step:
    """The calls of one step."""

    def __init__(self) -> None:
        self.calls = 0
        self.with_grad = False
        self.first: Draw | None = None
        self.later: Draw | None = None  # where a later call differs: it cannot take its own |phi|
        self.features: Tensor | None = None  # of the first call, where a later one needs them
        self.version = 0
        self.marks: list[Tensor] = []


class LayerNoise:
    """Perturbs a layer's calls so that the expected loss is loss + strength * kappa (:mod:`fam_ext.hessian.noise`).

    The caller's forward pre-hook takes :meth:`perturb_input` where `on_input` is true, and its forward hook
    :meth:`perturb_output` where it is not; both in training mode only, with or without gradients (reentrant checkpointing runs
    the first forward pass without). :meth:`end_step` is to be called whenever a loss is taken.

    Args:
        caller: named in error messages.
        layer: the layer as a linear map.
        shared: one draw for the whole batch; default: uncorrelated draws of the samples (dimension 0 of the features).
        generator: default the global one of the device, which activation checkpointing restores and torch.compile can trace.
    """

    def __init__(
        self, caller: str, layer: LinearMap, shared: bool = False, generator: torch.Generator | None = None
    ) -> None:
        self.caller = caller
        self.layer = layer
        self.shared = shared
        self.generator = generator
        self.on_input = noise.on_input(layer)
        self._step = _Step()
        self._last = _Step()  # the step whose loss was taken
        self._compiled = False
        self._usual = 0  # calls in the first step

    def perturb_input(self, features: Tensor, strength: float | Tensor) -> Tensor:
        """What the layer is to be given instead of `features`; `strength` a number of at least 0, or a 0-d tensor."""
        return noise.perturb_input(self.layer, self._draw(features), features, strength)

    def perturb_output(
        self, features: Tensor, weight: Tensor, output: Tensor, strength: float | Tensor
    ) -> Tensor:
        """What the layer is to return instead of `output`; `weight` is the effective one in the module's layout.

        Raises UnsupportedError where the output is not the layer's linear map of the features.
        """
        self.layer.check_call(self.caller, features, weight, output.shape)
        return noise.perturb_output(self.layer, self._draw(features), features, weight, output, strength)

    def end_step(self) -> None:
        """The loss of the calls so far is taken (or they are dropped): the next call draws anew.

        Raises UnsupportedError where a compiled module inside an activation checkpoint was run again by the backward pass: its
        repeated call cannot be told from the next step's.
        """
        step = self._step
        if not step.calls:
            return
        self._step, self._last = _Step(), step
        if self._compiled:
            self._last = _Step()
            self._usual = self._usual or step.calls
            if step.calls > self._usual:
                raise UnsupportedError(
                    f"{self.caller}: a compiled layer ({self.layer.kind}) was called {step.calls} times in this step, and "
                    f"{self._usual} times in the first: does checkpoint() call a compiled module? Compile what calls "
                    "checkpoint() instead"
                )

    def _draw(self, features: Tensor) -> Draw:
        fresh = noise.draw(self.layer, features, self.generator, self.shared)
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_graph_task_id() != -1:
            return self._repeated(fresh)
        step = self._step
        if step.first is not None and fresh.samples != step.first.samples:
            if step.with_grad:
                raise UnsupportedError(
                    f"{self.caller}: the layer was called with {step.first.samples} samples and then with {fresh.samples} before "
                    "the loss. A sample has one draw for all calls, so they need the same samples; share one draw "
                    "(per_sample_probes=False), or reset() the criterion to drop calls that no loss follows"
                )
            step = self._step = _Step()  # calls to look at the output, not to train
        step.with_grad = step.with_grad or torch.is_grad_enabled()
        step.calls += 1
        if compiling:
            self._compiled = True
        else:
            step.marks.append(fresh.left.flatten()[:_MARKS].clone())
        if step.first is None:
            step.first = fresh
            if fresh.channels is None:
                step.features = features.detach()
                step.version = -1 if compiling or features.is_inference() else features._version
            return fresh
        if step.later is None:
            step.later = self._for_later(step, step.first, fresh)
        return step.later

    def _for_later(self, step: _Step, first: Draw, fresh: Draw) -> Draw:
        """The first call's eps, written so that it can be applied to other features."""
        phi, step.features = step.features, None
        if first.channels is not None or phi is None:
            return first
        if step.version >= 0 and phi._version != step.version:
            raise UnsupportedError(
                f"{self.caller}: the input of a layer that is called several times in a step was modified in place after "
                "the first call; use an out-of-place operation"
            )
        # the first call took b = phi / |phi|; of a random b it tells nothing about the directions across phi
        unit = F.normalize(phi.reshape(first.left.shape), dim=2, eps=torch.finfo(phi.dtype).tiny)
        across = fresh.left
        return Draw(first.left, across + (1 - (unit * across).sum(2, keepdim=True)) * unit, None)

    def _repeated(self, fresh: Draw) -> Draw:
        """The draw of a call that the backward pass repeats."""
        steps = [step for step in (self._step, self._last) if step.calls]
        if not any(step.calls > 1 for step in steps):
            return fresh
        mark = fresh.left.flatten()[:_MARKS]
        for step in steps:
            same = {k == 0 for k, other in enumerate(step.marks) if torch.equal(mark, other)}
            drawn = step.later if False in same else step.first
            if drawn is not None and same and (len(same) == 1 or step.later is step.first):
                return drawn
        raise UnsupportedError(
            f"{self.caller}: the backward pass repeated a call of a layer that is called several times in a step, and which one "
            "cannot be told: checkpoint() needs preserve_rng_state=True, and backward() must come before the next step's loss"
        )
