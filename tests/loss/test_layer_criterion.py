"""What FAMLoss and RelativeFlatness share: layers beside the module tree, modes, a criterion that is replaced, copies."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import batch, network
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError
from fam_ext.loss.layer_criterion import LayerCriterion
from fam_ext.options import Options

CE = nn.CrossEntropyLoss()


def criterion(layer: object) -> LayerCriterion:
    return LayerCriterion(CE, layer, Options("FAMLoss"))  # type: ignore[arg-type]


def test_the_layer_is_no_submodule() -> None:
    net = network()
    loss = criterion([net[0], net[2]])
    assert list(loss.parameters()) == [] and [*loss.children()] == [CE]
    assert loss.layer is net[0] and [t.module for t in loss.terms] == [net[0], net[2]]
    loss.eval()
    assert net[0].training
    assert "measure=neuronwise" in repr(loss) and "out_features=6" in repr(loss)


@pytest.mark.parametrize("layers", [[], "same"])
def test_layers_that_are_none_or_twice_the_same(layers: object) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="FAMLoss: layer must be a module or a sequence of different modules"
    ):
        criterion([layer, layer] if layers == "same" else [])


def test_hooks_follow_the_mode() -> None:
    net = network()
    loss = criterion([net[0], net[2]])
    for turn, active in ((lambda: loss.eval(), False), (lambda: setattr(loss, "training", True), True)):
        turn()
        assert [t.hook.active for t in loss.terms] == [active] * 2
    with loss:
        pass
    assert [t.hook.active for t in loss.terms] == [False] * 2 and not net[0]._forward_hooks
    loss.train()
    assert not loss.terms[0].hook.active  # still off the layer
    loss.attach()
    assert all(t.hook.active for t in loss.terms)


def test_layers_that_cannot_all_be_hooked_are_left_alone() -> None:
    """The second one's forward has been replaced: the first one has no hook, although the error is alive."""
    first, second = nn.Linear(4, 4), nn.MultiheadAttention(4, 2)
    second.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="has been replaced") as kept:
        FAMLoss(CE, [first, second], 0.1, method="noise")
    assert kept.value is not None and not first._forward_pre_hooks


def test_reset_drops_every_layer_s_calls() -> None:
    net, (x, _) = network(), batch()
    loss = criterion([net[0], net[2]])
    z = net(x)
    assert all(t.captures.pending for t in loss.terms)
    loss.reset()
    assert not any(t.captures.pending for t in loss.terms) and z.requires_grad


def test_plans() -> None:
    net, (x, y) = network(), batch()
    one, two = FAMLoss(CE, net[2], 0.1), FAMLoss(CE, [net[0], net[2]], 0.1)
    assert one.plan is None and two.plan == (None, None)
    z = net(x)
    one(z, y)
    two(z, y)
    assert one.plan.method == "closed_form" and [p.method for p in two.plan] == ["exact", "closed_form"]


@pytest.mark.parametrize("kind", [FAMLoss, RelativeFlatness])
def test_plans_have_the_layers_names(kind: Any) -> None:
    """Of every class, in copies too; layers that were left out among them."""
    net = nn.Sequential(nn.Linear(5, 4), nn.MultiheadAttention(4, 1), nn.Linear(4, 3))
    options = {"strength": 0.1} if kind is FAMLoss else {}
    loss = kind.for_model(CE, net, "*", **options)
    for one in (loss, copy.deepcopy(loss)):
        assert [line.partition(":")[0] for line in repr(one.plan).splitlines()] == [
            "0", "2", "1.in_proj", "1.out_proj",
        ]  # fmt: skip


def test_a_replaced_criterion_is_read_again() -> None:
    net, (x, y) = network(), batch()
    loss = RelativeFlatness(CE, net[2], method="closed_form")
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    loss.criterion = weighted
    got = loss(net(x), y)
    loss.detach()
    torch.testing.assert_close(got, RelativeFlatness(weighted, net[2])(net(x), y))
    with pytest.raises(UnsupportedError, match="no closed form is known for the criterion HuberLoss"):
        loss.criterion = nn.HuberLoss()
    loss.attach()
    torch.testing.assert_close(loss(net(x), y), got)  # a refused one changes nothing

    class Own(nn.Module):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y)

    loss = RelativeFlatness(CE, net[2])
    loss.criterion = Own()
    assert loss(net(x), y).isfinite() and loss.plan.method == "exact"


def test_a_function_in_a_module_s_place_and_back() -> None:
    """Loss, kappa and gradients are the new criterion's each time, and the old one's where the new one is refused."""
    net, (x, y) = network().double(), batch()
    x = x.double()
    total = functools.partial(F.cross_entropy, reduction="sum")
    loss = FAMLoss(CE, net[2], 0.1)

    def check(criterion: object) -> None:
        fresh = FAMLoss(criterion, net[2], 0.1)
        got, want = (torch.autograd.grad(c(net(x), y), list(net.parameters())) for c in (loss, fresh))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(loss.last.flatness, fresh.last.flatness)
        assert loss.criterion is criterion

    for criterion in (total, CE, total, nn.CrossEntropyLoss(reduction="sum")):
        loss.criterion = criterion
        check(criterion)
    for wrong in (None, "cross_entropy"):
        with pytest.raises(TypeError, match="FAMLoss: criterion must be a loss module or function"):
            loss.criterion = wrong
        check(criterion)
    assert [*loss.children()] == [criterion]


def test_copies() -> None:
    """A copy has a layer and a hook of its own, attached as the original was."""
    net, (x, y) = network(), batch()
    loss = RelativeFlatness(CE, net[2])
    expected = loss(net(x), y)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        layer = copied.layer
        assert layer is not net[2] and len(layer._forward_hooks) == 1
        torch.testing.assert_close(copied(layer(net[:2](x)), y), expected)
    loss.detach()
    copied = copy.deepcopy(loss)
    assert not copied.layer._forward_hooks and copied.terms[0].handle is None


def test_products_with_the_hessian_of_one_loss() -> None:
    net, (x, y) = network().double(), batch()
    x = x.double()
    loss = RelativeFlatness(CE, net[0])

    def of_weight(w: Tensor) -> Tensor:
        return F.cross_entropy(net[1:](F.linear(x, w, net[0].bias)), y)

    hessian = torch.func.hessian(of_weight)(net[0].weight.detach())
    direction = torch.randn_like(net[0].weight)
    product = loss.weight_product(F.cross_entropy(net(x), y), direction.unsqueeze(0))
    assert not product.requires_grad
    torch.testing.assert_close(product[0], torch.einsum("abcd,cd->ab", hessian, direction))
