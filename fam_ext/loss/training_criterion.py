"""What FAMLoss keeps from step to step: strength and its schedule, the step, its record, the hooks' noise, the saved state."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.loss.advice import Advice
from fam_ext.loss.layer_criterion import LayerCriterion
from fam_ext.loss.noise_hook import NoiseHook
from fam_ext.loss.plan import CLOSED_FORM, NOISE, NOISE_SHARED, UNUSED
from fam_ext.loss.state import from_bytes, to_bytes
from fam_ext.loss.step_record import StepRecord
from fam_ext.options import Options
from fam_ext.schedules import Schedule, TargetRatio, check_strength


class TrainingCriterion(LayerCriterion):
    """A criterion that adds its term on some steps, with the strength of the step."""

    def __init__(
        self,
        criterion: Any,
        layer: nn.Module | Sequence[nn.Module],
        options: Options,
        strength: float | Schedule | TargetRatio,
        every: int,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            _checks.bad_type("FAMLoss", "every", "an integer", every)
        if every < 1:
            _checks.bad_value("FAMLoss", "every", "at least 1", every)
        super().__init__(criterion, layer, options)
        self._strength = self._check_strength(strength)
        self.every = every
        self.step = 0
        self._counts_calls = True
        self._followed: Any = None  # handle of the hook on the optimizer
        self.last = StepRecord()
        self._advice = Advice()
        self._noise = options.method == "noise"
        self.changes = False  # the strength of the noise, from step to step
        if self._noise:
            self._set_noise()

    def _check_strength(self, value: object) -> Any:
        if isinstance(value, TargetRatio):
            if self.options.method == "noise":
                _checks.bad_type(
                    "FAMLoss",
                    "strength",
                    "a number or a schedule of steps with method='noise', which has no value of kappa",
                    value,
                )
            return value
        return check_strength("FAMLoss", "strength", value)

    @property
    def strength(self) -> Any:
        """The number or schedule in use; may be set at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Schedule | TargetRatio) -> None:
        self._strength = self._check_strength(value)
        if self._noise:
            self._set_noise()

    def follow(self, optimizer: Any = None) -> None:
        """Count the steps of `optimizer` from now on, not the calls of the criterion: what `every` and schedules go by.

        Without it a training step is one call. Gradient accumulation, SAM and LBFGS call the criterion several times for one
        update: these calls share one step then, and with it one strength. A step that GradScaler skips does not count. Of an
        optimizer around others (SAM), pass the inner one, whose step makes the update. A copy of the criterion counts its calls
        until it follows an optimizer itself.

        Args:
            optimizer: a torch.optim.Optimizer, or a wrapper that keeps one as `.optimizer` (accelerate's, Lightning's); None:
                `advance` is called by hand, once for each update.

        Raises:
            TypeError: `optimizer` is no torch.optim.Optimizer.

        Example:
            >>> import torch, fam_ext
            >>> layer = torch.nn.Linear(3, 2)
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            >>> criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), layer, fam_ext.schedules.Warmup(0.1, steps=100))
            >>> criterion.follow(optimizer)
            >>> for _ in range(4):  # four micro-batches of one update
            ...     criterion(layer(torch.randn(2, 3)), torch.tensor([0, 1])).backward()
            >>> optimizer.step()
            >>> criterion.step
            1
        """
        inner = optimizer
        while inner is not None and "_optimizer_step_post_hooks" not in vars(inner):
            around, inner = inner, getattr(inner, "optimizer", None)
            if inner is None or inner is around:
                _checks.bad_type(
                    "FAMLoss.follow", "optimizer", "a torch.optim.Optimizer (else call advance())", optimizer
                )
        if self._followed is not None:
            self._followed.remove()
        self._followed, self._counts_calls = None, False
        if inner is not None:
            own = weakref.ref(self)  # an optimizer must not keep the criterion alive

            def after_step(*_: Any) -> None:
                criterion = own()
                if criterion is not None:
                    criterion.advance()

            self._followed = inner.register_step_post_hook(after_step)

    def advance(self) -> None:
        """End a step by hand: one update has been made. Only after `follow`, else each call of the criterion is a step."""
        if self._counts_calls:
            raise UnsupportedError(
                "FAMLoss.advance: each call of this criterion ends a step already; call follow(None) first"
            )
        self.step += 1
        if self._noise:
            self._set_noise()

    def attach(self) -> None:
        """Put the hooks on the layers (again); without effect while they are there."""
        super().attach()
        if self.__dict__.get("_noise"):
            self._set_noise()

    def get_extra_state(self) -> Tensor:
        """Step, schedule and random generators, as a tensor of bytes."""
        schedule = self._strength
        generators = [term.generator_states() for term in self.terms]
        state = schedule.state_dict() if hasattr(schedule, "state_dict") else None
        return to_bytes({"step": self.step, "schedule": state, "generators": generators})

    def set_extra_state(self, state: Any) -> None:
        state = from_bytes(state)
        self.step = state["step"]
        if state["schedule"] is not None and hasattr(self._strength, "load_state_dict"):
            self._strength.load_state_dict(state["schedule"])
        for term, of_term in zip(self.terms, state.get("generators", ()), strict=False):
            term.load_generator_states(of_term)
        if self._noise:
            self._set_noise()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As nn.Module's, but a state of a model that was trained with the criterion alone lacks nothing."""
        super()._load_from_state_dict(*args, **kwargs)
        prefix, missing = args[1], args[4]
        key = f"{prefix}_extra_state"
        if key in missing:
            missing.remove(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last": None, "_followed": None, "_counts_calls": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.last = StepRecord()

    def _activate(self, training: bool) -> None:
        """In evaluation mode and at strength 0 nothing is perturbed."""
        super()._activate(training)
        if self.__dict__.get("_noise"):
            for term in self.terms:
                hook: Any = term.hook
                if hook.value == 0:
                    hook.active = False

    def _set_noise(self) -> None:
        """Tell the hooks the strength of the step to come."""
        strength = self._strength_now()
        if strength < 0:
            _checks.bad_value("FAMLoss", "strength", "at least 0 with method='noise', a variance", strength)
        self.changes = callable(self._strength) or self.every > 1
        shared = self.options.per_sample_probes is False
        for term in self.terms:
            hook: Any = term.hook
            if isinstance(hook, NoiseHook):
                hook.set(strength * term.factor, term.device)
            if term.plan is None:
                term.record_plan(NOISE_SHARED if shared else NOISE)
        self._activate(self.training)

    def _reset_noise(self) -> None:
        for term in self.terms:
            if isinstance(term.hook, NoiseHook):
                term.hook.finish()

    def next_pass(self) -> None:
        """End the step of a forward pass whose loss the criterion is not given; only with method="noise"."""
        self._reset_noise()
        self.last = StepRecord(None, None, self._strength_now())
        if self._counts_calls:
            self.step += 1
        if self.changes:
            self._set_noise()

    def reset(self) -> None:
        """Drop the features, and the noise, of forward calls that no loss follows."""
        super().reset()
        self._reset_noise()

    def _advise(self, last: StepRecord) -> None:
        """Look at the numbers of a step with the term."""
        inside = self.options.curvature == "hessian" and any(
            term.plan not in (None, CLOSED_FORM, UNUSED) for term in self.terms
        )
        self._advice.look(last, inside, isinstance(self._strength, float))

    def _strength_now(self) -> Any:
        """This step's strength: a number, or TargetRatio. 0 on a step without the term."""
        if self.step % self.every:
            return 0.0
        strength = self._strength
        if not isinstance(strength, (float, TargetRatio)):
            what = "the value of the strength schedule"
            strength = check_strength("FAMLoss", what, strength(self.step))
            if callable(strength):
                _checks.bad_type("FAMLoss", what, "a number", strength)
        return strength
