"""Values of kappa with their standard errors."""

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
