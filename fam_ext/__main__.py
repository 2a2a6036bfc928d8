"""`python -m fam_ext`: in words, what is installed and what computes each operation here; with --json the same for programs."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from fam_ext.ops.backends import Info, info

_DEVICES = {"cpu": "the CPU", "cuda": "the GPU"}
_BACKENDS = {"native": "this package", "triton": "a Triton kernel", "reference": "plain PyTorch"}
_WIDEST = 100  # columns


def _library(facts: Info) -> str:
    if not facts.native:
        return (
            "The compiled library is not loaded: plain PyTorch computes the same numbers, slower. The reason: "
            f"{facts.reason}."
        )
    build = facts.build
    gpus = ", ".join(build.get("arch_list") or ())
    reason = build.get("no_cuda") or "no reason is recorded"
    return (
        f"The compiled library is loaded. It was built for torch {build.get('torch')} with {build.get('compiler')}, for "
        f"{build.get('simd')} processors, "
        + (f"with CUDA kernels for {gpus}." if gpus else f"without CUDA kernels: {reason}.")
    )


def _operations(facts: Info) -> Iterator[str]:
    """A sentence for each device, backend and reason, with the operations that share them."""
    shared: dict[tuple[str, str, str], list[str]] = {}
    for op, device, backend, why in facts.rows():
        shared.setdefault((device, backend, why), []).append(op)
    for (device, backend, why), ops in shared.items():
        place, by = _DEVICES.get(device, device), _BACKENDS[backend]
        yield f"On {place} {by} computes {', '.join(ops)} ({why})."
    if not any(device == "cuda" for device, _, _ in shared):
        yield "torch sees no GPU."


def in_words(facts: Info) -> str:
    """Paragraphs for a person, as wide as the terminal."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts.versions.items())
    paragraphs = [
        versions,
        _library(facts),
        *_operations(facts),
        f"Triton kernels for GPUs: {facts.triton}.",
        "The same for a program: python -m fam_ext --json",
    ]
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    fill = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(fill.fill, paragraphs))


def as_json(facts: Info) -> dict[str, Any]:
    """The fields of Info; an operation's answer on a device is {"backend": ..., "why": ...}."""
    operations: dict[str, dict[str, dict[str, str]]] = {}
    for op, device, backend, why in facts.rows():
        operations.setdefault(op, {})[device] = {"backend": backend, "why": why}
    return {
        "versions": facts.versions,
        "native": facts.native,
        "reason": facts.reason,
        "build": facts.build,
        "triton": facts.triton,
        "operations": operations,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; `arguments` are those of the command line unless given."""
    parser = argparse.ArgumentParser(prog="python -m fam_ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    facts = info()
    if parser.parse_args(arguments).json:
        print(json.dumps(as_json(facts), indent=2))
    else:
        print(in_words(facts))


if __name__ == "__main__":
    main()
