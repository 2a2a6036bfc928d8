"""Values of kappa with their standard errors, and the random signs they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """kappa (0-d, or by sample), and the standard error of the estimate over probes (None: exact, or a single probe)."""

    value: Tensor
    standard_error: Tensor | None

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of independent estimates along the first dimension."""
        several = len(values) > 1
        return cls(values.mean(0), values.detach().std(0) / len(values) ** 0.5 if several else None)

    @classmethod
    def total(cls, terms: Sequence[Estimate]) -> Estimate:
        """The sum of independent estimates."""
        if len(terms) == 1:
            return terms[0]
        value: Any = sum(term.value for term in terms)
        errors = [term.standard_error for term in terms if term.standard_error is not None]
        return cls(value, torch.stack(errors).square().sum(0).sqrt() if errors else None)


def rademacher(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal probability, of the device and dtype of `like`."""
    bits = torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)
