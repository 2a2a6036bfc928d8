"""Random calls of FlatnessNoise, measure, correlation and rescale."""

from __future__ import annotations

import math
from typing import Any

import torch
from fuzz_draws import Draws, Kwargs, corrupted, not_choice, not_finite, not_integer, not_number
from fuzz_models import Network, criterion, network
from fuzz_run import described, refuses, unchanged
from tolerance import relative_error
from torch import Tensor, nn

import fam_ext
from fam_ext import FlatnessNoise

D = torch.float64


def flatness_noise(d: Draws) -> None:
    strength = d.one_of(0.0, 0, 1e-3, 0.5, 2)
    if d.chance(0.3):
        bad = d.one_of(not_number(d, 0), not_finite(d, 0), -0.1)
        name = "strength"
        if d.chance(0.5):
            return refuses("FlatnessNoise", name, lambda: FlatnessNoise(bad), described(bad))
        noise = FlatnessNoise(strength)
        if d.chance(0.5):
            refuses("FlatnessNoise", name, lambda: setattr(noise, "strength", bad), described(bad))
            assert noise.strength == strength
            return None
        x = d.one_of(
            None, [1.0], torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3) * 1j, torch.tensor(1.0), "x"
        )
        return refuses("FlatnessNoise", "input", lambda: FlatnessNoise(0.1)(x), described(x))
    shape = tuple(d.size(most=9) for _ in range(d.between(1, 4)))
    x = d.tensor(shape, d.dtype()).requires_grad_()
    noise = FlatnessNoise(strength)
    noise.train(d.chance(0.8))
    state = torch.get_rng_state()
    with unchanged(x):
        y = noise(x)
    if strength == 0 or not noise.training:
        assert y is x
        return None
    torch.set_rng_state(state)
    draws = torch.randn_like(x).detach().double()
    exact = x.detach().double().requires_grad_()
    expected = exact + math.sqrt(2 * strength) * torch.linalg.vector_norm(exact, dim=-1, keepdim=True) * draws
    assert y.dtype == x.dtype and y.shape == x.shape
    if not x.numel():
        return None
    allowed = 4 * torch.finfo(x.dtype).eps
    assert relative_error(y, expected) <= allowed
    upstream = torch.rand(shape).to(x.dtype)
    grads = torch.autograd.grad(y, x, upstream) + torch.autograd.grad(expected, exact, upstream.double())
    # sums over a row of draws, which may cancel
    parts = (upstream.double() * draws).abs().sum(-1, keepdim=True) * math.sqrt(
        2 * strength
    ) + upstream.double().abs()
    assert relative_error(grads[0], grads[1], True, parts.expand(shape)) <= allowed * max(
        2.0, shape[-1] ** 0.5
    )
    return None


def _loader(d: Draws, net: Network) -> tuple[Any, list[tuple[Tensor, Any]]]:
    """A criterion of (outputs, target) and batches of unequal size."""
    loss, targets = criterion(d, net.outputs)
    while len(targets) > 1:
        loss, targets = criterion(d, net.outputs)
    x, y = net.x.detach(), targets[0]
    least = 2 if any(isinstance(m, nn.BatchNorm1d) for m in net.model) else 1  # which takes no single sample
    sizes = [d.between(least, len(x))] * d.between(1, 3)
    pick = [torch.randint(0, len(x), (n,)) for n in sizes]
    if len(y) != len(x):  # rows are tokens, and cannot be picked by sample
        return loss, [(x, y)]
    return loss, [(x[k], y[k]) for k in pick]


def measure(d: Draws) -> None:
    net = network(d, hidden=d.chance(0.4))
    loss, batches = _loader(d, net)
    names = d.one_of(("neuronwise", "layerwise", "trace"), ("neuronwise",), ("weight_norm", "trace"))
    kwargs: Kwargs = {
        "model": net.model,
        "batches": batches,
        "layer": d.one_of(str(net.at), net.layer),
        "criterion": loss,
        "measures": names,
        "progress": False,
        "method": "exact" if d.chance(0.4) else "auto",
        "training": False,
    }
    if d.chance(0.4):
        return _bad_measure(d, kwargs)
    state = {k: v.clone() for k, v in net.model.state_dict().items()}
    modes = [m.training for m in net.model.modules()]
    report = fam_ext.measure(**kwargs)
    assert modes == [m.training for m in net.model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in net.model.state_dict().items())
    net.oracle.eval()  # without running statistics batch_norm takes the batch's in evaluation mode, too
    weights = [_counts(loss, z, y) for z, y in ((x, y) for x, y in batches)]
    if sum(weights) == 0:
        assert all(math.isnan(v) for k, v in report.values.items() if "weight_norm" not in k)
        return None
    total = 1 if getattr(loss, "reduction", "mean") == "sum" else sum(weights)
    for name in names:
        if name == "weight_norm":
            continue
        expected = 0.0
        for (x, y), weight in zip(batches, weights, strict=True):
            if weight:
                net.x = x
                kappa = net.kappa(lambda z, y=y: loss(z, y), {"measure": name})  # type: ignore[misc]
                expected += weight * float(kappa.detach()) / total
        got = (
            report.values[f"{net.at}/{name}"] if f"{net.at}/{name}" in report.values else report.values[name]
        )
        exactly = kwargs["method"] == "exact" or report.rows[str(net.at)].standard_errors[name] is None
        assert not exactly or math.isclose(got, expected, rel_tol=1e-8, abs_tol=1e-11), (name, got, expected)
    return None


