"""method="noise" in training: the mean of loss and gradient, one draw a step, modes, checkpointing, compilation, refusals."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import batch, expect, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError, schedules

CE = nn.CrossEntropyLoss()


def noisy(net: nn.Module, layer: Any = "*", strength: Any = 1e-3, **options: Any) -> FAMLoss:
    return FAMLoss.for_model(
        options.pop("criterion", CE), net, layer, strength=strength, method="noise", **options
    )


@pytest.mark.parametrize("shared", [False, True])
def test_the_mean_holds_strength_times_kappa(shared: bool) -> None:
    """Against the full Hessian, in value and gradient: MSE about the clean output has no first-order term."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, strength = torch.randn(6, 3).double(), 1e-3
    clean = net(x).detach()

    def loss(weight: Tensor) -> Tensor:
        return F.mse_loss(net[2](F.linear(x, weight, net[0].bias).tanh()), clean)

    weight = net[0].weight.detach().clone().requires_grad_()
    kappa = oracle.kappa(loss, weight)
    (gradient,) = torch.autograd.grad(kappa, weight)
    options = {"per_sample_probes": False} if shared else {}
    criterion = noisy(net, "0", strength, criterion=nn.MSELoss(), **options)
    values, gradients = [], []
    for _ in range(1500):
        value = criterion(net(x), clean)
        gradients.append(torch.autograd.grad(value, net[0].weight)[0] / strength)
        values.append(value.detach() / strength)
    stacked = torch.stack(values)
    assert abs(stacked.mean() - kappa) < 4 * stacked.std() / len(values) ** 0.5 + 0.01 * kappa
    by_draw = torch.stack(gradients)
    error = by_draw.std(0) / len(values) ** 0.5
    assert ((by_draw.mean(0) - gradient).abs() < 4.5 * error + 0.01 * gradient.norm()).all()
    assert F.cosine_similarity(by_draw.mean(0).flatten(), gradient.flatten(), dim=0) > 0.8


