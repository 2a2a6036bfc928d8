"""FAMLoss and RelativeFlatness in use: modes, lifetimes, copies, mistakes and what they are told."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from inputs import ON_OTHER, batch, expect, network
from torch import Tensor, nn

import fam_ext
from fam_ext import FAMLoss, RelativeFlatness, schedules

pytestmark = pytest.mark.on_devices


def test_training_and_evaluation() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    total = criterion(net(x), y)
    kappa = RelativeFlatness(nn.CrossEntropyLoss(), net[2])(net(x), y)
    plain = F.cross_entropy(net(x), y)
    torch.testing.assert_close(total, plain + 0.5 * kappa)
    torch.testing.assert_close(criterion.last.loss, plain.detach())
    torch.testing.assert_close(criterion.last.flatness, kappa.detach())
    assert criterion.last.strength == 0.5
    assert not criterion.last.loss.requires_grad
    for quiet in (criterion, net):
        quiet.eval()
        assert criterion(net(x), y) == plain
        assert criterion(net(x).detach() * 2, y) == F.cross_entropy(net(x) * 2, y)
        quiet.train()


@pytest.mark.parametrize("mode", ["eval", "loss", "skip", "cast"])
def test_features_are_not_kept(mode: str) -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    kept: list[weakref.ref[Tensor]] = []
    net[1].register_forward_hook(lambda m, a, z: kept.append(weakref.ref(z)))
    if mode == "eval":
        net.eval()
    out = net(x)
    if mode == "loss":
        loss = criterion(out, y)
        loss.backward()
    if mode == "cast":
        out = out.double()
    if mode != "loss":
        del out
    gc.collect()
    assert kept[0]() is None


def test_memory_is_constant_over_200_steps() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)

    def step(i: int) -> int:
        out = net(x)
        if i % 7:
            net.zero_grad()
            criterion(out, y).backward()
        gc.collect(0)
        return sum(isinstance(o, Tensor) for o in gc.get_objects()) if i in (20, 199) else 0

    counts = [step(i) for i in range(200)]
    assert counts[199] <= counts[20]


def test_mistakes_are_told() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5, method="closed_form")
    expect("not called since the last loss", lambda: criterion(torch.randn(8, 4, requires_grad=True), y))
    with torch.no_grad():
        out = net(x)
    expect("no_grad", lambda: criterion(out, y))
    pair = [net(x), net(x)]
    expect("called 2 times", lambda: criterion(pair[1], y))
    criterion.reset()
    pair.clear()
    expect("not the output of `layer` .*Mul", lambda: criterion(net(x) * 2, y))
    expect("log_softmax", lambda: criterion(net(x).log_softmax(1), y))
    out = net(x)
    expect("detach", lambda: criterion(out.detach(), y))
    criterion.reset()
    out = net(x)
    with torch.no_grad():
        out.clamp_(-1, 1)
    expect("modified in place", lambda: criterion(out, y))
    wrong = FAMLoss(nn.CrossEntropyLoss(), net[0], 0.5, method="closed_form")
    expect("not the output of `layer`", lambda: wrong(net(x), y))
    with pytest.raises(TypeError, match="outputs must be the tensor"):
        criterion((net(x),), y)
    criterion.reset()
    with pytest.raises(ValueError, match="target must be of shape"):
        criterion(net(x), y[:3])
    regression = FAMLoss(nn.MSELoss(), net[2], 0.5)
    with pytest.raises(ValueError, match="broadcast"):
        regression(net(x), torch.randn(8, 1))


def test_class_dimension_must_be_the_layers() -> None:
    layer = nn.Linear(3, 4)
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.5, method="closed_form")
    expect(
        "dimension 1", lambda: criterion(layer(torch.randn(2, 4, 3)), torch.zeros(2, 4, dtype=torch.int64))
    )


def test_teacher_pass_and_second_loss_on_one_output() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    out = net(x)
    with torch.no_grad():
        net(x)
    mixed = 0.3 * criterion(out, y) + 0.7 * criterion(out, y.flip(0))  # mixup
    once = criterion(net(x), y)
    torch.testing.assert_close(mixed - 0.3 * once, 0.7 * criterion(net(x), y.flip(0)))


def test_two_criteria_on_one_layer_and_previous_losses_alive() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    log = RelativeFlatness(nn.CrossEntropyLoss(), net[2])
    losses = []
    for i in range(4):
        out = net(x)
        losses.append(criterion(out, y))
        if i % 2:
            torch.testing.assert_close(log(out, y), criterion.last.flatness, check_dtype=False)


def test_relative_flatness_of_a_model_in_evaluation() -> None:
    net, (x, y) = network(), batch()
    measure = RelativeFlatness(nn.CrossEntropyLoss(), net[2])
    expected = measure(net(x), y)
    net.eval()
    with torch.no_grad():
        got = measure(net(x), y)
    torch.testing.assert_close(got, expected.detach())
    with torch.no_grad():
        out = net(x)
        torch.testing.assert_close(measure(out, y), got)
        torch.testing.assert_close(
            measure(out, y, per_sample=True).sum(), got
        )  # the output still holds the features
        expect("no graph tells of casts", lambda: measure(out.double(), y))
    measure.eval()
    expect("evaluation mode", lambda: measure(net(x), y))


def test_copies() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    expected = criterion(net(x), y)
    assert list(net.state_dict()) == list(network().state_dict())
    average = copy.deepcopy(net)
    out = net(x)
    average(x)
    torch.testing.assert_close(criterion(out, y), expected)
    for net2, criterion2 in (copy.deepcopy((net, criterion)), pickle.loads(pickle.dumps((net, criterion)))):
        assert criterion2.layer is net2[2] and criterion2.layer is not net[2]
        assert len(net2[2]._forward_hooks) == 1
        torch.testing.assert_close(criterion2(net2(x), y), expected)
    pickle.loads(pickle.dumps(net))(x)
    assert list(criterion.parameters()) == []


def test_hook_removal() -> None:
    net, (x, y) = network(), batch()
    with FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5) as criterion:
        criterion(net(x), y)
    assert not net[2]._forward_hooks
    expect("detached", lambda: criterion(net(x), y))
    assert criterion.eval()(net(x), y) == F.cross_entropy(net(x), y)
    criterion.train().attach()
    criterion(net(x), y)
    gone = weakref.ref(FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5))
    gc.collect()
    assert gone() is None and len(net[2]._forward_hooks) == 1


def test_state_and_schedule() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(
        nn.CrossEntropyLoss(), net[2], schedules.SwitchOff(schedules.Warmup(0.4, 2), 4), every=1
    )
    seen = []
    for _ in range(5):
        criterion(net(x), y)
        seen.append(criterion.last.strength)
    assert seen == [0.0, 0.2, 0.4, 0.4, 0.0]
    assert criterion.last.flatness is None
    other = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.1)
    other.load_state_dict(criterion.state_dict())
    assert other.step == 5
    every = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.1, every=2)
    for i in range(4):
        every(net(x), y)
        assert (every.last.flatness is None) == bool(i % 2)


def test_target_ratio() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], schedules.TargetRatio(0.25, maximum=100.0))
    total = criterion(net(x), y)
    torch.testing.assert_close(total.detach(), 1.25 * criterion.last.loss)
    restored = FAMLoss(nn.CrossEntropyLoss(), net[2], schedules.TargetRatio(0.25, maximum=100.0))
    restored.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(restored.strength.averages.to(x.device), criterion.strength.averages)
    totals = [c(net(x), y).detach() for c in (restored, criterion)]
    torch.testing.assert_close(*totals)


def test_spectral_norm_is_read_without_another_power_iteration() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4))
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.5)
    x, y = batch()
    for _ in range(3):
        out = layer(x)
        weight = criterion.layer.parametrizations.weight
        weight.eval()
        used = layer.weight.detach()
        weight.train()
        criterion(out, y)
        torch.testing.assert_close(criterion.last.flatness, fam_ext.relative_flatness(x, used, out).detach())


def test_forward_that_is_not_the_linear_map_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 1.5

    class Plain(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    x, y = batch()
    plain, scaled = Plain(5, 4), Scaled(5, 4)
    FAMLoss(nn.CrossEntropyLoss(), plain, 0.5)(plain(x), y)
    criterion = FAMLoss(nn.CrossEntropyLoss(), scaled, 0.5)
    expect("its forward does", lambda: criterion(scaled(x), y))


@pytest.mark.parametrize(
    "wrap", ["accumulate", "functional", "input by keyword", "checkpoint", "backward hook"]
)
def test_ways_to_call_the_model(wrap: str) -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    criterion(net(x), y).backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    if wrap == "accumulate":
        for _ in range(2):
            (criterion(net(x), y) / 2).backward()
    elif wrap == "functional":
        params = dict(net.named_parameters())
        grads = torch.func.grad(lambda p: criterion(torch.func.functional_call(net, p, (x,)), y))(params)
        for name, p in net.named_parameters():
            p.grad = grads[name]
    elif wrap == "input by keyword":
        criterion(net[2](input=net[1](net[0](x))), y).backward()
    elif wrap == "checkpoint":
        criterion(torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False), y).backward()
    else:
        net[2].register_full_backward_hook(lambda *a: None)
        criterion(net(x), y).backward()
    for p, w in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w)


@pytest.mark.skipif(ON_OTHER, reason="that device has no autocast")
def test_autocast(device: str) -> None:
    net, (x, y) = network(), batch()
    for criterion in (nn.CrossEntropyLoss(), F.mse_loss):
        target = y if isinstance(criterion, nn.Module) else torch.randn(8, 4)
        famloss = FAMLoss(criterion, net[2], 0.5)
        exact = RelativeFlatness(criterion, net[2])(net(x), target)
        with torch.autocast(device, torch.bfloat16):
            out = net(x)
            famloss(out if isinstance(criterion, nn.Module) else out.float(), target).backward()
        assert out.dtype == torch.bfloat16
        assert famloss.last.flatness.dtype == torch.float32
        torch.testing.assert_close(famloss.last.flatness, exact.detach(), rtol=0.05, atol=0)


@pytest.mark.slow
def test_compiled_model() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    expected = criterion(net(x), y)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(criterion(compiled(x), y), expected)
    step = torch.compile(lambda x, y: criterion(net(x), y), backend="aot_eager")
    torch.testing.assert_close(step(x, y), expected)
    net.eval()
    whole = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), net(x))


@pytest.mark.slow
def test_compiled_function_of_tensors() -> None:
    net, (x, _) = network(), batch()
    for loss in ("cross_entropy", "bce_with_logits"):

        def kappa(features: Tensor, weight: Tensor, logits: Tensor, loss: str = loss) -> Tensor:
            return fam_ext.relative_flatness(features, weight, logits, loss=loss)

        phi = net[1](net[0](x)).detach()
        arguments = (phi, net[2].weight, net(x).detach())
        compiled = torch.compile(kappa, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), kappa(*arguments))


def test_masked_classes_and_not_finite_ignored_rows() -> None:
    layer, (x, y) = nn.Linear(5, 4), batch()
    with torch.no_grad():
        layer.bias[3] = -torch.inf
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.5, backend="reference")
    criterion(layer(x), y.clamp(max=2)).backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    three = fam_ext.relative_flatness(x, layer.weight[:3], layer(x)[:, :3])
    torch.testing.assert_close(criterion.last.flatness, three.detach())
    x[0], y = torch.nan, y.clamp(max=2)
    y[0] = -100
    assert RelativeFlatness(nn.CrossEntropyLoss(), layer)(layer(x), y).isfinite()


def test_frozen_layer_and_features() -> None:
    layer, (x, y) = nn.Linear(5, 4).requires_grad_(False), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.5)
    total = criterion(layer(x), y)
    torch.testing.assert_close(criterion(layer(x).view(-1, 4), y), total)
    x.requires_grad_()
    moving = criterion(layer(x), y)
    moving.backward()
    torch.testing.assert_close(moving.detach(), total)
    layer.bias.requires_grad_()
    with torch.inference_mode():
        features = x.detach().clone()  # has no version counter
    torch.testing.assert_close(criterion(layer(features), y).detach(), total)


def test_a_negative_share_of_noise_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    ce = nn.CrossEntropyLoss()
    with pytest.raises(
        ValueError, match=r"FAMLoss\.for_model: strength must be at least 0 with method='noise'"
    ):
        FAMLoss.for_model(ce, net, strength={"0": -0.1, "2": 0.1}, method="noise")
    assert not net[0]._forward_pre_hooks and not net[2]._forward_pre_hooks
    FAMLoss.for_model(ce, net, strength={"0": -0.1, "2": 0.1})  # elsewhere it may be negative