def _counts(loss: Any, x: Tensor, y: Tensor) -> float:
    """What a batch's mean is divided by."""
    if getattr(loss, "reduction", "mean") == "sum":
        return 1.0
    if isinstance(loss, nn.CrossEntropyLoss) and not y.is_floating_point():
        valid = y[y != -100]
        return float(len(valid) if loss.weight is None else loss.weight[valid].sum())
    if isinstance(loss, nn.CrossEntropyLoss):
        return float(y.numel() // y.shape[1])
    return float(y.numel())


def _bad_measure(d: Draws, kwargs: Kwargs) -> None:
    number = (not_integer, lambda d, v: d.one_of(0, -1))
    bad, name = corrupted(
        d,
        kwargs,
        {
            "model": (lambda d, v: d.one_of(None, "model", 3),),
            "batches": (lambda d, v: d.one_of([], None, 3, [1], [(1, 2, 3)], torch.ones(2, 2), "xy"),),
            "layer": (lambda d, v: d.one_of("no such layer", 3, [], nn.Linear(2, 2), torch.ones(2)),),
            "criterion": (lambda d, v: d.one_of(None, "ce", 3, nn.CrossEntropyLoss(reduction="none")),),
            "measures": (lambda d, v: d.one_of((), "trace", ("sharpness",), 3, None, [3], ("trace", None)),),
            "method": (not_choice,),
            "curvature": (not_choice,),
            "probes": number,
            "max_probes": number,
            "rtol": (lambda d, v: d.one_of("0.1", -0.1, 0.0, float("nan"), [0.1], True),),
            "norm_power": (lambda d, v: d.one_of(0, 3, "2", True, None),),
            "normalize": (lambda d, v: d.one_of("fan_out", 1, True),),
            "radius": (not_number, lambda d, v: d.one_of(0.0, -1.0)),
            "adaptive_radius": (not_number, lambda d, v: d.one_of(0.0, -1.0)),
            "max_bytes": (lambda d, v: d.one_of(0, -1, 1.5, "1", True, None),),
            "generator": (lambda d, v: d.one_of(0, "cpu"),),
            "backend": (lambda d, v: d.one_of("cuda", "", None, 3),),
            "training": (lambda d, v: d.one_of("yes", None, 2),),
            "progress": (lambda d, v: d.one_of("yes", None, 2),),
            "normalize_features": (lambda d, v: d.one_of("yes", None, 2),),
        },
    )
    names = ("measures", "norm_power") if name == "norm_power" else name
    refuses("measure", names, lambda: fam_ext.measure(**bad), described(bad))


def correlation(d: Draws) -> None:
    n = d.between(3, 12)

    def pick() -> list[float]:
        far = (0.0, 1.0, 2.0, 3.5, -7.0, 1e9)
        return [d.one_of(*far) if d.chance(0.3) else d.random.gauss(0, 1) for _ in range(n)]

    measures, gaps = {"a": pick(), "b": pick()}, pick()
    groups = [d.one_of("x", "y", 3) for _ in range(n)] if d.chance(0.4) else None
    kwargs: Kwargs = {
        "measures": d.one_of(measures, measures["a"], torch.tensor(measures["a"], dtype=D)),
        "gaps": gaps,
        "groups": groups,
        "resamples": d.one_of(1, 20, 50),
        "confidence": d.one_of(0.5, 0.95),
        "seed": d.between(0, 99),
    }
    if d.chance(0.35):
        numbers = (
            lambda d, v: d.one_of(
                None, 3, "abc", [1.0, 2.0], [1.0] * (n + 1), [[1.0] * n], [float("nan")] * n, ["a"] * n, {}
            ),
        )
        bad, name = corrupted(
            d,
            kwargs,
            {
                "measures": (*numbers, lambda d, v: {"a": [1.0] * (n + 1)}, lambda d, v: {"a": None}),
                "gaps": numbers,
                "groups": (lambda d, v: d.one_of([1], 3, ["x"] * (n + 1), [[1]] * n, "abc" * n),),
                "confidence": (
                    lambda d, v: d.one_of(0, 1, 0.0, 1.0, -1, "0.5", None, float("nan"), [0.5], 1j),
                ),
                "resamples": (not_integer, lambda d, v: d.one_of(0, -1)),
                "seed": (lambda d, v: d.one_of("0", None, 1.5, [0]),),
            },
        )
        # numbers of another length are told of either side
        names = ("measures", "gaps") if name in ("measures", "gaps") else name
        return refuses("correlation", names, lambda: fam_ext.correlation(**bad), described(bad))
    result = fam_ext.correlation(**kwargs)
    again = fam_ext.correlation(**kwargs)
    assert repr(result) == repr(again)
    for name, row in result.rows.items():
        x = measures["a" if name == "measure" else name]
        assert row.networks == n
        _close(row.kendall.value, _tau(x, gaps, [0] * n))
        _close(row.pearson.value, _pearson(x, gaps))
        for one in (row.kendall, row.pearson):
            assert math.isnan(one.value) or not one.low > one.high
        if groups is None:
            assert row.kendall_within is None and row.pearson_within is None
            continue
        _close(row.kendall_within.value, _tau(x, gaps, groups))
        assert set(row.by_group) == set(groups)
        for label, (tau, r, count) in row.by_group.items():
            own = [i for i in range(n) if groups[i] == label]
            assert count == len(own)
            _close(tau, _tau([x[i] for i in own], [gaps[i] for i in own], [0] * count))
            _close(r, _pearson([x[i] for i in own], [gaps[i] for i in own]))
    return None


def _close(got: float, expected: float) -> None:
    assert (math.isnan(got) and math.isnan(expected)) or math.isclose(
        got, expected, rel_tol=1e-9, abs_tol=1e-9
    ), (got, expected)


def _tau(x: list[float], y: list[float], groups: list[Any]) -> float:
    sign = lambda a, b: (a > b) - (a < b)  # noqa: E731
    pairs = [(i, j) for i in range(len(x)) for j in range(i) if groups[i] == groups[j]]
    both = sum(sign(x[i], x[j]) * sign(y[i], y[j]) for i, j in pairs)
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    return both / math.sqrt(untied[0] * untied[1]) if all(untied) else math.nan


def _pearson(x: list[float], y: list[float]) -> float:
    a, b = (torch.tensor(v, dtype=D) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    if not (a.norm() > 1e-9 * max(map(abs, x)) and b.norm() > 1e-9 * max(map(abs, y))):
        return math.nan
    return float(a @ b / (a.norm() * b.norm()))


def rescale(d: Draws) -> None:
    width, inputs = d.between(1, 5), d.between(1, 4)
    convolution = d.chance(0.4)
    make = (lambda a, b: nn.Conv1d(a, b, 1)) if convolution else nn.Linear
    model = nn.Sequential(make(inputs, width), nn.ReLU(), make(width, 3), nn.LeakyReLU(), make(3, 2)).to(
        d.one_of(D, torch.float32)
    )
    x = torch.randn(4, inputs, *([3] if convolution else []), dtype=model[0].weight.dtype)
    pairs = d.one_of([("0", "2")], [("2", "4")], [("0", "2"), ("2", "4")], [["0", "2"]], ())
    factor = d.one_of(0.5, 3, 1e3, 1)
    kwargs: Kwargs = {
        "model": model,
        "layer_pairs": pairs,
        "factor": factor,
        "inputs": d.one_of(None, x, (x,)),
    }
    if d.chance(0.35):
        bad, name = corrupted(
            d,
            kwargs,
            {
                "model": (lambda d, v: d.one_of(None, 3, "model"),),
                "layer_pairs": (
                    lambda d, v: d.one_of(
                        "02",
                        3,
                        None,
                        [("0",)],
                        [("0", "1")],
                        [("9", "2")],
                        [(0, 2)],
                        ["0", "2"],
                        [(["0"], "2")],
                    ),
                ),
                "factor": (lambda d, v: d.one_of(0, -1.0, "2", None, True, math.inf, math.nan, [1.0], 1j),),
            },
        )
        return refuses("rescale", name, lambda: fam_ext.rescale(**bad), described(bad))
    before = [p.detach().clone() for p in model.parameters()]
    other = fam_ext.rescale(**kwargs)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(
        other(x), model(x), rtol=1e3 * eps, atol=100 * eps * float(model(x).detach().abs().max())
    )
    y = torch.randint(0, 2, (4, 3) if convolution else (4,))
    values = [fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), m[4])(m(x), y).detach() for m in (model, other)]
    torch.testing.assert_close(values[1], values[0], rtol=1e4 * eps, atol=1e-30)
    return None
