"""Losses of torch.nn, on z itself; where they take two outputs, also with the second one from the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verified_cases_base import Case, Tail, labels, param, positive


def _loss(
    op: str,
    criterion: Callable[[], nn.Module],
    target: Callable[[], Tensor],
    shape: tuple[int, ...] = (5, 4),
    variant: str = "",
) -> Case:
    """criterion(z, target); a target that is a parameter is differentiated, too."""
    return Case(op, lambda: Tail(lambda m, z: m.c(z, m.t), c=criterion(), t=target()), shape, variant, True)


def _of(
    op: str,
    function: Callable[[Tail, Tensor], Tensor],
    shape: tuple[int, ...] = (5, 4),
    variant: str = "",
    **parts: Callable[[], Tensor],
) -> Case:
    return Case(op, lambda: Tail(function, **{k: v() for k, v in parts.items()}), shape, variant, True)


def _soft() -> Tensor:
    return torch.randn(5, 4).softmax(-1)


def _real() -> Tensor:
    return torch.randn(5, 4)


def _bits() -> Tensor:
    return torch.randint(2, (5, 4)).to(torch.get_default_dtype())


def _signs() -> Tensor:
    return 2 * _bits() - 1


def _three(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z[0:2], z[2:4], z[4:6]


def _multi_margin(m: Tail, z: Tensor) -> Tensor:
    others = torch.ones_like(z).scatter(1, m.t, 0)
    return ((1 + z - z.gather(1, m.t)).relu().square() * others).mean()


CE = nn.CrossEntropyLoss
CASES = [
    _loss("CrossEntropyLoss", CE, lambda: labels(4, 5)),
    _loss("CrossEntropyLoss", lambda: CE(reduction="sum"), lambda: labels(4, 5), variant="sum"),
    _loss("CrossEntropyLoss", lambda: CE(label_smoothing=0.2), lambda: labels(4, 5), variant="smoothing"),
    _loss("CrossEntropyLoss", lambda: CE(torch.rand(4) + 0.5), lambda: labels(4, 5), variant="weights"),
    _loss(
        "CrossEntropyLoss",
        lambda: CE(torch.rand(4) + 0.5, label_smoothing=0.2),
        lambda: labels(4, 5),
        variant="weights, smoothing",
    ),
    _loss(
        "CrossEntropyLoss",
        lambda: CE(ignore_index=1),
        lambda: torch.tensor([0, 1, 2, 3, 1]),
        variant="ignore_index",
    ),
    _loss("CrossEntropyLoss", CE, _soft, variant="probabilities"),
    _loss(
        "CrossEntropyLoss",
        lambda: CE(torch.rand(4) + 0.5, label_smoothing=0.2),
        _soft,
        variant="probabilities, weights, smoothing",
    ),
    _of(
        "CrossEntropyLoss",
        lambda m, z: F.cross_entropy(z, m.w.softmax(-1)),
        variant="probabilities from the network",
        w=lambda: param(5, 4),
    ),
    _of(
        "CrossEntropyLoss",
        lambda m, z: F.cross_entropy(z.mT, m.t),
        (2, 3, 4),
        "tokens",
        t=lambda: labels(4, 2, 3),
    ),
    _of(
        "CrossEntropyLoss",
        lambda m, z: F.cross_entropy(z, m.t, label_smoothing=0.1),
        (2, 3, 2, 4),
        "pixels",
        t=lambda: labels(3, 2, 2, 4),
    ),
    _of(
        "CrossEntropyLoss",
        lambda m, z: F.cross_entropy(m.w * z.tanh(), m.t).exp(),
        variant="focal-like use",
        t=lambda: labels(4, 5),
        w=lambda: param(4),
    ),
    _of(
        "CrossEntropyLoss",
        lambda m, z: (F.cross_entropy(z, m.t, reduction="none") ** 1.5).mean(),
        variant="reduction none",
        t=lambda: labels(4, 5),
    ),
    Case(
        "F.linear_cross_entropy",
        lambda: Tail(lambda m, z: F.linear_cross_entropy(z, m.w, m.t), t=labels(3, 5), w=param(3, 4)),
        (5, 4),
        is_loss=True,
        needs="linear_cross_entropy",
    ),
    _of("NLLLoss", lambda m, z: F.nll_loss(z.log_softmax(-1), m.t), t=lambda: labels(4, 5)),
    _of(
        "NLLLoss",
        lambda m, z: F.nll_loss(z.log_softmax(1), m.t, torch.tensor([1.0, 2, 3])),
        (2, 3, 2, 4),
        "pixels, weights",
        t=lambda: labels(3, 2, 2, 4),
    ),
    _loss("MSELoss", nn.MSELoss, _real),
    _loss(
        "MSELoss",
        lambda: nn.MSELoss(reduction="sum"),
        lambda: param(5, 4),
        variant="sum, target from the network",
    ),
    _loss("L1Loss", nn.L1Loss, _real),
    _loss("SmoothL1Loss", lambda: nn.SmoothL1Loss(beta=0.7), _real),
    _loss("SmoothL1Loss", nn.SmoothL1Loss, lambda: param(5, 4), variant="target from the network"),
    _loss("HuberLoss", lambda: nn.HuberLoss(delta=0.7), _real),
    _loss(
        "HuberLoss", lambda: nn.HuberLoss(delta=0.7), lambda: param(5, 4), variant="target from the network"
    ),
    _of("HuberLoss", lambda m, z: F.huber_loss(z.sinh(), m.t), variant="after sinh", t=_real),
    _of("SmoothL1Loss", lambda m, z: F.smooth_l1_loss(z.sinh(), m.t), variant="after sinh", t=_real),
    _of("MSELoss", lambda m, z: F.mse_loss(z.sinh(), m.t), variant="after sinh", t=_real),
    _of("L1Loss", lambda m, z: F.l1_loss(z.sinh(), m.t), variant="after sinh", t=_real),
    _of("BCELoss", lambda m, z: F.binary_cross_entropy(z.sigmoid(), m.t), t=_bits),
    _of(
        "BCELoss",
        lambda m, z: F.binary_cross_entropy(z.sigmoid(), m.t, torch.rand(4)),
        variant="weights, soft targets",
        t=_soft,
    ),
    _of(
        "BCELoss",
        lambda m, z: F.binary_cross_entropy(z.sigmoid(), m.t.sigmoid()),
        variant="target from the network",
        t=lambda: param(5, 4),
    ),
    _loss("BCEWithLogitsLoss", nn.BCEWithLogitsLoss, _bits),
    _loss(
        "BCEWithLogitsLoss",
        lambda: nn.BCEWithLogitsLoss(torch.rand(4), pos_weight=torch.rand(4)),
        _soft,
        variant="weights, pos_weight",
    ),
    _loss("BCEWithLogitsLoss", nn.BCEWithLogitsLoss, lambda: param(5, 4), variant="target from the network"),
    _loss("PoissonNLLLoss", nn.PoissonNLLLoss, lambda: labels(5, 5, 4)),
    _of(
        "PoissonNLLLoss",
        lambda m, z: F.poisson_nll_loss(z.exp(), m.t, log_input=False, full=True),
        variant="not log_input, full",
        t=lambda: labels(5, 5, 4),
    ),
    _of("GaussianNLLLoss", lambda m, z: F.gaussian_nll_loss(z, m.t, m.v), t=_real, v=lambda: positive(5, 4)),
    _of(
        "GaussianNLLLoss",
        lambda m, z: F.gaussian_nll_loss(z[:, :2], m.t, F.softplus(z[:, 2:]), full=True),
        variant="variance from the network",
        t=lambda: torch.randn(5, 2),
    ),
    _of("KLDivLoss", lambda m, z: F.kl_div(z.log_softmax(-1), m.t, reduction="batchmean"), t=_soft),
    _of(
        "KLDivLoss",
        lambda m, z: F.kl_div(z.log_softmax(-1), m.t.log(), reduction="batchmean", log_target=True),
        variant="log_target",
        t=_soft,
    ),
    _of(
        "KLDivLoss",
        lambda m, z: F.kl_div(z.log_softmax(-1), m.w.softmax(-1), reduction="sum"),
        variant="target from the network",
        w=lambda: param(5, 4),
    ),
    _of(
        "KLDivLoss",
        lambda m, z: F.kl_div(m.w.log_softmax(-1), z.log_softmax(-1), reduction="sum", log_target=True),
        variant="log_target, target from the network",
        w=lambda: param(5, 4),
    ),
    _of(
        "CosineEmbeddingLoss",
        lambda m, z: F.cosine_embedding_loss(z, m.w, torch.tensor([1, -1, 1, -1, 1]), 0.1),
        w=lambda: param(5, 4),
    ),
    _loss("HingeEmbeddingLoss", nn.HingeEmbeddingLoss, _signs),
    _of(
        "HingeEmbeddingLoss",
        lambda m, z: F.hinge_embedding_loss(z.square(), m.t),
        variant="of squares",
        t=_signs,
    ),
    _of(
        "MarginRankingLoss",
        lambda m, z: F.margin_ranking_loss(z.exp(), m.w, m.t, 0.3),
        w=lambda: param(5, 4),
        t=_signs,
    ),
    _loss("MultiLabelSoftMarginLoss", nn.MultiLabelSoftMarginLoss, _bits),
    _loss("SoftMarginLoss", nn.SoftMarginLoss, _signs),
    _of("MultiMarginLoss", _multi_margin, variant="written out", t=lambda: labels(4, 5, 1)),
    _of("TripletMarginLoss", lambda m, z: F.triplet_margin_loss(*_three(z)), (6, 4)),
    _of(
        "TripletMarginLoss",
        lambda m, z: F.triplet_margin_loss(*_three(z), margin=3.0, swap=True),
        (6, 4),
        "swap",
    ),
    _of(
        "TripletMarginWithDistanceLoss",
        lambda m, z: F.triplet_margin_with_distance_loss(
            *_three(z), distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)
        ),
        (6, 4),
    ),
    _of(
        "contrastive loss (InfoNCE)",
        lambda m, z: F.cross_entropy(F.normalize(z) @ F.normalize(z.sin()).mT / 0.3, torch.arange(5)),
    ),
    _of(
        "AdaptiveLogSoftmaxWithLoss",
        lambda m, z: m.c(z, m.t).loss,
        t=lambda: labels(8, 5),
        c=lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 8, [3, 5]),
    ),
]
