"""One regularized layer: its hook on and off, its generators, the scale of its measure, copies."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from fam_ext.capture.hook import LayerHook
from fam_ext.loss.layer_term import LayerTerm
from fam_ext.loss.noise_hook import Gate, NoiseHook
from fam_ext.loss.plan import CLOSED_FORM, Plan
from fam_ext.options import Options


class Owner:
    """What a term asks of its criterion."""

    training = True
    any_mode = False


def term(layer: nn.Module | None = None, **options: Any) -> LayerTerm:
    return LayerTerm(Options("FAMLoss", **options), nn.Linear(3, 2) if layer is None else layer)


def hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def test_attached_and_detached() -> None:
    one, owner = term(), Owner()
    assert hooks(one.module) == [] and not one.hook.active
    one.attach(owner)
    one.attach(owner)  # without effect
    assert hooks(one.module) == [one.hook] and isinstance(one.hook, LayerHook) and one.hook.active
    z = one.module(torch.randn(4, 3))
    assert len(one.captures.pending) == 1
    one.detach()
    assert hooks(one.module) == [] and not one.hook.active and not one.captures.pending and z.requires_grad
    owner.training = False
    one.attach(owner)
    assert not one.hook.active


def test_the_hook_goes_with_the_criterion() -> None:
    one, owner = term(), Owner()
    one.attach(owner)
    del owner
    gc.collect()
    assert hooks(one.module) == []


def test_what_waits_for_the_criterion_does_not_pile_up() -> None:
    one, owner = term(), Owner()
    before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for _ in range(5):
        one.attach(owner)
        assert len(weakref.finalize._registry) == before + 1  # type: ignore[attr-defined]
        one.detach()
    assert len(weakref.finalize._registry) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(("layer", "before"), [(nn.Linear(3, 2), True), (nn.Conv1d(3, 2, 2), False)])
def test_noise_has_its_hook_before_or_after_the_layer(layer: nn.Module, before: bool) -> None:
    one, owner = term(layer, method="noise"), Owner()
    one.attach(owner)
    (hook,) = layer._forward_pre_hooks.values() if before else layer._forward_hooks.values()
    assert isinstance(hook, NoiseHook) and hook is one.hook
    one.detach()
    assert hooks(layer) == []


def test_the_gate_outlives_the_hook() -> None:
    one, owner = term(method="noise"), Owner()
    one.gate = Gate()
    for _ in range(2):
        one.attach(owner)
        assert one.hook.gate is one.gate
        one.detach()


def test_inert_hooks_of_a_copied_layer_are_removed() -> None:
    for method in ("auto", "noise"):
        first, owner = term(method=method), Owner()
        first.attach(owner)
        copied = copy.deepcopy(first.module)
        assert len(hooks(copied)) == 1
        second = term(copied, method=method)
        second.attach(owner)
        assert hooks(copied) == [second.hook]
        assert not copied._forward_hooks_with_kwargs.keys() - copied._forward_hooks.keys()


def test_generators() -> None:
    """One of the term's own, always seeded alike; the user's where there is one, on the layer's device."""
    device = torch.device("cpu")
    own = term().generator(device)
    assert torch.equal(own.get_state(), term().generator(device).get_state())
    given = torch.Generator().manual_seed(1)
    assert term(generator=given).generator(device) is given
    with pytest.raises(
        ValueError, match=r"FAMLoss: generator must be on the layer's device \(meta\), got one on cpu"
    ):
        term(generator=given).generator(torch.device("meta"))


@pytest.mark.parametrize("given", [None, torch.Generator()])
def test_states_of_generators_come_back(given: torch.Generator | None) -> None:
    one, device = term(generator=given), torch.device("cpu")
    torch.rand(3, generator=one.generator(device))
    states = one.generator_states()
    drawn = torch.rand(5, generator=one.generator(device))
    other = term(generator=None if given is None else torch.Generator())
    other.load_generator_states(states)
    assert torch.equal(torch.rand(5, generator=other.generator(device)), drawn)


def test_states_of_devices_that_are_not_here_wait() -> None:
    """They are kept, and saved again; a generator that is made later starts from its own."""
    here, absent = torch.device("cpu"), "cuda:63"
    one = term()
    torch.rand(3, generator=one.generator(here))
    states = {absent: torch.arange(16, dtype=torch.uint8), "cpu": one.generator(here).get_state()}
    other = term()
    other.load_generator_states(states)
    assert not other.generators and other.generator_states().keys() == states.keys()
    drawn = [torch.rand(5, generator=t.generator(here)) for t in (one, other)]
    assert torch.equal(*drawn)
    assert torch.equal(other.generator_states()[absent], states[absent])
    other.load_generator_states(states)  # into the generator that is in use
    assert torch.equal(torch.rand(5, generator=other.generator(here)), drawn[0])
    given = torch.Generator()
    term(generator=given).load_generator_states(states)  # which other layers may share
    assert torch.equal(torch.rand(5, generator=given), drawn[0])


