"""What a graph is refused for, named so that the reader knows what to change."""

from __future__ import annotations

import warnings

import pytest
import torch
from inputs import batch, expect, needs_native, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from fam_ext import FAMLoss
from fam_ext.derivatives import verdicts


@needs_native
def test_a_criterion_that_is_a_famloss_itself() -> None:
    net, (x, y) = network(), batch()
    inner = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.1)
    outer = FAMLoss(inner, net[0], 0.1)
    expect(
        "holds fam_ext::HeadCrossEntropy, which can be differentiated once only.*give one FAMLoss",
        lambda: outer(net(x), y),
    )


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson"])
def test_reentrant_checkpointing_around_the_layer(method: str) -> None:
    net, (x, y) = network(), batch()
    fam = FAMLoss(nn.CrossEntropyLoss(), net[0], 0.1, method=method)
    z = net[2](checkpoint(net[:2], x.requires_grad_(), use_reentrant=True))
    expect("reentrant checkpointing", lambda: fam(z, y))


def test_anomaly_mode_reports_nothing_of_ours() -> None:
    """Products that vmap has no rule for are tried together first: anomaly mode would report that as an error."""
    layer, rnn, x, y = nn.Linear(2, 2), nn.LSTM(2, 2), torch.randn(2, 2), torch.tensor([0, 1])
    fam = FAMLoss(nn.CrossEntropyLoss(), layer, 0.1, method="exact")
    expected = fam(rnn(layer(x))[0], y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            warnings.simplefilter("error")
            torch.testing.assert_close(fam(rnn(layer(x))[0], y), expected)


def test_every_way_out_is_named() -> None:
    for name, (why, way_out) in verdicts.REFUSED.items():
        assert why and way_out and name.endswith("Backward")
