"""Relative-flatness-aware training: the FAM regularizer, exact and differentiable, with compiled kernels."""

from __future__ import annotations

from fam_ext import functional, integrations, schedules, typing
from fam_ext._version import __version__
from fam_ext.correlation import correlation
from fam_ext.errors import UnsupportedError
from fam_ext.flatness_noise import FlatnessNoise
from fam_ext.functional import relative_flatness
from fam_ext.loss.fam_loss import FAMLoss
from fam_ext.loss.relative_flatness import RelativeFlatness
from fam_ext.measurement import measure
from fam_ext.ops.backends import info
from fam_ext.rescaling import rescale

__all__ = [
    "FAMLoss",
    "FlatnessNoise",
    "RelativeFlatness",
    "UnsupportedError",
    "__version__",
    "correlation",
    "functional",
    "info",
    "integrations",
    "measure",
    "relative_flatness",
    "rescale",
    "schedules",
    "typing",
]


def __dir__() -> list[str]:
    """The public names; the floors of the package are no part of its interface."""
    return sorted(__all__)
