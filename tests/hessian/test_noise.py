"""The noise's mean over designs of draws against kappa and its gradients from second derivatives, in float64; and the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import noise_designs
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext.hessian import noise, noise_draws
from fam_ext.layers.linear_map import LinearMap

pytestmark = pytest.mark.on_devices

Loss = Callable[[Tensor], Tensor]
# layer, shape of its input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rows": (lambda: nn.Linear(3, 4), (3, 3)),
    "one row": (lambda: nn.Linear(3, 4), (3,)),
    "tokens": (lambda: nn.Linear(3, 4), (2, 4, 3)),
    "grid": (lambda: nn.Linear(3, 2, bias=False), (2, 2, 3, 3)),
    "1d": (lambda: nn.Conv1d(2, 3, 2), (2, 2, 5)),
    "1d unbatched": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 4)),
    "1d circular": (lambda: nn.Conv1d(2, 2, 3, padding=2, dilation=2, padding_mode="circular"), (2, 2, 6)),
    "1d same": (lambda: nn.Conv1d(2, 3, 2, padding="same"), (2, 2, 4)),
    "1d pointwise": (lambda: nn.Conv1d(4, 2, 1, groups=2), (2, 4, 3)),
    "1d transposed": (lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1), (2, 2, 3)),
    "2d": (lambda: nn.Conv2d(1, 3, 2), (3, 1, 3, 4)),
    "2d groups": (lambda: nn.Conv2d(4, 4, (1, 2), stride=2, padding=(0, 1), groups=2), (2, 4, 3, 4)),
    "2d depthwise": (lambda: nn.Conv2d(3, 6, (1, 2), groups=3), (2, 3, 2, 3)),
    "2d reflect": (lambda: nn.Conv2d(1, 2, (3, 1), padding=(2, 0), padding_mode="reflect"), (2, 1, 4, 2)),
    "2d replicate": (
        lambda: nn.Conv2d(1, 2, 2, padding=1, padding_mode="replicate", bias=False),
        (2, 1, 2, 3),
    ),
    "2d pointwise": (lambda: nn.Conv2d(3, 4, 1, stride=2, padding=1), (2, 3, 3, 4)),
    "2d transposed": (
        lambda: nn.ConvTranspose2d(4, 4, (2, 1), stride=(1, 2), padding=(1, 0), groups=2),
        (2, 4, 3, 2),
    ),
    "2d transposed pointwise": (lambda: nn.ConvTranspose2d(2, 4, 1, stride=2, groups=2), (2, 2, 2, 2)),
    "3d": (lambda: nn.Conv3d(2, 2, (1, 2, 2), groups=2, padding=(1, 0, 0)), (2, 2, 2, 3, 2)),
    "3d transposed": (lambda: nn.ConvTranspose3d(1, 2, (2, 1, 2), dilation=(1, 1, 2)), (2, 1, 2, 2, 2)),
}
both = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


class Problem:
    """A layer, its input, and a loss of its output."""

    def __init__(self, name: str) -> None:
        make, shape = LAYERS[name]
        self.module: Any = make().double()
        self.layer = LinearMap("test", self.module)
        self.x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        self.z = self.module(self.x).detach()

    def quadratic(self) -> Loss:
        """A quadratic form in which all entries of z interact: the expected loss is loss + strength * kappa, exactly."""
        size = self.z.numel()
        matrix, line = torch.randn(size, size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
        return lambda z: z.flatten() @ matrix @ z.flatten() / size + line @ z.flatten()

    def perturbed(self, drawn: noise_draws.Draw, strength: float | Tensor) -> Tensor:
        """z with noise."""
        if noise_draws.on_input(self.layer):
            result: Tensor = self.module(noise.perturb_input(self.layer, drawn, self.x, strength))
            return result
        z = self.module(self.x)
        return noise.perturb_output(self.layer, drawn, self.x, self.module.weight, z, strength)

    def mean(self, loss: Loss, strength: float, shared: bool) -> Tensor:
        """Mean of the perturbed loss over a design."""
        losses = [loss(self.perturbed(d, strength)) for d in noise_designs.draws(self.layer, self.x, shared)]
        return torch.stack(losses).mean()

    def kappa(self, loss: Loss, shared: bool) -> Tensor:
        """Of the loss's full Hessian; for draws of each sample's own, without terms between samples."""
        if shared:
            return self._kappa(loss, torch.ones_like(self.z[:1], dtype=torch.bool))
        samples = self.layer.samples(self.z.shape)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(samples):
            own = torch.arange(samples) == i
            total = total + self._kappa(loss, own.reshape(-1, *(1,) * (self.z.dim() - 1)))
        return total

    def _kappa(self, loss: Loss, moved: Tensor) -> Tensor:
        layer, weight = self.layer, self.module.weight
        canonical = layer.canonical(weight)
        z = self.module(self.x)
        bias = z - layer.apply(self.x, weight)

        def of_rows(rows: Tensor) -> Tensor:
            other = layer.apply(self.x, layer.to_module(rows.reshape(canonical.shape), weight.shape))
            return loss(torch.where(moved, other + bias.detach(), z))

        return oracle.kappa(of_rows, canonical.flatten(0, 1), groups=layer.groups)

    def gradients(self, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, [self.x, self.module.weight]))


@both
@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_of_a_quadratic_loss_is_exact(name: str, shared: bool) -> None:
    problem = Problem(name)
    loss = problem.quadratic()
    value = problem.mean(loss, 0.3, shared)
    expected = loss(problem.module(problem.x)) + 0.3 * problem.kappa(loss, shared)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for g, e in zip(problem.gradients(value), problem.gradients(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)


@both
def test_more_samples_than_different_left_factors(shared: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(noise_draws, "DIFFERENT", 2)
    LAYERS["five"] = (lambda: nn.Conv1d(1, 2, 2), (5, 1, 3))
    try:
        test_the_mean_of_a_quadratic_loss_is_exact("five", shared)
    finally:
        del LAYERS["five"]


def norm(z: Tensor) -> Tensor:
    """batch_norm in training mode, with right third derivatives."""
    axes = [0, *range(2, z.dim())]
    centred = z - z.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + 1e-5).rsqrt()


@both
@pytest.mark.parametrize("name", ["rows", "1d", "2d groups", "2d pointwise", "1d transposed"])
def test_behind_batch_norm_as_the_strength_goes_to_zero(name: str, shared: bool) -> None:
    problem = Problem(name)
    mixing = torch.randn(problem.z[0].numel(), 3, dtype=torch.float64)
    target = torch.tanh(norm(problem.z)).flatten(1) @ mixing

    def loss_with(normalize: Callable[[Tensor], Tensor]) -> Loss:
        return lambda z: (torch.tanh(normalize(z)).flatten(1) @ mixing - target).square().mean()

    strength = 1e-10
    value = problem.mean(loss_with(lambda z: F.batch_norm(z, None, None, training=True)), strength, shared)
    expected = strength * problem.kappa(loss_with(norm), shared)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for g, e in zip(problem.gradients(value), problem.gradients(expected), strict=True):
        assert (g - e).norm() < 1e-4 * e.norm()  # a cosine above 1 - 1e-8


@both
@pytest.mark.parametrize("name", ["rows", "tokens", "2d", "2d groups", "2d pointwise", "1d transposed"])
def test_the_mean_over_random_draws(name: str, shared: bool) -> None:
    problem = Problem(name)
    root = torch.randn(problem.z.numel(), 4, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return ((z - problem.z).flatten() @ root).square().sum()

    with torch.no_grad():
        values = torch.stack(
            [
                loss(problem.perturbed(noise_draws.draw(problem.layer, problem.x, None, shared), 0.1))
                for _ in range(1000)
            ]
        )
    expected = 0.1 * problem.kappa(loss, shared)
    error = values.std() / math.sqrt(len(values))
    assert error < 0.1 * expected
    assert (values.mean() - expected).abs() < 4 * error


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_gradients(name: str) -> None:
    problem = Problem(name)
    drawn = next(noise_designs.draws(problem.layer, problem.x))

    def of(x: Tensor, weight: Tensor) -> Tensor:
        if noise_draws.on_input(problem.layer):
            return problem.layer.apply(noise.perturb_input(problem.layer, drawn, x, 0.1), weight)
        return noise.perturb_output(
            problem.layer, drawn, x, weight, problem.layer.apply(x, weight), torch.tensor(0.1)
        )

    inputs = (problem.x, problem.module.weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(of, inputs)
    assert torch.autograd.gradgradcheck(of, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rows", "tokens", "2d groups", "2d pointwise", "2d transposed"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    problem = Problem(name)
    drawn = next(noise_designs.draws(problem.layer, problem.x))
    expected = problem.perturbed(drawn, 0.01).detach()
    problem.x = problem.x.detach().to(dtype).requires_grad_()
    problem.module.to(dtype)
    got = problem.perturbed(
        noise_draws.Draw(*(None if t is None else t.to(dtype) for t in drawn)),
        torch.tensor(0.01, dtype=torch.float64),
    )
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=8 * eps * float(expected.abs().max()))


def test_the_norm_of_half_precision_rows_does_not_overflow() -> None:
    layer = LinearMap("test", nn.Linear(4096, 1))
    x = torch.full((1, 4096), 2e3, dtype=torch.float16)  # |x| = 128000, above the largest float16
    out = noise.perturb_input(layer, noise_draws.draw(layer, x), x, 1e-6)
    assert bool(out.isfinite().all())
    assert bool((out != x).any())


def test_channels_last_stays() -> None:
    for name in ("2d", "2d groups", "2d pointwise", "2d transposed"):
        problem = Problem(name)
        drawn = noise_draws.draw(problem.layer, problem.x)
        expected = problem.perturbed(drawn, 0.1)
        problem.x = problem.x.detach().to(memory_format=torch.channels_last)
        z = problem.module(problem.x).contiguous(memory_format=torch.channels_last)
        if noise_draws.on_input(problem.layer):
            got = noise.perturb_input(problem.layer, drawn, problem.x, 0.1)
            torch.testing.assert_close(problem.module(got), expected)
        else:
            got = noise.perturb_output(problem.layer, drawn, problem.x, problem.module.weight, z, 0.1)
            torch.testing.assert_close(got, expected)
        assert got.is_contiguous(memory_format=torch.channels_last)


@both
@pytest.mark.parametrize("name", ["rows", "tokens", "2d groups", "2d pointwise"])
def test_no_samples_and_zero_rows(name: str, shared: bool) -> None:
    problem = Problem(name)
    problem.x = problem.x[:0].detach()
    assert problem.perturbed(noise_draws.draw(problem.layer, problem.x, None, shared), 0.1).shape[0] == 0
    problem = Problem(name)
    problem.x = torch.zeros_like(problem.x, requires_grad=True)
    z = problem.perturbed(noise_draws.draw(problem.layer, problem.x, None, shared), 0.1)
    torch.testing.assert_close(z, problem.module(problem.x))
    assert all(bool(g.isfinite().all()) for g in problem.gradients(z.square().sum()))


def test_the_strength() -> None:
    problem = Problem("2d groups")
    drawn = noise_draws.draw(problem.layer, problem.x)
    clean = problem.module(problem.x)
    small, large = (problem.perturbed(drawn, s) - clean for s in (0.1, torch.tensor(0.4)))
    torch.testing.assert_close(2 * small, large)
    torch.testing.assert_close(problem.perturbed(drawn, 0.0), clean)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength must be finite and at least 0"):
            problem.perturbed(drawn, bad)


# The draws


def test_signs() -> None:
    for shape in ((), (1,), (7,), (3, 5), (2, 0), (300, 300)):
        like = torch.zeros(1, dtype=torch.float64)
        values = noise_draws.signs(shape, like, None)
        assert values.shape == shape
        assert values.dtype == torch.float64
        assert values.device == like.device
        assert bool((values.abs() == 1).all())
    every = noise_draws.signs((64, 4096), torch.zeros(1), None)
    gram = every @ every.T / 4096
    assert (gram - torch.eye(64)).abs().max() < 6 / 64  # rows, and so bits of a byte, are independent
    gram = every.T[:256] @ every[:, :256] / 64
    assert gram.fill_diagonal_(0).abs().max() < 6 / 8
    assert every.mean().abs() < 6 / 512


def test_compiled_signs_are_drawn_alike() -> None:
    compiled = torch.compile(noise_draws.signs, backend="eager", fullgraph=True)
    values = compiled((64, 4096), torch.zeros(1), None)
    assert bool((values.abs() == 1).all())
    assert values.mean().abs() < 6 / 512


@both
@pytest.mark.parametrize("name", LAYERS)
def test_shapes_of_a_draw(name: str, shared: bool) -> None:
    problem = Problem(name)
    like = next(noise_designs.draws(problem.layer, problem.x, shared))
    drawn = noise_draws.draw(problem.layer, problem.x, None, shared)
    for t, e in zip(drawn, like, strict=True):
        assert (t is None) == (e is None)
        assert t is None or (t.shape == e.shape and t.dtype == problem.x.dtype and not t.requires_grad)
    assert drawn.samples == (1 if shared else problem.layer.samples(problem.x.shape))


def test_places_of_a_kernel_are_drawn_alike() -> None:
    layer, x = LinearMap("test", nn.Conv2d(2, 2, (2, 3), groups=2)), torch.zeros(3000, 2, 4, 4)
    place = noise_draws.draw(layer, x).place
    assert place is not None
    assert bool(((place == 0) | (place == 6**0.5)).all())
    assert bool((place.flatten(2).count_nonzero(2) == 1).all())
    counts = place.flatten(2).count_nonzero(0).double()  # of 3000 draws, one in 6
    assert (counts - 500).abs().max() < 5 * (3000 * 5 / 36) ** 0.5


@pytest.mark.parametrize("name", ["rows", "tokens", "2d groups", "2d pointwise"])
def test_generators(name: str) -> None:
    problem = Problem(name)

    def mixed(seed: int, own: bool) -> Tensor:
        generator = torch.Generator(problem.x.device).manual_seed(seed) if own else None
        if not own:
            torch.manual_seed(seed)
        return problem.perturbed(noise_draws.draw(problem.layer, problem.x, generator), 0.1).detach()

    for own in (False, True):
        assert torch.equal(mixed(1, own), mixed(1, own))
        assert not torch.equal(mixed(1, own), mixed(2, own))
    state = torch.get_rng_state()
    mixed(3, own=True)
    assert torch.equal(torch.get_rng_state(), state)
