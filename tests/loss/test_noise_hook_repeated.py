"""Calls that share a draw, repeated by checkpointing or not: gradients, and which call a backward pass repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from noise_hooks import CONV, hooked, x
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fam_ext import UnsupportedError
from fam_ext.loss.noise_hook import Gate

KINDS = pytest.mark.parametrize("kind", ["linear", CONV])


@KINDS
def test_the_noise_is_linear_in_the_weight(kind: str) -> None:
    """z - bias = W (1 + eps) phi: its derivative along W is itself."""
    layer, _ = hooked(kind)
    z = layer(x(kind))
    bias: Any = layer.bias
    moved = z - (bias[:, None] if kind == CONV else bias)
    upstream = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((z * upstream).sum(), layer.weight)
    torch.testing.assert_close((gradient * layer.weight).sum(), (moved * upstream).sum())


def test_a_later_call_s_draw_depends_on_the_first_one_s_features() -> None:
    """One row per sample: b = phi / |phi| of the first call, plus signs. The gradient is that of all it depends on."""
    layer, hook = hooked()
    layer.double()

    def later(first: Tensor, second: Tensor) -> Tensor:
        torch.manual_seed(7)
        alive = layer(first)
        z: Tensor = layer(second)
        hook.finish()
        return z + 0 * alive

    features = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(later, features)
    (by_first,) = torch.autograd.grad(later(*features).square().sum(), features[:1])
    assert by_first.abs().min() > 1e-3


def test_a_look_at_an_output_in_between() -> None:
    """It leaves the step's draw alone, which goes with the first call."""
    layer, _ = hooked()
    features = x()
    first = layer(features)
    layer(features)  # no more than a look
    torch.testing.assert_close(layer(features), first)


def test_passes_of_any_size_after_reentrant_checkpointing() -> None:
    """Calls without grad may be a checkpoint's once there was one; of other samples they are not."""
    layer, hook = hooked()
    features = x().requires_grad_()
    z = checkpoint(layer, features, use_reentrant=True)
    hook.finish()
    z.sum().backward()
    with torch.no_grad():
        layer(torch.randn(7, 3))
    kept = layer(features)
    assert hook.drawn is not None and hook.drawn.samples == 4 and kept.requires_grad


def test_the_latest_call_that_drew_the_same_is_the_one_that_is_repeated() -> None:
    """Two steps with the same random numbers and padding elsewhere."""
    layer, hook = hooked()
    hook.gate = gate = Gate()
    gradients = []
    for checkpointed in (False, True):
        for padding in (0, 1):
            gate.positions = torch.ones(4, 2)
            gate.positions[:, padding] = 0
            torch.manual_seed(7)
            features = torch.randn(4, 2, 3, requires_grad=True)
            z = checkpoint(layer, features, use_reentrant=False) if checkpointed else layer(features)
            loss = z.square().sum()
            hook.finish()
            gate.positions = None
            gradients.append(torch.autograd.grad(loss, [features, layer.weight]))
    assert not torch.allclose(gradients[0][1], gradients[1][1])
    torch.testing.assert_close(gradients[2:], gradients[:2])


@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_generator_that_checkpointing_does_not_replay(kind: str, use_reentrant: bool) -> None:
    """A repeated call draws other numbers from it, and takes those of the step."""
    layer, hook = hooked(kind, generator=torch.Generator())
    features = x(kind).requires_grad_()
    gradients = []
    for checkpointed in (False, True):
        hook.generator.manual_seed(7)
        z = checkpoint(layer, features, use_reentrant=use_reentrant) if checkpointed else layer(features)
        loss = z.tanh().square().sum()
        hook.finish()
        features.grad = layer.weight.grad = None
        loss.backward()
        gradients.append((features.grad, layer.weight.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("generator", [None, torch.Generator()])
@pytest.mark.parametrize("inside", [(1,), (0, 1)])
def test_a_reentrant_checkpoint_of_calls_that_share_a_draw_of_one_row(
    generator: torch.Generator | None, inside: tuple[int, ...]
) -> None:
    """The later call's draw depends on the first one's features, whose gradient the repeated call could not give."""
    layer, hook = hooked(generator=generator)
    features = x().requires_grad_()
    first, second = (
        checkpoint(layer, t, use_reentrant=True) if k in inside else layer(t)
        for k, t in enumerate((features.tanh(), features))
    )
    hook.finish()
    with pytest.raises(
        UnsupportedError, match=r"reentrant checkpoint.*use_reentrant=False.*per_sample_probes=False"
    ):
        (first + second).sum().backward()
    shared, hook = hooked(generator=generator, shared=True)
    calls = [checkpoint(shared, t, use_reentrant=True) for t in (features.tanh(), features)]
    hook.finish()
    sum(calls, torch.zeros(())).sum().backward()
    assert isinstance(shared.weight, nn.Parameter) and shared.weight.grad is not None
