"""Relative flatness and companion measures of a trained model over a data set."""

from __future__ import annotations

from fam_ext.measurement.data_set import Report, measure

__all__ = ["Report", "measure"]
