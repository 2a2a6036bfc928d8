"""Warnings about a term whose sign or size does no good, each once for a criterion.

The numbers lie on the device, and reading them makes the host wait: they are read at the 1st, 2nd, 4th, 8th, ... step with the
term only.
"""

from __future__ import annotations

import math
import warnings

from fam_ext.loss.step_record import StepRecord

FIRST_STEPS = 8  # in which a strength that is evidently off is told from a term that training has moved
_NOTHING = 1e-6  # of the loss: float32 has seven digits


class Advice:
    """What one criterion has been told, and how many steps with the term it has taken."""

    def __init__(self) -> None:
        self.steps = 0
        self.given: set[str] = set()

    def look(self, last: StepRecord, inside: bool, chosen: bool) -> None:
        """Warn where the numbers of a step ask for it.

        Args:
            inside: kappa is that of the Hessian of a layer inside the network, which may be of either sign.
            chosen: strength is a number that the user chose, not a schedule's.
        """
        numbers = last.as_dict()
        curvature, plain, factor = (numbers[name] for name in ("flatness", "loss", "strength"))
        term = factor * curvature
        if not (math.isfinite(term) and math.isfinite(plain)):
            return
        if inside and factor > 0 and curvature < 0:
            self._give(
                "sign",
                f"kappa of a layer inside the network is negative ({curvature:.3g}; the loss is {plain:.3g}): the Hessian has "
                "either sign there, and training can make kappa ever more negative. Use curvature='fisher' or method='noise', "
                "which cannot be exploited so, or a smaller strength",
            )
        elif abs(term) > abs(plain) and (inside or self.steps <= FIRST_STEPS):
            ways = (
                "curvature='fisher' or method='noise' with a smaller strength"
                if inside
                else "a smaller strength"
            )
            self._give(
                "size",
                f"strength * kappa ({term:.3g}) outweighs the loss ({plain:.3g}), which is hardly trained on then; use {ways}",
            )
        elif chosen and 1 < self.steps <= FIRST_STEPS and 0 < abs(term) < _NOTHING * abs(plain):
            self._give(
                "size",
                f"strength * kappa ({term:.3g}) is less than a millionth of the loss ({plain:.3g}), which changes nothing; use a "
                "larger strength",
            )

    def _give(self, kind: str, text: str) -> None:
        if kind not in self.given:
            self.given.add(kind)
            warnings.warn(f"FAMLoss: {text} (said once; docs/strength.md)", stacklevel=5)


def warn_of_a_guess(module: object, guess: str) -> None:
    """The layer that for_model chose by itself, by the rule `guess`, is not the head that it is meant to be."""
    warnings.warn(
        f"FAMLoss.for_model: no layer was named, and {guess} gave {module}, whose output is not what the criterion receives: "
        "kappa is that of a layer inside the network. Name the layer to choose it",
        stacklevel=4,
    )
