"""What a criterion keeps of its latest loss call."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Last:
    """The latest loss call, detached, for logs.

    `flatness` is None on a step without the term; `standard_error` is that of an estimate from several probes, else None.
    """

    __slots__ = ("_loss", "_total", "flatness", "standard_error", "strength")

    def __init__(
        self,
        loss: Tensor | None = None,
        total: Tensor | None = None,
        flatness: Tensor | None = None,
        strength: Any = None,
        standard_error: Tensor | None = None,
    ) -> None:
        self.standard_error = standard_error
        self._loss = loss
        self._total = total
        self.flatness: Tensor | None = flatness
        self.strength: float | Tensor | None = strength

    @property
    def loss(self) -> Tensor | None:
        """The criterion's own loss, without the term."""
        if self._loss is None and self._total is not None and self.flatness is not None:
            self._loss = self._total - self.flatness * (0.0 if self.strength is None else self.strength)
        return self._loss

    def __repr__(self) -> str:
        return f"Last(loss={self.loss}, flatness={self.flatness}, strength={self.strength})"
