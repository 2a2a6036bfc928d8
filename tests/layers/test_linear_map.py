"""Layers as linear maps of their weight, against the layers themselves; Conv1D of transformers against nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import expect, make_input
from tolerance import relative_error
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, measure
from fam_ext.layers.linear_map import LinearMap, is_layer, squared_norms

D = torch.float64


def conv1d(inputs: int, outputs: int) -> Any:
    """transformers' Conv1D: its weight is (I, O)."""
    pytest.importorskip("transformers", reason="Conv1D is transformers'")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.weight, std=0.5)
    return layer.double()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (3, 5, 4)),
    "Conv1D": (lambda: conv1d(4, 6), (3, 5, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, dilation=(1, 2)), (3, 4, 6, 7)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (3, 4, 5)),
    "unbatched": (lambda: nn.Conv1d(4, 6, 3), (4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, output_padding=1), (3, 4, 2, 3)),
}


def make(name: str) -> tuple[Any, LinearMap, Tensor]:
    build, shape = LAYERS[name]
    module = build().double()
    return module, LinearMap("test", module), torch.randn(shape, dtype=D)


@pytest.mark.parametrize("name", LAYERS)
def test_the_map_is_the_layer_without_bias(name: str) -> None:
    module, layer, x = make(name)
    z = module(x)
    bias = module.bias.reshape(-1, *(1,) * layer.spatial)
    torch.testing.assert_close(layer.apply(x, module.weight) + (bias if layer.spatial else module.bias), z)
    assert z.shape[layer.class_dim] == layer.outputs and tuple(module.weight.shape) == layer.shape
    layer.check_call("test", x, module.weight, tuple(z.shape))
    samples = layer.samples(tuple(z.shape))
    assert samples * layer.positions(tuple(z.shape)) * layer.outputs == z.numel()
    each = torch.randn(samples, *layer.shape, dtype=D)
    if samples > 1:
        parts = [layer.apply(x[i : i + 1], each[i]) for i in range(samples)]
        torch.testing.assert_close(layer.apply_each(x, each), torch.cat(parts))


