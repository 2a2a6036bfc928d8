"""Relative flatness and companion measures of a trained model over a data set."""

from __future__ import annotations

from fam_ext.measurement.data_set import measure
from fam_ext.measurement.report import LayerRow, Report

__all__ = ["LayerRow", "Report", "measure"]
