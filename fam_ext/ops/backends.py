"""Backend selection: loads the compiled library where it fits, and chooses native, triton or reference for each operation."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fam_ext import _checks

BACKENDS = ("auto", "reference", "native", "triton")
OPERATIONS = ("softmax_trace", "patch_sqnorm", "head_cross_entropy", "linear_cross_entropy", "gram_trace")
TRITON_OPERATIONS = ("linear_cross_entropy", "gram_trace")
# "native" for these is Python over torch's batched products: there is nothing to compile
PYTHON_OPERATIONS = ("gram_trace",)
TRITON_EVIDENCE = "checked in Triton's interpreter and compiled ahead of time, never run on a GPU"
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_RECORD = Path(__file__).parents[1] / "_build.json"
# which csrc/registration.cpp this Python code belongs to, by its hash: a library of other schemas cannot be unloaded again
SCHEMAS = "a0987935e9a0"
_REBUILD = "run `pip install --no-build-isolation .` again"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _read_record() -> tuple[dict[str, Any], str | None]:
    """The build record written by setup.py, and why its library must not be imported (None when it may be).

    This comes before the import: loading a library that was built for another torch can end the process.
    """
    try:
        record = dict(json.loads(_RECORD.read_text()))
        if not record["built"]:
            return record, f"nothing was compiled: {record['reason']}"
        built_torch, built_python, simd = (
            str(record["torch"]),
            str(record["python"]),
            str(record["simd"]).upper(),
        )
    except FileNotFoundError:
        if _RECORD.parents[1].joinpath("setup.py").exists():
            return {}, (
                f"{_RECORD.parent} is the source folder and nothing was compiled in it; it hides an installed copy: start Python "
                "in another folder, or run `pip install --no-build-isolation -e .`"
            )
        return {}, f"no compiled library beside {_RECORD.parent} ({_RECORD.name} is missing); {_REBUILD}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"the build record {_RECORD} cannot be read ({error!r}); {_REBUILD}"
    if built_torch != str(torch.__version__):
        return record, f"compiled for torch {built_torch}, this is torch {torch.__version__}; {_REBUILD}"
    if _minor(built_python) != _minor(platform.python_version()):
        return (
            record,
            f"compiled for Python {built_python}, this is Python {platform.python_version()}; {_REBUILD}",
        )
    if record.get("schemas") != SCHEMAS:
        return record, f"compiled from another version of fam_ext's sources; {_REBUILD}"
    here = torch.backends.cpu.get_cpu_capability()
    if not here.startswith({"AVX512": "AVX512", "AVX2": "AVX"}.get(simd, "")):
        return (
            record,
            f"compiled for {simd} processors, torch reports {here} for this one; {_REBUILD} with FAM_EXT_SIMD=native",
        )
    return record, None


def _load() -> tuple[dict[str, Any], str | None]:
    """Import the compiled library if it fits; its build record, and why it is not loaded (None when it is)."""
    record, reason = _read_record()
    if reason is not None:
        return record, reason
    try:
        facts = importlib.import_module("fam_ext._C").facts()
    except Exception as error:  # whatever is wrong with the library, importing fam_ext never fails
        return record, f"the compiled library cannot be imported: {error}"
    if facts["torch"] != str(torch.__version__):
        return (
            record,
            f"the library itself was compiled for torch {facts['torch']}, this is {torch.__version__}; {_REBUILD}",
        )
    return record, None


def _find_kernels() -> frozenset[tuple[str, str]]:
    """(operation, device type) pairs for which every schema of the operation, its backward included, has a kernel."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fam_ext::")]
    pairs = set()
    for op in set(OPERATIONS).difference(PYTHON_OPERATIONS):
        family = [name for name in names if name == f"fam_ext::{op}" or name.startswith(f"fam_ext::{op}_")]
        for device, key in _DISPATCH_KEYS.items():
            if family and all(
                torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key) for name in family
            ):
                pairs.add((op, device))
    return frozenset(pairs)


