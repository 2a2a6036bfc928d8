"""Compiles fam_ext/_C where torch and a C++ compiler are at hand; pyproject.toml holds everything else. Environment:

FAM_EXT_BUILD=0                         pure Python, nothing is compiled
FAM_EXT_SIMD=native|avx512|avx2|default the instruction set; native is what torch finds on this machine
FAM_EXT_CUDA=0                          no CUDA kernels, which are compiled where nvcc and a torch with CUDA are
FAM_EXT_SANITIZE=1                      with the address and undefined-behaviour sanitizers: tools/sanitize.sh
FORCE_CUDA=1                            CUDA kernels, or an error that says why not
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX    as torch reads them
"""

import hashlib
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

sys.path.insert(0, os.path.abspath("tools"))
import build_config

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

NO_TORCH = """fam_ext compiles against the torch that will load it, and this build sees none: there is none, or pip hides it for
lack of --no-build-isolation. Install torch, then run: pip install --no-build-isolation .
(or, for pure Python: FAM_EXT_BUILD=0 pip install --no-build-isolation .)"""
NO_COMPILE = """fam_ext: compiling failed, see above. It needs Python's headers (python3-dev) and a compiler for the C++ of
torch's headers: C++20, up to torch 2.11 C++17.
For pure Python, same numbers but slower: FAM_EXT_BUILD=0 pip install --no-build-isolation ."""
NO_COMPILE_CUDA = """CUDA kernels were to be compiled with the toolkit in {home}. Two ways out:
without them: FAM_EXT_CUDA=0 pip install --no-build-isolation .
with another toolkit: CUDA_HOME=/path/to/cuda pip install --no-build-isolation ."""


def write_record(in_source, build_lib, **record):
    """What was built, or why nothing was: fam_ext/ops/backends.py reads it before it imports the library."""
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
    simd, openmp = build_config.simd_level(torch), ["-fopenmp"] * (sys.platform == "linux")
    flags = [
        *build_config.flags(),
        *openmp,
        f"-DCPU_CAPABILITY={simd.upper()}",
        *build_config.SIMD_FLAGS[simd].split(),
    ]
    flags += [include := f"-I{os.path.abspath('csrc')}", f'-DFAM_EXT_TORCH_VERSION="{torch.__version__}"']
    cpp_extension.CUDA_HOME = home = build_config.cuda_home(cpp_extension.CUDA_HOME)
    cuda, arch_list, no_cuda = build_config.cuda(torch, home)
    flags += [f'-DFAM_EXT_CUDA="{cuda}"', f'-DFAM_EXT_CUDA_ARCHITECTURES="{";".join(arch_list)}"'] * bool(
        cuda
    )
    every = sources + [
        str(p) for p in sorted(Path("csrc/cuda").glob("*.c*")) if p.suffix in (".cpp", ".cu")
    ] * bool(cuda)
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    arguments = {"cxx": flags, "nvcc": [*build_config.NVCC_FLAGS, include]}
    ext = make("fam_ext._C", every, extra_compile_args=arguments)
    ext.depends = sorted(str(p) for p in Path("csrc").rglob("*.*h"))
    # GCC: libgomp comes with libtorch_cpu, and linking it here could load a second OpenMP runtime
    ext.extra_link_args = openmp if "clang" in version else []
    if os.environ.get("FAM_EXT_SANITIZE") == "1":
        ext.extra_link_args = [*ext.extra_link_args, *build_config.SANITIZE.split()]
    record = {"torch": str(torch.__version__), "python": sys.version.split()[0], "compiler": version}
    schemas = hashlib.sha256(Path("csrc/registration.cpp").read_bytes()).hexdigest()[:12]
    record.update(schemas=schemas, simd=simd, cuda=cuda, arch_list=arch_list, no_cuda=no_cuda)

    class Build(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception:
                print(NO_COMPILE, file=sys.stderr)
                if cuda:
                    print(NO_COMPILE_CUDA.format(home=home), file=sys.stderr)
                raise
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