@pytest.mark.parametrize("name", LAYERS)
def test_canonical_layout(name: str) -> None:
    """Row s of group g holds what z's neuron (g, s) multiplies its patch with; norms are the patches' squared norms."""
    module, layer, x = make(name)
    canonical = layer.canonical(module.weight)
    assert canonical.shape == (layer.groups, layer.outputs // layer.groups, layer.fan_in)
    torch.testing.assert_close(layer.to_module(canonical, module.weight.shape), module.weight)
    neuron = torch.zeros_like(canonical)
    neuron[-1, 0] = canonical[-1, 0]
    s = layer.outputs - canonical.shape[1]
    z = layer.apply(x, layer.to_module(neuron, module.weight.shape))
    whole = layer.apply(x, module.weight).select(layer.class_dim, s)
    torch.testing.assert_close(z.select(layer.class_dim, s), whole)
    others = [k for k in range(layer.outputs) if k != s]
    assert not z.movedim(layer.class_dim, 0)[others].any()
    squares = torch.zeros_like(layer.apply(x, module.weight))
    for t in range(layer.fan_in):
        ones = torch.zeros_like(canonical)
        ones[:, :, t] = 1
        squares += layer.apply(x, layer.to_module(ones, module.weight.shape)).square()
    norms = layer.norms(x, "auto")
    torch.testing.assert_close(layer.spread(norms, layer.outputs), squares)
    torch.testing.assert_close(
        layer.row_norms(x, "auto"), norms.movedim(layer.class_dim, -1).reshape(-1, layer.groups)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_rescaled_features(name: str) -> None:
    module, layer, x = make(name)
    scale = torch.rand(layer.inputs, dtype=D) + 0.5
    z = layer.apply(layer.divide_features(x, scale), layer.multiply_weight(module.weight, scale))
    torch.testing.assert_close(z, layer.apply(x, module.weight))


def test_squared_norms() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.bfloat16)
    torch.testing.assert_close(squared_norms(x), x.float().square().sum(-1, keepdim=True), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backend 'triton' is not available"):
        squared_norms(x, "triton")


def test_what_is_no_layer_is_refused() -> None:
    expect("must be nn.Linear.*got torch.nn.modules.activation.Tanh", lambda: LinearMap("test", nn.Tanh()))
    expect(
        "nn.MultiheadAttention.*without calling it",
        lambda: LinearMap("test", nn.MultiheadAttention(4, 2).out_proj),
    )
    expect("no shape yet", lambda: LinearMap("test", nn.LazyLinear(2)))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    expect("packed or quantized .torch.uint8.", lambda: LinearMap("test", packed))
    with pytest.raises(TypeError, match="for its name use for_model"):
        LinearMap("test", "fc")
    assert is_layer(nn.Linear(2, 2)) and is_layer(conv1d(2, 2)) and not is_layer(nn.Bilinear(1, 1, 1))


# of RelativeFlatness, on a layer inside of a network and on its head
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exact": {"method": "exact"},
    "hutchinson": {"method": "hutchinson", "probes": 3},
    "shared draws": {"method": "hutchinson", "per_sample_probes": False},
    "layerwise": {"measure": "layerwise", "norm_power": 1},
    "trace": {"measure": "trace"},
    "layerwise_eigenvalue": {"measure": "layerwise_eigenvalue"},
    "neuronwise_eigenvalue": {"measure": "neuronwise_eigenvalue"},
    "ggn": {"curvature": "ggn"},
    "fisher": {"curvature": "fisher", "probes": 2},
    "held": {"curvature_grad": False},
}


class Twins:
    """The same network with Conv1D and with nn.Linear."""

    def __init__(self, index: int, calls: int = 1) -> None:
        self.index, self.calls = index, calls
        self.first: Any = nn.Sequential(conv1d(5, 4), nn.Tanh(), conv1d(4, 4), nn.Tanh(), conv1d(4, 3))
        self.second: Any = nn.Sequential(
            nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
        ).double()
        for k in (0, 2, 4):
            with torch.no_grad():
                self.second[k].weight.copy_(self.first[k].weight.t())
                self.second[k].bias.copy_(self.first[k].bias)
        self.x, self.y = torch.randn(6, 2, 5, dtype=D), torch.randint(0, 3, (12,))

    def outputs(self, net: Any) -> Tensor:
        z = net[0](self.x)
        for _ in range(self.calls):
            z = net[2](net[1](z))
        result: Tensor = net[4](net[3](z)).flatten(0, 1)
        return result

    def compare(self, run: Callable[[Any, Any], Tensor], atol: float = 1e-12) -> None:
        """`run` gives a number of a network and its layer; so do both networks, and gradients."""
        results = []
        for net in (self.first, self.second):
            value = run(net, net[self.index])
            grads = torch.autograd.grad(
                value, list(net.parameters()), allow_unused=True, materialize_grads=True
            )
            results.append((value, [g.t() if net is self.first and g.dim() == 2 else g for g in grads]))
        torch.testing.assert_close(*results, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("index", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_conv1d_is_a_linear_layer(way: str, index: int) -> None:
    twins = Twins(index)

    def run(net: Any, layer: Any) -> Tensor:
        criterion = RelativeFlatness(
            nn.CrossEntropyLoss(), layer, generator=torch.Generator().manual_seed(1), **WAYS[way]
        )
        return criterion(twins.outputs(net), twins.y)

    twins.compare(run)


@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_conv1d_called_twice(method: str) -> None:
    twins = Twins(2, calls=2)

    def run(net: Any, layer: Any) -> Tensor:
        criterion = RelativeFlatness(
            nn.CrossEntropyLoss(), layer, method=method, generator=torch.Generator().manual_seed(1)
        )
        return criterion(twins.outputs(net), twins.y)

    twins.compare(run)


@pytest.mark.parametrize("index", [2, 4])
def test_conv1d_in_famloss(index: int) -> None:
    twins = Twins(index)
    twins.compare(lambda net, layer: FAMLoss(nn.CrossEntropyLoss(), layer, 0.3)(twins.outputs(net), twins.y))
    if index == 2:  # rounding of a loss of order 1 over h^2 = eps^(1/2): 1e-8
        twins.compare(
            lambda net, layer: FAMLoss(nn.CrossEntropyLoss(), layer, 0.3, method="finite_difference")(
                twins.outputs(net), twins.y, closure=lambda: F.cross_entropy(twins.outputs(net), twins.y)
            ),
            atol=1e-7,
        )
    reports = [
        measure(
            net, [(twins.x[:, 0], twins.y[:6]), (twins.x[:3, 1], twins.y[6:9])], net[index], nn.CrossEntropyLoss(),
            ["neuronwise", "layerwise_eigenvalue"], progress=False, normalize_features=True,
        ).values
        for net in (twins.first, twins.second)
    ]  # fmt: skip
    assert reports[0] == pytest.approx(reports[1], rel=1e-8)


@pytest.mark.parametrize("index", [2, 4])
def test_conv1d_against_the_full_hessian(index: int) -> None:
    twins = Twins(index)
    layer = twins.first[index]
    value = RelativeFlatness(nn.CrossEntropyLoss(), layer, method="auto")(twins.outputs(twins.first), twins.y)

    def loss(weight: Tensor) -> Tensor:
        z = twins.first[:index](twins.x) @ weight.t() + layer.bias
        return F.cross_entropy(twins.first[index + 1 :](z).flatten(0, 1), twins.y)

    expected = oracle.kappa(loss, layer.weight.t())
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(value, layer.weight),
        torch.autograd.grad(expected, layer.weight),
        rtol=1e-8,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_gradients_of_padded_inputs_are_summed_in_float32(mode: str, dtype: torch.dtype) -> None:
    """With replicate a corner stands in 81 places of the padded input. A kernel of one position: no other sum is rounded."""
    layer = LinearMap("test", nn.Conv2d(1, 1, 1, padding=8, padding_mode=mode))
    x, weight = make_input((2, 1, 9, 9), dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    upstream = torch.rand(2, 1, 25, 25).to(dtype)
    grads = []
    for point, w, g in ((x, weight, upstream), (x.double(), weight.double(), upstream.double())):
        point.requires_grad_()
        grads += torch.autograd.grad(layer.apply(point, w), point, g)
    assert grads[0].dtype == dtype
    assert relative_error(*grads, elementwise=True) <= torch.finfo(dtype).eps
