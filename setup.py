"""Compiles fam_ext/_C where torch and a C++ compiler are at hand; pyproject.toml holds everything else. Environment:

FAM_EXT_BUILD=0                         pure Python, nothing is compiled
FAM_EXT_SIMD=native|avx512|avx2|default the instruction set; native is what torch finds on this machine
CXX                                     the C++ compiler
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

SIMD_FLAGS = {  # as ATen compiles its own kernels, so that at::vec has the same width here
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX512",
    "avx2": "-mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX2",
    "default": "-DCPU_CAPABILITY_DEFAULT",
}


def simd_level():
    level = os.environ.get("FAM_EXT_SIMD", "native").lower()
    if level == "native":
        level = torch.backends.cpu.get_cpu_capability().lower()
        level = level if level in SIMD_FLAGS else "default"  # aarch64 and others: what the compiler assumes
    if level not in SIMD_FLAGS:
        raise SystemExit(f"FAM_EXT_SIMD must be one of native, {', '.join(SIMD_FLAGS)}, got {level!r}")
    return level


def write_record(in_source, build_lib, **record):
    """What was built, or why nothing was: fam_ext/backends.py reads it before it imports the library."""
    folder = Path("." if in_source else build_lib, "fam_ext")
    (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n")


class PurePython(build_py):
    def run(self):
        super().run()
        write_record(self.editable_mode, self.build_lib, built=False, reason=reason)


class NothingToCompile(build_ext):
    def run(self):
        write_record(self.inplace, self.build_lib, built=False, reason=reason)


class NeedsTorch(build_ext):
    def run(self):
        raise SystemExit(
            f"fam_ext compiles against the torch that will load it, and {sys.executable} has none.\n"
            "Install torch, then run: pip install --no-build-isolation .\n"
            "(or, for pure Python: FAM_EXT_BUILD=0 pip install .)"
        )


def native():
    """setup()'s arguments for the extension. CUDA sources have csrc/cuda/ to themselves: object names differ."""
    os.environ["CXX"] = compiler  # torch and setuptools have different defaults
    version = subprocess.check_output([*shlex.split(compiler), "--version"], text=True).split("\n")[0]
    simd, openmp = simd_level(), ["-fopenmp"] if sys.platform == "linux" else []
    flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *openmp]
    flags += [f"-DCPU_CAPABILITY={simd.upper()}", *SIMD_FLAGS[simd].split()]
    flags += [f'-DFAM_EXT_TORCH_VERSION="{torch.__version__}"', f'-DFAM_EXT_COMPILER="{version}"']
    # GCC: libgomp comes with libtorch_cpu, and linking it here could load a second OpenMP runtime
    link = openmp if "clang" in version else []
    record = {"torch": str(torch.__version__), "python": platform.python_version(), "compiler": version}
    headers = sorted(map(str, Path("csrc").rglob("*.h")))
    arguments = {"include_dirs": [os.path.abspath("csrc")], "depends": headers, "extra_link_args": link}

    class Build(cpp_extension.BuildExtension):
        def run(self):
            super().run()
            write_record(
                self.inplace, self.build_lib, built=True, **record, simd=simd, cuda=None, arch_list=[]
            )

    extension = cpp_extension.CppExtension("fam_ext._C", sources, extra_compile_args=flags, **arguments)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


sources = [str(path) for folder in ("csrc", "csrc/cpu") for path in sorted(Path(folder).glob("*.cpp"))]
names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
compiler = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
pure = os.environ.get("FAM_EXT_BUILD") == "0"
if pure or compiler is None:
    reason = (
        "FAM_EXT_BUILD=0 was set" if pure else f"no C++ compiler was found (looked for {', '.join(names)})"
    )
    setup(cmdclass={"build_py": PurePython, "build_ext": NothingToCompile})
elif torch is None:
    setup(ext_modules=[Extension("fam_ext._C", sources)], cmdclass={"build_ext": NeedsTorch})
else:
    setup(**native())
