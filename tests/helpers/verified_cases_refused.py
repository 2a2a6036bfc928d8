"""Operations that cannot be differentiated often enough, and cases that compute the same in a way that can."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from verified_cases_base import Case, Refused, Tail, labels


def _bag(z: Tensor) -> Tensor:
    return F.embedding_bag(torch.tensor([[0, 2], [2, 1]]), z)


def _weighted_bag(z: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 12).reshape(4, 3).sin()
    index = torch.tensor([[0, 2], [2, 1], [3, 3], [0, 1]])
    return F.embedding_bag(index, table, per_sample_weights=z[:, :2], mode="sum")


def _ctc(z: Tensor) -> Tensor:
    target, lengths = torch.tensor([[1, 2]]), (torch.tensor([5]), torch.tensor([2]))
    return F.ctc_loss(z.log_softmax(-1), target, *lengths)


def _segments(z: Tensor) -> Tensor:
    return torch.segment_reduce(z, "mean", lengths=torch.tensor([2, 2]), axis=0)


def _compiled() -> Tail:
    return Tail(torch.compile(lambda _, z: z.sin().exp(), backend="aot_eager"))


CASES = [
    Refused(Case("CTCLoss", lambda: _ctc, (5, 1, 4), is_loss=True), "CtcLossBackward"),
    Refused(
        Case(
            "MultiMarginLoss",
            lambda: Tail(lambda m, z: F.multi_margin_loss(z, m.t), t=labels(4, 5)),
            (5, 4),
            is_loss=True,
        ),
        "MultiMarginLossBackward",
        "MultiMarginLoss written out",
    ),
    Refused(
        Case(
            "MultiLabelMarginLoss",
            lambda: lambda z: F.multilabel_margin_loss(z, torch.tensor([[0, 1, -1, 0]] * 4)),
            is_loss=True,
        ),
        "MultilabelMarginLossBackward",
    ),
    Refused(
        Case("cdist", lambda: lambda z: torch.cdist(z, z.cos())), "CdistBackward", "distances by broadcasting"
    ),
    Refused(
        Case("cdist", lambda: lambda z: torch.cdist(z, z.cos(), p=3), variant="p=3"),
        "CdistBackward",
        "cdist use_mm_for_euclid_dist",
    ),
    Refused(Case("F.pdist", lambda: F.pdist), "PdistBackward", "distances by broadcasting pairs"),
    Refused(
        Case("F.embedding_bag", lambda: _bag, variant="z as the table"),
        "EmbeddingBagBackward",
        "F.embedding mean of a bag, z as the table",
    ),
    Refused(Case("F.embedding_bag", lambda: _weighted_bag, variant="z as weights"), "EmbeddingBagBackward"),
    Refused(Case("segment_reduce", lambda: _segments), "SegmentReduceBackward", "index_reduce mean"),
    Refused(
        Case("CrossMapLRN2d", lambda: nn.CrossMapLRN2d(2), (2, 3, 2, 4)),
        "CrossMapLRN2dBackward",
        "LocalResponseNorm 2-d",
    ),
    Refused(
        Case("linalg.ldl_factor", lambda: lambda z: torch.linalg.ldl_factor(z @ z.mT).LD),
        "torch::autograd::NotImplemented",
    ),
    Refused(
        Case("logcumsumexp", lambda: lambda z: z.logcumsumexp(-1)),
        "LogcumsumexpBackward",
        "logcumsumexp written out",
    ),
    Refused(
        Case("torch.compile", _compiled, variant="backend='aot_eager'"),
        "CompiledFunctionBackward",
        "torch.compile backend='eager'",
    ),
    Refused(
        Case(
            "checkpoint",
            lambda: lambda z: checkpoint(torch.tanh, z, use_reentrant=True),
            variant="use_reentrant=True",
        ),
        "CheckpointFunctionBackward",
        "checkpoint use_reentrant=False",
    ),
]

# Nodes of refused operations that no CPU reaches: kernels of GPUs, and the flash attention of the CPU, which takes no dropout.
ELSEWHERE = {
    "ScaledDotProductFlashAttentionForCpuBackward",
    "ScaledDotProductFlashAttentionBackward",
    "ScaledDotProductEfficientAttentionBackward",
    "ScaledDotProductCudnnAttentionBackward",
    "ScaledDotProductFusedAttentionOverrideableBackward",
    "FlexAttentionAutogradOpBackward",
    "CudnnRnnBackward",
    "MiopenRnnBackward",
    "SyncBatchNormBackward",
    "CudnnCtcLossBackward",
}
