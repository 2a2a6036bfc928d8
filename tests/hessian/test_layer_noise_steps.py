"""The noise of a layer over the calls of a step: one draw for all, a new one after the loss, other samples refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fam_ext import UnsupportedError
from fam_ext.hessian.layer_noise import LayerNoise
from fam_ext.layers.linear_map import LinearMap


def tokens(shared: bool = False) -> LayerNoise:
    return LayerNoise("test", LinearMap("test", nn.Linear(4, 3)), shared)


def test_the_calls_of_a_step_share_a_draw() -> None:
    noise, x = tokens(), torch.randn(2, 5, 4, requires_grad=True)
    first, second = noise.perturb_input(x, 0.3), noise.perturb_input(x, 0.3)
    assert torch.equal(first, second) and not torch.equal(first, x)
    noise.end_step()
    assert not torch.equal(noise.perturb_input(x, 0.3), first)


def test_a_convolution_s_output() -> None:
    layer = nn.Conv1d(4, 3, 2)
    noise, x = LayerNoise("test", LinearMap("test", layer)), torch.randn(2, 4, 5, requires_grad=True)
    z = layer(x)

    def perturbed() -> Tensor:
        return noise.perturb_output(x, layer.weight, z, 0.3)

    first = perturbed()
    assert not noise.on_input and torch.equal(first, perturbed()) and not torch.equal(first, z)
    noise.end_step()
    assert not torch.equal(first, perturbed())
    with pytest.raises(UnsupportedError, match="test: the weight of layer has shape"):
        noise.perturb_output(x, layer.weight[:2], z, 0.3)


def test_other_samples_before_the_loss() -> None:
    noise = tokens()
    noise.perturb_input(torch.randn(2, 5, 4, requires_grad=True), 0.3)
    with pytest.raises(UnsupportedError, match="called with 2 samples and then with 3 before the loss"):
        noise.perturb_input(torch.randn(3, 5, 4, requires_grad=True), 0.3)
    noise.end_step()
    noise.perturb_input(torch.randn(3, 5, 4, requires_grad=True), 0.3)
    shared = tokens(shared=True)
    for samples in (2, 3):
        assert shared.perturb_input(torch.randn(samples, 5, 4), 0.3).shape == (samples, 5, 4)
