"""FAMTrainerMixin on two ranks with accumulation: the update of one process with the whole batch, and a run that is resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
import trainer_runs

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
HELPERS = Path(trainer_runs.__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HELPERS / "trainer_runs.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def by_hand() -> tuple[dict[str, Tensor], list[Tensor], list[float]]:
    """Weights, the first gradient and the losses of one process, kappa from the definition."""
    model = trainer_runs.language_model()
    data, size = trainer_runs.texts(), trainer_runs.PER_UPDATE
    first: list[Tensor] = []
    losses = []
    for start in range(0, len(data), size):
        ids, labels = (
            torch.stack([row[k] for row in data[start : start + size]]) for k in ("input_ids", "labels")
        )
        features = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
        target = labels[:, 1:].flatten()
        kept = target != -100
        weight = model.lm_head.weight
        loss = F.cross_entropy(features @ weight.T, target)
        traces = oracle.softmax_trace(features @ weight.T, weight)
        kappa = (features.square().sum(1) * traces)[kept].sum() / kept.sum()
        total = loss + trainer_runs.STRENGTH * kappa
        gradients = torch.autograd.grad(total, list(model.parameters()))
        first = first or list(gradients)
        losses.append(total.item())
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= trainer_runs.RATE * g
    return {name: p.detach() for name, p in model.named_parameters()}, first, losses


@pytest.mark.parametrize("kind", ["logits", "patch"])
def test_the_update_is_that_of_the_whole_batch(kind: str, ranks: list[dict[str, Any]]) -> None:
    weights, gradients, losses = by_hand()
    for rank in ranks:
        result = rank[kind]
        assert result["ranks"] == 2 and result["step"] == trainer_runs.UPDATES
        # the patch accumulates sums over rows in chunks
        torch.testing.assert_close(result["gradients"], gradients, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(result["weights"], weights, rtol=1e-9, atol=1e-11)
    assert ranks[0][kind]["losses"] == pytest.approx(losses, rel=1e-4)  # as Trainer rounds them


def test_a_resumed_run_is_the_run_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed"]["step"] == trainer_runs.UPDATES
        for name, expected in rank["noise"]["weights"].items():
            assert torch.equal(rank["resumed"]["weights"][name], expected), name
            assert torch.equal(expected, ranks[0]["noise"]["weights"][name]), name
