"""Normalization layers: modules and functions, training and evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from verified_cases_base import Case, Tail, param, positive


def _randomized(module: nn.Module) -> nn.Module:
    """Weights that are not all 1, running statistics that are not 0 and 1."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "bias" not in name else tensor.normal_()
    return module


def _norm(kind: type[nn.Module], *args: object, train: bool = True, **kwargs: object) -> nn.Module:
    return _randomized(kind(*args, **kwargs)).train(train)


def _batch_norms() -> list[Case]:
    cases = []
    for kind, shape in (
        (nn.BatchNorm1d, (5, 4)),
        (nn.BatchNorm1d, (3, 2, 4)),
        (nn.BatchNorm2d, (2, 3, 2, 4)),
        (nn.BatchNorm3d, (2, 2, 2, 1, 4)),
    ):
        for variant, train, options in (
            ("training", True, {}),
            ("training, no affine", True, {"affine": False}),
            ("training, no running statistics", True, {"track_running_stats": False}),
            ("evaluation", False, {}),
            ("evaluation, no affine", False, {"affine": False}),
            ("evaluation, no running statistics", False, {"track_running_stats": False}),
        ):

            def build(kind=kind, shape=shape, train=train, options=options) -> nn.Module:
                return _norm(kind, shape[1], train=train, **options)

            dims = "" if kind is not nn.BatchNorm1d else f", {len(shape)}-d"
            cases.append(Case(kind.__name__, build, shape, variant + dims))
    return cases


def _instance_norms() -> list[Case]:
    cases = []
    for kind, shape in (
        (nn.InstanceNorm1d, (2, 3, 4)),
        (nn.InstanceNorm2d, (2, 2, 2, 4)),
        (nn.InstanceNorm3d, (2, 2, 2, 1, 4)),
    ):
        for variant, train, options in (
            ("", True, {}),
            ("affine", True, {"affine": True}),
            ("training, running statistics", True, {"affine": True, "track_running_stats": True}),
            ("evaluation, running statistics", False, {"affine": True, "track_running_stats": True}),
        ):

            def build(kind=kind, shape=shape, train=train, options=options) -> nn.Module:
                return _norm(kind, shape[1], train=train, **options)

            cases.append(Case(kind.__name__, build, shape, variant))
    return cases


def _weight_normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 3))


def _spectral(train: bool) -> nn.Module:
    module = parametrizations.spectral_norm(nn.Linear(4, 3)).train(train)
    if train:  # power iteration moves with the weight and is no part of its gradient: only the bias is differentiated
        module.parametrizations.weight.original.requires_grad_(False)
    return module


