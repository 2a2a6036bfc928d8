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
    floats: tuple[str, ...] = ()

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


def _rows(function: str, what: str, pointers: dict[str, str], **flags: int) -> Build:
    """A row kernel of linear_cross_entropy: no products; vocabulary and fan-in multiples of 16, as they are made to be."""
    names = {"softmax": ("classes", "z_row", "p_row"), "gradient": ("classes", "p_row", "x_row")}
    whole = names.get(function, ("features", "shift_row", "weight_row", "mean_row"))

    def constants() -> dict[str, int]:
        kernels: Any = importlib.import_module("fam_ext.kernels.linear_cross_entropy")
        return {**flags, "BLOCK": kernels.BLOCK}

    kernel = f"linear_cross_entropy.{function}_kernel"
    return Build(kernel, what, pointers, constants, multiples=whole, warps=8, floats=("omega_total",))


_ROW = dict.fromkeys(("hard", "soft", "coefficient", "omega", "squares", "rest_share"), "*fp32")
_ROW |= {"target": "*i64", "best": "*i64"}


def _softmax(what: str, z: str, p: str, **flags: int) -> Build:
    return _rows("softmax", what, {**_ROW, "z": z, "p": p, "loss": "*fp32", "weighted": "*fp32"}, **flags)


def _shift(what: str, weight: str) -> Build:
    out = dict.fromkeys(
        ("shift", "rest_share", "weighted", "trace", "squared_shift", "squared_mean"), "*fp32"
    )
    return _rows("shift", what, {**out, "weight": weight, "best": "*i64", "mean": weight})


def _gradient(what: str, p: str, x: str, **flags: int) -> Build:
    row = dict.fromkeys(("upstream", "trace", "squared_shift", "squared_mean"), "*fp32")
    return _rows("gradient", what, {**_ROW, **row, "p": p, "x": x}, **flags)


BUILDS = (
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
    _softmax("float32", "*fp32", "*fp32", WEIGHTS=0, SMOOTHING=0),
    _softmax("bfloat16, class weights, smoothing", "*bf16", "*bf16", WEIGHTS=1, SMOOTHING=1),
    _shift("float32", "*fp32"),
    _shift("bfloat16", "*bf16"),
    _gradient("float32", "*fp32", "*fp32", WEIGHTS=0, CURVATURE=1),
    _gradient("bfloat16, class weights", "*bf16", "*bf16", WEIGHTS=1, CURVATURE=1),
    _gradient("Hessian held", "*bf16", "*bf16", WEIGHTS=0, CURVATURE=0),
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
    types = {**dict.fromkeys(build.floats, "fp32"), **build.pointers}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
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
