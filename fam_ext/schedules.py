"""Strength schedules: callables step -> strength. Any callable will do; 0 skips the term of that step, at no cost."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks

Schedule = Callable[[int], float]
# TargetRatio's term is at most this share of what the loss has fallen by. Near a start without any signal the loss falls in
# proportion to |W| and the term's gradient is that of share * fall * log|W|^2, so that the weight grows where the share is below
# 1/2. On digits 0.1 cost no run, 0.25 some.
_SHARE = 0.1


def check_strength(function: str, argument: str, value: object) -> float | Schedule:
    """A finite number as float, or a callable as it is. Raises TypeError or ValueError."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not -sys.float_info.max <= value <= sys.float_info.max:  # type: ignore[operator]
            _checks.bad_value(function, argument, "a finite number", value)
        return float(value)
    if callable(value) and not isinstance(value, (type, torch.nn.Module)):
        return value
    _checks.bad_type(function, argument, "a number or a callable from step to number", value)


def _steps(function: str, argument: str, value: object) -> int:
    _checks.check_integer(function, argument, value)
    if value < 0:  # type: ignore[operator]
        _checks.bad_value(function, argument, "at least 0", value)
    return value  # type: ignore[return-value]


class Constant:
    """The same strength at every step.

    >>> Constant(0.3)(100)
    0.3
    """

    def __init__(self, strength: float) -> None:
        checked = check_strength("Constant", "strength", strength)
        if callable(checked):
            _checks.bad_type("Constant", "strength", "a number", strength)
        self.strength = checked

    def __call__(self, step: int) -> float:
        return self.strength

    def __repr__(self) -> str:
        return f"Constant({self.strength})"


class Warmup:
    """Linear from 0 at step 0 to `strength` at step `steps`, which stays; `strength` may be a schedule itself.

    >>> [Warmup(0.4, steps=4)(step) for step in (0, 2, 4, 9)]
    [0.0, 0.2, 0.4, 0.4]
    """

    def __init__(self, strength: float | Schedule, steps: int) -> None:
        self.strength = _of_step("Warmup", strength)
        self.steps = _steps("Warmup", "steps", steps)

    def __call__(self, step: int) -> float:
        value = self.strength(step) if callable(self.strength) else self.strength
        return value if step >= self.steps else value * (step / self.steps)

    def __repr__(self) -> str:
        return f"Warmup({self.strength}, steps={self.steps})"


class SwitchOff:
    """`strength` (a number or a schedule) before step `step`, 0 from it on: the term is skipped then.

    >>> [SwitchOff(0.4, step=2)(step) for step in (0, 1, 2)]
    [0.4, 0.4, 0.0]
    """

    def __init__(self, strength: float | Schedule, step: int) -> None:
        self.strength = _of_step("SwitchOff", strength)
        self.step = _steps("SwitchOff", "step", step)

    def __call__(self, step: int) -> float:
        if step >= self.step:
            return 0.0
        return self.strength(step) if callable(self.strength) else self.strength

    def __repr__(self) -> str:
        return f"SwitchOff({self.strength}, step={self.step})"


def _of_step(function: str, strength: object) -> float | Schedule:
    if isinstance(strength, TargetRatio):
        _checks.bad_type(
            function, "strength", "a number or a schedule that depends on the step alone", strength
        )
    return check_strength(function, "strength", strength)


class TargetRatio:
    r"""Strength such that strength * |kappa| is about `ratio` times the loss, as far as training can bear it.

    .. math:: \mathrm{strength} = \min(\mathrm{ratio} \cdot |L|, \; 0.1 \, (L_0 - L)) \, / \, |\kappa|

    with exponential moving averages L and kappa of the detached values, both started at the first value, and L_0 the first loss.
    The second bound keeps the term below a tenth of what the loss has fallen by. Without it only kappa is trained: the term's
    gradient is that of ratio * L * log|kappa|, which nothing bounds from below, and kappa is driven to 0, with a strength that
    grows without end, before anything is learned. With it a term that makes the loss rise takes its own strength away, and the
    first step has none. Where the loss starts low (fine-tuning on the same task), give a `maximum` instead: then the strength is
    ratio * |L| / |kappa|, at most `maximum` (math.inf: no bound at all).

    The strength is 0 while the average of kappa is 0, and has the sign of `ratio`. The averages stay on the loss's device,
    nothing is copied to the host, and steps where either value is not finite leave them as they are. Give each criterion a
    TargetRatio of its own.

    Raises:
        TypeError, ValueError: an argument does not fit.

    >>> import torch
    >>> schedule = TargetRatio(0.1, momentum=0.0)
    >>> [float(schedule.update(torch.tensor(loss), torch.tensor(4.0))) for loss in (2.0, 1.6, 1.0)]  # loss, kappa
    [0.0, 0.009999999776482582, 0.02500000037252903]
    """

    def __init__(self, ratio: float, momentum: float = 0.9, maximum: float | None = None) -> None:
        checked = check_strength("TargetRatio", "ratio", ratio)
        if callable(checked):
            _checks.bad_type("TargetRatio", "ratio", "a number", ratio)
        if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real) or not 0 <= momentum < 1:
            _checks.bad_value("TargetRatio", "momentum", "a number in [0, 1)", momentum)
        if maximum is not None:
            if isinstance(maximum, bool) or not isinstance(maximum, numbers.Real) or not maximum > 0:
                _checks.bad_value("TargetRatio", "maximum", "None or a positive number", maximum)
            maximum = math.inf if maximum > sys.float_info.max else float(maximum)
        self.ratio: float = checked
        self.maximum: float | None = maximum
        self.momentum: float = float(momentum)
        self.averages: Tensor | None = None  # (2,): loss, kappa; nan before their first finite values
        self.first: Tensor | None = None  # the first finite loss

    @torch.no_grad()
    def update(self, loss: Tensor, flatness: Tensor) -> Tensor:
        """Take in a step's loss and kappa (their means where they are per row) and return the strength, 0-d."""
        new = torch.stack([loss.detach().mean().to(flatness.dtype), flatness.detach().mean()])
        old = torch.full_like(new, torch.nan) if self.averages is None else self.averages.to(new)
        fresh = torch.where(old.isnan().any(), new, torch.lerp(new, old, self.momentum))
        self.averages = torch.where(new.isfinite().all(), fresh, old)
        mean_loss, mean_kappa = self.averages
        first = mean_loss if self.first is None else self.first.to(new)
        self.first = torch.where(first.isnan(), mean_loss, first)
        size = abs(self.ratio) * mean_loss.abs()
        if self.maximum is None:
            size = torch.minimum(size, _SHARE * (self.first - mean_loss).clamp(min=0))
        strength = size / mean_kappa.abs()
        if self.maximum is not None:
            strength = strength.clamp(max=min(self.maximum, torch.finfo(strength.dtype).max))
        usable = self.averages.isfinite().all() & (mean_kappa != 0)
        return torch.where(usable, math.copysign(1.0, self.ratio) * strength, torch.zeros_like(mean_loss))

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages, self.first = state["averages"], state["first"]

    def __repr__(self) -> str:
        return f"TargetRatio({self.ratio}, momentum={self.momentum}, maximum={self.maximum})"
