"""Session rules: the compiled library is what is tested, uninitialized memory holds NaN, random examples repeat in CI."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import other_device
import pytest
import torch
from inputs import BACKENDS, ON_OTHER, TRITON_ON_GPU

from fam_ext import UnsupportedError
from fam_ext.ops import backends

# Some of cuBLAS's sums repeat only with this; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The tests of Triton's kernels have runs of their own: in its interpreter, which is chosen when triton is imported, or compiled
# for a GPU, when FAM_EXT_TEST_TRITON=gpu asks for that.
collect_ignore_glob = [] if TRITON_ON_GPU or os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/*"]

hypothesis.settings.register_profile(
    "local", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("local"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


if ON_OTHER:
    other_device.register()


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


def pytest_collectstart(collector: pytest.Collector) -> None:
    """A file's constants, some of which stand in the names of its tests, are the same in every process that shares them."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first: where several processes share the files, none is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """at::empty fills its memory with NaN (integers: the largest value), from Python and from C++ alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what results are compared in
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked on_devices run on the CPU and, where there is one, on a GPU as the default device.

    With FAM_EXT_TEST_DEVICE=cuda or cpu they run there alone, with =other on the device of helpers/other_device.py.
    """
    if metafunc.definition.path.parent.name == "kernels":
        devices = ["cuda"] if TRITON_ON_GPU else []
    elif metafunc.definition.get_closest_marker("on_devices") is None:
        devices = []
    elif ON_OTHER:
        devices = [other_device.NAME]
    elif os.environ.get("FAM_EXT_TEST_DEVICE"):
        devices = [d for d in [os.environ["FAM_EXT_TEST_DEVICE"]] if d != "cpu"]
    else:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else []
    if devices:
        metafunc.parametrize("device", devices, indirect=True, scope="function")


def moved(value: Any) -> Any:
    """Tensors and modules in `value` on the default device, which those of a test's parameters and module were made before."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.to(torch.get_default_device())
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).to(torch.get_default_device())
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *moved(value.args), **moved(value.keywords))
    if type(value) in (tuple, list):
        return type(value)(moved(v) for v in value)
    if type(value) is dict:
        return {key: moved(v) for key, v in value.items()}
    return value


@pytest.fixture(autouse=True)
def device(request: Any) -> Iterator[str]:
    """The device of the tensors that a test makes."""
    name: str = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
        return
    plain = (torch.Tensor, tuple, list, dict)
    constants = {
        k: v for k, v in vars(request.module).items() if isinstance(v, plain) and not k.startswith("__")
    }
    torch.set_default_device(name)
    vars(request.module).update(moved(constants))
    try:
        yield name
    finally:
        torch.set_default_device(None)
        vars(request.module).update(constants)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Iterator[None]:
    """With its arguments on the test's device; skipped where it asks for eigenvalues and SciPy is not installed."""
    if torch.get_default_device().type != "cpu":
        pyfuncitem.funcargs.update(moved(pyfuncitem.funcargs))
    try:
        return (yield)
    except UnsupportedError as error:
        if "need SciPy" in str(error) and importlib.util.find_spec("scipy") is None:
            pytest.skip(str(error))
        raise


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> str:
    """The reference, and the compiled library where it is loaded."""
    backend: str = request.param
    return backend


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