def _look_for_triton() -> str | None:
    """Why no Triton kernel can run, None when they can. triton itself is imported when a kernel first runs."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
        old = tuple(int(part) for part in version.split(".")[:2]) < (3, 5)
    except (
        importlib.metadata.PackageNotFoundError,
        ValueError,
    ):  # a build under another name: its kernels will tell
        return None
    return f"triton {version} is too old: 3.5 is needed" if old else None


_record, _reason = _load()
_kernels = _find_kernels() if _reason is None else frozenset()
_in_python = frozenset((op, device) for op in PYTHON_OPERATIONS for device in _DISPATCH_KEYS)
_no_triton = _look_for_triton()


def native_loaded() -> bool:
    """Whether the compiled library is loaded, so that torch.ops.fam_ext holds its operations."""
    return _reason is None


def native_reason() -> str | None:
    """Why the compiled library is not loaded, None when it is."""
    return _reason


def native_function(name: str) -> Any:
    """A function of the compiled library's module, None when the library is not loaded."""
    return getattr(importlib.import_module("fam_ext._C"), name) if _reason is None else None


def choose(op: str, backend: str, *tensors: Tensor) -> str:
    """The backend that runs `op` on these tensors: "native", "triton" or "reference".

    "auto" takes "native" where the compiled library has a kernel for the device and the dtype of the first tensor, outside of
    torch.func transforms and forward-mode differentiation (the operations have no rule for vmap, jvp and the like), else "triton"
    on a GPU where there is a Triton kernel for all tensors' dtypes, else "native" for one of PYTHON_OPERATIONS, else "reference".

    Raises ValueError for an unknown name and RuntimeError, with the reason, when a backend asked for by name is not available.
    """
    if backend == "reference":
        return backend
    first = tensors[0]
    place = (op, first.device.type)
    native = (
        backend in ("auto", "native")
        and (place in _kernels or place in _in_python)
        and first.dtype in _checks.FLOATING
        and _transformed(tensors) is None
    )
    if native and place in _kernels:
        return "native"
    wanted = backend == "triton" or (backend == "auto" and first.device.type == "cuda")
    if wanted and _why_no_triton(op, tensors) is None:
        return "triton"
    if native:
        return "native"
    if backend == "auto":
        return "reference"
    _checks.check_choice(op, "backend", backend, BACKENDS)
    raise RuntimeError(f"{op}: backend {backend!r} is not available: {_why_not(op, backend, tensors)}")


def _transformed(tensors: tuple[Tensor, ...]) -> str | None:
    """Why only plain PyTorch can run on these tensors, None when anything can: a kernel would lose a batch or a tangent."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "inside torch.func transforms (vmap, grad, ...) only the reference can be used"
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(t).tangent is not None for t in tensors):
        return "in forward-mode differentiation only the reference can be used"
    return None


def _why_no_triton(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why Triton cannot serve these tensors, None when it can."""
    if op not in TRITON_OPERATIONS:
        return f"it has no Triton kernel (these have: {', '.join(TRITON_OPERATIONS)})"
    for tensor in tensors:
        if tensor.dtype not in _TRITON_DTYPES:
            return f"its Triton kernel has no {str(tensor.dtype).removeprefix('torch.')}"
    device = tensors[0].device.type
    if device not in _DISPATCH_KEYS:
        return f"Triton has no {device} device here"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU Triton kernels run in its interpreter only: set TRITON_INTERPRET=1 before Python starts"
    if _no_triton is not None:
        return _no_triton
    return _transformed(tensors)


def _why_not(op: str, backend: str, tensors: tuple[Tensor, ...]) -> str:
    tensor = tensors[0]
    if backend == "triton":
        return str(_why_no_triton(op, tensors))
    if _reason is not None and op not in PYTHON_OPERATIONS:
        return _reason
    if (op, tensor.device.type) not in _kernels | _in_python:
        return _no_kernel(op, tensor.device.type)
    if tensor.dtype not in _checks.FLOATING:
        return f"it has no kernel for {str(tensor.dtype).removeprefix('torch.')}"
    return str(_transformed(tensors))


