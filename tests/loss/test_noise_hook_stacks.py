"""Noise where dropout works too: data parallel, compiled, in half precision, checkpointed, in front of fused attention."""

from __future__ import annotations

import pytest
import torch
from noise_runs import STRENGTH, Network, batch, data_parallel, draw_many, gradients, noisy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes

from fam_ext import FAMLoss

DRAWS = 600


def expected(network: Network) -> tuple[Tensor, Tensor]:
    """strength * kappa of all layers, which is all of the mean loss, and its gradient."""
    x, y = batch(network)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network.zero_grad()
        criterion = FAMLoss.for_model(nn.MSELoss(), network, "*", strength=STRENGTH, method="exact")
        criterion(network(x), y).backward()
    grads = gradients(network)
    criterion.detach()
    flatness = criterion.last.flatness
    assert flatness is not None
    return STRENGTH * flatness, grads


def check_mean(losses: Tensor, grads: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    """Means of independent draws within their standard errors, which are small enough to tell."""
    value, gradient = wanted
    error = losses.std() / len(losses) ** 0.5
    assert error < 0.1 * value and abs(losses.mean() - value) < 4 * error
    of_mean = (grads.var(0).sum() / len(grads)).sqrt()  # what the mean is off by, in the mean
    assert of_mean < 0.4 * gradient.norm() and (grads.mean(0) - gradient).norm() < 2 * of_mean


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel() -> None:
    """Each process draws for its samples; the mean of the gradients is that of the whole batch."""
    (first, grads), (second, same) = in_two_processes(data_parallel, DRAWS)
    assert torch.equal(grads, same)  # after all-reduce
    check_mean((first + second) / 2, grads, expected(Network()))
    together = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(together) < 4 / DRAWS**0.5  # draws of their own


def test_in_front_of_fused_attention() -> None:
    network = Network(attention=True)
    x, y = batch(network)
    z = torch.randn(2, 1, 4, 2, requires_grad=True)
    fused = torch.nn.functional.scaled_dot_product_attention(z, z, z)
    assert "Flash" in fused.grad_fn.name()  # what the network calls as well
    wanted = expected(network)
    torch.manual_seed(2)
    check_mean(*draw_many(network, network, x, y, DRAWS), wanted)


def test_half_precision() -> None:
    """Under autocast, linear layers and convolutions: the mean of the loss, float32 gradients."""
    network = Network()
    x, _ = batch(network)
    wanted, _ = expected(network)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = network(x).float()
    criterion = noisy(network)
    torch.manual_seed(3)
    losses = []
    for _ in range(DRAWS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(network(x).float(), y)
        losses.append(loss.detach())
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in network.parameters())
    assert gradients(network).isfinite().all()
    stacked = torch.stack(losses)
    assert abs(stacked.mean() - wanted) < 4 * stacked.std() / DRAWS**0.5 + 0.05 * wanted  # bfloat16


class Checkpointed(nn.Module):
    def __init__(self, network: Network, reentrant: bool) -> None:
        super().__init__()
        self.network, self.reentrant = network, reentrant

    def forward(self, x: Tensor) -> Tensor:
        z = checkpoint(self.network.body, x, use_reentrant=self.reentrant)
        out: Tensor = self.network.head(torch.sin(z))
        return out


def step(model: nn.Module, network: Network, criterion: FAMLoss) -> tuple[Tensor, Tensor]:
    """Loss and gradients of a step, with the same random numbers every time."""
    torch.manual_seed(4)
    x, y = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    network.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    return loss.detach(), gradients(network)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    network = Network()
    criterion = noisy(network, 0.1)
    wanted = step(network, network, criterion)
    torch.testing.assert_close(step(Checkpointed(network, reentrant), network, criterion), wanted)


@pytest.mark.slow
def test_compiled_without_a_break() -> None:
    """One compilation for a strength that changes; the mean of the compiled network's loss and gradients."""
    from torch._dynamo.testing import CompileCounterWithBackend

    network = Network()
    x, y = batch(network)
    wanted = expected(network)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    torch.manual_seed(5)
    check_mean(*draw_many(network, compiled, x, y, DRAWS), wanted)
    assert counter.frame_count == 1
    changing = noisy(network, lambda step: 1e-3 * (step + 1))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    for _ in range(5):
        changing(compiled(x), y).backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_checkpointed_inside_a_compiled_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch traces a hook that remembers its draw under a checkpoint on request only; the gradients are right then."""
    network = Network()
    criterion = noisy(network, 0.1)
    wanted = step(torch.compile(network, backend="aot_eager", fullgraph=True), network, criterion)
    torch._dynamo.reset()
    compiled = torch.compile(Checkpointed(network, False), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="skip_fwd_side_effects_in_bwd_under_checkpoint"):
        step(compiled, network, criterion)
    criterion.reset()
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    compiled = torch.compile(Checkpointed(network, False), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled, network, criterion), wanted)