def test_calls_with_other_features_share_the_draw_of_the_weight() -> None:
    """E<dz1, dz2> of one Delta = W eps: 2 strength |W|^2 <phi1, phi2>, whatever the lengths of the features."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    first, second = torch.randn(1, 3).double(), torch.randn(1, 3).double()
    criterion = FAMLoss(nn.MSELoss(), layer, 0.1, method="noise")
    products, squares = [], []
    for _ in range(4000):
        a, b = layer(first) - first @ layer.weight.T, layer(second) - second @ layer.weight.T
        products.append((a * b).sum().detach())
        squares.append(b.square().sum().detach())
        criterion.reset()
    norm = 2 * 0.1 * layer.weight.detach().square().sum()
    for values, expected in (
        (products, norm * (first * second).sum()),
        (squares, norm * second.square().sum()),
    ):
        stacked = torch.stack(values)
        assert abs(stacked.mean() - expected) < 4.5 * stacked.std() / len(values) ** 0.5


def test_one_draw_for_all_calls_of_a_step() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    criterion = FAMLoss(nn.MSELoss(), layer, 0.1, method="noise")
    first, second = layer(x), layer(x)
    torch.testing.assert_close(first, second)
    criterion(first, second.detach())
    assert not torch.equal(layer(x), first)


def test_other_numbers_of_samples_in_a_step() -> None:
    layer = nn.Linear(3, 2)
    criterion = FAMLoss(nn.MSELoss(), layer, 0.1, method="noise")
    kept = layer(torch.randn(4, 3))
    expect("one draw for all calls", lambda: layer(torch.randn(5, 3)))
    criterion.reset()
    del kept
    layer(torch.randn(5, 3))  # no loss follows, and its graph is gone
    layer(torch.randn(6, 3))


def test_evaluation_and_strength_zero_leave_the_network_alone() -> None:
    net, (x, y) = network(), batch()
    clean = net(x).detach()
    criterion = noisy(net, strength=0.1)
    assert not torch.equal(net(x), clean)
    criterion.eval()
    assert torch.equal(net(x), clean)
    criterion.train()
    net.eval()
    assert torch.equal(net(x), clean)
    net.train()
    criterion.strength = 0.0
    assert torch.equal(net(x), clean)
    torch.testing.assert_close(criterion(net(x), y), CE(net(x), y))
    assert criterion.last.as_dict().keys() == {"loss", "strength"}
    criterion.detach()
    assert not net[0]._forward_pre_hooks and not net[0]._forward_hooks


def test_schedules_and_every() -> None:
    net, (x, y) = network(), batch()
    clean = net(x).detach()
    criterion = noisy(net, strength=schedules.Warmup(0.1, 2), every=2)
    perturbed = []
    for _ in range(5):
        out = net(x)
        perturbed.append(not torch.equal(out, clean))
        criterion(out, y)
    assert perturbed == [False, False, True, False, True]  # at step 0 the warm-up is 0


def test_strengths_by_pattern() -> None:
    net = network()
    criterion = noisy(net, None, {"0": 0.5, "*": 0.25})
    assert [term.hook.value for term in criterion.terms] == [0.5, 0.25]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="near"):
        noisy(net, None, {"nothing": 0.5})


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_draw(reentrant: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 5), nn.Dropout(0.5), nn.Tanh(), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 4)
    )
    net[3] = nn.Sequential(nn.Unflatten(1, (1, 5)), net[3])
    x, y = batch()
    x.requires_grad_()
    plain = copy.deepcopy(net)
    gradients = []
    for model, checkpointed in ((plain, False), (net, True)):
        criterion = noisy(model, strength=0.05)
        torch.manual_seed(1)
        body = lambda x, model=model: model[:4](x)  # noqa: E731
        hidden = checkpoint(body, x, use_reentrant=reentrant) if checkpointed else body(x)
        criterion(model[4:](hidden), y).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_a_strength_that_changes_does_not_compile_again() -> None:
    from torch._dynamo.testing import CompileCounter

    net, (x, y) = network(), batch()
    criterion = noisy(net, strength=schedules.Warmup(0.1, 50))
    criterion(net(x), y)  # the first step's strength is 0
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    outs = []
    for _ in range(6):
        out = compiled(x)
        outs.append(out.detach())
        criterion(out, y).backward()
    assert counter.frame_count == 1 and not torch.equal(outs[-1], outs[-2])


def test_autocast_and_a_layer_that_is_never_called() -> None:
    net, (x, y) = network(), batch()
    criterion = noisy(net, strength=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        criterion(net(x), y).backward()
    assert net[0].weight.grad.dtype == torch.float32 and net[0].weight.grad.isfinite().all()
    unused = FAMLoss(CE, nn.Linear(5, 4), 0.1, method="noise")
    expect("was not called", lambda: unused(net(x), y))


def test_copies_carry_an_inert_hook() -> None:
    net, (x, _) = network(), batch()
    noisy(net, strength=0.1).eval()
    clean = net(x)
    copied = copy.deepcopy(net)
    assert torch.equal(copied(x), clean)
    again = noisy(copied, strength=0.1)
    assert len(copied[0]._forward_pre_hooks) == 1 and not torch.equal(copied(x), clean)
    again.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, "at least 0"),
        ({"strength": schedules.TargetRatio(0.1)}, "no value of kappa"),
        ({"curvature": "fisher"}, "curvature"),
        ({"measure": "trace"}, "measure"),
        ({"curvature_grad": False}, "curvature_grad"),
        ({"probes": 2}, "probes"),
    ],
    ids=str,
)
def test_what_it_cannot(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        noisy(network(), **options)


def test_there_is_no_value() -> None:
    with pytest.raises(UnsupportedError, match=r"hutchinson.*fisher"):
        RelativeFlatness(CE, nn.Linear(3, 2), method="noise")


@pytest.mark.parametrize("layers", ["*", "0"])
def test_a_run_with_a_generator_of_the_user_s_resumes_bit_for_bit(layers: str) -> None:
    net, (x, y) = network(), batch()
    generator = torch.Generator().manual_seed(5)
    criterion = noisy(net, layers, 0.1, generator=generator)
    saved: Any = criterion.state_dict()  # before the first step, too
    first = [criterion(net(x), y).item() for _ in range(3)]
    later = criterion.state_dict()
    second = [criterion(net(x), y).item() for _ in range(3)]
    assert len({*first, *second}) == 6
    criterion.load_state_dict(saved)
    assert [criterion(net(x), y).item() for _ in range(3)] == first
    copied = copy.deepcopy(net)
    resumed = noisy(copied, layers, 0.1, generator=torch.Generator())
    resumed.load_state_dict(later)
    assert [resumed(copied(x), y).item() for _ in range(3)] == second


def test_the_state_goes_on() -> None:
    net = network()
    criterion = noisy(net, strength=schedules.Warmup(0.1, 10))
    criterion.step = 5
    fresh = noisy(copy.deepcopy(net), strength=schedules.Warmup(0.1, 10))
    fresh.load_state_dict(criterion.state_dict())
    assert fresh.step == 5 and fresh.terms[0].hook.value == pytest.approx(0.05)  # type: ignore[union-attr]
