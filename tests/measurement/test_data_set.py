"""fam_ext.measure: a data set in unequal batches against one batch of everything, and against eigenvalues of the full Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fam_ext
from fam_ext import RelativeFlatness

pytestmark = pytest.mark.on_devices

ALL = ("neuronwise", "layerwise", "trace", "layerwise_eigenvalue", "neuronwise_eigenvalue")
WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
    ).double()


def data() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(11, 4, dtype=torch.float64), torch.randint(0, 3, (11,))
    y[[2, 3, 4, 5]] = -100  # the second batch below counts nothing
    return x, y


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split([2, 4, 5]), y.split([2, 4, 5]), strict=True))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"model": None}, TypeError),
        ({"batches": None}, TypeError),
        ({"batches": 3}, TypeError),
        ({"criterion": "ce"}, TypeError),
        ({"measures": None}, TypeError),
        ({"measures": 3}, TypeError),
        ({"measures": ["weight_norm"], "backend": "cuda"}, ValueError),
        ({"method": "noise"}, fam_ext.UnsupportedError),
        ({"curvature": "sharp"}, ValueError),
        ({"probes": "8"}, TypeError),
        ({"normalize": True}, ValueError),
        ({"norm_power": 3}, ValueError),
        ({"max_bytes": 0}, ValueError),
        ({"generator": 0}, TypeError),
        ({"progress": None}, TypeError),
        ({"training": "yes"}, TypeError),
        ({"normalize_features": 2}, TypeError),
    ],
    ids=str,
)
def test_refusals_name_measure_and_the_argument(wrong: dict[str, Any], error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "model": network(), "batches": batches(*data()), "layer": "4", "criterion": nn.CrossEntropyLoss(), "progress": False,
    }  # fmt: skip
    with pytest.raises(error, match=f"measure: .*{list(wrong)[-1]}"):
        fam_ext.measure(**{**arguments, **wrong})


@pytest.mark.parametrize("layer", ["0", "4"])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
)
def test_unequal_batches_are_one_data_set(criterion: nn.Module, layer: str) -> None:
    net, (x, y) = network(), data()
    for module in net.modules():
        module.training = len(module._modules) == 0  # a mixture of modes, to be restored
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    report = fam_ext.measure(net, batches(x, y), layer, criterion, ALL, progress=False)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net.eval()
    for name in ALL:
        whole = RelativeFlatness(criterion, net[int(layer)], measure=name, method="auto")(net(x), y)
        assert report.values[name] == pytest.approx(float(whole.detach()), rel=1e-6)
        assert report.standard_errors[name] is None
    assert report.loss == pytest.approx(float(criterion(net(x), y)), rel=1e-12)
    assert (report.samples, report.batches) == (11, 3)
    assert set(report.as_dict()) == {"loss", "samples", *ALL}
    assert "neuronwise" in repr(report) and "exact" in report.table()
    assert not net[0]._forward_hooks and not net[4]._forward_hooks


@pytest.mark.parametrize("layer", ["0", "4"])
def test_feature_normalization_is_a_reparametrization(layer: str) -> None:
    """The same numbers as for the network whose layer's input is divided by its standard deviation."""
    net, (x, y) = network().eval(), data()
    report = fam_ext.measure(
        net, batches(x, y), layer, nn.CrossEntropyLoss(), ALL, progress=False, normalize_features=True
    )
    index = int(layer)
    features = net[:index](x)
    scale = features.std(0, correction=0).detach()
    rescaled = nn.Linear(len(scale), net[index].out_features).double()
    with torch.no_grad():
        rescaled.weight.copy_(net[index].weight * scale)
        rescaled.bias.copy_(net[index].bias)
    for name in ALL:
        whole = RelativeFlatness(nn.CrossEntropyLoss(), rescaled, measure=name)
        value = whole(net[index + 1 :](rescaled(features / scale)), y)
        assert report.values[name] == pytest.approx(float(value.detach()), rel=1e-6)


