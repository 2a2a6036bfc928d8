"""The CUDA sources compiled without a GPU: kernels for three architectures, bindings against what headers torch has."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_host_library import ROOT, compiler, run_all
from torch.utils import cpp_extension

from fam_ext.ops import backends


def tool(name: str) -> ModuleType:
    """tools/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


kernel_table, build_config = tool("kernel_table"), tool("build_config")
NVCC = kernel_table.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc was found")
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))


@cache
def compiled() -> list:
    return kernel_table.compile_kernels(NVCC)


@needs_nvcc
def test_kernels_use_no_local_memory() -> None:
    """No stack frame and no spilled register on any architecture; static shared memory within what every launch may have."""
    kernels = compiled()
    assert {k.architecture for k in kernels} == set(kernel_table.ARCHITECTURES)
    assert {k.source for k in kernels} == {path.stem for path in KERNELS}
    assert not [k for k in kernels if k.stack or k.spilled]
    assert max(k.shared for k in kernels) <= 48 << 10
    launched = {
        "small_trace_kernel": 128,
        "squares_by_position": 256,
    }  # threads per block; a processor has 65536 registers
    for k in kernels:
        threads = launched.get(k.name.split("<")[0], 128)
        assert k.registers * threads <= 65536


@needs_nvcc
def test_the_table_of_kernels_is_current() -> None:
    page = kernel_table.written((ROOT / "docs/kernels.md").read_text())
    here = kernel_table.release(NVCC)
    recorded = re.match(r"nvcc ([\d.]+);", page)
    assert recorded is not None
    if recorded.group(1) != here:
        pytest.skip(f"docs/kernels.md was written with nvcc {recorded.group(1)}, this is {here}")
    assert page == kernel_table.table(here, compiled()), "run python tools/kernel_table.py"


def test_what_ptxas_says_is_read() -> None:
    said = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 384 bytes smem
