"""FAMLoss where one call is out of the ordinary: other hooks, dependent targets, a replaced criterion; and its short way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import batch, expect, network
from torch import Tensor, nn

import fam_ext
from fam_ext import FAMLoss, RelativeFlatness

pytestmark = pytest.mark.on_devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_hook_that_changes_the_output_is_refused(dtype: torch.dtype) -> None:
    x, y = batch()
    for change in (lambda z: 2 * z, lambda z: z.mul_(2)):
        layer = nn.Linear(5, 4)
        layer.register_forward_hook(lambda m, args, z, change=change: change(z))
        criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.5)
        out = layer(x)
        expect("a forward hook on it", lambda c=criterion, z=out: c(z, y))
    for harmless in (lambda z: None, lambda z: z.float()):
        layer = nn.Linear(5, 4).to(dtype)
        layer.register_forward_hook(lambda m, args, z, harmless=harmless: harmless(z))
        criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.5, method="closed_form")
        criterion(layer(x.to(dtype)), y)


def test_a_target_made_from_the_layer_s_own_output() -> None:
    net, (x, _) = network().double(), batch()
    x = x.double()

    def loss(out: Tensor) -> Tensor:
        return F.mse_loss(out, out.flip(0))

    want = RelativeFlatness(loss, net[2], method="exact")(net(x))
    for criterion in (nn.MSELoss(), F.mse_loss):
        term = RelativeFlatness(criterion, net[2])
        out = net(x)
        got = term(out, out.flip(0))
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(k, net[2].weight, retain_graph=True)[0] for k in (got, want)]
        torch.testing.assert_close(*grads)
        detached = net(x)
        assert term(detached, detached.flip(0).detach()) != got
        assert term.plan.method == "closed_form"
    out = net(x)
    term = RelativeFlatness(nn.MSELoss(), net[2], method="closed_form")
    out = net(x)
    expect("target depends on the layer's output", lambda: term(out, out.flip(0)))


def test_hooks_on_the_criterion() -> None:
    net, (x, y) = network(), batch()
    loss, calls = nn.CrossEntropyLoss(), []
    loss.register_forward_hook(lambda m, args, value: calls.append(value))
    criterion = FAMLoss(loss, net[2], 0.5, method="closed_form")
    criterion(net(x), y)
    assert len(calls) == 1
    loss.register_forward_hook(lambda m, args, value: 3 * value)
    expect("hook on the criterion changes", lambda: criterion(net(x), y))
    exact = FAMLoss(loss, net[2], 0.5, method="exact")
    exact(net(x), y)
    three = 3 * RelativeFlatness(nn.CrossEntropyLoss(), net[2])(net(x), y)
    torch.testing.assert_close(exact.last.flatness, three.detach())


def test_the_criterion_may_be_replaced() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    target = torch.randn(len(y), 4)
    for loss, t in (
        (nn.CrossEntropyLoss(label_smoothing=0.2), y),
        (nn.MSELoss(), target),
        (nn.HuberLoss(), target),
    ):
        criterion.criterion = loss
        total, fresh = criterion(net(x), t), FAMLoss(loss, net[2], 0.5)
        torch.testing.assert_close(total, fresh(net(x), t))
        fresh.detach()


@pytest.mark.parametrize("method", ["exact", "hutchinson", "finite_difference"])
def test_a_method_asked_for_is_taken_on_a_head_too(method: str) -> None:
    net, (x, y) = network(), batch()
    probes = 1 if method == "exact" else 2
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5, method=method, probes=probes)
    out = net(x)
    criterion(out, y, closure=lambda: F.cross_entropy(net(x), y))
    assert criterion.plan.method == method
    assert (criterion.last.standard_error is None) == (method == "exact")


@pytest.mark.parametrize(
    "unusual",
    [
        "nothing",
        "earlier call",
        "second loss",
        "changed input",
        "changed output",
        "view",
        "mean",
        "other weight",
    ],
)
def test_short_and_long_way_agree(unusual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way of an ordinary step gives what all checks in Python give, and leaves everything else to them."""

    def step() -> Tensor | str:
        torch.manual_seed(0)
        layer = nn.Linear(5, 4)
        loss = nn.CrossEntropyLoss(reduction="mean" if unusual == "mean" else "sum")
        criterion = FAMLoss(loss, layer, 0.3, method="closed_form")
        x, y = torch.randn(6, 5).requires_grad_(), torch.arange(6) % 4
        features = x * 1
        if unusual == "other weight":
            layer.weight = nn.Parameter(torch.randn(4, 3))
            features = features[:, :3]
        out = layer(features)
        others = [layer(x)] if unusual == "earlier call" else []
        if unusual == "second loss":
            criterion(out, y)
        if unusual.startswith("changed"):
            (features if unusual == "changed input" else out).detach().mul_(2)
        try:
            total = criterion(out[:] if unusual == "view" else out, y)
        except fam_ext.UnsupportedError as error:
            return f"{error} {len(others)}"
        kappa = criterion.last.flatness
        return torch.cat(
            [t.flatten() for t in (total, kappa, *torch.autograd.grad(total, [x, layer.weight]))]
        )

    short = step()
    monkeypatch.setattr("fam_ext.head.one_pass.ordinary_step", lambda *_: None)
    long = step()
    assert short == long if isinstance(long, str) else torch.equal(short, long)  # type: ignore[arg-type]
    assert isinstance(long, str) == (
        unusual in ("earlier call", "changed input", "changed output", "other weight")
    )


