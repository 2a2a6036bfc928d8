"""The hook that perturbs a layer: which calls share a draw, what repeats one, and when it does nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from noise_hooks import CONV, hooked, plain, x
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from fam_ext import FAMLoss, UnsupportedError
from fam_ext.hessian.noise_draws import Draw
from fam_ext.loss.noise_hook import Gate, _signs

KINDS = pytest.mark.parametrize("kind", ["linear", CONV])


@KINDS
def test_calls_of_a_step_share_a_draw_and_the_next_step_has_another(kind: str) -> None:
    layer, hook = hooked(kind)
    features = x(kind)
    first, second = layer(features), layer(features)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, plain(layer, features))
    drawn = hook.drawn
    assert hook.called and hook.seen and drawn is not None
    hook.finish()
    assert not hook.called and hook.seen and hook.drawn is None and hook.kept[0] is drawn
    assert not torch.equal(layer(features), first)


@KINDS
def test_noise_is_one_linear_map_of_the_features(kind: str) -> None:
    """z + W eps phi with one eps for the step: twice the features, twice the noise; the strength's root."""
    layer, hook = hooked(kind, shared=True)
    features = x(kind)

    alive = []  # the draw is that of the first call as long as its graph lives

    def noise(t: Tensor) -> Tensor:
        alive.append(layer(t))
        return alive[-1].detach() - plain(layer, t).detach()

    once = noise(features)
    torch.testing.assert_close(noise(2 * features), 2 * once)
    if kind == CONV:
        torch.testing.assert_close(noise(features.flip(0)), once.flip(0))  # shared: the same for every sample
    hook.set(0.4, torch.device("cpu"))
    torch.testing.assert_close(noise(features), 2 * once)  # sqrt(strength)


@KINDS
def test_inactive(kind: str) -> None:
    layer, hook = hooked(kind)
    features = x(kind)
    state = torch.get_rng_state()
    for turn_off in ("active", "training"):
        hook.active, layer.training = turn_off != "active", turn_off != "training"
        assert torch.equal(layer(features), plain(layer, features))
    assert torch.equal(torch.get_rng_state(), state) and not hook.seen


def test_a_call_whose_graph_is_gone_is_forgotten() -> None:
    """A look at the output, without a loss: the next call is a step of its own, of any size."""
    layer, hook = hooked()
    z = layer(x())
    assert hook._token() is not None
    del z
    gc.collect()
    first = hook.drawn
    kept = layer(torch.randn(7, 3))
    assert hook.drawn is not first and hook.drawn.samples == 7 and kept.requires_grad


def test_other_samples_in_one_step_are_refused() -> None:
    layer, hook = hooked()
    z = layer(x())
    with pytest.raises(UnsupportedError, match=r"one has 7 samples where an earlier one had 4.*reset"):
        layer(torch.randn(7, 3))
    hook.finish()
    layer(torch.randn(7, 3))
    shared, _ = hooked(shared=True)
    z = shared(x())
    assert shared(torch.randn(7, 3)).shape == (7, 2) and z.requires_grad


@KINDS
def test_passes_without_grad_leave_the_steps_alone(kind: str) -> None:
    """Of any size, before a step and within it: the step's calls share one draw, and none of the passes'."""
    layer, hook = hooked(kind)
    features = x(kind)
    sizes = (3, 4, 2)
    with torch.no_grad():
        for size in sizes:
            assert not torch.equal(layer(features[:size]), plain(layer, features[:size]))
    before = hook.drawn
    first = layer(features)
    assert hook.drawn is not before
    with torch.no_grad():
        for size in sizes:
            assert not torch.equal(layer(features[:size]), plain(layer, features[:size]))
    second = layer(features)
    torch.testing.assert_close(first, second)
    hook.finish()
    assert not torch.equal(layer(features), first)


def test_reentrant_checkpointing_beside_a_plain_call() -> None:
    """Its first pass has no grad; the calls share one draw from the step after the one whose backward pass showed that."""
    layer, hook = hooked()
    features = x().requires_grad_()
    shared = []
    for _ in range(3):
        inside = checkpoint(layer, features, use_reentrant=True)
        outside = layer(features)
        shared.append(torch.allclose(inside, outside))
        hook.finish()
        (inside + outside).sum().backward()
    assert shared[1:] == [True, True]


