"""Builds fam_ext/_C, the compiled operations, where torch and a C++ compiler are at hand; see pyproject.toml for everything else.

FAM_EXT_BUILD=0     pure Python, nothing is compiled
FAM_EXT_SIMD=...    avx512, avx2, default, or native (what this machine has; the default)
CXX=...             the C++ compiler
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

NO_TORCH = "fam_ext compiles against the torch you use, and torch cannot be imported by {}.\nInstall torch first, then run: \
pip install --no-build-isolation .\n(or FAM_EXT_BUILD=0 pip install . for the pure-Python package)"
SIMD_FLAGS = {  # the flags that ATen compiles its own kernels with, so that at::vec has the same width here
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX512",
    "avx2": "-mavx2 -mfma -mf16c -DCPU_CAPABILITY_AVX2",
    "default": "-DCPU_CAPABILITY_DEFAULT",
}


def find_compiler():
    """The command of the C++ compiler, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def simd_level():
    wanted = os.environ.get("FAM_EXT_SIMD", "native").lower()
    if wanted == "native":
        wanted = torch.backends.cpu.get_cpu_capability().lower()
        wanted = wanted if platform.machine().lower() in ("x86_64", "amd64") and wanted in SIMD_FLAGS else "default"
    if wanted not in SIMD_FLAGS:
        raise SystemExit(f"FAM_EXT_SIMD must be native, {', '.join(SIMD_FLAGS)}, got {wanted!r}")
    return wanted


def write_record(folder, **facts):
    """What was built, or why nothing was: read by fam_ext/backends.py before it imports the library."""
    (Path(folder) / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")


class PurePython(build_py):
    def run(self):
        super().run()
        write_record("fam_ext" if self.editable_mode else Path(self.build_lib) / "fam_ext", built=False, reason=reason)


class NeedsTorch(build_ext):
    def run(self):
        raise SystemExit(NO_TORCH.format(sys.executable))


def native():
    """The extension and the command that compiles it. CUDA sources will live in csrc/cuda/, apart from the C++ ones."""
    simd = simd_level()
    os.environ["CXX"] = compiler  # torch and setuptools have different defaults
    version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *openmp]
    flags += [f"-DCPU_CAPABILITY={simd.upper()}", *SIMD_FLAGS[simd].split()]
    flags += [f'-DFAM_EXT_TORCH_VERSION="{torch.__version__}"', f'-DFAM_EXT_COMPILER="{version}"']
    extension = cpp_extension.CppExtension(
        "fam_ext._C",
        sources=sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=flags,
        # libgomp comes with libtorch_cpu: linking it again could load a second OpenMP runtime. Clang names another one.
        extra_link_args=openmp if "clang" in version else [],
    )

    class Build(cpp_extension.BuildExtension):
        def run(self):
            super().run()
            facts = {"torch": str(torch.__version__), "python": platform.python_version(), "compiler": version, "simd": simd}
            folder = Path(self.get_ext_fullpath("fam_ext._C")).parent
            write_record(folder, built=True, **facts, cuda=None, arch_list=[])

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


sources = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp"))
compiler = find_compiler()
if os.environ.get("FAM_EXT_BUILD", "1") == "0" or compiler is None:
    reason = "no C++ compiler was found" if os.environ.get("FAM_EXT_BUILD", "1") != "0" else "FAM_EXT_BUILD=0 was set"
    setup(cmdclass={"build_py": PurePython})
elif torch is None:
    setup(ext_modules=[Extension("fam_ext._C", sources)], cmdclass={"build_ext": NeedsTorch})
else:
    setup(**native())
