"""LoRA: kappa of the effective weight, differentiable in the low-rank matrices; the wrapper has PEFT's attribute names."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError, measure


class LoraLinear(nn.Module):
    """What peft.tuners.lora.Linear is to a caller."""

    def __init__(self, base: nn.Linear, rank: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = {"default": 0.5}
        self.active_adapters = ["default"]
        self.merged = self.disable_adapters = self.fan_in_fan_out = False
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_B["default"](self.lora_A["default"](self.dropout(x)))
        result: Tensor = self.base_layer(x) + self.scaling["default"] * low
        return result


def network(dropout: float = 0.0) -> nn.Sequential:
    parts = [nn.Linear(5, 6), nn.Tanh(), LoraLinear(nn.Linear(6, 4), dropout=dropout), nn.Tanh()]
    return nn.Sequential(*parts, LoraLinear(nn.Linear(4, 3))).double()


@pytest.mark.parametrize("index", [2, 4])
def test_the_effective_weight_counts(index: int) -> None:
    net, x, y = network(), torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 3, (7,))
    lora = net[index]
    for p in (net[0].weight, lora.base_layer.weight, lora.base_layer.bias):
        p.requires_grad_(False)
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), lora)
    value = criterion(net(x), y)
    assert criterion.plan.method == ("exact" if index == 2 else "closed_form")
    weight = lora.base_layer.weight + 0.5 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight

    def loss(w: Tensor) -> Tensor:
        z = F.linear(net[:index](x), w, lora.base_layer.bias)
        return F.cross_entropy(net[index + 1 :](z), y)

    expected = oracle.kappa(loss, weight)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    inputs = [lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    for g, e in zip(*(torch.autograd.grad(v, inputs) for v in (value, expected)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_measured_over_a_data_set_with_normalized_features() -> None:
    net, x, y = network(), torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 3, (7,))
    report = measure(
        net, [(x, y)], net[2], nn.CrossEntropyLoss(), ["neuronwise"], progress=False, normalize_features=True
    )
    features = net[:2](x)
    scale = features.std(0, correction=0).detach()
    lora = net[2]
    plain = nn.Linear(6, 4).double()
    low = 0.5 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    with torch.no_grad():
        plain.weight.copy_((lora.base_layer.weight + low) * scale)
        plain.bias.copy_(lora.base_layer.bias)
    value = RelativeFlatness(nn.CrossEntropyLoss(), plain)(net[3:](plain(features / scale)), y)
    assert report.values["neuronwise"] == pytest.approx(float(value.detach()), rel=1e-9)


def test_what_is_not_its_weight_is_refused() -> None:
    net, x, y = network(dropout=0.5), torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 3, (7,))
    with pytest.raises(UnsupportedError, match="adapter's dropout"):
        FAMLoss(nn.CrossEntropyLoss(), net[2], 0.1)(net(x), y)
    with pytest.raises(UnsupportedError, match="merge"):
        finite = FAMLoss(nn.CrossEntropyLoss(), net[4], 0.1, method="finite_difference")
        finite(net(x), y, closure=lambda: F.cross_entropy(net(x), y))


def test_the_model_finds_the_wrapper() -> None:
    net = network()
    assert FAMLoss.for_model(nn.CrossEntropyLoss(), net, strength=0.1).layer is net[4]
    several = FAMLoss.for_model(nn.CrossEntropyLoss(), net, "*", strength=0.1)
    assert [p.module for p in several.terms] == [net[0], net[2], net[4]]