class Skipping(nn.Module):
    """Two blocks, the second of which a step may skip, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.first(x).tanh()
        return self.head(x if skip else x + self.second(x).tanh())


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "exact"}, {"method": "hutchinson"}, {"curvature": "ggn"}, {"curvature": "fisher"}],
    ids=str,
)
@pytest.mark.parametrize("criterion_is_known", [True, False])
def test_a_layer_that_a_step_skips_counts_nothing(options: dict[str, Any], criterion_is_known: bool) -> None:
    if not criterion_is_known and "curvature" in options:
        return
    net, (x, y) = Skipping(), batch()
    ce: Any = nn.CrossEntropyLoss() if criterion_is_known else lambda z, t: F.cross_entropy(z, t)
    alone = FAMLoss(ce, net.second, 0.5, **options)
    expect("was not called", lambda: alone(net(x, skip=True), y))  # nothing tells that it ever will be
    alone(net(x), y)
    total = alone(net(x, skip=True), y)
    torch.testing.assert_close(total, F.cross_entropy(net(x, skip=True), y))
    assert alone.last.flatness == 0 and alone.plan.method == "unused"
    total.backward()
    alone(net(x), y)
    assert alone.last.flatness != 0
    alone.detach()
    both = FAMLoss(
        ce,
        [net.first, net.second],
        0.5,
        **options,
        generator=torch.Generator(torch.get_default_device()).manual_seed(0),
    )
    one = FAMLoss(
        ce, net.first, 0.5, **options, generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    )
    both(net(x), y)
    one(net(x), y)
    both.reset()  # that forward pass was the other criterion's
    both.options.generator and both.options.generator.manual_seed(1)
    one.options.generator and one.options.generator.manual_seed(1)
    out = net(x, skip=True)
    torch.testing.assert_close(both(out, y), one(out, y))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.GaussianNLLLoss()])
@pytest.mark.parametrize("make", [lambda c, m: FAMLoss(c, m, 0.1), RelativeFlatness])
def test_a_missing_target_is_refused(criterion: Any, make: Any) -> None:
    """Also where kappa does not depend on it: the criterion has no loss without it."""
    layer = nn.Linear(3, 2)
    rest = (torch.ones(4, 2),) if isinstance(criterion, nn.GaussianNLLLoss) else ()
    made = make(criterion, layer)
    with pytest.raises(TypeError, match="target must be a tensor, got None"):
        made(layer(torch.randn(4, 3)), None, *rest)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("cls", [FAMLoss, RelativeFlatness])
def test_a_class_that_there_is_not_is_named(cls: Any, kind: str, reduction: str, backend: str) -> None:
    """In the name of what was called: by the one operation, and on a head that it does not take."""
    layer: nn.Module = nn.Conv1d(2, 3, 1) if kind == "conv" else nn.Linear(2, 3)
    if not next(layer.parameters()).is_cpu:
        pytest.skip("on a device torch's own kernel finds it: looking would make the host wait")
    shape, rows = ((4, 2, 5), (4, 5)) if kind == "conv" else ((4, 2), (4,))
    options: dict[str, Any] = {"backend": backend} | ({"strength": 0.1} if cls is FAMLoss else {})
    made = cls(nn.CrossEntropyLoss(reduction=reduction), layer, **options)
    for wrong in (3, -1):
        with pytest.raises(
            IndexError, match=rf"^{cls.__name__}: target must be a class index from 0 to 2 .*{wrong}"
        ):
            made(layer(torch.randn(shape)), torch.full(rows, wrong))
    if backend == "auto":
        with pytest.raises(TypeError, match=rf"^{cls.__name__}: target must be class indices of int64"):
            made(layer(torch.randn(shape)), torch.zeros(rows, dtype=torch.int32))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss()])
@pytest.mark.parametrize("normalize", [None, "fan_in"])
def test_a_head_without_features(criterion: Any, normalize: str | None) -> None:
    layer = nn.Linear(0, 3).double()
    target = torch.tensor([0, 2]) if isinstance(criterion, nn.CrossEntropyLoss) else torch.ones(2, 3).double()
    made = FAMLoss(criterion, layer, 0.5, normalize=normalize)
    total = made(layer(torch.zeros(2, 0).double()), target)
    assert total == criterion(layer.bias.expand(2, 3), target) and made.last.flatness == 0
    total.backward()
    assert layer.bias.grad.isfinite().all()


def test_outputs_without_a_shape_are_refused() -> None:
    criterion = FAMLoss(nn.MSELoss(), nn.Linear(3, 2), 0.1)
    with pytest.raises(TypeError, match="FAMLoss: outputs must be the tensor the layer returned"):
        criterion(nn.LazyLinear(2).weight, torch.ones(4, 2))
