"""Every Triton kernel as it is compiled for a GPU, without one: arguments, targets, and what the result is made of.

A kernel joins by entries in BUILDS: its file and name, the pointers' types, its constants, and the sizes and strides that are 1
or multiples of 16 in that build, as Triton's launcher would find out. All other arguments are 32-bit integers.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

NAMES = {"*fp32": "float32", "*bf16": "bfloat16", "*fp16": "float16", "*i64": "int64"}


@dataclass(frozen=True)
class Target:
    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes that one block may use
    instruction: str  # of the matrix units, as a regular expression


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024, r"\bmma\.sync"),
    Target("sm_90", "cuda", 90, 32, 227 * 1024, r"\bwgmma\.mma_async|\bmma\.sync"),
    Target("sm_100", "cuda", 100, 32, 227 * 1024, r"\btcgen05\.mma|\bmma\.sync"),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024, r"\bv_mfma_\w+"),
)


@dataclass(frozen=True)
class Build:
    kernel: str  # file.function
    what: str  # which operands
    pointers: dict[str, str]
    constants: Callable[[], dict[str, int]]  # the launcher's own
    ones: tuple[str, ...] = ()
    multiples: tuple[str, ...] = ()  # of 16; pointers count as such where there are any
    matrix_units: bool = False  # whether the products are of a type that they serve exactly
    warps: int = 4
    stages: int = 3

    @property
    def label(self) -> str:
        return f"{self.kernel} ({self.what})"


def _gram_trace(function: str, pointers: dict[str, str], aligned: bool) -> dict[str, Any]:
    """The tiles that the launcher takes for these dtypes, and the strides of contiguous operands."""

    def constants() -> dict[str, int]:
        kernels: Any = importlib.import_module("fam_ext.kernels.gram_trace")
        types = [getattr(torch, NAMES[pointers[p]]) for p in pointers if p not in ("out", "y")]
        return dict(getattr(kernels, f"{function}_blocks")(*types))

    described: dict[str, Any] = {"pointers": pointers, "constants": constants, "warps": 8}
    described["stages"] = 3 if aligned else 1
    described["matrix_units"] = True
    if aligned:
        letters = {"phi": "nqi", "left": "nqko", "right": "nqko", "x": "nqm", "y": "nqm", "z": "nqc"}
        strides = {p: [f"{p}_{d}" for d in letters[p]] for p in pointers if p != "out"}
        described["ones"] = tuple(names[-1] for names in strides.values())
        described["multiples"] = tuple(name for names in strides.values() for name in names[:-1])
    return described


def _pair_trace(what: str, left: str, right: str, aligned: bool = True) -> Build:
    pointers = {"phi": right, "left": left, "right": right, "out": "*fp32"}
    return Build("gram_trace.pair_trace_kernel", what, **_gram_trace("pair_trace", pointers, aligned))


def _chain(what: str, x: str, z: str, aligned: bool = True) -> Build:
    pointers = {"x": x, "y": z, "z": z, "out": "*fp32"}
    return Build("gram_trace.chain_kernel", what, **_gram_trace("chain", pointers, aligned))


def _rows(function: str, what: str, dtypes: dict[str, str], block: dict[str, str], **flags: int) -> Build:
    """A row kernel of linear_cross_entropy: pointers are float32 but for `dtypes`; `block`: its tile's names in the module."""

    def constants() -> dict[str, int]:
        kernels: Any = importlib.import_module("fam_ext.kernels.linear_cross_entropy")
        return {**flags, **{name: getattr(kernels, size) for name, size in block.items()}}

    pointers = {p: dtypes.get(p, "*fp32") for p in _POINTERS[function].split()}
    warps = 8 if block.get("BLOCK") in ("ROW_BLOCK", "MEAN_BLOCK") else 4
    multiples = tuple(_STRIDES[function].split())
    return Build(
        f"linear_cross_entropy.{function}_kernel", what, pointers, constants, (), multiples, warps=warps
    )


_POINTERS = {
    "softmax_rows": "z high low bias squares omega target best stats",
    "mean_rows": "shift weight offset features squares best stats curvature_factor means scaled row_sums",
    "grad_logits": "high low dots dz squares omega target best factors class_sums bias_sums",
    "add_rows": "source classes order out",
}
_STRIDES = {
    "softmax_rows": "z_row e_row",
    "mean_rows": "fan_in weight_row",
    "grad_logits": "e_row dot_row dz_row",
    "add_rows": "fan_in out_row",
}
_INDICES = dict.fromkeys(("target", "best", "classes", "order"), "*i64")
_EVERYTHING = {"HAS_OMEGA": True, "SMOOTH": True}
_ROW, _MEAN, _TILE = (
    {"BLOCK": "ROW_BLOCK"},
    {"BLOCK": "MEAN_BLOCK"},
    {"BLOCK_S": "CLASS_BLOCK", "BLOCK_N": "CHUNK_BLOCK"},
)
_COLUMNS = {"BLOCK": "COLUMN_BLOCK"}
_PAIR = {**_INDICES, "high": "*bf16", "low": "*bf16", "dz": "*bf16"}
_PAIR_ROWS = {**_INDICES, **dict.fromkeys(("weight", "features", "means", "scaled"), "*bf16")}

