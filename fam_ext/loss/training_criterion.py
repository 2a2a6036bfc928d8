"""What FAMLoss keeps from step to step: strength and its schedule, the step, its record, the hooks' noise, the saved state."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.loss.advice import Advice
from fam_ext.loss.layer_criterion import LayerCriterion
from fam_ext.loss.noise_hook import NoiseHook
from fam_ext.loss.one_call import check_attached
from fam_ext.loss.plan import CLOSED_FORM, NOISE, NOISE_SHARED, UNUSED
from fam_ext.loss.state import from_bytes, to_bytes
from fam_ext.loss.step_record import StepRecord
from fam_ext.options import Options
from fam_ext.schedules import Schedule, TargetRatio, check_strength

if TYPE_CHECKING:
    from typing_extensions import Self


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
        every = _checks.check_positive("FAMLoss", "every", every)
        strength = _checked(options, strength)
        super().__init__(criterion, layer, options)
        self._strength: Any = strength
        self._every = every
        self.step = 0
        self._counts_calls = True
        self._followed: Any = None  # handle of the hook on the optimizer
        self.last = StepRecord()
        self._advice = Advice()
        self._noise = options.method == "noise"
        self.changes = False  # whether the strength of the noise may change from step to step
        if self._noise:
            try:
                self._set_noise()
            except Exception:  # of the schedule; the error may be kept, and with it the criterion
                self.detach()
                raise

    @classmethod
    def _within(cls, caller: str, given: Any) -> Self:
        """`given`, or the criterion of a patch. Raises TypeError for anything else."""
        own = given if isinstance(given, cls) else getattr(given, "criterion", None)
        if not isinstance(own, cls):
            _checks.bad_type(
                caller, "criterion", f"a {cls.__name__}, or what patch_causal_lm returned", given
            )
        return own

    @property
    def strength(self) -> Any:
        """The number or schedule in use; may be set at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Schedule | TargetRatio) -> None:
        value = _checked(self.options, value)
        now = self._strength_at(self.step, value, self._every) if self._noise else None
        self._strength = value
        if self._noise:
            self._set_noise(now)

    @property
    def every(self) -> int:
        """The term is added on steps 0, every, 2 every, ...; may be set at any time."""
        return self._every

    @every.setter
    def every(self, value: int) -> None:
        value = _checks.check_positive("FAMLoss", "every", value)
        now = self._strength_at(self.step, self._strength, value) if self._noise else None
        self._every = value
        if self._noise:
            self._set_noise(now)

    def follow(self, optimizer: Any = None) -> None:
        """Count the steps of `optimizer` from now on, not the calls of the criterion: what `every` and schedules go by.

        Without it a training step is one call. Gradient accumulation, SAM and LBFGS call the criterion several times for one
        update: these calls share one step then, and with it one strength (but TargetRatio's, which every call moves). A step
        that GradScaler skips does not count. Of an optimizer around others (SAM), pass the inner one, whose step makes the
        update. A copy of the criterion counts its calls until it follows an optimizer itself.

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
        while inner is not None and "_optimizer_step_post_hooks" not in getattr(inner, "__dict__", ()):
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
        if state["schedule"] is not None and hasattr(self._strength, "load_state_dict"):
            self._strength.load_state_dict(state["schedule"])
        for term, of_term in zip(self.terms, state.get("generators", ()), strict=False):
            term.load_generator_states(of_term)
        step = state["step"]
        now = self._strength_at(step, self._strength, self._every) if self._noise else None
        self.step = step  # last: an error above leaves it
        if self._noise:
            self._set_noise(now)

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

    def _set_noise(self, strength: float | None = None) -> None:
        """Tell the hooks the strength of the step to come, and turn those off that have none; `strength` where it is known."""
        if strength is None:
            strength = self._strength_now()
        self.changes = callable(self._strength) or self._every > 1
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
        """Look at the numbers of a step with the term; on the meta device there are none."""
        if last.flatness is None or last.flatness.is_meta:
            return
        inside = self.options.curvature == "hessian" and any(
            term.plan not in (None, CLOSED_FORM, UNUSED) for term in self.terms
        )
        self._advice.look(last, inside, isinstance(self._strength, float))

    def _perturbed(
        self, outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any], items: Any
    ) -> tuple[Tensor, float]:
        """The loss of the network that the hooks have perturbed, and the strength of this step."""
        strength = self._strength_now()
        if strength:
            check_attached("FAMLoss", self.terms)
            for term in self.terms:
                hook: Any = term.hook
                if hook.value and not hook.called and not hook.seen:
                    raise term.captures.not_called("FAMLoss")
        loss: Tensor = self.criterion(outputs, *targets, **kwargs)
        if items is not None:
            loss = loss / items
        self._reset_noise()
        return loss, strength

    def _strength_now(self) -> Any:
        """This step's strength: a number, or TargetRatio. 0 on a step without the term."""
        return self._strength_at(self.step, self._strength, self._every)

    def _strength_at(self, step: int, strength: Any, every: int) -> Any:
        if step % every:
            return 0.0
        if not isinstance(strength, (float, TargetRatio)):
            what = "the value of the strength schedule"
            strength = _checked(self.options, strength(step), what)
            if callable(strength):
                _checks.bad_type("FAMLoss", what, "a number", strength)
        return strength


def _checked(options: Options, value: object, what: str = "strength") -> Any:
    """A strength that the options allow: a float, a schedule or TargetRatio."""
    noise = options.method == "noise"
    if isinstance(value, TargetRatio):
        if noise:
            expected = "a number or a schedule of steps with method='noise', which has no value of kappa"
            _checks.bad_type("FAMLoss", what, expected, value)
        return value
    checked = check_strength("FAMLoss", what, value)
    if noise and isinstance(checked, float) and checked < 0:
        _checks.bad_value("FAMLoss", what, "at least 0 with method='noise', a variance", checked)
    return checked
