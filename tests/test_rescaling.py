"""fam_ext.rescale: the same function, the same relative flatness, another trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fam_ext

pytestmark = pytest.mark.on_devices


def networks() -> dict[str, tuple[nn.Sequential, Tensor, list[tuple[str, str]]]]:
    mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3))
    cnn = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    return {
        "mlp": (mlp.double(), torch.randn(7, 4, dtype=torch.float64), [("0", "2"), ("2", "4")]),
        "cnn": (cnn.double(), torch.randn(7, 1, 8, 8, dtype=torch.float64), [("1", "4"), ("4", "6")]),
    }


@pytest.mark.parametrize("factor", [0.1, 20.0])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_kappa_does_not_change_and_the_trace_does(name: str, factor: float) -> None:
    net, x, pairs = networks()[name]
    before = copy.deepcopy(net.state_dict())
    other = fam_ext.rescale(net, pairs, factor, inputs=x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.testing.assert_close(other.eval()(x), net.eval()(x), rtol=1e-10, atol=1e-12)
    names = ["neuronwise", "layerwise", "layerwise_eigenvalue", "neuronwise_eigenvalue", "trace"]
    batches, layers = [(x, torch.arange(7) % 3)], sorted({n for pair in pairs for n in pair} - {"1"})
    arguments: Any = (layers, nn.CrossEntropyLoss(), names)
    values = [
        fam_ext.measure(model, batches, *arguments, method="exact", progress=False).values
        for model in (net, other)
    ]
    for key, value in values[0].items():
        if key.endswith("trace"):
            continue
        assert values[1][key] == pytest.approx(value, rel=1e-6), key
    last = layers[-1]
    assert values[1][f"{last}/trace"] == pytest.approx(values[0][f"{last}/trace"] * factor**2, rel=1e-6)


def test_what_is_not_homogeneous_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    fam_ext.rescale(net, [("0", "2")], 2.0)
    with pytest.raises(ValueError, match="only positively homogeneous operations between them"):
        fam_ext.rescale(net, [("0", "2")], 2.0, inputs=torch.randn(5, 4))


def test_bad_arguments() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for factor in (0.0, -1.0, float("inf"), True, "2"):
        with pytest.raises(ValueError, match="factor must be a positive number"):
            fam_ext.rescale(net, [("0", "2")], factor)  # type: ignore[arg-type]
    for pairs in ([("0", "1")], [("0", "9")], [("1", "2")]):
        with pytest.raises(ValueError, match="layer_pairs must be names of layers"):
            fam_ext.rescale(net, pairs, 2.0)
    for wrong in ("02", ["0"], 3, None, [(0, 2)], [(["0"], "2")]):
        with pytest.raises(TypeError, match="layer_pairs must be a sequence of pairs"):
            fam_ext.rescale(net, wrong, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a module"):
        fam_ext.rescale(None, [], 2.0)  # type: ignore[type-var]
