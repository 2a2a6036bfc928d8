"""The weights after a few updates are those of a loop with kappa from the full float64 Hessian: accumulation, SAM, LBFGS,
GradScaler, averaged weights, accelerate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import update_loops
from torch import Tensor, nn

from fam_ext import FAMLoss


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("layer", [0, 2], ids=["inner", "head"])
@pytest.mark.parametrize("loop", update_loops.LOOPS)
def test_weights_after_updates(loop: str, layer: int) -> None:
    expected = update_loops.network()
    update_loops.LOOPS[loop](expected, update_loops.by_definition(layer), lambda optimizer: None)
    net = update_loops.network()
    criterion = FAMLoss(
        nn.CrossEntropyLoss(), net[layer], update_loops.WARMUP, method="auto" if layer else "exact"
    )
    strengths = []

    def loss(net: nn.Sequential, x: Tensor, y: Tensor, step: int) -> Tensor:
        assert criterion.step == step
        total: Tensor = criterion(net(x), y)
        strengths.append(criterion.last.strength)
        return total

    update_loops.LOOPS[loop](net, loss, criterion.follow)
    assert criterion.step == update_loops.UPDATES
    assert sorted(set(strengths)) == pytest.approx([0.0, 0.2, 0.4, 0.6])
    torch.testing.assert_close(parameters(net), parameters(expected), rtol=1e-8, atol=1e-11)


def test_averaged_weights() -> None:
    """A copy of the model carries no criterion: it is evaluated, and the one that is trained is not disturbed."""
    nets = [update_loops.network() for _ in range(2)]
    criterion = FAMLoss(nn.CrossEntropyLoss(), nets[0][2], update_loops.WARMUP)
    averaged = [
        torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        for net in nets
    ]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.2) for net in nets]
    criterion.follow(optimizers[0])
    by_definition = update_loops.by_definition(2)
    for step, (x, y) in enumerate(update_loops.batches(4)):
        totals = [criterion(nets[0](x), y), by_definition(nets[1], x, y, step)]
        for total, net, optimizer, average in zip(totals, nets, optimizers, averaged, strict=True):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            average.update_parameters(net)
            average(x)
    torch.testing.assert_close(parameters(averaged[0]), parameters(averaged[1]), rtol=1e-9, atol=1e-12)


def test_accelerate(tmp_path: Path) -> None:
    """Accumulation by its context, its optimizer's wrapper, and a state that is saved and loaded."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def run(updates: int, start: int = 0) -> tuple[Any, FAMLoss]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = update_loops.network()
        criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], update_loops.WARMUP)
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5))
        criterion.follow(optimizer)
        accelerator.register_for_checkpointing(criterion)
        if start:
            accelerator.load_state(str(tmp_path / "state"))
            assert criterion.step == start
        for x, y in update_loops.batches(2 * update_loops.UPDATES)[2 * start : 2 * updates]:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        if updates < update_loops.UPDATES:
            accelerator.save_state(str(tmp_path / "state"))
        return net, criterion

    expected = update_loops.network()
    update_loops.accumulated(expected, update_loops.by_definition(2), lambda optimizer: None)
    whole, criterion = run(update_loops.UPDATES)
    assert criterion.step == update_loops.UPDATES
    torch.testing.assert_close(parameters(whole), parameters(expected), rtol=1e-9, atol=1e-12)
    run(2)
    resumed, _ = run(update_loops.UPDATES, start=2)
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name
