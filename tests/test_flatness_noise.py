"""FlatnessNoise: the moments of what it adds, its modes, and what it regularizes."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FlatnessNoise


def test_the_added_noise_has_the_length_of_the_row() -> None:
    torch.manual_seed(0)
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]).double()
    noise = FlatnessNoise(0.02)
    added = torch.stack([noise(x) - x for _ in range(20000)])
    expected = 2 * 0.02 * x.square().sum(1, keepdim=True).expand(3, 2)
    assert (added[:, 1] == 0).all()
    torch.testing.assert_close(added.square().mean(0), expected, rtol=0.05, atol=0)
    assert (added.mean(0).abs() < 5 * expected.sqrt() / 20000**0.5 + 1e-12).all()


def test_the_mean_of_a_quadratic_loss_is_strength_times_kappa() -> None:
    """A quadratic loss about the clean output has no first-order term, and the mean is exact in the strength."""
    torch.manual_seed(0)
    layer, x, strength = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), 0.01
    clean = layer(x).detach()

    def loss(weight: Tensor) -> Tensor:
        return F.mse_loss(F.linear(x, weight, layer.bias), clean)

    kappa = oracle.kappa(loss, layer.weight.detach().requires_grad_()).detach()
    noise = FlatnessNoise(strength)
    values = torch.stack([F.mse_loss(layer(noise(x)), clean).detach() for _ in range(4000)])
    assert abs(values.mean() - strength * kappa) < 4 * values.std() / 4000**0.5


def test_modes() -> None:
    x = torch.randn(3, 5)
    noise = FlatnessNoise(0.1)
    assert not torch.equal(noise(x), x)
    assert torch.equal(noise.eval()(x), x)
    assert torch.equal(FlatnessNoise(0.0)(x), x)
    assert not noise.state_dict() and "0.1" in repr(noise)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), "a", None, True])
def test_a_strength_that_is_no_variance_is_refused(strength: object) -> None:
    with pytest.raises((TypeError, ValueError), match="FlatnessNoise: strength"):
        FlatnessNoise(strength)  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_whole_and_scripted() -> None:
    net = nn.Sequential(FlatnessNoise(0.1), nn.Linear(5, 3))
    x = torch.randn(4, 5)
    assert torch.compile(net, backend="eager", fullgraph=True)(x).shape == (4, 3)
    torch.testing.assert_close(torch.jit.script(net).eval()(x), net[1](x))
