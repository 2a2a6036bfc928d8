"""The autograd graph between a loss and the layer's output: which operations it holds, and whether they can be trusted.

The gradient of kappa differentiates this part of the graph three times. Operations whose third derivative has been compared with
finite differences are listed in VERIFIED (docs/verified-ops.md, written by the tests); those known to be wrong or missing are refused
or corrected (fam_ext.corrections); for any other a warning is given once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from fam_ext import corrections
from fam_ext.errors import UnsupportedError
from fam_ext.verified import VERIFIED

_ELSEWHERE = "use curvature='ggn' or method='finite_difference'"
_MATH = (
    "run the model under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), or " + _ELSEWHERE
)
_NO_SECOND = "torch has no second derivative of it"
REFUSED: dict[str, tuple[str, str]] = {
    # node name without its trailing digit: (why, ways out)
    "ScaledDotProductFlashAttentionForCpuBackward": ("with dropout it cannot be differentiated twice", _MATH),
    "ScaledDotProductFlashAttentionBackward": (_NO_SECOND, _MATH),
    "ScaledDotProductEfficientAttentionBackward": (_NO_SECOND, _MATH),
    "ScaledDotProductCudnnAttentionBackward": (_NO_SECOND, _MATH),
    "ScaledDotProductFusedAttentionOverrideableBackward": (_NO_SECOND, _MATH),
    "CudnnRnnBackward": (
        "cuDNN's recurrent kernels cannot be differentiated twice",
        "set torch.backends.cudnn.enabled = False around the model, or " + _ELSEWHERE,
    ),
    "CtcLossBackward": (_NO_SECOND, "use method='finite_difference'"),
    "CudnnCtcLossBackward": (_NO_SECOND, "use method='finite_difference'"),
    "MultiMarginLossBackward": (_NO_SECOND, _ELSEWHERE),
    "MultilabelMarginLossBackward": (_NO_SECOND, _ELSEWHERE),
    "CdistBackward": (
        "torch has no second derivative of cdist",
        "write the distances as (x.unsqueeze(-2) - y.unsqueeze(-3)).norm(dim=-1), or " + _ELSEWHERE,
    ),
    "PdistBackward": (_NO_SECOND, "write the distances with broadcasting, or " + _ELSEWHERE),
    "NativeDropoutBackward": (
        "the fused dropout has no verified third derivative",
        "use nn.Dropout, or " + _ELSEWHERE,
    ),
    "GridSampler2DBackward": (_NO_SECOND, _ELSEWHERE),
    "GridSampler3DBackward": (_NO_SECOND, _ELSEWHERE),
}
_warned: set[str] = set()


@dataclass(frozen=True)
class Call:
    """One call of the layer in the graph of a loss: the node that made its output, which of its outputs, what was captured."""

    node: Any
    number: int
    stored: Any


def find(loss: Any, key: object) -> tuple[list[Call], list[Any]]:
    """The calls whose node holds (key, output number) in its metadata, and the nodes between them and `loss`.

    Between means: on a path from the loss to a call, the calls' own nodes excluded. Every node is visited once.
    """
    root = loss.grad_fn
    if root is None:
        return [], []
    calls: dict[Any, list[Call]] = {}
    reaches: dict[Any, bool] = {}  # whether a call is behind this node
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None]
        if done:
            reaches[node] = any(reaches.get(n, False) or n in calls for n in following)
            order.append(node)
            continue
        if node in reaches:
            continue
        reaches[node] = False
        metadata = node.metadata
        found = (
            [Call(node, k[1], stored) for k, stored in metadata.items() if _is_key(k, key)]
            if metadata
            else []
        )
        if found:
            calls[node] = found
        stack.append((node, True))
        stack.extend((n, False) for n in following if n not in reaches)
    between = [node for node in reversed(order) if reaches[node]]
    return [call for found in calls.values() for call in found], between


def _is_key(candidate: object, key: object) -> bool:
    return isinstance(candidate, tuple) and len(candidate) == 2 and candidate[0] is key


def bare(name: str) -> str:
    """An autograd node's name without the number torch appends."""
    return name.rstrip("0123456789")


def check(caller: str, nodes: list[Any]) -> list[Any]:
    """Refuse nodes that cannot be differentiated right, warn once of those never verified; returns those to correct."""
    correct = []
    for node in nodes:
        if corrections.needs_correction(node):
            correct.append(node)
            continue
        name = bare(node.name())
        if name in REFUSED and not _fine_here(node, name):
            why, way_out = REFUSED[name]
            raise UnsupportedError(
                f"{caller}: the graph between the layer and the loss holds {name.removesuffix('Backward')}: {why}; {way_out}"
            )
        if name not in VERIFIED and name not in REFUSED and name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"{caller}: the third derivative of {name} (between the layer and the loss) has never been verified; kappa's value "
                "is right where torch's second derivative is, its gradient may not be. curvature='ggn' needs second derivatives only",
                stacklevel=2,
            )
    return correct


def _fine_here(node: Any, name: str) -> bool:
    """Nodes of refused kinds that are right as they are: none so far beyond what is corrected."""
    return False
