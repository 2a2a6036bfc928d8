"""FAMLoss's arguments: layers by name, what is refused, and what it says."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from inputs import batch, expect
from torch import nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError


def test_for_model() -> None:
    net = nn.ModuleDict({"body": nn.Linear(2, 3), "fc": nn.Linear(3, 4), "act": nn.ReLU()})
    ce = nn.CrossEntropyLoss()
    assert FAMLoss.for_model(ce, net, strength=0.1).layer is net["fc"]
    assert FAMLoss.for_model(ce, net, "body", strength=0.1).layer is net["body"]
    assert FAMLoss.for_model(ce, net, "f*", strength=0.1).layer is net["fc"]
    assert [p.module for p in FAMLoss.for_model(ce, net, "*", strength=0.1).terms] == [net["body"], net["fc"]]
    expect(r"got torch\.nn\..*ReLU", lambda: FAMLoss.for_model(ce, net, "act", strength=0.1))
    with pytest.raises(ValueError, match=r"near: .*fc"):
        FAMLoss.for_model(ce, net, "fcc", strength=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "fc"}, TypeError, "layer must be a module"),
        ({"layer": nn.LazyLinear(3)}, UnsupportedError, "no shape yet"),
        ({"layer": nn.Bilinear(2, 3, 1)}, UnsupportedError, r"got torch\.nn\..*Bilinear"),
        ({"layer": []}, ValueError, "sequence of different modules"),
        ({"criterion": nn.NLLLoss(), "method": "closed_form"}, UnsupportedError, "NLLLoss"),
        ({"criterion": lambda z, t: z.sum(), "curvature": "ggn"}, UnsupportedError, "no closed form"),
        (
            {"criterion": nn.PoissonNLLLoss(log_input=False), "method": "closed_form"},
            UnsupportedError,
            "log_input",
        ),
        ({"criterion": 3}, TypeError, "criterion"),
        ({"strength": float("nan")}, ValueError, "finite"),
        ({"strength": "1"}, TypeError, "strength"),
        ({"measure": "sharpness"}, ValueError, "measure"),
        ({"measure": "layerwise_eigenvalue", "method": "hutchinson"}, ValueError, "method"),
        ({"curvature": "fisher", "method": "hutchinson"}, ValueError, "curvature"),
        ({"curvature": "ggn", "method": "exact"}, ValueError, "curvature"),
        ({"method": "finite_difference", "curvature_grad": False}, ValueError, "curvature_grad"),
        ({"max_bytes": 0}, ValueError, "max_bytes"),
        ({"norm_power": 1}, ValueError, "norm_power"),
        ({"norm_power": torch.ones(2)}, ValueError, "norm_power must be 1 or 2"),
        ({"normalize": numpy.ones(2)}, ValueError, "normalize must be None or 'fan_in'"),
        ({"measure": numpy.ones(2)}, ValueError, "measure must be one of"),
        ({"hold_statistics": torch.ones(2)}, TypeError, "hold_statistics must be None, True or False"),
        ({"per_sample_probes": 0}, TypeError, "per_sample_probes must be None, True or False"),
        ({"measure": "trace", "curvature_grad": False}, ValueError, "curvature_grad"),
        ({"every": 0}, ValueError, "every"),
        ({"probes": 0}, ValueError, "probes"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an integer"),
        ({"normalize": "fan_out"}, ValueError, "normalize"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss(),
        "layer": nn.Linear(3, 4),
        "strength": 0.1,
    }
    with pytest.raises(error, match=message):
        FAMLoss(**{**arguments, **options})


EIGENVALUE = {"measure": "layerwise_eigenvalue"}
DIFFERENCES = {"method": "finite_difference"}


@pytest.mark.parametrize("cls", [FAMLoss, RelativeFlatness])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact", "probes": 8}, r"probes must be left out .*method='hutchinson' does\), got 8"),
        ({"method": "exact", **EIGENVALUE, "probes": 8}, "probes must be left out with method='exact'"),
        ({"method": "closed_form", "probes": 8}, "probes must be left out with method='closed_form'"),
        ({"curvature": "fisher", "method": "closed_form", "probes": 8}, "probes must be left out"),
        ({"method": "closed_form", "per_sample_probes": True}, "per_sample_probes must be None"),
        (
            {"curvature": "ggn", "per_sample_probes": False},
            "per_sample_probes must be None or True with curv",
        ),
        (
            {"curvature": "fisher", "per_sample_probes": False},
            "per_sample_probes must be None or True with curv",
        ),
        ({**DIFFERENCES, "per_sample_probes": True}, "per_sample_probes must be None or False"),
        ({**DIFFERENCES, "backend": "reference"}, "backend must be 'auto' with method='finite_difference'"),
    ],
    ids=str,
)
def test_what_would_have_no_effect(cls: Any, options: dict[str, Any], message: str) -> None:
    strength = {"strength": 0.1} if cls is FAMLoss else {}
    with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
        cls(nn.CrossEntropyLoss(), nn.Linear(3, 4), **strength, **options)


def test_noise_has_no_backend() -> None:
    with pytest.raises(ValueError, match="FAMLoss: backend must be 'auto' with method='noise'"):
        FAMLoss(nn.CrossEntropyLoss(), nn.Linear(3, 4), 0.1, method="noise", backend="native")


@pytest.mark.parametrize(
    "options",
    [
        {"probes": 8, "per_sample_probes": False, "backend": "reference"},  # "auto" may not need them
        {**EIGENVALUE, "probes": 8, "per_sample_probes": False},
        {"curvature": "ggn", "probes": 8},
        {"curvature": "fisher", "probes": 8, "per_sample_probes": True},
        {"curvature": "empirical_fisher", "probes": 8},
        {"curvature": "ggn", "method": "hutchinson", "probes": 8},
        {"method": "hutchinson", "probes": 8, "per_sample_probes": True},
        {**DIFFERENCES, "probes": 8, "per_sample_probes": False},
        {"method": "exact", "per_sample_probes": False},
    ],
    ids=str,
)
def test_what_may_have_an_effect(options: dict[str, Any]) -> None:
    RelativeFlatness(nn.CrossEntropyLoss(), nn.Linear(3, 4), generator=torch.Generator(), **options)


def test_fisher_is_accepted_where_it_is_the_hessian() -> None:
    layer, x, y = nn.Linear(5, 4), *batch()
    FAMLoss(nn.CrossEntropyLoss(), layer, 0.1, curvature="fisher")(layer(x), y)
    smoothed = FAMLoss(nn.CrossEntropyLoss(label_smoothing=0.1), layer, 0.1, curvature="fisher")
    expect("fisher", lambda: smoothed(layer(x), y))
