"""Random calls of FAMLoss and RelativeFlatness on heads and on hidden layers, against the full Hessian of fuzz_models."""

from __future__ import annotations

import importlib.util
from typing import Any

import dense_factors
import torch
from fuzz_draws import (
    Draws,
    Kwargs,
    corrupted,
    not_bool,
    not_choice,
    not_finite,
    not_floating,
    not_integer,
    not_number,
    of_another_shape,
)
from fuzz_losses import bad_indices
from fuzz_models import BatchNorm, Network, criterion, network
from fuzz_run import described, refuses, unchanged
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness

_SCIPY = importlib.util.find_spec("scipy") is not None


def agree(ours: Tensor, exact: Tensor, tensors: list[Tensor], rtol: float = 1e-8, parts: float = 0.0) -> None:
    """Values, and gradients to their largest entry. `parts`: the sum of the sizes of what kappa adds up.

    A Hessian has entries of either sign, which may cancel in kappa: their roundings stay, however small kappa is.
    """
    options: Kwargs = {"allow_unused": True, "materialize_grads": True}
    torch.testing.assert_close(ours, exact, rtol=rtol, atol=1e-3 * rtol * parts + 1e-11)
    grads = [torch.autograd.grad(v, tensors, **options) if v.requires_grad else None for v in (ours, exact)]
    if grads[0] is None or grads[1] is None:
        assert grads[0] is None or not any(g.any() for g in grads[0])
        assert grads[1] is None or not any(g.any() for g in grads[1])
        return
    largest = max(parts, *(float(g.abs().max()) if g.numel() else 0.0 for g in grads[1]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=100 * rtol, atol=10 * rtol * largest + 1e-11)


def _settings(d: Draws) -> Kwargs:
    measure = d.one_of("neuronwise", "neuronwise", "neuronwise", "layerwise", "trace")
    return {
        "measure": measure,
        "norm_power": d.one_of(1, 2) if measure == "layerwise" else 2,
        "normalize": d.one_of(None, "fan_in"),
        "curvature_grad": d.chance(0.75) or measure == "trace",
    }


def head(d: Draws) -> None:
    net = network(d, hidden=False)
    loss, targets = criterion(d, net.outputs)
    settings = _settings(d)
    if d.chance(0.4):
        return _refused(d, net, loss, targets, settings)
    if d.chance(0.2):
        settings["curvature"] = d.one_of("ggn", "hessian")
    return _compare(d, net, loss, targets, settings)


def _compare(
    d: Draws, net: Network, loss: Any, targets: tuple[Any, ...], settings: Kwargs, rtol: float = 1e-8
) -> None:
    def of_outputs(z: Tensor) -> Tensor:
        value: Tensor = loss(z, *targets)
        return value

    exact = net.kappa(of_outputs, settings).nan_to_num()
    with unchanged(net.x, *net.model.parameters(), *targets):
        if d.chance(0.5):
            kappa = RelativeFlatness(loss, net.layer, **settings)(net.model(net.x), *targets)
            return agree(kappa, exact, net.tensors, rtol, net.parts)
        strength = d.one_of(1.0, 0.3, -0.5)
        criterion_ = FAMLoss(loss, net.layer, strength, **settings)
        total = criterion_(net.model(net.x), *targets)
        allowed = 1e-3 * rtol * net.parts + 1e-11
        torch.testing.assert_close(criterion_.last.flatness, exact.detach(), rtol=rtol, atol=allowed)
        plain = of_outputs(net.oracle(net.x))
        return agree(
            total.nan_to_num(), (plain + strength * exact).nan_to_num(), net.tensors, rtol, net.parts
        )


def hidden(d: Draws) -> None:
    net = network(d, hidden=True)
    loss, targets = criterion(d, net.outputs)
    way = d.one_of("exact", "exact", "auto", "eigenvalue", "ggn", "ggn", "fisher", "hutchinson", "difference")
    settings = _settings(d)
    if way in ("exact", "auto"):
        return _compare(
            d,
            net,
            loss,
            targets,
            {**settings, "method": way, "max_bytes": 2**40} if way == "exact" else settings,
        )
    if way == "eigenvalue":
        if not _SCIPY:
            return None
        measure = d.one_of("layerwise_eigenvalue", "neuronwise_eigenvalue")
        power = d.one_of(1, 2) if measure == "layerwise_eigenvalue" else 2
        settings = {"measure": measure, "norm_power": power, "normalize": settings["normalize"]}
        return _value(net, loss, targets, settings)
    if way == "ggn":
        return _gauss_newton(d, net, loss, targets)
    if way == "difference":
        value = RelativeFlatness(loss, net.layer, method="finite_difference", probes=3)

        def closure() -> Tensor:
            result: Tensor = loss(net.model(net.x), *targets)
            return result

        return _finite(value(net.model(net.x), *targets, closure=closure), targets)
    return _draws(d, net, loss, targets, way)


def _value(net: Network, loss: Any, targets: tuple[Any, ...], settings: Kwargs) -> None:
    """Alone: eigenvalues need not be simple, and have no gradient then. Lanczos stops at a relative residual."""
    exact = net.kappa(lambda z: loss(z, *targets), settings).nan_to_num()
    with torch.no_grad():
        scale = float(net.hessian(lambda z: loss(z, *targets))[0].nan_to_num().abs().max()) + 1e-3
    kappa = RelativeFlatness(loss, net.layer, **settings)(net.model(net.x), *targets)
    size = float(net.layer.weight.detach().square().sum()) + 1
    torch.testing.assert_close(kappa.nan_to_num(), exact, rtol=1e-3, atol=1e-4 * scale * size)


def _gauss_newton(d: Draws, net: Network, loss: Any, targets: tuple[Any, ...]) -> None:
    """J^T Lambda J with a dense J by jacrev. Of batch_norm the statistics are held, unless that is refused."""
    options: Kwargs = {"curvature": "ggn", "measure": d.one_of("neuronwise", "trace")}
    norms = [m for m in net.oracle if isinstance(m, BatchNorm)]
    if norms and d.chance(0.3):
        measured = RelativeFlatness(loss, net.layer, **options, hold_statistics=False)
        outputs = net.model(net.x)
        return refuses(
            "RelativeFlatness",
            "hold_statistics",
            lambda: measured(outputs, *targets),
            "batch_norm in training mode",
        )
    for norm in norms:
        norm.held = True
    matrix = dense_factors.of_loss(lambda f: loss(f, *targets).nan_to_num())
    weighted = options["measure"] == "neuronwise"
    exact = dense_factors.quadratic_form(net.layer, net.tail, net.before(), matrix, weighted)
    kappa = RelativeFlatness(loss, net.layer, **options)(net.model(net.x), *targets)
    if norms:
        return torch.testing.assert_close(kappa, exact, rtol=1e-8, atol=1e-11)
    return agree(kappa, exact, net.tensors)


def _finite(kappa: Tensor, targets: tuple[Any, ...]) -> None:
    ignored = targets[0].dtype == torch.int64 and bool((targets[0] < 0).all())
    assert kappa.dim() == 0 and (bool(kappa.isfinite()) or ignored), f"not finite: {kappa}"


def _draws(d: Draws, net: Network, loss: Any, targets: tuple[Any, ...], way: str) -> None:
    """What holds for every draw: the generator repeats it, and one number in the weight leaves nothing to chance."""
    options: Kwargs = {"curvature": "fisher"} if way == "fisher" else {"method": "hutchinson"}
    if way == "fisher" and not likelihood(loss):
        outputs = net.model(net.x)
        refuses(
            "RelativeFlatness",
            ("fisher", "curvature"),
            lambda: RelativeFlatness(loss, net.layer, **options)(outputs, *targets),
            repr(loss),
        )
        return
    options["probes"] = d.between(1, 3)
    values = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(7)
        measured = RelativeFlatness(loss, net.layer, **options, generator=generator)
        values.append(measured(net.model(net.x), *targets).detach())
        _finite(values[-1], targets)
    assert torch.equal(values[0].nan_to_num(), values[1].nan_to_num()), f"{values} with the same generator"
    assert way == "hutchinson" or values[0].nan_to_num() >= 0
    if way == "hutchinson" and net.layer.weight.numel() == 1:
        exact = net.kappa(lambda z: loss(z, *targets), {}).nan_to_num()
        shared = RelativeFlatness(loss, net.layer, **options, per_sample_probes=False)
        torch.testing.assert_close(
            shared(net.model(net.x), *targets).nan_to_num(), exact, rtol=1e-8, atol=1e-11
        )


def likelihood(loss: Any) -> bool:
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.weight is None and loss.label_smoothing == 0
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return loss.weight is None and loss.pos_weight is None
    return isinstance(loss, nn.PoissonNLLLoss)


_SETTINGS: dict[str, Any] = {
    "measure": (not_choice,),
    "curvature": (not_choice,),
    "method": (not_choice,),
    "probes": (not_integer, lambda d, v: d.one_of(0, -1)),
    "normalize": (lambda d, v: d.one_of("fan_out", 1, True, torch.ones(2)),),
    "norm_power": (lambda d, v: d.one_of(0, 3, 1.5, "2", True, None, torch.ones(2)),),
    "curvature_grad": (not_bool,),
    "generator": (lambda d, v: d.one_of(0, "cpu", torch.ones(1)),),
    "backend": (lambda d, v: d.one_of("cuda", "", None, 3, ["native"]),),
    "per_sample_probes": (lambda d, v: d.one_of("no", 2, [], torch.ones(2)),),
    "max_bytes": (lambda d, v: d.one_of(0, -1, 1.5, "1", True, None, torch.ones(2)),),
    "hold_statistics": (lambda d, v: d.one_of("no", 2, [], torch.ones(2)),),
    "layer": (
        lambda d, v: d.one_of(
            None, "fc", 3, [], [v, v], nn.ReLU(), nn.Embedding(3, 2), nn.LazyLinear(3), torch.ones(2)
        ),
    ),
    "criterion": (lambda d, v: d.one_of(None, "cross_entropy", 3, torch.ones(2)),),
}
_OF_FAM_LOSS: dict[str, Any] = {
    "strength": (not_number, not_finite),
    "every": (not_integer, lambda d, v: d.one_of(0, -1)),
}


def _refused(d: Draws, net: Network, loss: Any, targets: tuple[Any, ...], settings: Kwargs) -> None:
    name, cls, own = d.one_of(("FAMLoss", FAMLoss, _OF_FAM_LOSS), ("RelativeFlatness", RelativeFlatness, {}))
    kwargs: Kwargs = {"criterion": loss, "layer": net.layer, **settings}
    if name == "FAMLoss":
        kwargs["strength"] = 0.1
    if d.chance(0.5):
        bad, argument = corrupted(d, kwargs, {**_SETTINGS, **own})
        return refuses(name, argument, lambda: cls(**bad), described(bad))
    made = cls(**kwargs)
    outputs = net.model(net.x)
    target = targets[0]
    rest = targets[1:]
    if d.chance(0.5):
        wrong = d.one_of(
            lambda: not_floating(d, outputs),
            lambda: outputs.detach(),
            lambda: torch.randn(outputs.shape),
            lambda: outputs.detach().to("meta"),
            lambda: (outputs,),
        )()
        return refuses(
            name,
            ("outputs", "layer", "logits"),
            lambda: made(wrong, target, *rest),
            f"outputs={described(wrong)}, {loss}",
        )
    if target.is_floating_point():
        wrong = d.one_of(
            lambda: None, lambda: "target", lambda: of_another_shape(d, target), lambda: target.to_sparse()
        )()
    else:
        wrong = bad_indices(d, target, outputs.shape[1])
    return refuses(name, "target", lambda: made(outputs, wrong, *rest), f"target={described(wrong)}, {loss}")
