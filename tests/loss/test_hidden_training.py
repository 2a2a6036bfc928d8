"""Layers inside a network as a user trains them: side effects, several calls, several layers, dropout, ways to call."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError
from fam_ext.derivatives import verdicts

pytestmark = pytest.mark.on_devices

METHODS: list[dict[str, Any]] = [{"method": "exact"}, {"method": "hutchinson"}, {"curvature": "ggn"}]


@pytest.fixture(autouse=True)
def verified_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_warned", set())


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.randint(0, 3, (8,))


@pytest.mark.parametrize("options", METHODS)
def test_no_traces_are_left(options: dict[str, Any]) -> None:
    """Statistics move once, .grad is only the loss's, random numbers are as without the term."""
    net, (x, y) = network(), batch()
    net.insert(3, nn.BatchNorm1d(4, momentum=0.5))
    if "curvature" in options:
        net.insert(0, net.pop(3))  # samples must not interact after the layer
        net[0] = nn.BatchNorm1d(5)
    plain = copy.deepcopy(net)
    torch.manual_seed(3)
    F.cross_entropy(plain(x), y).backward()
    state = torch.get_rng_state()
    layer = [m for m in net if isinstance(m, nn.Linear)][1]
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 1e-12, **options)
    torch.manual_seed(3)
    loss = criterion(net(x), y)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    loss.backward()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, b), c in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=0, atol=0, msg=name)
    before = [p.grad.clone() for p in net.parameters()]
    torch.manual_seed(3)
    criterion(net(x), y).backward()  # accumulates
    for p, g in zip(net.parameters(), before, strict=True):
        assert p.grad.norm() > 1.5 * g.norm()


def test_the_backbone_is_differentiated_once() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    net, (x, y) = network(), batch()
    for options in METHODS:
        criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5, **options)
        criterion(net[2:](Once.apply(net[:2](x))), y).backward()
        assert net[0].weight.grad is not None
        behind = FAMLoss(nn.CrossEntropyLoss(), net[0], 0.5, **options)
        with pytest.raises(RuntimeError, match=r"once_differentiable|once only.*OnceBackward"):
            behind(net[2:](Once.apply(net[:2](x))), y).backward()


@pytest.mark.parametrize("options", METHODS)
def test_memory_is_constant_over_200_steps(options: dict[str, Any]) -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.1, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()

    def alive() -> int:
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    for _ in range(10):
        step()
    gc.collect()
    gc.disable()
    try:
        first = alive()
        for _ in range(200):
            step()
        assert alive() <= first
    finally:
        gc.enable()


def double_network() -> tuple[nn.Module, Tensor, Tensor]:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.norm, self.out = nn.Linear(3, 3), nn.GroupNorm(1, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(self.norm(torch.tanh(self.shared(torch.tanh(self.shared(x))))))
            return result

    return Twice().double(), torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 2, (4,))


@pytest.mark.parametrize("measure", ["neuronwise", "trace"])
def test_a_layer_called_twice_is_one_weight(measure: str) -> None:
    """Cross terms of the two calls count."""
    net, x, y = double_network()
    weight = net.shared.weight

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, {"shared.weight": w}, (x,)), y)

    expected = oracle.kappa(loss, weight, measure)
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), net.shared, measure=measure, method="exact")
    value = criterion(net(x), y)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for g, e in zip(
        *(torch.autograd.grad(v, list(net.parameters())) for v in (value, expected)), strict=True
    ):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-11)
    estimate = RelativeFlatness(
        nn.CrossEntropyLoss(), net.shared, measure=measure, method="hutchinson", probes=200
    )
    assert abs(estimate(net(x), y) - expected) < 4 * estimate.standard_error
    frozen = copy.deepcopy(net)
    frozen.shared.weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"several times.*requires grad"):
        RelativeFlatness(nn.CrossEntropyLoss(), frozen.shared)(frozen(x.requires_grad_()), y)


def test_dropout_has_the_same_mask_in_every_product() -> None:
    """The exact value for the mask drawn: that of the network with the mask multiplied in."""
    layer, out = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(6, 4, dtype=torch.float64), 0.5)
    torch.manual_seed(5)
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), layer)
    value = criterion(out(F.dropout(torch.tanh(layer(x)), 0.5)), y)
    masked = RelativeFlatness(nn.CrossEntropyLoss(), layer)
    torch.testing.assert_close(value, masked(out(torch.tanh(layer(x)) * mask), y))


