"""Session rules: the compiled library is what is tested, uninitialized memory holds NaN, random examples repeat in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from inputs import BACKENDS

from fam_ext import backends

# The interpreter of Triton is chosen when triton is imported: its tests have a run of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton/*"]

hypothesis.settings.register_profile(
    "local", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("local"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_report_header() -> str:
    return f"fam_ext: compiled library {'loaded' if backends.native_loaded() else 'not loaded: ' + str(backends.native_reason())}"


def pytest_sessionstart() -> None:
    """Without the compiled library every backend test would compare the reference with itself."""
    if backends.native_loaded() or os.environ.get("FAM_EXT_TEST_BACKEND") == "reference":
        return
    reason = str(backends.native_reason())
    if "FAM_EXT_BUILD=0" not in reason:
        pytest.exit(
            f"fam_ext in {backends.__file__} has no compiled library: {reason}. Build it in place with `pip install "
            "--no-build-isolation -e .`, or set FAM_EXT_TEST_BACKEND=reference to test the reference alone.",
            returncode=3,
        )


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """at::empty fills its memory with NaN (integers: the largest value), from Python and from C++ alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> str:
    """The reference, and the compiled library where it is loaded."""
    backend: str = request.param
    return backend


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
