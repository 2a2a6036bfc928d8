"""The products that an attention's noise is made of, against the perturbation written out, one sample at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fam_ext.hessian import attention_noise
from fam_ext.hessian.noise_draws import Draw
from fam_ext.layers.attention import sizes
from fam_ext.layers.linear_map import LinearMap

STRENGTH = 0.3
SCALE = math.sqrt(2 * STRENGTH)
D = torch.float64


def drawn(samples: int, width: int, positions: Tensor | None = None) -> Draw:
    left, right = (torch.randn(samples, 1, width, dtype=D) for _ in range(2))
    return Draw(left, right, None, positions)


def layers(*widths: int) -> list[LinearMap]:
    return [LinearMap("test", sizes(width, 1)) for width in widths]


@pytest.mark.parametrize("samples", [1, 3], ids=["shared", "own"])
def test_inputs(samples: int) -> None:
    """Different tensors take columns of their own, the same one the first that it had."""
    x, y = torch.randn(3, 2, 4, dtype=D), torch.randn(3, 5, 2, dtype=D)
    draw = drawn(samples, 8)
    given = attention_noise.perturb_inputs(layers(4, 2, 2), draw, [x, y, y], [STRENGTH, STRENGTH, 9.0])
    assert given[1] is given[2]
    for phi, result, own in ((x, given[0], slice(0, 4)), (y, given[1], slice(4, 6))):
        left, right = draw.left[..., own], draw.channels[..., own]  # type: ignore[index]
        torch.testing.assert_close(result, phi + SCALE * (phi * right).sum(-1, keepdim=True) * left)
    same_place = attention_noise.perturb_inputs(layers(4, 2, 2), draw, [x, y, y.detach()], [STRENGTH] * 3)
    assert same_place[1] is not same_place[2] and torch.equal(same_place[1], same_place[2])
    apart = attention_noise.perturb_inputs(layers(4, 2, 2), draw, [x, y, y.clone()], [STRENGTH] * 3)
    assert not torch.allclose(apart[1], apart[2])


@pytest.mark.parametrize("samples", [1, 2, 20], ids=["shared", "few", "more than b"])
@pytest.mark.parametrize("padded", [False, True])
def test_output(samples: int, padded: bool) -> None:
    count, length, width = 3 if samples == 1 else samples, 4, 6
    phi, weight = torch.randn(length, count, width, dtype=D), torch.randn(5, width, dtype=D)
    positions = torch.rand(count, length) < 0.5 if padded else None
    draw = drawn(samples, width, positions)
    rows = attention_noise.directions(draw)
    assert rows.shape == (min(len(draw.left), 16), width)
    leaves = [phi.requires_grad_(), weight.requires_grad_()]
    z, products = phi @ weight.T, phi @ rows.T
    given = attention_noise.perturb_product(draw, weight, z, products, STRENGTH)
    wanted = z.clone()
    for i in range(count):
        a, b = draw.left[i % len(draw.left), 0], draw.channels[i % len(rows), 0]  # type: ignore[index]
        at = torch.ones(length, dtype=D) if positions is None else positions[i].to(D)
        wanted[:, i] += SCALE * (at * (phi[:, i] @ b))[:, None] * (weight @ a)
    torch.testing.assert_close(given, wanted)
    upstream = torch.randn_like(z)
    for g, w in zip(
        *(torch.autograd.grad(t, leaves, upstream, retain_graph=True) for t in (given, wanted)), strict=True
    ):
        torch.testing.assert_close(g, w)


def test_nothing_to_perturb() -> None:
    z = torch.randn(3, 0, 4)
    assert attention_noise.perturb_product(drawn(0, 4), torch.randn(4, 4), z, torch.randn(3, 0, 0), 0.1) is z


def test_each_is_called_once_for_a_tensor() -> None:
    x, y = torch.ones(1), torch.ones(1)
    calls: list[int] = []
    results = attention_noise.each([x, y, x], lambda k: calls.append(k) or torch.tensor(k))  # type: ignore[func-returns-value]
    assert calls == [0, 1] and results[2] is results[0] and results[1] is not results[0]
