"""Strength schedules: callables step -> strength. Any callable will do; 0 skips the term of that step, at no cost."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks

Schedule = Callable[[int], float]


def check_strength(function: str, argument: str, value: object) -> float | Schedule:
    """A finite number as float, or a callable as it is. Raises TypeError or ValueError."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if not math.isfinite(number):
            _checks.bad_value(function, argument, "a finite number", value)
        return number
    if callable(value) and not isinstance(value, (type, torch.nn.Module)):
        return value
    _checks.bad_type(function, argument, "a number or a callable from step to number", value)


def _steps(function: str, argument: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        _checks.bad_type(function, argument, "an integer", value)
    if value < 0:
        _checks.bad_value(function, argument, "at least 0", value)
    return value


class Constant:
    """The same strength at every step."""

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
    """Linear from 0 at step 0 to `strength` at step `steps`, which stays; `strength` may be a schedule itself."""

    def __init__(self, strength: float | Schedule, steps: int) -> None:
        self.strength = _of_step("Warmup", strength)
        self.steps = _steps("Warmup", "steps", steps)

    def __call__(self, step: int) -> float:
        value = self.strength(step) if callable(self.strength) else self.strength
        return value if step >= self.steps else value * (step / self.steps)

    def __repr__(self) -> str:
        return f"Warmup({self.strength}, steps={self.steps})"


class SwitchOff:
    """`strength` (a number or a schedule) before step `step`, 0 from it on: the term is skipped then."""

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
    """Strength such that strength * |kappa| is about `ratio` times the loss, and at most `maximum`.

    strength = ratio * mean(loss) / |mean(kappa)| with exponential moving averages of the detached values, both started at the
    first value; 0 while the average of kappa is 0. The averages stay on the loss's device, nothing is copied to the host,
    and steps where either value is not finite leave them as they are. Give each criterion a TargetRatio of its own.

    Give a `maximum` in training: the gradient is that of ratio * loss * log|kappa|, which nothing bounds from below. Where
    kappa can be driven to 0 faster than the loss falls, early in training as a rule, the strength grows without end and only
    kappa is trained.
    """

    def __init__(self, ratio: float, momentum: float = 0.9, maximum: float = math.inf) -> None:
        checked = check_strength("TargetRatio", "ratio", ratio)
        if callable(checked):
            _checks.bad_type("TargetRatio", "ratio", "a number", ratio)
        if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real) or not 0 <= momentum < 1:
            _checks.bad_value("TargetRatio", "momentum", "a number in [0, 1)", momentum)
        if isinstance(maximum, bool) or not isinstance(maximum, numbers.Real) or not maximum > 0:
            _checks.bad_value("TargetRatio", "maximum", "a positive number", maximum)
        self.ratio: float = checked
        self.maximum: float = float(maximum)
        self.momentum: float = float(momentum)
        self.averages: Tensor | None = None  # (2,): loss, kappa; nan before their first finite values

    @torch.no_grad()
    def update(self, loss: Tensor, flatness: Tensor) -> Tensor:
        """Take in a step's loss and kappa (their means where they are per row) and return the strength, 0-d."""
        new = torch.stack([loss.detach().mean().to(flatness.dtype), flatness.detach().mean()])
        old = torch.full_like(new, torch.nan) if self.averages is None else self.averages.to(new)
        fresh = torch.where(old.isnan().any(), new, torch.lerp(new, old, self.momentum))
        self.averages = torch.where(new.isfinite().all(), fresh, old)
        mean_loss, mean_kappa = self.averages
        usable = self.averages.isfinite().all() & (mean_kappa != 0)
        strength = (self.ratio * mean_loss / mean_kappa.abs()).clamp(-self.maximum, self.maximum)
        return torch.where(usable, strength, torch.zeros_like(mean_loss))

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = state["averages"]

    def __repr__(self) -> str:
        return f"TargetRatio({self.ratio}, momentum={self.momentum}, maximum={self.maximum})"
