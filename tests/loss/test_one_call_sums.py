"""A head among hidden layers in a positive form: its loss and kappa are one operation, and the sum is as if they were two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import ON_OTHER
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError
from fam_ext.loss import fam_loss

pytestmark = pytest.mark.on_devices

STRENGTH, B = 0.3, 6
FISHER = {"curvature": "fisher"}


class Net(nn.Module):
    """A convolution, a linear layer, and a head; `scale` makes the head one layer more inside."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv1d(2, 3, 2), nn.Linear(9, 5), nn.Linear(5, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(self.conv(x).tanh().flatten(1)).sigmoid())
        return logits if self.scale == 1.0 else self.scale * logits


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 2, 4).double(), torch.tensor([0, 3, 1, -100, 2, 2])


def steps(net: Net, make: Any, options: dict[str, Any], count: int = 3) -> list[list[Tensor]]:
    """What `make(options)` returns of each of several batches, and its gradients."""
    criterion = make(options)  # each draws from a generator of its own, and all of these from one seed
    taken = []
    for seed in range(count):
        torch.manual_seed(seed)
        values = criterion(net, *data())
        taken.append([*values, *torch.autograd.grad(values[0], list(net.parameters()))])
    return taken


def together(ce: nn.Module, net: Net, strength: Any = STRENGTH, **call: Any) -> Any:
    def make(options: dict[str, Any]) -> Any:
        fam = FAMLoss.for_model(ce, net, "*", strength=strength, **options)

        def step(net: Net, x: Tensor, y: Tensor) -> list[Tensor]:
            total = fam(net(x), y, **call)
            last = fam.last
            assert last.total is not None and last.flatness is not None and last.loss is not None
            error = last.flatness * 0 if last.standard_error is None else last.standard_error
            return [total, last.total, last.flatness, last.loss, error]

        return step

    return make


def apart(
    ce: nn.Module, net: Net, shares: tuple[float, float, float] = (1.0, 1.0, 1.0), over: float = 1.0
) -> Any:
    """The criterion's own loss, and to it the terms of RelativeFlatness."""

    def make(options: dict[str, Any]) -> Any:
        term = RelativeFlatness(ce, [net.conv, net.inner, net.head], **options)
        for part, share in zip(term.terms, shares, strict=True):
            part.set_share(share)

        def step(net: Net, x: Tensor, y: Tensor) -> list[Tensor]:
            outputs = net(x)
            kappa = term(outputs, y) / over
            loss = ce(outputs, y) / over
            error = kappa * 0 if term.standard_error is None else term.standard_error / over
            total = loss + STRENGTH * kappa
            return [total, total.detach(), kappa.detach(), loss.detach(), error.detach()]

        return step

    return make


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["head", "no head"])
@pytest.mark.parametrize(
    "options",
    [
        FISHER,
        {"curvature": "ggn"},
        {**FISHER, "probes": 3},
        {**FISHER, "normalize": "fan_in"},
        {**FISHER, "curvature_grad": False},
        {**FISHER, "backend": "reference"},
        {**FISHER, "measure": "layerwise"},
        {"curvature": "empirical_fisher"},
    ],
    ids=str,
)
def test_as_if_apart(options: dict[str, Any], scale: float) -> None:
    """In the first step, which finds the head, and in later ones."""
    net, ce = Net(scale).double(), nn.CrossEntropyLoss()
    got, want = steps(net, together(ce, net), options), steps(net, apart(ce, net), options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("ce", [{"reduction": "sum"}, {"label_smoothing": 0.2}, {"weight": True}], ids=str)
def test_as_if_apart_for_every_cross_entropy(ce: dict[str, Any]) -> None:
    if "weight" in ce:
        ce["weight"] = torch.tensor([0.5, 1.0, 2.0, 0.1]).double()
    net, loss = Net().double(), nn.CrossEntropyLoss(**ce)
    got, want = (steps(net, make(loss, net), {"curvature": "ggn"}) for make in (together, apart))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_as_if_apart_with_a_number_of_items() -> None:
    net = Net().double()
    got = steps(net, together(nn.CrossEntropyLoss(), net, num_items=7), FISHER)
    want = steps(net, apart(nn.CrossEntropyLoss(reduction="sum"), net, over=7.0), FISHER)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_as_if_apart_with_a_strength_for_each_layer() -> None:
    net, ce = Net().double(), nn.CrossEntropyLoss()
    strengths = {"conv": STRENGTH, "inner": 3 * STRENGTH, "head": 2 * STRENGTH}
    got = steps(net, together(ce, net, strengths), FISHER)
    want = steps(net, apart(ce, net, (1.0, 3.0, 2.0)), FISHER)
    for g, w in zip(got, want, strict=True):
        del g[2], w[2]  # kappa, which counts the strengths there
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_the_criterion_is_not_taken_beside_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls, ordinary = Net().double(), [], []
    ce = nn.CrossEntropyLoss()
    monkeypatch.setattr(
        type(ce), "forward", lambda *a: calls.append(a) or nn.functional.cross_entropy(*a[1:])
    )
    short = fam_loss.one_pass.ordinary_step
    monkeypatch.setattr(
        fam_loss.one_pass, "ordinary_step", lambda *a: ordinary.append(short(*a)) or ordinary[-1]
    )
    bound = fam_loss.FAMLoss.for_model(ce, net, "*", strength=STRENGTH, **FISHER)
    bound._bind = lambda target: fam_loss.one_pass.CrossEntropy(target)  # as of torch's own forward
    for _ in range(3):
        x, y = data()
        bound(net(x), y).backward()
    assert not calls and [plan.method for plan in bound.plan] == ["fisher", "fisher", "closed_form"]
    assert len(ordinary) == 2  # the first step looked for the head


def test_refused_in_every_step() -> None:
    """What the first step, which looks at everything, refuses."""
    net, ce = Net().double(), nn.CrossEntropyLoss()
    fam = FAMLoss(ce, [net.head, net.conv], STRENGTH, method="closed_form", **FISHER)
    for _ in range(2):
        x, y = data()
        with pytest.raises(UnsupportedError, match="not the output of `layer`"):
            fam(net(x), y)
    fam.detach()
    for layers in (["head"], "*"):
        fam = FAMLoss.for_model(ce, net, layers, strength=STRENGTH, **FISHER)
        for smoothing in (0.0, 0.0, 0.1):
            ce.label_smoothing = smoothing
            x, y = data()
            if not smoothing:
                fam(net(x), y)
                continue
            with pytest.raises(UnsupportedError, match="without class weights and label smoothing"):
                fam(net(x), y)
    ce.label_smoothing = 0.0
    if ON_OTHER:  # nobody reads targets there
        return
    x, y = data()
    with pytest.raises(IndexError, match="FAMLoss: target"):
        fam(net(x), y + 4)
    outputs = net(x)
    ce.reduction = "none"
    with pytest.raises(UnsupportedError, match="must return one number"):
        fam(outputs, y)
