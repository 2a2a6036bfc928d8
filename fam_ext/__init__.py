"""Relative-flatness-aware training: the FAM regularizer, exact and differentiable, with compiled kernels."""

from __future__ import annotations

from fam_ext import functional, schedules
from fam_ext.backends import info
from fam_ext.errors import UnsupportedError
from fam_ext.functional import relative_flatness
from fam_ext.loss import FAMLoss, RelativeFlatness
from fam_ext.measurement import measure

__version__ = "0.1.0"
__all__ = [
    "FAMLoss",
    "RelativeFlatness",
    "UnsupportedError",
    "__version__",
    "functional",
    "info",
    "measure",
    "relative_flatness",
    "schedules",
]
