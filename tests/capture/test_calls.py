"""Captured calls: kept as long as the output's graph, found again from it, and refused where they tell of another call."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fam_ext import FAMLoss, UnsupportedError
from fam_ext.capture.calls import CapturedCall, CapturedCalls, check_tensor, layer_weight
from fam_ext.errors import LayerNotCalled, NoClosedForm

pytestmark = pytest.mark.on_devices


class Recorded:
    """A layer whose calls are recorded, as the hook does it."""

    def __init__(self, without_grad: bool = False, check: bool = False) -> None:
        self.layer = nn.Linear(3, 2)
        self.calls = CapturedCalls("the layer", -1, check)
        self.without_grad = without_grad

    def __call__(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        self.calls.record(self.layer, x, z, self.without_grad)
        return z

    def take(self, outputs: Tensor) -> Any:
        return self.calls.take("test", outputs, -1)


def x() -> Tensor:
    return torch.randn(4, 3)


def test_the_call_of_an_output() -> None:
    recorded, features = Recorded(), x()
    z = recorded(features)
    call, taken, rows = recorded.take(z)
    assert taken is features and call.weight is recorded.layer.weight and rows is None
    assert call.shape == (4, 2) and call.dtype == z.dtype and not recorded.calls.pending
    assert recorded.calls.seen and recorded.calls.idle()


def test_rows_and_casts_of_an_output() -> None:
    recorded, features = Recorded(), x()
    call, taken, rows = recorded.take(recorded(features)[1:3].double())
    assert taken is features and rows.class_dim == 1 and rows.rows.tolist() == [1, 2]
    assert call.used == [True]


def test_features_live_as_long_as_the_graph() -> None:
    recorded = Recorded()
    features = x()
    alive = weakref.ref(features)
    z = recorded(features)
    del features
    gc.collect()
    assert alive() is not None and not recorded.calls.idle()
    del z
    gc.collect()
    assert alive() is None and recorded.calls.idle()


def test_a_second_loss_of_one_output_before_backward_only() -> None:
    recorded = Recorded()
    z = recorded(x())
    first = recorded.take(z)[1]
    assert recorded.take(z)[1] is first
    del first
    z.sum().backward()
    gc.collect()
    with pytest.raises(UnsupportedError, match=r"features of this forward call are gone.*before backward"):
        recorded.take(z)


def test_several_calls_that_wait() -> None:
    recorded = Recorded()
    first, second = recorded(x()), recorded(x())
    for z in (first, second):
        with pytest.raises(
            NoClosedForm, match=r"called 2 times since the last loss and all of its outputs are alive"
        ):
            recorded.take(z)
    del first, z
    gc.collect()
    recorded.take(second)  # the other one's output is gone: a call for a look, not for a loss


def test_an_output_of_before() -> None:
    recorded = Recorded()
    first = recorded(x())
    recorded.take(first)
    second = recorded(x())
    with pytest.raises(NoClosedForm, match="outputs are those of an earlier forward call"):
        recorded.take(first)
    recorded.calls.reset()
    recorded.take(first)
    with pytest.raises(LayerNotCalled, match="the layer was not called since the last loss"):
        recorded.take(torch.zeros_like(second))


def test_changes_in_place() -> None:
    recorded, features = Recorded(), x()
    z = recorded(features)
    features.add_(1)
    with pytest.raises(UnsupportedError, match="input was modified in place after the layer used it"):
        recorded.take(z)
    z = recorded(x())
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(NoClosedForm, match="outputs were modified in place"):
        recorded.take(z)


@pytest.mark.parametrize(
    ("move", "hint"),
    [
        (lambda z: z.log_softmax(1), r"LogSoftmax is in between.*pass the logits to CrossEntropyLoss"),
        (lambda z: z.softmax(1), r"pass the logits instead of probabilities"),
        (lambda z: z.sigmoid(), r"BCEWithLogitsLoss"),
        (lambda z: z + 1, r"Add is in between.*pass the last layer"),
    ],
)
def test_outputs_that_are_more_than_the_layer_s(move: Any, hint: str) -> None:
    recorded = Recorded()
    z = recorded(x())
    with pytest.raises(NoClosedForm, match=hint):
        recorded.take(move(z))
    with pytest.raises(UnsupportedError, match="do not detach them"):
        recorded.take(z.detach())


def test_calls_without_gradients() -> None:
    recorded = Recorded()
    with torch.no_grad():
        z = recorded(x())
    assert recorded.calls.called_without_grad and not recorded.calls.idle()
    with pytest.raises(UnsupportedError, match=r"called under torch.no_grad or inference_mode"):
        recorded.take(z)
    recorded.calls.reset()
    assert recorded.calls.idle()
    measured, features = Recorded(without_grad=True), x()
    with torch.no_grad():
        z = measured(features)
        for outputs, mapped in ((z, False), (z.view(2, 2, 2), True)):
            _, taken, rows = measured.take(outputs)
            assert taken is features and (rows is not None) == mapped
        with pytest.raises(UnsupportedError, match="no graph tells of casts, slices"):
            measured.take(z[1:])


def test_a_call_without_gradients_leaves_a_pending_one() -> None:
    recorded = Recorded(without_grad=True)
    pending = recorded(x())
    with torch.no_grad():
        look = recorded(x())
        recorded.take(look)
    assert recorded.take(pending)[0].shape == (4, 2)


def test_only() -> None:
    """The short way: this very tensor, one call, and nothing has changed."""
    recorded, features = Recorded(), x()
    z = recorded(features)
    call = recorded.calls.only(z)
    assert call is not None and call.features is features
    for other in (z.view(4, 2), z + 0, z.detach()):
        assert recorded.calls.only(other) is None
    features.add_(0)
    assert recorded.calls.only(z) is None
    second = recorded(x())
    assert recorded.calls.only(second) is None  # z waits too
    recorded.calls.reset()
    third = recorded(x())
    assert recorded.calls.only(third) is not None
    recorded.calls.only(third).used[0] = True
    assert recorded.calls.only(third) is None
    fourth = Recorded(check=True)
    assert fourth.calls.only(fourth(x())) is None  # its map must be checked


def test_the_first_row_is_kept_for_a_check() -> None:
    recorded = Recorded(check=True)
    z = recorded(x())
    first = z[0].detach().clone()
    call, _, _ = recorded.take(z)
    assert torch.equal(call.first, first)
    conv = nn.Conv1d(3, 2, 1)
    calls = CapturedCalls("conv", -2, True)
    features = torch.randn(4, 3, 5)
    out = conv(features)
    calls.record(conv, features, out, False)
    assert torch.equal(calls.take("test", out, -2)[0].first, out[0, :, 0])


def test_two_criteria_capture_one_call() -> None:
    one, features = Recorded(), x()
    other = CapturedCalls("the layer", -1, False)
    z = one(features)
    other.record(one.layer, features, z, False)
    assert one.take(z)[0].used is other.take("test", z, -1)[0].used


def test_copies_carry_no_features() -> None:
    call = CapturedCall(x(), nn.Parameter(torch.ones(2, 3)), torch.ones(4, 2))
    for copied in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert copied.features is None and copied.weight is None and not copied.waits()


def test_the_weight_of_the_latest_call() -> None:
    layer = nn.Linear(3, 2)
    assert layer_weight(layer) is layer.weight
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    normed(x())
    state = copy.deepcopy(normed.state_dict())
    weight = layer_weight(normed)
    torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), torch.ones(()), rtol=0.3, atol=0)
    assert all(torch.equal(v, state[k]) for k, v in normed.state_dict().items())  # no power iteration
    assert all(m.training for m in normed.modules())


def test_only_tensors_are_outputs() -> None:
    with pytest.raises(TypeError, match="test: outputs must be the tensor the layer returned"):
        check_tensor("test", {"logits": torch.ones(1)})
    assert check_tensor("test", z := torch.ones(1)) is z


def test_a_weight_that_changes_between_forward_and_loss_is_refused() -> None:
    layer, x, y = nn.Linear(4, 3).double(), torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    criterion = FAMLoss(nn.CrossEntropyLoss(), layer, 0.1)
    out = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(
        UnsupportedError, match="weight was modified in place between the forward pass and the loss"
    ):
        criterion(out, y)
    criterion(layer(x), y)
