"""Writes derivatives/verified.py and docs/verified-ops.md from the table of cases: python tests/helpers/write_verified.py"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch
import verified_cases
from verified_cases_base import Case

from fam_ext.derivatives import corrections, verdicts
from fam_ext.derivatives.nodes import bare

ROOT = Path(__file__).parents[2]
MODULE, DOCUMENT = ROOT / "fam_ext" / "derivatives" / "verified.py", ROOT / "docs" / "verified-ops.md"
TORCH = ".".join(torch.__version__.split(".")[:2])

Nodes = list[tuple[Case, set[str], set[str]]]

_WRONG = "right twice, silently wrong from the third derivative on"
_NO_SECOND = "no second derivative"
CORRECTIONS = {
    "NativeBatchNormBackward": ("batch_norm in training mode, instance_norm", _WRONG),
    "CudnnBatchNormBackward": ("batch_norm in training mode (cuDNN); untested without a GPU", _WRONG),
    "MiopenBatchNormBackward": ("batch_norm in training mode (MIOpen); untested without a GPU", _WRONG),
    "NativeLayerNormBackward": ("layer_norm", _WRONG),
    "NativeGroupNormBackward": (
        "group_norm",
        "right one product at a time; of several products at once an error, or silently wrong",
    ),
    "HardsigmoidBackward": ("hardsigmoid", _NO_SECOND),
    "ScaledDotProductFlashAttentionForCpuBackward": (
        "flash attention on the CPU, without dropout",
        _NO_SECOND,
    ),
}

_HEAD = f"""# Verified operations

The gradient of kappa for a layer inside a network differentiates what comes after the layer three times. This table, written
by `python tests/helpers/write_verified.py` and kept up to date by `tests/derivatives/test_verified.py`, lists what that was
verified for, with torch {TORCH} on the CPU: kappa against second differences of the loss (float64), its gradient by the
layer's weight and by the operation's parameters against differences of kappa, relative error at most 1e-6.

- **verified**: torch's own derivatives are right.
- **corrected**: torch's derivatives are wrong or missing; `fam_ext.derivatives.corrections` puts right ones in their place while
  kappa is formed.
- **refused**: an error names the operation and a way out.

Any other operation between the layer and the loss gives a warning, once. What counts is the autograd node: an operation with the
same node as a verified one is taken for verified. `curvature="ggn"` needs two derivatives, `method="finite_difference"` one.

## Corrected

| operation | torch's derivatives | autograd node |
|---|---|---|
"""


def collect(cases: Iterable[Case]) -> Nodes:
    with torch.backends.opt_einsum.flags(enabled=False):  # where it is installed einsum takes other steps
        return [(case, *verified_cases.nodes(case)) for case in cases]


def module(table: Nodes) -> str:
    nodes = set().union(*(torchs for _, torchs, _ in table))
    names = sorted(_short(node) for node in nodes if node.endswith("Backward"))
    others = "".join(f'    "{node}",\n' for node in sorted(nodes) if not node.endswith("Backward"))
    return (
        '"""Autograd nodes whose third derivative has been compared with finite differences in float64.\n\n'
        f'Written by tests/helpers/write_verified.py with torch {TORCH}; docs/verified-ops.md says for which operations.\n"""\n\n'
        f'TORCH = "{TORCH}"\n\n_NODES = """\n{textwrap.fill(" ".join(names), 128, break_on_hyphens=False)}\n"""\n'
        'VERIFIED: frozenset[str] = frozenset(f"{name}Backward" for name in _NODES.split()) | {\n'
        f"{others}}}\n"
    )


def document(table: Nodes) -> str:
    """The table by operation; nodes of the loss around it are left out where others remain."""
    ((_, common, _),) = collect([Case("identity", lambda: lambda z: z)])
    operations: dict[tuple[str, str], tuple[list[str], set[str], set[str]]] = {}
    for case, torchs, corrected in table:
        settings, all_torchs, all_corrected = operations.setdefault((case.op, "verified"), ([], set(), set()))
        settings.append(case.variant)
        all_torchs |= torchs - common or (torchs if not corrected else set())
        all_corrected |= corrected
    for refused in verified_cases.REFUSED:
        settings, nodes, _ = operations.setdefault((refused.case.op, "refused"), ([], set(), set()))
        settings.append(refused.case.variant)
        nodes.add(refused.node)
    lines = [_HEAD]
    lines += [f"| {what} | {torchs} | {node} |\n" for node, (what, torchs) in CORRECTIONS.items()]
    lines.append("\n## Refused\n\n| autograd node | why | way out |\n|---|---|---|\n")
    lines += [
        f"| {node} | {why} | {way_out} |\n" for node, (why, way_out) in sorted(verdicts.REFUSED.items())
    ]
    lines.append(
        "\n## Refused by older versions\n\n| autograd node | right since torch | before |\n|---|---|---|\n"
    )
    lines += [
        f"| {node} | {first} | {why}; {way_out} |\n" for node, (first, why, way_out) in verdicts.SINCE.items()
    ]
    lines.append("\n## By operation\n\nCorrected nodes in bold.\n\n")
    lines.append("| operation | with | autograd nodes | status |\n|---|---|---|---|\n")
    for (op, status), (settings, torchs, corrected) in sorted(
        operations.items(), key=lambda item: item[0][0].lower()
    ):
        names = [f"**{_short(n)}**" for n in sorted(corrected)] + [_short(n) for n in sorted(torchs)]
        variants = "; ".join(s for s in settings if s)
        lines.append(f"| {op} | {variants} | {', '.join(names)} | {'corrected' if corrected else status} |\n")
    return "".join(lines)


def _short(name: str) -> str:
    return name.removesuffix("Backward")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    assert {bare(name) for name in corrections.CORRECTED} == set(CORRECTIONS)
    wrong = []
    for case in verified_cases.CASES:
        errors = verified_cases.verify(case)
        if not errors.right:
            wrong.append(f"{case.id}: {errors}")
    if wrong:
        sys.exit("wrong, nothing written:\n" + "\n".join(wrong))
    table = collect(verified_cases.CASES)
    MODULE.write_text(module(table))
    DOCUMENT.write_text(document(table))


if __name__ == "__main__":
    main()
