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

# Their tests run on the CPU and, where there is one, on a GPU: the second time with the GPU as the default device.
ON_DEVICES = {
    "test_softmax_trace", "test_patch_sqnorm", "test_head_cross_entropy", "test_head_cross_entropy_autograd", "test_opcheck",
    "test_functional", "test_heads", "test_loss", "test_general", "test_any_layer",
}  # fmt: skip
# Some of cuBLAS's sums repeat only with this; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if torch.cuda.is_available() and metafunc.module.__name__ in ON_DEVICES:
        metafunc.parametrize("device", ["cpu", "cuda"], indirect=True, scope="function")


@pytest.fixture(autouse=True)
def device(request: Any) -> Iterator[str]:
    """The device of the tensors that a test makes."""
    name: str = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
        return
    constants = {key: value for key, value in vars(request.module).items() if isinstance(value, torch.Tensor)}
    torch.set_default_device(name)
    vars(request.module).update({key: value.to(name) for key, value in constants.items()})
    try:
        yield name
    finally:
        torch.set_default_device(None)
        vars(request.module).update(constants)


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> str:
    """The reference, and the compiled library where it is loaded."""
    backend: str = request.param
    return backend


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
