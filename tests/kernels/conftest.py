"""Skips the tests, with the reason, where Triton's interpreter does not work with the NumPy that is installed."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
from inputs import TRITON_ON_GPU


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    if TRITON_ON_GPU or importlib.util.find_spec("triton") is None:
        return
    reason = importlib.import_module("triton_interpreter").why_not()
    if reason is not None:
        pytest.skip(reason)
