"""Compile the CUDA kernels for every architecture and write what ptxas says of them into docs/kernels.md. No GPU is needed.

    python tools/kernel_table.py

ptxas reports, for each kernel: registers of a thread, static shared memory of a block, and bytes of local memory (stack frame,
spilled registers), of which there must be none. The bytes of a kernel's instructions come from the compiled file. Dynamic shared
memory is chosen at the launch and is not in the table.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/kernels.md"
ARCHITECTURES = (80, 90, 100)
BEGIN, END = "<!-- cuda:begin -->", "<!-- cuda:end -->"
# torch's own flags for CUDA sources, then ours
FLAGS = (
    "-std=c++17 -O3 --expt-relaxed-constexpr -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ "
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__"
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel for one architecture, and the size of its code; bytes, but for the registers."""

    source: str
    name: str
    architecture: int
    registers: int
    shared: int
    stack: int
    spilled: int
    code: int = 0


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    return Path(found) if found else None


def release(nvcc: Path) -> str:
    said = subprocess.check_output([str(nvcc), "--version"], text=True)
    found = re.search(r", V([\d.]+)", said)
    return found.group(1) if found else "unknown"


def include_folders(nvcc: Path) -> list[str]:
    """Where nvcc, which may be a script that calls it, has CUDA's headers."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"INCLUDES=(.*)", said.stdout + said.stderr)
    return re.findall(r"-I([^\s\"]+)", found.group(1)) if found else []


def demangled(names: list[str]) -> list[str]:
    """Kernel names as the source has them, without namespaces and parameters."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = [re.sub(r"^void ", "", line).replace("fam_ext::gpu::", "") for line in said.stdout.splitlines()]
    return [re.sub(r"\((bool|int)\)", "", re.sub(r">\(.*", ">", line)) for line in plain]


def parse(source: str, said: str) -> list[Kernel]:
    """The kernels in what `nvcc -Xptxas -v` says; names as ptxas has them."""
    number = r"(\d+) bytes "
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'.*?"
        rf"{number}stack frame, {number}spill stores, {number}spill loads\s*\n.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    kernels = []
    for name, architecture, stack, stores, loads, registers, rest in pattern.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        bytes_shared = int(shared.group(1)) if shared else 0
        spilled = int(stores) + int(loads)
        kernels.append(
            Kernel(source, name, int(architecture), int(registers), bytes_shared, int(stack), spilled)
        )
    return kernels


def code_sizes(cubin: bytes) -> dict[str, int]:
    """Bytes of instructions of every kernel in a cubin, an ELF file with a section .text.NAME for each."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + k * size) for k in range(count)]
    sizes = {}
    for section in sections:
        start = sections[names][4] + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            sizes[name.removeprefix(".text.")] = section[5]
    return sizes


def compile_kernels(nvcc: Path) -> list[Kernel]:
    """All kernels of csrc/cuda/, one call of nvcc for each source and all architectures."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]

    def run(source: Path) -> list[Kernel]:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                str(nvcc),
                *FLAGS.split(),
                *codes,
                f"-I{ROOT / 'csrc'}",
                "-Xptxas",
                "-v",
                "--keep",  # the compiled file of every architecture
                f"--keep-dir={folder}",
                "-c",
                str(source),
            ]
            done = subprocess.run(
                [*command, "-o", f"{folder}/object.o"], capture_output=True, text=True, timeout=550
            )
            if done.returncode != 0:
                raise RuntimeError(done.stderr[-5000:])
            cubins = {a: next(Path(folder).glob(f"*_{a}.cubin")).read_bytes() for a in ARCHITECTURES}
        sizes = {a: code_sizes(cubin) for a, cubin in cubins.items()}
        kernels = parse(source.stem, done.stderr)
        return [replace(k, code=sizes[k.architecture][k.name]) for k in kernels]

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        found = [k for kernels in pool.map(run, sorted((ROOT / "csrc/cuda").glob("*.cu"))) for k in kernels]
    names = demangled([k.name for k in found])
    plain = [replace(k, name=name) for k, name in zip(found, names, strict=True)]
    return sorted(plain, key=lambda k: (k.source, k.name, k.architecture))


def table(nvcc_release: str, kernels: list[Kernel]) -> str:
    """The part of docs/kernels.md between the markers."""
    lines = [
        f"nvcc {nvcc_release}; registers per thread / bytes of static shared memory per block / KiB of code.",
        "No kernel uses local memory.",
        "",
        "| source | kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for source, name in dict.fromkeys((k.source, k.name) for k in kernels):
        of_name = {k.architecture: k for k in kernels if (k.source, k.name) == (source, name)}
        rows = [of_name[a] for a in ARCHITECTURES]
        cells = [f"{k.registers} / {k.shared} / {k.code / 1024:.0f}" for k in rows]
        lines.append(f"| {source} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(page: str) -> str:
    """What stands between the markers of docs/kernels.md."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc was found")
    text = table(release(nvcc), compile_kernels(nvcc))
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