@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_call_is_repeated_as_it_was(kind: str, use_reentrant: bool) -> None:
    """The gradients are those without checkpointing; the step's loss may be taken in between."""
    layer, hook = hooked(kind)
    features = x(kind).requires_grad_()
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(7)
        z = checkpoint(layer, features, use_reentrant=use_reentrant) if checkpointed else layer(features)
        loss = z.tanh().square().sum()
        hook.finish()  # what the criterion does
        gradients.append(
            torch.autograd.grad(loss, features) if not use_reentrant else backward(loss, features)
        )
    torch.testing.assert_close(gradients[0], gradients[1])


def backward(loss: Tensor, features: Tensor) -> tuple[Tensor]:
    features.grad = None
    loss.backward()
    assert features.grad is not None
    return (features.grad.clone(),)


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_later_call_that_is_checkpointed(generator: torch.Generator | None) -> None:
    """It takes a draw that depends on the first one's features: gradients are those without checkpointing."""
    layer, hook = hooked(generator=generator)
    layer.double()
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(7)
        if generator is not None:
            generator.manual_seed(7)
        features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        hidden = features.tanh()
        call = (lambda t: checkpoint(layer, t, use_reentrant=False)) if checkpointed else layer
        loss = (layer(hidden) * layer(2 * hidden + 1) * call(hidden + 2)).sum()
        hook.finish()
        gradients.append(torch.autograd.grad(loss, [features, layer.weight]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_step_without_a_backward_pass_is_let_go() -> None:
    """Of a layer that is called twice."""
    layer, hook = hooked()
    alive = []
    for _ in range(5):
        first, second = x().requires_grad_().tanh(), x().requires_grad_().tanh()
        alive += [TensorWeakRef(first), TensorWeakRef(second)]
        total = (layer(first) + layer(second)).sum()
        hook.finish()
        del first, second, total
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_every_call_takes_as_many_random_numbers() -> None:
    layer, hook = hooked()
    features = x()
    torch.manual_seed(0)
    layer(features)
    after_one = torch.get_rng_state()
    hook.finish()
    z = layer(features)
    torch.manual_seed(0)
    layer(features)  # shares the draw of the call before
    assert torch.equal(torch.get_rng_state(), after_one) and z.requires_grad


def test_a_generator_of_the_user_s() -> None:
    layer, hook = hooked(generator=torch.Generator())
    features, state = x(), torch.get_rng_state()
    outputs = []
    for _ in range(2):
        hook.generator.manual_seed(3)
        outputs.append(layer(features))
        hook.finish()
    assert torch.equal(*outputs) and torch.equal(torch.get_rng_state(), state)


@KINDS
def test_the_input_by_keyword(kind: str) -> None:
    layer, hook = hooked(kind, generator=torch.Generator())
    features = x(kind)
    outputs = []
    for call in (lambda: layer(features), lambda: layer(input=features)):
        hook.generator.manual_seed(3)
        outputs.append(call())
        hook.finish()
    assert torch.equal(*outputs)


def test_strengths_as_a_number_and_as_a_tensor() -> None:
    _, hook = hooked()
    tensor = hook.tensor
    hook.set(0.7, torch.device("cpu"))
    assert hook.value == 0.7 and hook.tensor is not tensor
    torch.testing.assert_close(tensor, torch.tensor(0.1))  # a compiled step's backward pass may need it yet
    torch.testing.assert_close(hook.tensor, torch.tensor(0.7))
    hook.set(0.7, torch.device("meta"))
    assert hook.tensor.is_meta


def test_copies_are_inert() -> None:
    layer, hook = hooked()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (other,) = copied._forward_pre_hooks.values()
        assert other is not hook and other.layer is None and not other.active
        assert torch.equal(
            copied(torch.ones(1, 3)), nn.functional.linear(torch.ones(1, 3), layer.weight, layer.bias)
        )


def test_a_layer_without_a_share_leaves_the_others_their_noise() -> None:
    """Shares of 0: nothing is perturbed there, and everything elsewhere."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    y = torch.tensor([0, 1, 1, 0])
    criterion = FAMLoss.for_model(
        nn.CrossEntropyLoss(), net, strength={"0": 0.0, "*": 0.5}, layer="*", method="noise"
    )
    silent, loud = (term.hook for term in criterion.terms)
    assert not silent.active and loud.active
    features = x()
    hidden = net[1](net[0](features))
    assert torch.equal(hidden, net[0](features).tanh()) and not silent.seen
    perturbed = net[2](hidden)
    assert not torch.allclose(perturbed, nn.functional.linear(hidden, net[2].weight, net[2].bias))
    criterion(perturbed, y)
    criterion.eval()
    assert not loud.active
    criterion.train()
    assert loud.active and not silent.active


def test_tools_that_copy_the_forward_pass() -> None:
    """A trace has no noise, as an exported program has none; TorchScript is told what to do."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv1d(1, 2, 2))
    net[1] = nn.Sequential(nn.Tanh(), nn.Unflatten(1, (1, 4)))
    x = torch.randn(2, 3)
    plain = net(x)
    criterion = FAMLoss(nn.CrossEntropyLoss(), [net[0], net[2]], 0.5, method="noise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.trace(net, x)(x), plain)
        with pytest.raises(UnsupportedError, match=r"criterion\.detach\(\)"):
            torch.jit.script(net)
    assert not torch.equal(net(x), plain)
    criterion.detach()


@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_calls_of_one_step_repeat_the_draw_that_they_shared(
    kind: str, use_reentrant: bool
) -> None:
    layer, hook = hooked(kind)
    shape = (4, 3, 5) if kind == CONV else (4, 5, 3)
    features, more = torch.randn(shape, requires_grad=True), torch.randn(shape)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(7)
        calls = [
            checkpoint(layer, t, use_reentrant=use_reentrant) if checkpointed else layer(t)
            for t in (features, features + more)
        ]
        loss = sum((z.tanh().square().sum() for z in calls), torch.zeros(()))
        hook.finish()
        gradients += backward(loss, features)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_layer_s_other_arguments() -> None:
    layer = nn.ConvTranspose1d(3, 2, 2, stride=2)
    criterion = FAMLoss(nn.MSELoss(), layer, 0.1, method="noise")
    features = x(CONV)
    outputs = (
        layer(features, [11]),
        layer(features, output_size=[11]),
        layer(input=features, output_size=[11]),
    )
    for z in outputs:
        assert z.shape == (4, 2, 11)
        torch.testing.assert_close(z, outputs[0])
    criterion.detach()


def test_what_is_remembered_of_a_draw_is_small_and_tells_it_apart() -> None:
    large, hook = hooked(layer=nn.Linear(1000, 2))
    large(torch.randn(8, 1000))
    (remembered, *_) = hook._calls[-1]
    assert remembered.untyped_storage().nbytes() <= 64 * 4
    one, other = (Draw(torch.ones(1, 1, 1), c * torch.ones(1, 1, 1), None) for c in (1, -1))
    assert not torch.equal(_signs(one), _signs(other))


def test_compiled_calls_of_a_step_have_noise_at_the_same_positions() -> None:
    layer, hook = hooked()
    hook.gate = gate = Gate()
    gate.positions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    features = torch.randn(2, 2, 3)

    def twice(t: Tensor) -> tuple[Tensor, Tensor]:
        return layer(t), layer(t)

    clean = plain(layer, features)
    torch._dynamo.reset()
    for z in torch.compile(twice, backend="aot_eager", fullgraph=True)(features):
        moved = (z - clean).abs().amax(2) > 1e-6
        assert torch.equal(moved, gate.positions.bool())


def test_an_input_that_another_hook_has_changed() -> None:
    """The noise on a convolution's output is that of the input it had."""
    layer, hook = hooked(CONV, generator=torch.Generator())
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    features = x(CONV)

    def moved() -> Tensor:
        hook.generator.manual_seed(3)
        z: Tensor = layer(features)
        hook.finish()
        return z

    once = moved() - plain(layer, features)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    hook.generator.manual_seed(3)
    clean = nn.functional.conv1d(2 * features, layer.weight, layer.bias)  # type: ignore[arg-type]
    assert not torch.allclose(once, torch.zeros(()))
    torch.testing.assert_close(moved() - clean, 2 * once)