def test_held_curvature() -> None:
    """Gradient through the weights' inner products alone: kappa(G) is linear in G, so it is that of Tr(W W^T M), M held."""
    net, (x, y) = network().double(), batch()
    net[4].p = 0.0
    x, weight = x.double(), net[2].weight

    for options in ({"method": "exact"}, {"curvature": "ggn"}):
        held = RelativeFlatness(nn.CrossEntropyLoss(), net[2], curvature_grad=False, **options)
        free = RelativeFlatness(nn.CrossEntropyLoss(), net[2], **options)
        value = held(net(x), y)
        torch.testing.assert_close(value.detach(), free(net(x), y).detach())
        grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
        assert [g is not None for g in grads] == [p is weight for p in net.parameters()]
        # degree two in the weight, the Hessian held
        torch.testing.assert_close((grads[2] * weight).sum(), 2 * value)
    probe = RelativeFlatness(
        nn.CrossEntropyLoss(), net[2], curvature_grad=False, method="hutchinson", probes=3
    )
    estimate = probe(net(x), y)
    (grad,) = torch.autograd.grad(estimate, weight)
    torch.testing.assert_close((grad * weight).sum(), 2 * estimate.detach())


def test_finite_differences() -> None:
    net, (x, y) = network().double(), batch()
    x = x.double()
    net.insert(3, nn.BatchNorm1d(4).double())
    exact = RelativeFlatness(nn.CrossEntropyLoss(), net[2], method="exact", curvature_grad=True)
    net[5].p = 0.0
    expected = exact(net(x), y)
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 1.0, method="finite_difference", probes=400)
    out = net(x)
    statistics = copy.deepcopy(dict(net[3].named_buffers()))
    state = torch.get_rng_state()
    total = criterion(out, y, closure=lambda: F.cross_entropy(net(x), y))
    assert all(torch.equal(b, statistics[n]) for n, b in net[3].named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    value = total - F.cross_entropy(out, y)
    assert abs(value - expected) < 4 * criterion.last.standard_error
    (g,), (e,) = (torch.autograd.grad(v, net[2].weight) for v in (value, expected))
    assert abs(((g - e) * net[2].weight).sum()) < 30 * criterion.last.standard_error
    assert "rounding error" in str(criterion.plan)
    with pytest.raises(UnsupportedError, match="closure="):
        criterion(net(x), y)
    assert isinstance(net[2].weight, nn.Parameter)


def test_any_criterion_serves() -> None:
    """Ones without closed form, and a head behind an operation that is not only a view."""
    net, (x, y) = network().double(), batch()
    x, target = x.double(), torch.rand(8, 3, dtype=torch.float64)
    for criterion, args in (
        (nn.HuberLoss(delta=0.3), (target,)),
        (lambda out, t: (out.logsumexp(1) - t.sum(1)).exp().mean(), (target,)),
        (nn.NLLLoss(), (y,)),
    ):
        for layer in (net[2], net[5]):
            net[4].p = 0.0
            head = (lambda z: z.log_softmax(1)) if isinstance(criterion, nn.NLLLoss) else (lambda z: z)
            measure = RelativeFlatness(criterion, layer, method="exact")
            value = measure(head(net(x)), *args)
            name = f"{list(net).index(layer)}.weight"

            def loss(
                w: Tensor, name: str = name, c: Any = criterion, head: Any = head, args: Any = args
            ) -> Tensor:
                return c(head(torch.func.functional_call(net, {name: w}, (x,))), *args)

            torch.testing.assert_close(value, oracle.kappa(loss, layer.weight), rtol=1e-9, atol=1e-12)


def test_mistakes_are_told() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    with pytest.raises(UnsupportedError, match="not called since the last loss"):
        criterion(torch.randn(8, 3, requires_grad=True), y)
    with torch.no_grad():
        out = net(x)
    with pytest.raises(UnsupportedError, match="no_grad"):
        criterion(out, y)
    each = FAMLoss(nn.CrossEntropyLoss(reduction="none"), net[2], 0.5)
    with pytest.raises(UnsupportedError, match="must return one number"):
        each(net(x), y)
    with pytest.raises(UnsupportedError, match="samples interact"):
        shared = RelativeFlatness(nn.CrossEntropyLoss(), net[2], per_sample_probes=False)
        shared(net(x), y, per_sample=True)
    with pytest.raises(ValueError, match="generator must be on"):
        foreign = torch.Generator()
        one = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5, method="hutchinson", generator=foreign)
        one.terms[0].generator(torch.device("meta"))


def test_finite_differences_of_a_layer_that_was_never_called() -> None:
    """The closure tells nothing of it: kappa would be 0 for good."""
    net, other = network(), nn.Linear(4, 6)
    x, y = batch()
    made = FAMLoss(nn.CrossEntropyLoss(), other, 0.1, method="finite_difference")
    with pytest.raises(UnsupportedError, match="was not called"):
        made(net(x), y, closure=lambda: F.cross_entropy(net(x), y))


def test_per_sample_shares_add_up() -> None:
    net, (x, y) = network(), batch()
    for options in METHODS:
        torch.manual_seed(1)
        measure = RelativeFlatness(nn.CrossEntropyLoss(), net[2], **options)
        parts = measure(net(x), y, per_sample=True)
        torch.manual_seed(1)
        again = RelativeFlatness(nn.CrossEntropyLoss(), net[2], **options)
        assert parts.shape == (8,)
        torch.testing.assert_close(parts.sum(), again(net(x), y))


