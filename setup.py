"""Compiles fam_ext/_C where torch and a C++ compiler are at hand; pyproject.toml holds everything else. Environment:

FAM_EXT_BUILD=0                         pure Python, nothing is compiled
FAM_EXT_SIMD=native|avx512|avx2|default the instruction set; native is what torch finds on this machine
CXX                                     the C++ compiler
"""

import json
import os
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

NO_TORCH = f"""fam_ext compiles against the torch that will load it, and {sys.executable} has none.
Install torch, then run: pip install --no-build-isolation .
(or, for pure Python: FAM_EXT_BUILD=0 pip install .)"""
FLAGS = (  # GCC warns about uninitialized values in its own AVX-512 header
    "-O3 -g0 -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-Wall -Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized"
)
SIMD_FLAGS = {  # as ATen compiles its own kernels, so that at::vec has the same width here
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX512",
    "avx2": "-mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX2",
    "default": "-DCPU_CAPABILITY_DEFAULT",
}


def simd_level():
    level = os.environ.get("FAM_EXT_SIMD", "native").lower()
    if level == "native":
        level = torch.backends.cpu.get_cpu_capability().lower()
        return level if level in SIMD_FLAGS else "default"  # aarch64 and others: what the compiler assumes
    if level not in SIMD_FLAGS:
        raise SystemExit(f"FAM_EXT_SIMD must be one of native, {', '.join(SIMD_FLAGS)}, got {level!r}")
    return level


def write_record(in_source, build_lib, **record):
    """What was built, or why nothing was: fam_ext/backends.py reads it before it imports the library."""
    Path("." if in_source else build_lib, "fam_ext", "_build.json").write_text(json.dumps(record, indent=2))


class PurePython(build_py):
    def run(self):
        super().run()
        write_record(self.editable_mode, self.build_lib, built=False, reason=reason)


class NoExtension(build_ext):
    def run(self):
        if not reason:
            raise SystemExit(NO_TORCH)
        write_record(self.inplace, self.build_lib, built=False, reason=reason)


def native():
    """setup()'s arguments for the extension. CUDA sources have csrc/cuda/ to themselves: object names differ."""
    os.environ["CXX"] = compiler  # torch and setuptools have different defaults
    version = subprocess.check_output([*shlex.split(compiler), "--version"], text=True).split("\n")[0]
    simd, openmp = simd_level(), ["-fopenmp"] * (sys.platform == "linux")
    flags = [*FLAGS.split(), *openmp, f"-DCPU_CAPABILITY={simd.upper()}", *SIMD_FLAGS[simd].split()]
    flags += [f"-I{os.path.abspath('csrc')}", f'-DFAM_EXT_TORCH_VERSION="{torch.__version__}"']
    ext = cpp_extension.CppExtension("fam_ext._C", sources, extra_compile_args=flags)
    ext.depends = sorted(map(str, Path("csrc").rglob("*.h")))
    # GCC: libgomp comes with libtorch_cpu, and linking it here could load a second OpenMP runtime
    ext.extra_link_args = openmp if "clang" in version else []
    record = {"torch": str(torch.__version__), "python": sys.version.split()[0], "compiler": version}
    record.update(simd=simd, cuda=None, arch_list=[])

    class Build(cpp_extension.BuildExtension):
        def run(self):
            super().run()
            write_record(self.inplace, self.build_lib, built=True, **record)

    return {"ext_modules": [ext], "cmdclass": {"build_ext": Build}}


sources = [str(path) for folder in ("csrc", "csrc/cpu") for path in sorted(Path(folder).glob("*.cpp"))]
names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
compiler = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
reason = "" if compiler else f"no C++ compiler was found (looked for {', '.join(names)})"
reason = "FAM_EXT_BUILD=0 was set" if os.environ.get("FAM_EXT_BUILD") == "0" else reason
if reason:
    setup(cmdclass={"build_py": PurePython, "build_ext": NoExtension})
elif torch is None:
    setup(ext_modules=[Extension("fam_ext._C", sources)], cmdclass={"build_ext": NoExtension})
else:
    setup(**native())