def test_a_state_of_another_device_of_the_same_type() -> None:
    """It goes to the layer's generator where there is no other of that type, on either side."""
    here, there, third = (torch.device("cpu", index) for index in (0, 1, 2))
    states = {
        str(device): torch.Generator().manual_seed(3 + device.index).get_state() for device in (here, there)
    }
    expected = {name: torch.rand(5, generator=generator(state)) for name, state in states.items()}

    def drawn(one: LayerTerm, device: torch.device) -> torch.Tensor:
        return torch.rand(5, generator=one.generator(device))

    for used_before in (False, True):
        for given in (None, torch.Generator()):
            one = term(generator=given)
            if used_before:
                drawn(one, torch.device("cpu") if given else here)
            one.load_generator_states({"cpu:1": states["cpu:1"], "cuda:0": states["cpu:0"]})
            assert torch.equal(drawn(one, torch.device("cpu") if given else here), expected["cpu:1"])
            assert "cuda:0" in one.generator_states() and "cpu:1" not in one.generator_states()
        both = term()
        if used_before:
            drawn(both, third), drawn(both, here)
        both.load_generator_states(states)
        assert torch.equal(drawn(both, here), expected["cpu:0"])
        assert torch.equal(drawn(both, third), expected["cpu:1"])
    undecided = term()
    undecided.load_generator_states(states)
    assert torch.equal(drawn(undecided, third), drawn(term(), third))
    assert undecided.generator_states().keys() >= states.keys()


def generator(state: torch.Tensor) -> torch.Generator:
    made = torch.Generator()
    made.set_state(state)
    return made


def test_the_measure_from_the_curvature() -> None:
    weight, value = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor(2.0)
    layer = nn.Linear(2, 2)
    for options, share, expected in (
        ({}, 1.0, 2.0),
        ({}, 0.5, 1.0),
        ({"normalize": "fan_in"}, 0.5, 0.5),
        ({"measure": "trace"}, 1.0, 2.0),
        ({"measure": "layerwise"}, 1.0, 2.0 * 25),
        ({"measure": "layerwise", "norm_power": 1}, 1.0, 2.0 * 5),
        ({"measure": "layerwise_eigenvalue"}, 2.0, 2.0 * 25 * 2),
        ({"measure": "neuronwise_eigenvalue"}, 1.0, 2.0),
    ):
        one = term(layer, **options)
        one.set_share(share)
        torch.testing.assert_close(one.scale_to_measure(value, weight), torch.tensor(expected))


def test_features_over_their_scale() -> None:
    """The layer's output stays; channels of scale 0 are left out."""
    for layer, x in (
        (nn.Linear(3, 2, bias=False), torch.randn(4, 3)),
        (nn.Conv1d(3, 2, 2, bias=False), torch.randn(4, 3, 5)),
    ):
        one = term(layer)
        one.scale = torch.tensor([0.5, 2.0, 3.0])
        features, weight = one.rescaled(x, layer.weight)
        torch.testing.assert_close(one.layer.apply(features, weight), layer(x))
        assert not torch.allclose(features, x)
        torch.testing.assert_close(one.weight(), one.layer.canonical(weight).detach())
        one.scale = torch.tensor([0.5, 0.0, 3.0])
        assert (one.rescaled(x, layer.weight)[0][:, 1] == 0).all()


def test_plans_are_logged_when_they_change(caplog: pytest.LogCaptureFixture) -> None:
    one = term()
    with caplog.at_level(logging.INFO, "fam_ext"):
        for plan in (CLOSED_FORM, CLOSED_FORM, Plan("exact", "rows", 2), Plan("exact", "rows", 2)):
            one.record_plan(plan)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["FAMLoss on Linear"] * 2
    assert one.plan == Plan("exact", "rows", 2)


def test_copies_start_anew() -> None:
    one, owner = term(), Owner()
    one.set_share(0.3)
    one.name = "body.0"
    one.attach(owner)
    one.record_plan(CLOSED_FORM)
    z = one.module(torch.randn(4, 3))
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (
            copied.share == copied.factor == 0.3
            and copied.name == "body.0"
            and copied.plan is None
            and copied.handle is None
        )
        assert not copied.captures.pending and not copied.hook.active
        assert torch.equal(copied.module.weight, one.module.weight)
    assert z.requires_grad
