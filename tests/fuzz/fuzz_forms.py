"""Random calls of FAMLoss and RelativeFlatness in their other forms: positive forms, noise, shares by sample, several layers."""

from __future__ import annotations

import copy
import math
from typing import Any

import dense_factors
import torch
from fuzz_criteria import agree, likelihood
from fuzz_draws import Draws, Kwargs
from fuzz_models import BatchNorm, Network, criterion, network
from fuzz_run import refuses, unchanged
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness


def _by_sample(d: Draws, hidden: bool = True) -> tuple[Network, Any, tuple[Any, ...]]:
    """A network whose samples do not interact, and a criterion."""
    while True:
        net = network(d, hidden)
        if not any(isinstance(m, BatchNorm) for m in net.oracle):
            return net, *criterion(d, net.outputs)


def positive(d: Draws) -> None:
    """curvature="fisher", "empirical_fisher" and "ggn" of random factors, on a layer inside a network."""
    net, loss, targets = _by_sample(d)
    if isinstance(loss, nn.CrossEntropyLoss) and targets[0].is_floating_point():
        targets = (targets[0] / targets[0].sum(1, keepdim=True),)
    curvature = d.one_of("fisher", "empirical_fisher", "ggn")
    options: Kwargs = {
        "curvature": curvature,
        "measure": d.one_of("neuronwise", "trace"),
        "probes": d.between(1, 3),
    }
    if curvature == "ggn":
        options["method"] = "hutchinson"
    measured = RelativeFlatness(loss, net.layer, **options)
    outputs = net.model(net.x)
    if curvature != "ggn" and not likelihood(loss):
        return refuses(
            "RelativeFlatness", ("fisher", "curvature"), lambda: measured(outputs, *targets), repr(loss)
        )
    with unchanged(net.x, *net.model.parameters(), *targets):
        kappa = measured(outputs, *targets)
    by_sample = measured(net.model(net.x), *targets, per_sample=True)
    assert by_sample.shape == net.x.shape[:1] and bool((by_sample.nan_to_num() >= 0).all())
    grads = torch.autograd.grad(kappa, net.tensors, materialize_grads=True, retain_graph=True)
    assert all(g.nan_to_num().isfinite().all() for g in grads)
    matrix = _matrix(net, loss, targets, curvature)
    if matrix is None:
        assert kappa.nan_to_num() >= 0
        return None
    weighted = options["measure"] == "neuronwise"
    exact = dense_factors.quadratic_form(net.layer, net.tail, net.before(), matrix, weighted).nan_to_num()
    if curvature == "empirical_fisher":
        return agree(kappa.nan_to_num(), exact, net.tensors)
    torch.testing.assert_close(kappa.nan_to_num(), exact, rtol=1e-8, atol=1e-11)
    return None


def _matrix(net: Network, loss: Any, targets: tuple[Any, ...], curvature: str) -> Any:
    """The matrix of the outputs that every draw has; None where draws differ, or go along one random direction of the input."""
    if net.x.dim() > 2:
        return None
    classes = net.outputs.shape[1]
    entropy = isinstance(loss, nn.CrossEntropyLoss)
    if curvature == "empirical_fisher":
        return _empirical(loss, targets, len(net.x)) if entropy or classes == 1 else None
    if classes == (2 if entropy else 1):  # all factors of a sample are multiples of one
        return dense_factors.of_loss(lambda f: loss(f, *targets).nan_to_num())
    return None


def _empirical(loss: Any, targets: tuple[Any, ...], samples: int) -> Any:
    """sum_i c g_i g_i^T of the terms' gradients g_i: the loss's own gradient is c g_i."""
    ignored = int((targets[0] == -100).sum()) if targets[0].dtype == torch.int64 else 0
    c = 1.0 if loss.reduction == "sum" else 1 / max(samples - ignored, 1)

    def matrix(f: Tensor) -> Tensor:
        g = torch.func.grad(lambda z: loss(z, *targets).nan_to_num())(f)
        blocks = g[:, :, None] * g[:, None, :] / c
        return torch.block_diag(*blocks)

    return matrix


