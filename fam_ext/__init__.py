"""Relative-flatness-aware training: the FAM regularizer in closed form, with compiled kernels."""

from __future__ import annotations

import importlib
from typing import Any

from fam_ext.errors import UnsupportedError

__version__ = "0.1.0"
__all__ = [
    "FAMLoss",
    "RelativeFlatness",
    "UnsupportedError",
    "__version__",
    "functional",
    "info",
    "relative_flatness",
    "schedules",
]
_HOME = {"FAMLoss": "loss", "RelativeFlatness": "loss", "relative_flatness": "functional", "info": "backends"}


def __getattr__(name: str) -> Any:
    if name in ("functional", "schedules"):
        return importlib.import_module(f"fam_ext.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"fam_ext.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fam_ext' has no attribute {name!r}")
