"""FlatnessNoise: the noise's covariance, when there is none, and its arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fam_ext.flatness_noise import FlatnessNoise

pytestmark = pytest.mark.on_devices


def test_the_noise_of_given_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """x + sqrt(2 strength) |x| r, row by row."""
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    r = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda *args, **options: r)
    expected = x + (2 * 0.3) ** 0.5 * x.norm(dim=1, keepdim=True) * r
    torch.testing.assert_close(FlatnessNoise(0.3)(x), expected)


def test_a_quadratic_loss_holds_kappa_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """E over r with E[r r^T] = 1, here the sum over orthogonal vectors: loss + strength kappa, exactly, and its gradient."""
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    layer, y = nn.Linear(2, 3).double(), torch.randn(5, 3, dtype=torch.float64)
    noise, losses = FlatnessNoise(0.2), []
    for r in ([2.0**0.5, 0.0], [-(2.0**0.5), 0.0], [0.0, 2.0**0.5], [0.0, -(2.0**0.5)]):
        given = torch.tensor(r, dtype=torch.float64).expand(5, 2)
        monkeypatch.setattr(torch, "randn_like", lambda *args, given=given, **options: given)
        losses.append((layer(noise(x)) - y).square().sum())
    got = torch.stack(losses).mean()
    kappa = 2 * layer.weight.square().sum() * x.square().sum()  # H = 2 phi phi^T kron 1
    want = (layer(x) - y).square().sum() + 0.2 * kappa
    torch.testing.assert_close(got, want)
    tensors = (x, layer.weight)
    for g, e in zip(*(torch.autograd.grad(v, tensors) for v in (got, want)), strict=True):
        torch.testing.assert_close(g, e)


def test_no_noise() -> None:
    x, state = torch.randn(4, 3), torch.get_rng_state()
    noise = FlatnessNoise(0.0)
    assert noise(x) is x
    noise.strength = 0.5
    assert noise.eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    noise.train()
    perturbed = noise(x)
    assert perturbed is not x and not torch.equal(perturbed, x) and not torch.equal(noise(x), perturbed)


def test_a_strength_set_before_the_backward_pass_is_the_next_one_s() -> None:
    noise = FlatnessNoise(0.1)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    perturbed = noise(x)
    noise.strength = 0.2
    (got,) = torch.autograd.grad(perturbed.sum(), x)
    torch.manual_seed(3)
    length = x.norm(dim=-1, keepdim=True)
    by_hand = x + (2 * 0.1) ** 0.5 * length * torch.randn_like(x)
    torch.testing.assert_close(perturbed, by_hand)
    torch.testing.assert_close(got, torch.autograd.grad(by_hand.sum(), x)[0])


def test_dtypes() -> None:
    noise = FlatnessNoise(0.1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert noise(torch.ones(2, 3, dtype=dtype)).dtype == dtype
    long = torch.full((1, 100_000), 10.0, dtype=torch.float16)  # |x|^2 is above float16's range
    assert noise(long).isfinite().all()
    with pytest.raises(TypeError, match="FlatnessNoise: input must be a floating-point tensor"):
        noise(torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"FlatnessNoise: input must be a floating-point tensor, got \[1.0\]"):
        noise([1.0])
    for value in (
        torch.ones(2, 3, device="cpu").to_sparse(),
        torch.nested.nested_tensor([torch.ones(2, 3, device="cpu")], layout=torch.jagged),
        torch.ones(2, 3).to(torch.float8_e4m3fn),
    ):
        with pytest.raises(TypeError, match=r"FlatnessNoise: input must be a (dense|floating-point) tensor"):
            noise(value)
    with pytest.raises(ValueError, match=r"FlatnessNoise: input must be of shape \(\*, I\)"):
        noise(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("strength", "error"),
    [
        ("1", TypeError),
        (True, TypeError),
        (None, TypeError),
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (10**400, ValueError),
    ],
)
def test_strengths_that_are_none(strength: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="FlatnessNoise: strength must be"):
        FlatnessNoise(strength)
    noise = FlatnessNoise(0.5)
    with pytest.raises(error):
        noise.strength = strength
    assert noise.strength == 0.5 and "strength=0.5" in repr(noise)


def test_copies_keep_the_strength() -> None:
    noise = FlatnessNoise(0.5)
    other = copy.deepcopy(noise)
    other.strength = 0.0
    x = torch.randn(2, 3)
    assert other(x) is x and noise(x) is not x and noise.state_dict() == {}


def test_compiled_once_for_all_strengths() -> None:
    """The compiled module has the strength of the moment, in its value and in a backward pass that comes later."""
    graphs = []

    def counter(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    noise, x = FlatnessNoise(0.1), torch.randn(4, 3, requires_grad=True)
    compiled = torch.compile(noise, backend=counter, fullgraph=True)
    for strength in (0.1, 0.2, 0.4):
        taken = []
        for module in (compiled, noise):
            noise.strength = strength
            torch.manual_seed(0)
            perturbed = module(x)
            noise.strength = 7.0
            taken.append((perturbed, torch.autograd.grad(perturbed.sum(), x)[0]))
        torch.testing.assert_close(*taken)
    assert len(graphs) == 1