def noise(d: Draws) -> None:
    """What holds for every draw of method="noise"; that its mean is loss + strength * kappa is tested elsewhere."""
    net = network(d, hidden=d.chance(0.7))
    loss, targets = criterion(d, net.outputs)
    options: Kwargs = {
        "method": "noise",
        "normalize": d.one_of(None, "fan_in"),
        "per_sample_probes": d.one_of(None, True, False),
        "every": d.one_of(1, 1, 2),
    }
    strength = d.one_of(1e-3, 0.1, 0.0, lambda step: 0.01 * step)
    layers = [m for m in net.model if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d))]
    made = FAMLoss(loss, d.one_of(net.layer, layers), strength, **options)
    state = torch.get_rng_state()
    draws = []
    for _ in range(2):  # the same random numbers give the same step
        torch.set_rng_state(state)
        made.step = 0
        made.strength = strength
        with unchanged(net.x, *net.model.parameters(), *targets):
            total = made(net.model(net.x), *targets)
        assert total.dim() == 0 and (total.isfinite() or loss(net.outputs, *targets).isnan()), total
        draws.append(total.nan_to_num().detach())
    assert torch.equal(*draws), draws
    if total.requires_grad and total.isfinite():
        grads = torch.autograd.grad(total, net.tensors, allow_unused=True)
        used = torch.autograd.grad(loss(net.oracle(net.x), *targets), net.tensors, allow_unused=True)
        for g, plain in zip(grads, used, strict=True):
            assert (g is None) == (plain is None) and (g is None or bool(g.isfinite().all()))
    assert made.last.flatness is None
    made.eval()
    plain = loss(net.model(net.x), *targets)
    torch.testing.assert_close(made(net.model(net.x), *targets), plain, rtol=0, atol=0, equal_nan=True)


def per_sample(d: Draws) -> None:
    """Shares by sample are each sample's own kappa under a sum, and add up to the batch's."""
    net, loss, targets = _by_sample(d, hidden=d.chance(0.5))
    if len(targets[0]) != len(net.x):  # rows are tokens
        return
    if isinstance(loss, nn.Module) and d.chance(0.5):
        loss.reduction = "sum"  # type: ignore[assignment]
    options: Kwargs = {"method": d.one_of("auto", "exact"), "max_bytes": 2**40}
    measured = RelativeFlatness(loss, net.layer, **options)
    shares = measured(net.model(net.x), *targets, per_sample=True)
    assert shares.shape == net.x.shape[:1]
    if measured.plan is not None and measured.plan.method == "hutchinson":  # type: ignore[union-attr]
        return
    exact = net.kappa(lambda z: loss(z, *targets), {}).nan_to_num()
    agree(shares.nan_to_num().sum(), exact, net.tensors, parts=net.parts)
    if getattr(loss, "reduction", "mean") != "sum":
        return
    i = d.between(0, len(net.x) - 1)
    alone, own = copy.copy(net), tuple(t[i : i + 1] for t in targets)
    alone.x = net.x[i : i + 1]
    each = alone.kappa(lambda z: loss(z, *own), {})
    torch.testing.assert_close(shares[i], each, rtol=0, atol=1e-9 * alone.parts + 1e-13)


def several(d: Draws) -> None:
    """A layer and the head behind it: the sum of both kappas, with shares."""
    net = network(d, hidden=True)
    loss, targets = criterion(d, net.outputs)
    head = copy.copy(net)
    head.at = len(net.model) - 1
    head.layer = net.model[head.at]
    settings: Kwargs = {
        "measure": d.one_of("neuronwise", "layerwise", "trace"),
        "normalize": d.one_of(None, "fan_in"),
    }
    exact = sum(n.kappa(lambda z: loss(z, *targets), settings).nan_to_num() for n in (net, head))
    parts = net.parts + head.parts
    layers = d.one_of([net.layer, head.layer], [head.layer, net.layer])
    strength = d.one_of(0.5, -1.0)
    made = FAMLoss(loss, layers, strength, method=d.one_of("exact", "auto"), max_bytes=2**40, **settings)
    with unchanged(net.x, *net.model.parameters(), *targets):
        total = made(net.model(net.x), *targets)
    if any(plan.method == "hutchinson" for plan in made.plan):  # type: ignore[union-attr]
        assert math.isfinite(total) or loss(net.outputs, *targets).isnan()
        return
    plain = loss(net.oracle(net.x), *targets)
    agree(total.nan_to_num(), (plain + strength * exact).nan_to_num(), net.tensors, parts=parts)
