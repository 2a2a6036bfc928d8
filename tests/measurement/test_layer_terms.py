"""fam_ext.measure on several layers, estimates that stop at a tolerance, and data that counts nothing or holds NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fam_ext

pytestmark = pytest.mark.on_devices

ALL = (
    "neuronwise", "layerwise", "trace", "layerwise_eigenvalue", "neuronwise_eigenvalue", "largest_eigenvalue",
)  # fmt: skip
NETWORK = ("fisher_rao", "pac_bayes_sharpness", "sam_sharpness", "adaptive_sam_sharpness", "weight_norm")


def problem() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    return net, list(zip(x.split(6), y.split(6), strict=True))


@pytest.mark.parametrize("layer", ["*", ["0", "2", "4"], "modules"])
def test_a_row_for_each_layer(layer: Any) -> None:
    net, batches = problem()
    modules = [net[0], net[2], net[4]]
    report = fam_ext.measure(
        net, batches, modules if layer == "modules" else layer, nn.CrossEntropyLoss(), ALL, progress=False
    )
    assert list(report.rows) == ["0", "2", "4"]
    for name in ("0", "2", "4"):
        alone = fam_ext.measure(net, batches, name, nn.CrossEntropyLoss(), ALL, progress=False)
        assert report[name].values == alone.values == alone[name].values
        assert report.values[f"{name}/trace"] == alone.values["trace"]
    assert set(report.as_dict()) == {"loss", "samples", *(f"{n}/{m}" for n in "024" for m in ALL)}
    assert "3 layers" in repr(report) and "largest_eigenvalue" in report.table()
    assert not any(module._forward_hooks for module in net)


def test_largest_eigenvalue_is_that_of_the_layers_hessian() -> None:
    net, batches = problem()
    report = fam_ext.measure(
        net, batches, "2", nn.CrossEntropyLoss(), ["largest_eigenvalue"], progress=False, normalize="fan_in"
    )
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    h = net[:2](x).detach()

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net[3:](h @ weight.T + net[2].bias), y)

    hessian = torch.autograd.functional.hessian(loss, net[2].weight.detach()).reshape(42, 42)
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert report.values["largest_eigenvalue"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_target_counts(reduction: str) -> None:
    net, batches = problem()
    batches = [(x, torch.full_like(y, -100)) for x, y in batches]
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    report = fam_ext.measure(net, batches, ["2", "4"], criterion, [*ALL, *NETWORK], progress=False)
    assert len(report.values) == 2 * len(ALL) + len(NETWORK)
    for name, value in report.as_dict().items():
        if name in ("samples", "weight_norm"):
            assert value > 0
        elif reduction == "sum" and name != "fisher_rao":  # a mean over samples
            assert value == 0, name
        else:
            assert math.isnan(value), name


def test_nan_comes_out() -> None:
    net, batches = problem()
    batches[1][0][0, 0] = torch.nan
    report = fam_ext.measure(net, batches, "*", nn.CrossEntropyLoss(), [*ALL, *NETWORK], progress=False)
    wrong = [name for name, value in report.values.items() if not math.isnan(value)]
    assert wrong == ["weight_norm"]


@pytest.mark.parametrize("size", [3, 40])
def test_an_eigenvalue_of_nan_in_training_is_nan(size: int) -> None:
    """Small Hessians are formed, large ones go to Lanczos."""
    net = nn.Sequential(nn.Linear(size, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(4, size, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    x[0, 0] = torch.nan
    for measure in ("layerwise_eigenvalue", "neuronwise_eigenvalue"):
        loss = fam_ext.FAMLoss(nn.CrossEntropyLoss(), net[0], 0.1, measure=measure)(net(x), y)
        loss.backward()
        assert loss.isnan()


@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
def test_more_probes_until_the_tolerance(curvature: str) -> None:
    net, batches = problem()
    arguments: Any = (net, batches, ["0", "2"], nn.CrossEntropyLoss(), ["neuronwise"])
    method = {"method": "hutchinson"} if curvature == "hessian" else {}
    options: Any = {"progress": False, "curvature": curvature, **method}
    first = fam_ext.measure(*arguments, probes=4, **options)
    good = fam_ext.measure(*arguments, probes=4, rtol=0.03, max_probes=20000, **options)
    for name in ("0", "2"):
        row = good[name]
        error = row.standard_errors["neuronwise"]
        assert error is not None and error <= 0.03 * abs(row.values["neuronwise"])
        assert error < (first[name].standard_errors["neuronwise"] or 0)
        assert "rounds" in row.plans["neuronwise"]
    exact_method: Any = {"method": "exact"} if curvature == "hessian" else {"curvature": "ggn"}
    exact = fam_ext.measure(*arguments, progress=False, **exact_method)
    for name in ("0", "2"):
        difference = good[name].values["neuronwise"] - exact[name].values["neuronwise"]
        assert abs(difference) < 4 * (good[name].standard_errors["neuronwise"] or 0)


def test_probes_are_bounded_and_one_has_no_standard_error() -> None:
    net, batches = problem()
    arguments: Any = (net, batches, "0", nn.CrossEntropyLoss(), ["neuronwise", "trace"])
    report = fam_ext.measure(
        *arguments, progress=False, method="hutchinson", probes=4, rtol=1e-9, max_probes=12
    )
    assert report.plans["trace"].endswith("(3 rounds)")
    alone = fam_ext.measure(*arguments, progress=False, method="hutchinson", probes=1)
    assert math.isnan(alone.standard_errors["trace"] or 0)
    assert "exact" not in alone.table()


def test_finite_differences_need_no_closure() -> None:
    net, batches = problem()
    arguments: Any = (net, batches, "2", nn.CrossEntropyLoss(), ["trace"])
    exact = fam_ext.measure(*arguments, progress=False, method="exact").values["trace"]
    report = fam_ext.measure(*arguments, progress=False, method="finite_difference", probes=400)
    error = report.standard_errors["trace"]
    assert error is not None and abs(report.values["trace"] - exact) < 4 * error


def test_an_estimate_in_one_batch_is_no_exact_value() -> None:
    """A batch of one sample needs few products, a larger one whose samples interact is estimated."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y) + z.mean(0).square().sum()

    x, y = torch.randn(9, 6).double(), torch.randint(0, 3, (9,))
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    report = fam_ext.measure(net, batches, "0", loss, progress=False, probes=2)
    error = report.standard_errors["neuronwise"]
    assert error is not None and error > 0
    assert "hutchinson" in report.plans["neuronwise"] and "exact" in report.plans["neuronwise"]