"""
    (kernel,) = kernel_table.parse("source", said)
    assert kernel == kernel_table.Kernel("source", "_Z1kPf", 90, 40, 384, 8, 16)


@needs_nvcc
def test_instructions(tmp_path: Path) -> None:
    """Packs are loaded and stored 16 bytes at a time, and nothing is summed by an atomic instruction on floating numbers."""
    ptx = {}
    for source in KERNELS:
        command = [
            str(NVCC),
            *kernel_table.FLAGS.split(),
            f"-I{ROOT / 'csrc'}",
            "-arch=compute_90",
            "-ptx",
            str(source),
        ]
        run_all([[*command, "-o", str(tmp_path / "k.ptx")]])
        for part in (tmp_path / "k.ptx").read_text().split(".visible .entry")[1:]:
            ptx[part.split("(")[0].strip()] = part
    assert len(ptx) > 40
    assert not [name for name, text in ptx.items() if re.search(r"\b(atom|red)\.\S*\.b?f\d", text)]
    for name, text in ptx.items():
        packed = re.search(r"((?:squares|scale)_by_\w+?)I.*Li([248])E", name)
        if packed is None:
            continue
        wide = r"(v4\.[buf]32|v2\.[buf]64)"
        assert re.search(rf"ld\.global\.(nc\.)?{wide}", text), name
        assert "scale" not in name or not re.search(r"st\.global\.(?!v4\.[buf]32|v2\.[buf]64)", text), name


@needs_nvcc
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler was found")
def test_bindings_compile_against_torch(tmp_path: Path) -> None:
    """To object files, with the CUDA headers of this torch and of nvcc. A torch without CUDA has all of them but one, which its
    build makes (tests/helpers/cuda_host/generated). Linking with libtorch_cuda is not tried."""
    includes = [] if torch.version.cuda else [f"-I{ROOT / 'tests/helpers/cuda_host/generated'}"]
    includes += [f"-I{ROOT / 'csrc'}"]
    for path in (
        *kernel_table.include_folders(NVCC),
        *cpp_extension.include_paths(),
        sysconfig.get_path("include"),
    ):
        includes += ["-isystem", path]
    macros = [
        '-DFAM_EXT_CUDA="13.0"',
        '-DFAM_EXT_CUDA_ARCHITECTURES="8.0;9.0+PTX"',
        "-DTORCH_EXTENSION_NAME=_C",
    ]
    macros += ['-DFAM_EXT_TORCH_VERSION="0"', "-DCPU_CAPABILITY=DEFAULT"]
    flags = ["-std=c++20", "-c", "-O0", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    # torch's headers are most of the work: two units instead of one a source
    units = {"bindings.cpp": sorted((ROOT / "csrc/cuda").glob("*.cpp"))}
    units["module.cpp"] = sorted((ROOT / "csrc").glob("*.cpp"))
    for name, sources in units.items():
        (tmp_path / name).write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [*(compiler() or []), *flags, *macros, *includes]
    run_all([[*command, str(tmp_path / name), "-o", str(tmp_path / f"{name}.o")] for name in units])


class FakeTorch:
    """What build_config.cuda asks of torch."""

    __version__ = "2.13.0"
    utils = torch.utils

    class version:
        cuda: str | None = "13.0"

    class cuda:
        capabilities: tuple[tuple[int, int], ...] = ()

        @classmethod
        def device_count(cls) -> int:
            return len(cls.capabilities)

        @classmethod
        def get_device_capability(cls, k: int) -> tuple[int, int]:
            return cls.capabilities[k]


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CUDA_HOME whose nvcc says that it is 13.0, and an environment that asks for nothing."""
    home = tmp_path / "toolkit"
    script(
        home / "bin/nvcc",
        f"""case "$1" in
            --dryrun) echo '#$ _SPACE_= ' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;
            *) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
        esac""",
    )
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    for name in ("FAM_EXT_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "")  # undone with everything that build_config sets
        monkeypatch.delenv(name)
    return str(home)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_toolkit_is_the_one_that_nvcc_takes(
    toolkit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nvcc in PATH is a script that calls the toolkit's, the folder above it is not the toolkit, as torch would guess."""
    script(tmp_path / "wrapper/bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    guess = str(tmp_path / "wrapper")
    monkeypatch.setenv("PATH", f"{guess}/bin", prepend=os.pathsep)
    assert build_config.cuda_home(guess) == toolkit
    assert build_config.cuda(FakeTorch, build_config.cuda_home(guess))[0] == "13.0"
    monkeypatch.setenv("CUDA_HOME", "/named")
    assert build_config.cuda_home("/named") == "/named"
    monkeypatch.delenv("CUDA_HOME")
    script(tmp_path / "broken/bin/nvcc", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/broken/bin", prepend=os.pathsep)
    assert build_config.cuda_home("/guess") == "/guess"
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert build_config.cuda_home(None) is None


def test_a_folder_without_headers_is_not_compiled_with(
    toolkit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(toolkit) / "include/cuda_runtime.h").unlink()
    release, _, reason = build_config.cuda(FakeTorch, toolkit)
    assert release is None
    assert reason == f"{toolkit} has nvcc but no CUDA headers (set CUDA_HOME to the folder of the toolkit)"
    headers = Path(toolkit) / "targets/x86_64-linux/include"  # where conda has them
    headers.mkdir(parents=True)
    (headers / "cuda_runtime.h").touch()
    assert build_config.cuda(FakeTorch, toolkit)[0] == "13.0"


def test_names_of_architectures_are_recorded_as_numbers(
    toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    recorded = build_config.cuda(FakeTorch, toolkit)[1]
    assert recorded == ["9.0+PTX"]
    assert backends.runs_on(recorded, (9, 0)) and not backends.runs_on(recorded, (8, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere 10.0a")
    assert build_config.cuda(FakeTorch, toolkit)[1] == ["8.0", "8.6+PTX", "10.0a"]


def test_cuda_is_compiled_where_it_can_be(toolkit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_config.cuda(FakeTorch, toolkit) == ("13.0", ["8.0", "9.0", "10.0+PTX"], None)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(FakeTorch.cuda, "capabilities", ((9, 0), (8, 0), (9, 0)))
    assert build_config.cuda(FakeTorch, toolkit)[1] == ["8.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6+PTX")
    assert build_config.cuda(FakeTorch, toolkit)[1] == ["7.5", "8.6+PTX"]


def test_why_cuda_is_not_compiled(toolkit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        release, architectures, reason = build_config.cuda(FakeTorch, home)
        assert release is None and not architectures
        return str(reason)

    home: str | None = None
    assert reason() == "no nvcc was found (CUDA_HOME)"
    home = "/nothing"
    assert reason() == "no nvcc was found in /nothing/bin (CUDA_HOME)"
    home = toolkit
    monkeypatch.setattr(FakeTorch.version, "cuda", "12.6")
    assert reason() == "nvcc is CUDA 13.0, torch 2.13.0 was built with CUDA 12.6"
    monkeypatch.setattr(FakeTorch.version, "cuda", None)
    assert reason() == "torch 2.13.0 is built without CUDA"
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA=1 was set, but torch 2\.13\.0 is built without CUDA"):
        reason()
    monkeypatch.setenv("FAM_EXT_CUDA", "0")
    assert reason() == "FAM_EXT_CUDA=0 was set"


@pytest.mark.skipif(not backends.native_loaded(), reason="the compiled library is not loaded")
def test_the_record_says_whether_cuda_was_compiled() -> None:
    record = backends.info().build
    assert (record["cuda"] is None) == bool(record["no_cuda"])
    assert bool(record["arch_list"]) == (record["cuda"] is not None)


def test_objects_have_names_of_their_own() -> None:
    """A .cpp and a .cu of one stem in one folder would be compiled into the same object file."""
    stems = [p.with_suffix("") for p in (ROOT / "csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu")]
    assert len(stems) == len(set(stems))


@needs_nvcc
def test_nvcc_finds_errors(tmp_path: Path) -> None:
    """The compilations above can fail."""
    (tmp_path / "k.cu").write_text(
        '#include "cuda/device.cuh"\n__global__ void k(float* x) { *x = missing; }\n'
    )
    command = [str(NVCC), f"-I{ROOT / 'csrc'}", "-c", str(tmp_path / "k.cu"), "-o", str(tmp_path / "k.o")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode != 0