def _no_kernel(op: str, device: str) -> str:
    if op in PYTHON_OPERATIONS:
        return f"it runs on {' and '.join(_DISPATCH_KEYS)}, not on {device}"
    why = _record.get("no_cuda") if device == "cuda" else None
    return f"the compiled library has no {device} kernel for it" + (f": {why}" if why else "")


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a library compiled for `architectures` ("8.0", "9.0+PTX") has code for a GPU of this capability: machine code
    of the same major version and no later minor one, or PTX of any earlier version. Other entries (names) count as none.
    """
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").rstrip("af")
        if not re.fullmatch(r"\d+\.\d+", number):
            continue
        major, minor = (int(n) for n in number.split("."))
        same = major == capability[0] and minor <= capability[1]
        if same or (architecture.endswith("+PTX") and (major, minor) <= capability):
            return True
    return False


@dataclass(frozen=True)
class Info:
    """What is installed and which backend each operation takes: see :func:`info`."""

    versions: dict[str, str | None]
    """fam_ext, torch, python and triton (None when it is not installed)."""
    build: dict[str, Any]
    """The record of the build; empty when there is none."""
    native: bool
    """Whether the compiled library is loaded."""
    reason: str | None
    """Why it is not."""
    operations: dict[str, dict[str, tuple[str, str]]]
    """Operation -> device type -> (backend that "auto" takes there, why)."""
    triton: str
    """Which operations have Triton kernels, and how far these have been checked."""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(operation, device, backend, why), one for each line of a table."""
        return [
            (op, device, *answer)
            for op, devices in self.operations.items()
            for device, answer in devices.items()
        ]

    def __repr__(self) -> str:
        lines = ["  ".join(f"{name} {version or 'not installed'}" for name, version in self.versions.items())]
        lines.append(f"compiled library: {'loaded' if self.native else 'not loaded: ' + str(self.reason)}")
        lines += [f"  {key}: {value}" for key, value in self.build.items() if value is not None]
        lines.append(f"Triton kernels: {self.triton}")
        rows = [("operation", "device", "backend", "why"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines += [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join(lines)


def info() -> Info:
    """Versions, what is compiled, and for each operation the backend taken on this machine's devices and why.

    Printing the answer, or `python -m fam_ext`, gives a table.

    Example:
        >>> import fam_ext
        >>> facts = fam_ext.info()
        >>> facts.versions["fam_ext"] == fam_ext.__version__
        True
        >>> backend, why = facts.operations["head_cross_entropy"]["cpu"]
        >>> backend in ("native", "reference")
        True
    """
    from fam_ext._version import __version__

    versions: dict[str, str | None] = {
        "fam_ext": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = None
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    operations = {op: {device: _answer(op, device) for device in devices} for op in OPERATIONS}
    kernels = f"{', '.join(TRITON_OPERATIONS)} ({TRITON_EVIDENCE})"
    return Info(versions, dict(_record), _reason is None, _reason, operations, kernels)


def _answer(op: str, device: str) -> tuple[str, str]:
    if (op, device) not in _kernels:
        if device == "cuda" and op in TRITON_OPERATIONS and _no_triton is None:
            return "triton", f"Triton kernel, {TRITON_EVIDENCE}"
        if (op, device) in _in_python:
            return "native", "Python over torch's batched products, nothing to compile"
        return "reference", _reason or _no_kernel(op, device)
    if device == "cpu":
        return "native", "compiled kernel, C++"
    compiled, here = _record.get("arch_list", []), torch.cuda.get_device_capability()
    if runs_on(compiled, here):
        return "native", "compiled kernel, CUDA"
    return (
        "native",
        f"compiled kernel, CUDA, but for {', '.join(compiled)} and not for this GPU, {here[0]}.{here[1]}",
    )