def test_convolution_with_feature_normalization_and_estimates() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    x, y = torch.rand(6, 2, 4, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    pairs = [((part,), target) for part, target in zip(x.split(4), y.split(4), strict=True)]
    arguments: dict[str, Any] = {"progress": False, "normalize_features": True}
    exact = fam_ext.measure(net, pairs, "2", F.cross_entropy, ["neuronwise"], method="exact", **arguments)
    estimate = fam_ext.measure(
        net, pairs, "2", F.cross_entropy, ["neuronwise"], method="hutchinson", probes=200, **arguments
    )
    error = estimate.standard_errors["neuronwise"]
    assert error is not None and abs(estimate.values["neuronwise"] - exact.values["neuronwise"]) < 4 * error
    assert estimate.as_dict()["neuronwise_standard_error"] == error
    features = net[:2](x)
    scale = features.std((0, 2, 3), correction=0).detach()
    with torch.no_grad():
        net[2].weight.mul_(scale.reshape(2, 1, 2, 1, 1).expand(2, 2, 2, 1, 1).reshape(4, 2, 1, 1))
    term = RelativeFlatness(nn.CrossEntropyLoss(), net[2], method="exact")
    value = term(net[2:](features / scale.reshape(-1, 1, 1)), y)
    assert exact.values["neuronwise"] == pytest.approx(float(value.detach()), rel=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_normalized_by_the_fan_in(name: str) -> None:
    net, (x, y) = network().eval(), data()
    report = fam_ext.measure(
        net, batches(x, y), "0", nn.CrossEntropyLoss(), [name], progress=False, normalize="fan_in"
    )
    whole = RelativeFlatness(nn.CrossEntropyLoss(), net[0], measure=name, normalize="fan_in")(net(x), y)
    assert report.values[name] == pytest.approx(float(whole.detach()), rel=1e-6)


def test_inference_mode_around_it_changes_nothing() -> None:
    net, (x, y) = network(), data()
    arguments: Any = (net, batches(x, y), "0", nn.CrossEntropyLoss(), ["neuronwise"])
    with torch.inference_mode():
        got = fam_ext.measure(*arguments, progress=False)
    assert got.values == fam_ext.measure(*arguments, progress=False).values


def test_bad_arguments() -> None:
    net, (x, y) = network(), data()
    ce = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="batches must be at least one"):
        fam_ext.measure(net, [], None, ce, progress=False)
    with pytest.raises(ValueError, match="measures must be one of"):
        fam_ext.measure(net, [(x, y)], None, ce, ["sharpness"])
    for batch in ({"inputs": x, "labels": y}, x, (x, y, y)):
        with pytest.raises(TypeError, match=r"batches must be an iterable of pairs \(inputs, targets\), got"):
            fam_ext.measure(net, [batch], None, ce, progress=False)
    with pytest.raises(TypeError, match="measures"):
        fam_ext.measure(net, [(x, y)], None, ce, "trace")
    for wrong in ({"rtol": 0.0}, {"rtol": 1}, {"max_probes": 0}, {"radius": -1.0}, {"adaptive_radius": None}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fam_ext.measure(net, [(x, y)], None, ce, progress=False, **wrong)
    with pytest.raises(ValueError, match="probes must be 2 or more with rtol"):
        fam_ext.measure(net, [(x, y)], None, ce, progress=False, rtol=0.1, probes=1)
    for exactly in ({"method": "exact"}, {"curvature": "ggn"}, {"measures": ["layerwise_eigenvalue"]}):
        with pytest.raises(ValueError, match=r"measure: probes must be at least 1"):
            fam_ext.measure(net, [(x, y)], None, ce, progress=False, probes=0, **exactly)
        report = fam_ext.measure(net, [(x, y)], "0", ce, progress=False, probes=3, **exactly)
        assert all(error is None for error in report.standard_errors.values())
    for options in ({"measures": ["layerwise_eigenvalue"]}, {"normalize_features": True}):
        with pytest.raises(ValueError, match="batches must be a collection"):
            fam_ext.measure(net, iter([(x, y)]), None, ce, progress=False, **options)
    with pytest.raises(ValueError, match="reduction"):
        fam_ext.measure(net, [(x, y)], None, nn.CrossEntropyLoss(reduction="none"), progress=False)
    assert not net[4]._forward_hooks
