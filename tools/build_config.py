"""What setup.py compiles with: the instruction set of the CPU; whether CUDA kernels, for which architectures, and why not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NVCC_FLAGS = ["-O3", "-lineinfo"]
FLAGS = (  # GCC warns about uninitialized values in its own AVX-512 header
    "-O3 -g0 -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-Wall -Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized"
)
# every report of the second ends the process, as one of the first does; vptr would need the types of torch's libraries
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
SIMD_FLAGS = {  # as ATen compiles its own kernels, so that at::vec has the same width here
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX512",
    "avx2": "-mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX2",
    "default": "-DCPU_CAPABILITY_DEFAULT",
}


def flags() -> list[str]:
    """The compiler's. With FAM_EXT_SANITIZE=1 for both sanitizers, with lines and frames for their reports."""
    if os.environ.get("FAM_EXT_SANITIZE") != "1":
        return FLAGS.split()
    return f"{FLAGS} -O1 -g1 -fno-omit-frame-pointer {SANITIZE}".split()


def simd_level(torch: Any) -> str:
    level = os.environ.get("FAM_EXT_SIMD", "native").lower()
    if level == "native":
        level = str(torch.backends.cpu.get_cpu_capability()).lower()
        return level if level in SIMD_FLAGS else "default"  # aarch64 and others: what the compiler assumes
    if level not in SIMD_FLAGS:
        raise SystemExit(f"FAM_EXT_SIMD must be one of native, {', '.join(SIMD_FLAGS)}, got {level!r}")
    return level


def cuda_home(guess: str | None) -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME, else what nvcc itself calls its top folder, else torch's guess.

    torch takes the folder above that of nvcc. Where the nvcc in PATH is a script that calls another one, it has no headers.
    """
    named, nvcc = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    if named or not nvcc:
        return named or guess
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return guess
    top = re.search(r"^#\$ TOP=(.+)$", done.stdout + done.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else guess


def has_headers(home: Path) -> bool:
    """Toolkits have their headers in include/, those of conda in targets/PLATFORM/include/."""
    return (home / "include/cuda_runtime.h").exists() or any(home.glob("targets/*/include/cuda_runtime.h"))


def nvcc_release(nvcc: Path) -> str:
    """The release, as 13.0."""
    said = subprocess.check_output([str(nvcc), "--version"], text=True)
    found = re.search(r"release (\d+\.\d+)", said)
    return found.group(1) if found else "unknown"


def default_architectures(release: str) -> str:
    """What is compiled for where no GPU is seen and TORCH_CUDA_ARCH_LIST is not set; PTX for the newest."""
    return "8.0;9.0;10.0+PTX" if tuple(map(int, release.split("."))) >= (12, 8) else "8.0;9.0+PTX"


def with_ptx(architectures: list[str]) -> list[str]:
    return [*architectures[:-1], architectures[-1].removesuffix("+PTX") + "+PTX"]


def visible_architectures(torch: Any) -> list[str]:
    """Compute capabilities of the GPUs of this machine."""
    found = {torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def architectures(torch: Any, asked: str) -> list[str]:
    """A list such as "8.0;9.0+PTX" as its entries; names such as Hopper become the numbers that this torch compiles them for."""
    entries = [entry for entry in asked.split(";") if entry]
    if all(re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", entry) for entry in entries):
        return entries
    flags = ";".join(torch.utils.cpp_extension._get_cuda_arch_flags())
    made = {kind: re.findall(rf"code={kind}_(\d+)(\d[a-z]?)", flags) for kind in ("sm", "compute")}
    numbers = sorted({*made["sm"], *made["compute"]}, key=lambda n: (int(n[0]), n[1]))
    return [f"{major}.{minor}" + "+PTX" * ((major, minor) in made["compute"]) for major, minor in numbers]


def cuda(torch: Any, home: str | None) -> tuple[str | None, list[str], str | None]:
    """(CUDA release or None, architectures, why there is no CUDA). FORCE_CUDA=1 makes a reason an error."""
    if os.environ.get("FAM_EXT_CUDA") == "0":
        return None, [], "FAM_EXT_CUDA=0 was set"
    nvcc = Path(home or "", "bin", "nvcc")
    reason = release = None
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif not home or not nvcc.exists():
        reason = f"no nvcc was found{f' in {home}/bin' if home else ''} (CUDA_HOME)"
    elif not has_headers(Path(home)):
        reason = f"{home} has nvcc but no CUDA headers (set CUDA_HOME to the folder of the toolkit)"
    else:
        release = nvcc_release(nvcc)
        if release.split(".")[0] != torch.version.cuda.split(".")[0]:
            reason = (
                f"nvcc is CUDA {release}, torch {torch.__version__} was built with CUDA {torch.version.cuda}"
            )
    if reason is not None or release is None:
        if os.environ.get("FORCE_CUDA") == "1":
            raise SystemExit(f"FORCE_CUDA=1 was set, but {reason}")
        return None, [], reason
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if not asked or asked == "native":
        visible = visible_architectures(torch)
        asked = ";".join(with_ptx(visible)) if visible else default_architectures(release)
        os.environ["TORCH_CUDA_ARCH_LIST"] = asked  # torch's own default is an error where no GPU is seen
    return release, architectures(torch, asked), None