def test_plan_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    assert criterion.plan is None
    with caplog.at_level(logging.INFO, logger="fam_ext"):
        for _ in range(3):
            criterion(net(x), y)
    assert len(caplog.records) == 1 and "exact (rows independent), 4 products" in caplog.text


def test_copies_and_pickles() -> None:
    net, (x, y) = network(), batch()
    net[4].p = 0.0
    criterion = FAMLoss(nn.CrossEntropyLoss(), [net[0], net[2]], 0.5, method="exact")
    expected = criterion(net(x), y)
    for net2, criterion2 in (copy.deepcopy((net, criterion)), pickle.loads(pickle.dumps((net, criterion)))):
        assert criterion2.terms[1].module is net2[2] and len(net2[2]._forward_hooks) == 1
        torch.testing.assert_close(criterion2(net2(x), y), expected)


def test_autocast() -> None:
    net, (x, y) = network(), batch()
    net[4].p = 0.0
    exact = RelativeFlatness(nn.CrossEntropyLoss(), net[2], method="exact")(net(x), y)
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5, method="exact")
    with torch.autocast("cpu", torch.bfloat16):
        criterion(net(x), y).backward()
    assert criterion.last.flatness.dtype == torch.float32
    torch.testing.assert_close(criterion.last.flatness, exact.detach(), rtol=0.1, atol=0.02)


def test_evaluation_mode_is_the_plain_loss() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5, method="finite_difference")
    net.eval()
    assert criterion(net(x), y, closure=lambda: None) == F.cross_entropy(net(x), y)


@pytest.mark.parametrize("zero", ["head", "gamma", "gate"])
def test_interaction_that_a_weight_of_zero_hides_at_first(zero: str) -> None:
    """kappa and its gradient stay those of the full Hessian while the weight that lets rows interact leaves zero."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
            self.norm, self.gate = nn.BatchNorm1d(3), nn.Parameter(torch.zeros(()))
            nn.init.zeros_({"head": self.head, "gamma": self.norm, "gate": self.norm}[zero].weight)

        def tail(self, x: Tensor, z: Tensor) -> Tensor:
            if zero == "gate":
                return self.head(torch.tanh(z + self.gate * z.mean(0)))
            if zero == "gamma":  # batch_norm by hand: torch's third derivative is wrong
                scaled = (z - z.mean(0)) * (z.var(0, correction=0) + self.norm.eps).rsqrt()
                return self.head(torch.tanh(x + scaled * self.norm.weight + self.norm.bias))
            return self.head(torch.tanh(z - z.mean(0)))

        def forward(self, x: Tensor) -> Tensor:
            if zero == "gamma":
                return self.head(torch.tanh(x + self.norm(self.layer(x))))
            return self.tail(x, self.layer(x))

    net, x, y = Net().double(), torch.randn(6, 3).double(), torch.randint(0, 3, (6,))
    criterion = FAMLoss(nn.CrossEntropyLoss(), net.layer, 0.5, method="exact")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for step in range(3):
        optimizer.zero_grad()
        criterion(net(x), y).backward()

        def loss(weight: Tensor) -> Tensor:
            return F.cross_entropy(net.tail(x, F.linear(x, weight, net.layer.bias)), y)

        kappa = oracle.kappa(loss, net.layer.weight)
        torch.testing.assert_close(criterion.last.flatness, kappa.detach())
        if step or zero != "gate":  # on its first step nothing tells of the gate
            wanted = torch.autograd.grad(
                loss(net.layer.weight) + 0.5 * kappa, [*net.head.parameters(), net.layer.weight]
            )
            got = [p.grad for p in (*net.head.parameters(), net.layer.weight)]
            torch.testing.assert_close(got, list(wanted))
        optimizer.step()


def test_samples_that_a_weight_of_zero_keeps_apart_at_first() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    x, y = batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[0], 0.5, curvature="ggn", hold_statistics=False)
    nn.init.zeros_(net[1].weight)
    assert criterion(net(x), y).isfinite() and criterion.last.flatness == 0
    nn.init.ones_(net[1].weight)
    with pytest.raises(UnsupportedError, match="samples interact"):
        criterion(net(x), y)


@pytest.mark.parametrize("options", [*METHODS, {"curvature": "fisher"}, {"measure": "layerwise_eigenvalue"}])
@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 5), (3, 0, 5)])
def test_no_rows(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    criterion = FAMLoss(nn.CrossEntropyLoss(reduction="sum"), net[0], 0.5, **options)
    out = net(torch.randn(shape))
    total = criterion(out.movedim(-1, 1), torch.zeros(shape[:-1], dtype=torch.int64))
    total.backward()
    assert total == 0 and criterion.last.flatness == 0
    assert net[0].weight.grad is not None and not net[0].weight.grad.any()
