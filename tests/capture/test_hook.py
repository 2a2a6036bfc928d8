"""The forward hook: what it records, when it does nothing, and the tools that copy, trace and export modules with it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from inputs import batch, expect, network
from torch import nn

from fam_ext import FAMLoss, RelativeFlatness
from fam_ext.capture.hook import LayerHook, exporting


def hook_of(module: nn.Module) -> LayerHook:
    (hook,) = (h for h in module._forward_hooks.values() if isinstance(h, LayerHook))
    return hook


def test_it_follows_the_criterion_and_the_layer() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    pending = criterion.terms[0].captures.pending
    assert hook_of(net[2]).active
    criterion.eval()
    assert not hook_of(net[2]).active
    criterion.training = True  # some tools set it without train()
    assert hook_of(net[2]).active
    net.eval()
    net(x)
    assert not pending
    net.train()
    out = net(x)
    assert len(criterion.terms[0].captures.pending) == 1 and criterion(out, y).requires_grad
    criterion.detach()
    assert not any(isinstance(h, LayerHook) for h in net[2]._forward_hooks.values())
    criterion.train()
    criterion.attach()
    assert hook_of(net[2]).active


def test_a_new_criterion_in_evaluation_mode_captures_nothing() -> None:
    net, (x, _) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5).eval()
    criterion.detach()
    criterion.attach()
    net(x)
    assert not criterion.terms[0].captures.pending


def test_copies_carry_an_inert_hook() -> None:
    net, (x, _) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not hook_of(copied[2]).active
        copied(x)
    assert not criterion.terms[0].captures.pending


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export(mode: str) -> None:
    """An exported program has no loss; the hook leaves it alone, in training mode too."""
    net, (x, _) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    if mode == "eval":
        criterion.eval()
    for strict in (False, True):
        program = torch.export.export(net, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), net[2](net[1](net[0](x))))
    criterion.reset()


def test_quantization() -> None:
    net, (x, _) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net).eval(), {nn.Linear})
        aware: Any = copy.deepcopy(net).train()
        aware.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        aware = torch.ao.quantization.prepare_qat(aware)
    assert quantized(x).shape == aware(x).shape == (8, 4)
    criterion.detach()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tracing_and_whole_graphs() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5).eval()
    for traced in (
        torch.compile(net, backend="eager", fullgraph=True),
        torch.jit.trace(net, x),
    ):
        torch.testing.assert_close(traced(x), net(x))
    expect(r"criterion\.detach\(\)", lambda: torch.jit.script(net))
    criterion.detach()
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
    criterion.attach()
    criterion.train()
    out = torch.compile(net, backend="eager")(x)
    kappa = RelativeFlatness(nn.CrossEntropyLoss(), net[2])
    expected = kappa(net(x), y)
    criterion(out, y)
    torch.testing.assert_close(criterion.last.flatness, expected.detach())


@pytest.mark.filterwarnings("ignore")
def test_a_trace_in_training_mode_is_that_of_the_network() -> None:
    net, (x, y) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net[2](net[1](net[0](x))))
    criterion.reset()
    criterion(net(x), y)
    assert criterion.last.flatness > 0


def test_the_break_of_the_graph_is_explained() -> None:
    net, (x, _) = network(), batch()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], 0.5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"fam_ext keeps a layer's input"):
        torch.compile(net, backend="eager", fullgraph=True)(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"use *fam_ext\.functional"):
        torch.compile(lambda z: criterion(z, torch.zeros(8).long()), backend="eager", fullgraph=True)(net(x))


class Exporting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if exporting() else x + 0


@pytest.mark.filterwarnings("ignore")
def test_exporting() -> None:
    x = torch.zeros(2)
    torch._dynamo.reset()
    made = [torch.export.export(Exporting(), (x,), strict=strict).module() for strict in (False, True)]
    assert [bool(m(x).all()) for m in (*made, torch.jit.trace(Exporting(), x))] == [True] * 3
    for fullgraph in (False, True):
        compiled = torch.compile(Exporting(), backend="eager", fullgraph=fullgraph)
        assert not compiled(x).any()
    assert not Exporting()(x).any()