LINEAR_CROSS_ENTROPY = (
    _rows("softmax_rows", "float32, all options", _INDICES, _ROW, HAS_BIAS=True, PARTS=0, **_EVERYTHING),
    _rows("softmax_rows", "two bfloat16", _PAIR, _ROW, HAS_BIAS=False, HAS_OMEGA=False, SMOOTH=False, PARTS=2),
    _rows("softmax_rows", "one bfloat16", _PAIR, _ROW, HAS_BIAS=False, HAS_OMEGA=False, SMOOTH=False, PARTS=1),
    _rows("mean_rows", "float32", _INDICES, _MEAN, SPLIT=False, GRADS=True),
    _rows("mean_rows", "two bfloat16", _PAIR_ROWS, _MEAN, SPLIT=True, GRADS=True),
    _rows("mean_rows", "one bfloat16", _PAIR_ROWS, _MEAN, SPLIT=False, GRADS=True),
    _rows(
        "grad_logits", "float32, all options", _INDICES, _TILE, PRODUCTS=True, SPLIT=False, CLASS_SUMS=True,
        BIAS_SUMS=True, **_EVERYTHING,
    ),
    _rows(
        "grad_logits", "two bfloat16", _PAIR, _TILE, PRODUCTS=True, SPLIT=True, CLASS_SUMS=True, BIAS_SUMS=False,
        HAS_OMEGA=False, SMOOTH=False,
    ),
    _rows(
        "grad_logits", "one bfloat16", _PAIR, _TILE, PRODUCTS=True, SPLIT=False, CLASS_SUMS=True, BIAS_SUMS=False,
        HAS_OMEGA=False, SMOOTH=False,
    ),
    _rows("add_rows", "float32", _INDICES, _COLUMNS),
)  # fmt: skip

BUILDS = (
    *LINEAR_CROSS_ENTROPY,
    _pair_trace("float32", "*fp32", "*fp32"),
    _pair_trace("float32, any strides", "*fp32", "*fp32", aligned=False),
    _pair_trace("bfloat16, G in float32", "*fp32", "*bf16"),
    _pair_trace("bfloat16, any strides", "*bf16", "*bf16", aligned=False),
    _pair_trace("float16, G in float32", "*fp32", "*fp16"),
    _chain("float32", "*fp32", "*fp32"),
    _chain("float32, any strides", "*fp32", "*fp32", aligned=False),
    _chain("bfloat16", "*bf16", "*bf16"),
    _chain("bfloat16, any strides", "*bf16", "*bf16", aligned=False),
    _chain("float32 by bfloat16", "*fp32", "*bf16"),
    _chain("float16", "*fp16", "*fp16"),
    _chain("float32 by float16", "*fp32", "*fp16"),
)


@dataclass(frozen=True)
class Compiled:
    registers: int
    shared: int
    spilled: int  # registers or bytes that went to memory
    instructions: dict[str, int] = field(
        hash=False
    )  # of the matrix units, and how often they stand in the code
    ttir: str = field(repr=False, default="")


def triton_version() -> str:
    return str(importlib.import_module("triton").__version__)


@cache
def compiled(number: int, target: Target) -> Compiled:
    """BUILDS[number] for `target`; nothing is read from Triton's cache or left there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build = BUILDS[number]
    module, name = build.kernel.split(".")
    kernel = getattr(importlib.import_module(f"fam_ext.kernels.{module}"), name)
    constants = {**build.constants(), **dict.fromkeys(build.ones, 1)}
    signature = {a: "constexpr" if a in constants else build.pointers.get(a, "i32") for a in kernel.arg_names}
    whole = {*build.multiples, *(build.pointers if build.multiples else ())}
    attrs = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in whole}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        result = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp),
            options={"num_warps": build.warps, "num_stages": build.stages},
        )
        facts = _nvidia(result, folder) if target.backend == "cuda" else _amd(result.asm["amdgcn"])
    text = result.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    found: dict[str, int] = {}
    for match in re.finditer(target.instruction, text):
        found[match.group()] = found.get(match.group(), 0) + 1
    return Compiled(facts[0], result.metadata.shared, facts[1], found, result.asm["ttir"])


def _nvidia(result: Any, folder: str) -> tuple[int, int]:
    """(registers of a thread, bytes of stack and local memory), from the assembled code."""
    import triton

    path = f"{folder}/kernel.cubin"
    with open(path, "wb") as file:
        file.write(result.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run(
        [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True, timeout=60
    )
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd(text: str) -> tuple[int, int]:
    """(vector registers of a thread, accumulation registers included; scratch memory). Scalar registers spill to lanes."""
    number = lambda key: int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])  # noqa: E731
    return number("vgpr_count"), number("private_segment_fixed_size") + number("vgpr_spill_count")