def _written_out(z: Tensor) -> Tensor:
    """Normalization as models that distrust modules write it."""
    return (z - z.mean(-1, keepdim=True)) * (z.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()


CASES = [
    *_batch_norms(),
    Case(
        "F.batch_norm",
        lambda: Tail(
            lambda m, z: F.batch_norm(z, None, None, m.w, m.b, training=True), w=param(4), b=param(4)
        ),
        (5, 4),
        "training",
    ),
    Case(
        "F.batch_norm", lambda: lambda z: F.batch_norm(z, None, None, training=True, eps=0.3), (5, 4), "eps"
    ),
    Case(
        "F.batch_norm",
        lambda: Tail(
            lambda m, z: F.batch_norm(z, m.mean, m.var, m.w, m.b),
            mean=torch.randn(4),
            var=torch.rand(4) + 0.5,
            w=param(4),
            b=param(4),
        ),
        (5, 4),
        "evaluation",
    ),
    Case("LayerNorm", lambda: _norm(nn.LayerNorm, 4), (3, 2, 4), "1 dimension"),
    Case("LayerNorm", lambda: _norm(nn.LayerNorm, (2, 4)), (3, 2, 4), "2 dimensions"),
    Case("LayerNorm", lambda: _norm(nn.LayerNorm, (3, 2, 4)), (3, 2, 4), "3 dimensions, all"),
    Case("LayerNorm", lambda: _norm(nn.LayerNorm, (2, 2, 4)), (3, 2, 2, 4), "3 dimensions"),
    Case("LayerNorm", lambda: _norm(nn.LayerNorm, 4, bias=False), (3, 4), "no bias"),
    Case("LayerNorm", lambda: _norm(nn.LayerNorm, 4, elementwise_affine=False), (3, 4), "no affine"),
    Case(
        "F.layer_norm",
        lambda: Tail(lambda m, z: F.layer_norm(z, (4,), m.w, m.b), w=param(4), b=param(4)),
        (3, 4),
    ),
    Case(
        "F.layer_norm",
        lambda: Tail(lambda m, z: F.layer_norm(z, (4,), None, m.b), b=param(4)),
        (3, 4),
        "bias alone",
    ),
    Case("F.layer_norm", lambda: lambda z: F.layer_norm(z, (4,), eps=0.5), (3, 4), "no affine, eps"),
    Case("F.layer_norm", lambda: lambda z: F.layer_norm(F.layer_norm(z, (4,)).tanh(), (4,)), (3, 4), "twice"),
    *_instance_norms(),
    Case("InstanceNorm1d", lambda: _norm(nn.InstanceNorm1d, 3, affine=True), (3, 4), "no batch dimension"),
    Case(
        "F.instance_norm",
        lambda: Tail(lambda m, z: F.instance_norm(z, weight=m.w, bias=m.b), w=param(3), b=param(3)),
        (2, 3, 4),
    ),
    Case("F.instance_norm", lambda: lambda z: F.instance_norm(z, eps=0.3), (2, 3, 4), "no affine, eps"),
    Case("GroupNorm", lambda: _norm(nn.GroupNorm, 2, 4), (3, 4, 2, 4), "2-d"),
    Case("GroupNorm", lambda: _norm(nn.GroupNorm, 2, 6), (5, 6), "rows"),
    # torch's products of several at once are silently wrong where the numbers of samples, groups and channels fit like this
    Case("GroupNorm", lambda: _norm(nn.GroupNorm, 1, 4), (1, 4, 4), "one sample"),
    Case("GroupNorm", lambda: _norm(nn.GroupNorm, 1, 2, affine=False), (3, 2, 4), "no affine"),
    Case("RMSNorm", lambda: _norm(nn.RMSNorm, 4), (3, 4)),
    Case("RMSNorm", lambda: _norm(nn.RMSNorm, (2, 4), eps=0.1), (3, 2, 4), "2 dimensions, eps"),
    Case("RMSNorm", lambda: nn.RMSNorm(4, elementwise_affine=False), (3, 4), "no affine"),
    Case("LocalResponseNorm", lambda: nn.LocalResponseNorm(2, alpha=0.3), (2, 3, 4)),
    Case("LocalResponseNorm", lambda: nn.LocalResponseNorm(3, alpha=0.3, k=0.7), (2, 3, 2, 4), "2-d"),
    Case("parametrizations.weight_norm", _weight_normed, variant="of a later layer"),
    Case("parametrizations.spectral_norm", lambda: _spectral(False), variant="of a later layer, evaluation"),
    Case("parametrizations.spectral_norm", lambda: _spectral(True), variant="of a later layer, training"),
    Case("F.normalize", lambda: F.normalize),
    Case("F.normalize", lambda: lambda z: F.normalize(z, p=3.0, dim=0), variant="p=3"),
    Case("F.normalize", lambda: lambda z: F.normalize(z, p=1.0), variant="p=1"),
    Case("norm written out", lambda: _written_out, variant="mean, var, rsqrt"),
    Case(
        "Linear, BatchNorm1d, LayerNorm",
        lambda: nn.Sequential(
            _norm(nn.BatchNorm1d, 4), nn.Linear(4, 3), nn.Tanh(), _norm(nn.LayerNorm, 3), nn.Linear(3, 2)
        ),
        variant="one after the other",
    ),
    Case(
        "BatchNorm1d",
        lambda: Tail(lambda m, z: m.n(z) * m.n(z.tanh()), n=nn.BatchNorm1d(4), w=positive(1)),
        (5, 4),
        "called twice",
    ),
]
