"""StepRecord: the criterion's own loss and the numbers for a logger."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import batch, network
from torch import nn

from fam_ext import FAMLoss, schedules
from fam_ext.loss.step_record import StepRecord


def test_loss_is_the_total_without_the_term() -> None:
    record = StepRecord(torch.tensor(3.0), torch.tensor(4.0), 0.5)
    assert record.loss == 1.0
    assert StepRecord(torch.tensor(3.0), None, 0.0).loss == 3.0
    assert StepRecord().loss is None


def test_numbers_for_a_logger() -> None:
    assert StepRecord().as_dict() == {}
    record = StepRecord(torch.tensor([3.0, 5.0]), torch.tensor([4.0, 4.0]), 0.5)
    assert record.as_dict("train/") == {"train/loss": 2.0, "train/flatness": 4.0, "train/strength": 0.5}
    assert list(record.values()) == ["loss", "flatness", "strength"]
    assert record.values()["flatness"] is record.flatness  # unread, of each row
    estimated = StepRecord(torch.tensor(3.0), torch.tensor(4.0), torch.tensor(0.5), None, torch.tensor(0.1))
    assert estimated.as_dict()["standard_error"] == pytest.approx(0.1)


def test_a_step_without_the_term_has_no_flatness_to_log() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], schedules.Warmup(0.5, 2))
    criterion(net(x), y)
    assert criterion.last.as_dict() == {
        "loss": pytest.approx(float(F.cross_entropy(net(x), y))),
        "strength": 0.0,
    }
    criterion.reset()
    criterion(net(x), y)
    assert set(criterion.last.as_dict()) == {"loss", "flatness", "strength"}
