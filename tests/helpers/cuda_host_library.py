"""csrc/cuda/ compiled as C++ over the shim in helpers/cuda_host/: the CUDA kernels and their bindings, on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests/helpers/cuda_host"
OPERATIONS = (
    "softmax_trace",
    "softmax_trace_backward",
    "patch_sqnorm",
    "patch_sqnorm_backward",
    "head_cross_entropy_forward",
)
FLAGS = "-std=c++20 -O2 -g0 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas"
NAMES = "-DFAM_EXT_CUDA_KEY=CPU -DFAM_EXT_CUDA_LIBRARY=fam_ext_host"
# a pack of 16 bytes at a wrong address, an index outside an array and the like end the process
CHECKS = "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero -fsanitize-undefined-trap-on-error"


def compiler() -> list[str] | None:
    """The C++ compiler, or None."""
    words = shlex.split(os.environ.get("CXX", "c++"))
    return words if shutil.which(words[0]) else None


def run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run compilers side by side; raise with what the first failed one said."""

    def run(command: Sequence[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=550)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for _ in pool.map(run, commands):
            pass


def build() -> Path:
    """The shared library, compiled again when a source or torch has changed."""
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    bindings = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
    headers = [p for folder in (ROOT / "csrc", SHIM) for p in folder.rglob("*.*h")]
    digest = hashlib.sha256(f"{torch.__version__} {FLAGS} {CHECKS}".encode())
    for path in sorted([*kernels, *bindings, *headers, SHIM / "cuda_host.cpp"]):
        digest.update(path.read_bytes())
    folder = ROOT / "build/cuda_host" / digest.hexdigest()[:16]
    library = folder / "libfam_ext_cuda_host.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    assert cxx is not None
    include = [f"-I{SHIM / 'include'}", f"-I{ROOT / 'csrc'}"]
    torch_include = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    unit = folder / "bindings.cpp"  # torch's headers are most of the work: one unit for all
    unit.write_text("".join(f'#include "{path}"\n' for path in bindings))
    commands = []
    for path in (unit, *kernels, SHIM / "cuda_host.cpp"):  # the slowest first
        wanted = [*NAMES.split(), *torch_include] if path == unit else CHECKS.split()
        command = [*cxx, *FLAGS.split(), abi, *include, *wanted, "-x", "c++", "-c", str(path)]
        commands.append([*command, "-o", str(folder / f"{path.name}.o")])
    run_all(commands)
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    objects = [command[-1] for command in commands]
    partial = folder / "partial.so"
    run_all([[*cxx, "-shared", "-o", str(partial), *objects, *paths, "-ltorch", "-ltorch_cpu", "-lc10"]])
    partial.rename(library)
    return library


class Shim:
    """The knobs of tests/helpers/cuda_host/cuda_host.cpp."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def set_order(self, order: int) -> None:
        """The order of threads between two barriers, and of blocks: 0 forward, 1 backward, 2 shuffled."""
        self._library.fam_host_set_order(order)

    def set_cooperative(self, supported: bool, processors: int = 64) -> None:
        self._library.fam_host_set_cooperative(int(supported))
        self._library.fam_host_set_processors(processors)

    def launches(self) -> int:
        """Kernels launched since the last call."""
        return int(self._library.fam_host_launches())

    def grid_barriers(self) -> int:
        """Barriers of all blocks of a launch since the last call."""
        return int(self._library.fam_host_grid_barriers())


@cache
def load() -> tuple[Shim, torch.library.Library]:
    """The library, with its kernels as torch.ops.fam_ext_host.*"""
    path = build()
    definitions = torch.library.Library("fam_ext_host", "DEF")
    for name in OPERATIONS:
        schema = str(getattr(torch.ops.fam_ext, name).default._schema)
        definitions.define(schema.removeprefix("fam_ext::"))
    torch.ops.load_library(str(path))
    return Shim(path), definitions


@contextmanager
def kernels_on_the_host() -> Iterator[Shim]:
    """Inside, torch.ops.fam_ext takes the CUDA kernels for CPU tensors: whatever tests backend "native" tests them."""
    shim, _ = load()
    overrides: Any = torch.library.Library("fam_ext", "IMPL")
    for name in OPERATIONS:
        overrides.impl(name, getattr(torch.ops.fam_ext_host, name).default, "CPU")
    try:
        yield shim
    finally:
        overrides._destroy()
        shim.set_order(0)
        shim.set_cooperative(True)
