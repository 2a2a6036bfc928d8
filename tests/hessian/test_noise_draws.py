"""Draws of a layer's noise: shapes, who shares one, and the effect of one draw written out with its dense eps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fam_ext.hessian import noise, noise_draws
from fam_ext.layers.linear_map import LinearMap


def conv() -> nn.Module:
    return nn.Conv1d(4, 6, 2, groups=2, padding=1, bias=False).double()


def tokens() -> nn.Module:
    return nn.Linear(4, 3, bias=False).double()


def point() -> nn.Module:
    return nn.Conv1d(4, 6, 1, groups=2, bias=False).double()


def features(layer: nn.Module) -> Tensor:
    shape = (3, 2, 4) if isinstance(layer, nn.Linear) else (3, 4, 5)
    return torch.randn(shape, dtype=torch.float64)


def test_which_side_of_the_layer_is_perturbed() -> None:
    for layer, side in ((tokens(), True), (point(), True), (conv(), False)):
        assert noise_draws.on_input(LinearMap("test", layer)) is side
    one = LinearMap("test", tokens())
    assert noise_draws.one_row(one, torch.ones(3, 4)) and noise_draws.one_row(one, torch.ones(4))
    assert not noise_draws.one_row(one, torch.ones(3, 2, 4)) and not noise_draws.one_row(
        LinearMap("test", point()), torch.ones(4, 5)
    )


@pytest.mark.parametrize("make", [conv, tokens, point])
def test_samples_share_a_draw_or_not(make: Any) -> None:
    layer = LinearMap("test", make())
    x = features(layer.module)
    shared, own = noise_draws.draw(layer, x, None, True), noise_draws.draw(layer, x, None, False)
    assert shared.samples == 1 and own.samples == 3
    assert own.left.dtype == x.dtype and (own.left.abs() == 1).all() and not own.left.requires_grad
    again = [noise_draws.draw(layer, x, torch.Generator().manual_seed(s)).left for s in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def perturbed(layer: LinearMap, drawn: noise_draws.Draw, x: Tensor, strength: float) -> Tensor:
    weight = layer.module.weight
    if noise_draws.on_input(layer):
        return layer.apply(noise.perturb_input(layer, drawn, x, strength), weight)
    return noise.perturb_output(layer, drawn, x, weight, layer.apply(x, weight), strength)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("make", [conv, tokens, point])
def test_the_output_under_the_dense_weight_noise(make: Any, shared: bool) -> None:
    """z_i with weight W (1 + sqrt(2 strength) a_i b_i^T), b_i laid out over channels and the kernel's places."""
    layer = LinearMap("test", make())
    x, strength = features(layer.module), 0.3
    drawn = noise_draws.draw(layer, x, torch.Generator().manual_seed(2), shared)
    weight = layer.canonical(layer.module.weight)  # (groups, n, I)
    expected = []
    for i in range(len(x)):
        k = 0 if shared else i
        b = drawn.channels[k].unsqueeze(-1)  # (groups, C, 1)
        if drawn.place is not None:
            b = b * drawn.place[k].flatten(1).unsqueeze(1)  # (groups, C, kernel)
        epsilon = drawn.left[k % len(drawn.left)].unsqueeze(2) * b.flatten(1).unsqueeze(
            1
        )  # a b^T, (groups, I, I)
        moved = weight + (2 * strength) ** 0.5 * weight @ epsilon
        expected.append(layer.apply(x[i : i + 1], layer.to_module(moved, layer.module.weight.shape)))
    torch.testing.assert_close(perturbed(layer, drawn, x, strength), torch.cat(expected))


@pytest.mark.parametrize("make", [conv, tokens, point])
def test_strength_as_a_number_and_as_a_tensor(make: Any) -> None:
    layer = LinearMap("test", make())
    x = features(layer.module)
    drawn = noise_draws.draw(layer, x)
    number, tensor = (perturbed(layer, drawn, x, s) for s in (0.3, torch.tensor(0.3, dtype=torch.float64)))
    torch.testing.assert_close(number, tensor)
    torch.testing.assert_close(perturbed(layer, drawn, x, 0.0), layer.apply(x, layer.module.weight))
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="method='noise': strength must be finite and at least 0"):
            perturbed(layer, drawn, x, wrong)
