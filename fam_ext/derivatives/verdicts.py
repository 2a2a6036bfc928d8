"""The autograd graph between a loss and the layer's output: which operations it holds, and whether they can be trusted.

The gradient of kappa differentiates this part of the graph three times. Operations whose third derivative has been compared with
finite differences are listed in VERIFIED (docs/verified-ops.md, written by the tests); those known to be wrong or missing, in
this torch, are refused or corrected (fam_ext.derivatives.corrections); for any other a warning is given once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from math import prod
from typing import Any

import torch

from fam_ext.derivatives import corrections, log_softmax
from fam_ext.derivatives.nodes import bare, readable
from fam_ext.derivatives.verified import VERIFIED
from fam_ext.errors import UnsupportedError

_DIFFERENCES = "use method='finite_difference'"

_MATH = (
    "run the model under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), or "
    + _DIFFERENCES
)

_NO_SECOND = "torch has no second derivative of it"
_REENTRANT = "CheckpointFunctionBackward"

REFUSED: dict[str, tuple[str, str]] = {
    # node name without its trailing digit: (why, ways out); curvature='ggn' needs second derivatives, too
    "ScaledDotProductFlashAttentionForCpuBackward": ("with dropout " + _NO_SECOND, _MATH),
    "ScaledDotProductFlashAttentionBackward": (_NO_SECOND, _MATH),
    "ScaledDotProductEfficientAttentionBackward": (_NO_SECOND, _MATH),
    "ScaledDotProductCudnnAttentionBackward": (_NO_SECOND, _MATH),
    "ScaledDotProductFusedAttentionOverrideableBackward": (_NO_SECOND, _MATH),
    "FlexAttentionAutogradOpBackward": (
        _NO_SECOND,
        "use scaled_dot_product_attention with the MATH backend, or " + _DIFFERENCES,
    ),
    "CudnnRnnBackward": (
        "cuDNN's recurrent kernels cannot be differentiated twice",
        "set torch.backends.cudnn.enabled = False around the model, or " + _DIFFERENCES,
    ),
    "MiopenRnnBackward": (
        "MIOpen's recurrent kernels cannot be differentiated twice",
        "set torch.backends.cudnn.enabled = False around the model, or " + _DIFFERENCES,
    ),
    "SyncBatchNormBackward": (_NO_SECOND, "use nn.BatchNorm, or " + _DIFFERENCES),
    "CompiledFunctionBackward": (
        "a graph made by torch.compile cannot be differentiated twice",
        "use the model without torch.compile, or with backend='eager', or " + _DIFFERENCES,
    ),
    _REENTRANT: (
        "reentrant checkpointing cannot be differentiated twice",
        "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    ),
    "CtcLossBackward": (_NO_SECOND, _DIFFERENCES),
    "CudnnCtcLossBackward": (_NO_SECOND, _DIFFERENCES),
    "MultiMarginLossBackward": (
        _NO_SECOND,
        "write the margins as relu(margin + z - z.gather(1, target)), or " + _DIFFERENCES,
    ),
    "MultilabelMarginLossBackward": (_NO_SECOND, _DIFFERENCES),
    "PdistBackward": (_NO_SECOND, "write the distances as (x[i] - x[j]).norm(dim=-1), or " + _DIFFERENCES),
    "EmbeddingBagBackward": (_NO_SECOND, "use F.embedding and a sum or mean, or " + _DIFFERENCES),
    "SegmentReduceBackward": (_NO_SECOND, "use index_reduce or scatter_reduce, or " + _DIFFERENCES),
    "CrossMapLRN2dBackward": (_NO_SECOND, "use nn.LocalResponseNorm, or " + _DIFFERENCES),
    "torch::autograd::NotImplemented": (
        "torch has no derivative of an operation in it, which an ordinary backward pass of the loss names",
        "write it with operations that have one, or " + _DIFFERENCES,
    ),
    "LogcumsumexpBackward": (
        "its third derivative is NaN",
        "write it as (x - m).exp().cumsum(dim).log() + m with m = x.detach().amax(dim, keepdim=True), or use curvature='ggn' "
        "or method='finite_difference'",
    ),
}

_NEWER = "use torch {} or newer, or " + _DIFFERENCES

SINCE: dict[str, tuple[str, str, str]] = {
    # node name: (the first torch that differentiates it right, why it is refused before, ways out)
    "GridSampler2DBackward": ("2.12", _NO_SECOND, _NEWER.format("2.12")),
    "GridSampler3DBackward": ("2.12", _NO_SECOND, _NEWER.format("2.12")),
    "CdistBackward": (
        "2.14",
        _NO_SECOND,
        "write the distances as (x.unsqueeze(-2) - y.unsqueeze(-3)).norm(dim=-1), or for p=2 call torch.cdist with "
        "compute_mode='use_mm_for_euclid_dist', or " + _NEWER.format("2.14"),
    ),
}
REFUSED |= {
    name: (why, way_out) for name, (first, why, way_out) in SINCE.items() if torch.__version__ < first
}
# of DistributedDataParallel, an identity, of which static_graph makes more: check_sink
_SINK = "_DDPSinkBackward"
# an identity that tells FSDP2 that the backward pass has left a group (fam_ext.layers.sharding)
_FSDP = "RegisterPostBackwardFunctionBackward"
TRUSTED = (VERIFIED | SINCE.keys() | {_FSDP}) - REFUSED.keys()

_OWN = (
    "can be differentiated once only. Where the criterion is a FAMLoss itself, give one FAMLoss all layers, or add strength "
    "times a RelativeFlatness to the loss"
)

_warned: set[str] = set()


def check_sink(caller: str, node: Any) -> bool:
    """Whether the node is DistributedDataParallel's sink; refuse that of static_graph=True between a hidden layer and the loss.

    The backward pass through it starts the only all-reduce of the first step, and the term's own passes come first: the
    gradients of the loss would stay those of each rank.
    """
    if not node.name().startswith(_SINK):
        return False
    module = getattr(node, "ddp_weakref", lambda: None)()
    if module is None or module.static_graph:
        raise UnsupportedError(
            f"{caller}: the layer lies inside DistributedDataParallel(static_graph=True), whose gradients would not be "
            "averaged: the term's backward passes come before the loss's own. Leave static_graph out (with "
            "find_unused_parameters=True where a layer is skipped), or use method='noise', which needs no second pass"
        )
    return True


def _refusal(caller: str, name: str) -> UnsupportedError:
    why, way_out = REFUSED[name]
    return UnsupportedError(
        f"{caller}: the graph between the layer and the loss holds {name.removesuffix('Backward')}: {why}; {way_out}"
    )


def check_reentrant(caller: str, nodes: Iterable[Any]) -> None:
    """Refuse reentrant checkpointing where gradients are taken once only, too: its backward pass knows no inputs to stop at."""
    if any(node.name().startswith(_REENTRANT) for node in nodes):
        raise _refusal(caller, _REENTRANT)


def check(caller: str, nodes: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """The nodes to correct, and the names of those never verified, of which it warns once.

    Raises UnsupportedError for a node that cannot be differentiated right.
    """
    correct, doubtful = [], set()
    for node in nodes:
        full = node.name()
        name = bare(full)
        replaced = full in corrections.REPLACED
        if replaced and full in corrections.FASTER:
            replaced = prod(node._input_metadata[0].shape) >= log_softmax.LEAST
        if name in TRUSTED and not replaced:
            continue
        if check_sink(caller, node):
            continue
        if corrections.needs_correction(node):
            correct.append(node)
        elif name in REFUSED:
            raise _refusal(caller, name)
        elif "fam_ext" in name:
            operation = readable(name)
            raise UnsupportedError(
                f"{caller}: the graph between the layer and the loss holds {operation}, which {_OWN}"
            )
        elif name not in TRUSTED:
            name = readable(name)
            doubtful.add(name)
            if name not in _warned:
                _warned.add(name)
                warnings.warn(
                    f"{caller}: the third derivative of {name} (between the layer and the loss) has never been verified; kappa's "
                    "value is right where torch's second derivative is, its gradient may not be. curvature='ggn' needs second "
                    "derivatives only",
                    stacklevel=2,
                )
    return correct, sorted(doubtful)
