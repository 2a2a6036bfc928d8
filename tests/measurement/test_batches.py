"""A model over its batches: calls, weighted means, gradients of the data set, and modes that come back."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext.measurement import batches
from fam_ext.measurement.batches import DataSet, Mean, batch_weight, mode

pytestmark = pytest.mark.on_devices


def data(criterion: Any = None, model: Any = None, batches: Any = None) -> DataSet:
    x, y = torch.randn(7, 3), torch.tensor([0, 1, 1, 0, -100, 1, 0])
    batches = list(zip(x.split(4), y.split(4), strict=True)) if batches is None else batches
    return DataSet(model or nn.Linear(3, 2), batches, criterion or nn.CrossEntropyLoss(), False)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"weight": torch.tensor([1.0, 3.0])}], ids=str)
def test_loss_and_gradient_are_those_of_all_at_once(options: dict[str, Any]) -> None:
    """Batches of other sizes, ignored targets and class weights count as the criterion counts them."""
    of_all = data(nn.CrossEntropyLoss(**options))
    x, y = (torch.cat(parts) for parts in zip(*of_all.batches, strict=True))
    loss = of_all.criterion(of_all.model(x), y)
    assert math.isclose(of_all.loss(), float(loss), rel_tol=1e-6)
    parameters = list(of_all.model.parameters())
    for got, want in zip(of_all.gradient(parameters), torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(got, want)


def test_a_parameter_that_the_loss_does_not_know() -> None:
    of_all = data()
    other = nn.Parameter(torch.ones(2))
    assert torch.equal(of_all.gradient([other])[0], torch.zeros(2))


def test_inputs_of_every_kind() -> None:
    def model(a: Tensor, b: Tensor | float = 1.0) -> Tensor:
        return a * b

    call = data(model=model).call
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert torch.equal(call(two), two)
    assert torch.equal(call((one, two)), two) and torch.equal(call([one, two]), two)
    assert torch.equal(call({"a": one, "b": two}), two)


@pytest.mark.parametrize("batch", [torch.ones(2), (1, 2, 3), {"x": 1, "y": 2}])
def test_batches_that_are_no_pairs(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"measure: batches must be an iterable of pairs \(inputs, targets\)"):
        list(data(batches=[batch]).pairs())


def test_weights_of_batches() -> None:
    z, y = torch.randn(4, 2), torch.tensor([0, -100, 1, 1])
    assert batch_weight(nn.CrossEntropyLoss(), z, y) == (3.0, 3.0)
    assert batch_weight(nn.CrossEntropyLoss(reduction="sum"), z, y) == (1.0, None)
    assert batch_weight(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), z, y) == (7.0, 7.0)
    assert batch_weight(nn.MSELoss(), z, z) == (8.0, 8.0)
    assert batch_weight(F.cross_entropy, z, y) == (3.0, 3.0)
    assert batch_weight(nn.HuberLoss(), z, z) == (4.0, 4.0)  # not known: by the number of targets
    assert batch_weight(nn.HuberLoss(reduction="sum"), z, z) == (1.0, None)


def test_means() -> None:
    z = torch.randn(4, 2)
    mean = Mean()
    assert math.isnan(mean.value())
    for targets, value in (
        (torch.tensor([0, 0, 0, -100]), 2.0),
        (torch.full((4,), -100), math.nan),
        (torch.tensor([0, -100, -100, -100]), 6.0),
    ):
        mean.add(nn.CrossEntropyLoss(), z[: len(targets)], targets, value)
    assert mean.value() == (3 * 2.0 + 6.0) / 4
    total = Mean()
    for value in (2.0, 6.0):
        total.add(nn.CrossEntropyLoss(reduction="sum"), z, torch.zeros(4).long(), value)
    assert total.value() == 8.0


@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].eval()
    with pytest.raises(ZeroDivisionError), torch.inference_mode(), mode(model, training):
        assert all(m.training == training for m in model.modules())
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    assert [m.training for m in model] == [True, False, True]


def test_passes_without_a_bar_of_their_own_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    bars = []

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(batches, "_tqdm", lambda: Bar)
    data = batches.DataSet(
        nn.Linear(2, 2), [(torch.ones(1, 2), torch.tensor([0]))], nn.CrossEntropyLoss(), True
    )
    with data.counting_passes():
        data.loss()
        data.loss()
        list(data.pairs("shown"))
    list(data.pairs())
    passes, shown = bars
    assert (passes.n, passes.delay, shown.desc) == (2, 2, "shown")
    quiet = batches.DataSet(data.model, data.batches, data.criterion, False)
    with quiet.counting_passes():
        quiet.loss()
    assert len(bars) == 2
