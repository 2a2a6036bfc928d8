"""What a criterion keeps of its latest loss call: detached numbers for logs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class StepRecord:
    """The latest loss call, detached. It is what `FAMLoss.last` holds.

    `total` is what the criterion returned. `flatness` (kappa) is None on a step without the term, and with method="noise", which
    has no value for it. `standard_error` is that of an estimate from several probes, else None.

    Example:
        >>> import torch, fam_ext
        >>> layer = torch.nn.Linear(3, 2)
        >>> criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), layer, strength=0.1)
        >>> _ = criterion(layer(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0]))
        >>> sorted(criterion.last.as_dict())
        ['flatness', 'loss', 'strength']
    """

    total: Tensor | None = None
    flatness: Tensor | None = None
    strength: float | Tensor | None = None
    criterion_loss: Tensor | None = None
    standard_error: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """The criterion's own loss, without the term; with method="noise" the loss of the perturbed network."""
        if self.criterion_loss is None and self.total is not None:
            term = 0.0 if self.flatness is None or self.strength is None else self.flatness * self.strength
            self.criterion_loss = self.total - term
        return self.criterion_loss

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Numbers for a logger: "loss", "strength", and "flatness" and "standard_error" where there are any.

        A mean over rows stands for a loss or kappa per row. Reading them makes the host wait for the device.
        """
        return {
            prefix + name: float(value.mean()) if isinstance(value, Tensor) else float(value)
            for name, value in self.values().items()
        }

    def values(self) -> dict[str, float | Tensor]:
        """What `as_dict` makes numbers of, unread."""
        named = {
            "loss": self.loss,
            "flatness": self.flatness,
            "strength": self.strength,
            "standard_error": self.standard_error,
        }
        return {name: value for name, value in named.items() if value is not None}

    def __repr__(self) -> str:
        return f"StepRecord(loss={self.loss}, flatness={self.flatness}, strength={self.strength})"
