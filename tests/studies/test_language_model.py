"""The language study: its text, methods and losses, and `python studies/language_model.py --quick`, stopped and started again."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))
pytest.importorskip("tokenizers")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from studies import language_data, language_model, language_summary, language_training
from studies.language_data import CONTEXT, Size, Windows
from studies.language_networks import Transformer, mean_loss
from studies.language_training import CHECKPOINTS, METHODS, NUMBERS, Part, configuration
from studies.methods import Range
from studies.store import Run, Store

SCRIPT = Path(__file__).parents[2] / "studies" / "language_model.py"
SMALL = Size(1500, 800, 500, 700, 280, 6, 3000)
PART = Part(16, 4, Range(1e-3, 1e-2))


def text(tokens: int = 400) -> Windows:
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 20, (tokens,), generator=generator)
    return Windows(
        train, train[:130].unfold(0, CONTEXT + 1, CONTEXT), train[-130:].unfold(0, CONTEXT + 1, CONTEXT)
    )


def run(method: str, hyper: dict[str, float], **options: Any) -> dict[str, float]:
    given: dict[str, Any] = {"data": text(), "vocabulary": 20, "seed": 0, "testing": True, **options}
    return language_training.run(METHODS[method], PART, hyper, **given)


HYPER = {"lr": 5e-3, "weight_decay": 0.1}


def test_parts_share_no_package_and_are_read_as_they_are() -> None:
    for parts in (language_data.PRE_TRAINING, language_data.FINE_TUNING):
        names = [name for part in parts for name in part]
        assert len(set(names)) == len(names)
    made = language_data.tokenizer(SMALL)
    assert made.get_vocab_size() == SMALL.vocabulary
    words = "def close(self) -> None:\n    self.é = 1"
    assert made.decode(made.encode(words).ids) == words
    data = language_data.language("pretrain", SMALL)
    assert len(data.train) == SMALL.training and data.validation.shape[1] == CONTEXT + 1
    assert torch.equal(data.test[0, -1], data.test[1, 0])  # each token but the first is predicted once


def test_topics_are_balanced_and_their_parts_differ() -> None:
    data = language_data.topics(SMALL)
    assert data.labels is not None
    for labels, count in zip(data.labels, (4, 1, 1), strict=True):
        assert labels.bincount().tolist() == [count] * len(language_data.TOPICS)
    rows = {tuple(row) for part in data[:3] for row in part.tolist()}
    assert len(rows) == sum(len(part) for part in data[:3])


def test_the_causal_model_sees_no_token_ahead() -> None:
    torch.manual_seed(0)
    model, tokens = Transformer(20, CONTEXT), torch.randint(0, 20, (2, 9))
    logits = model(tokens)
    tokens[:, 5] = (tokens[:, 5] + 1) % 20
    other = model(tokens)
    assert torch.equal(other[:, :5], logits[:, :5]) and not torch.allclose(other[:, 5:], logits[:, 5:])


def test_mean_loss_is_over_all_tokens() -> None:
    torch.manual_seed(0)
    model, rows = Transformer(20, CONTEXT, dropout=0.5), torch.randint(0, 20, (70, CONTEXT + 1))
    loss, accuracy = mean_loss(model, rows)
    assert model.training
    logits = model.eval()(rows[:, :-1])
    assert math.isclose(
        loss, float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).detach()), rel_tol=1e-5
    )
    assert math.isclose(accuracy, float((logits.argmax(2) == rows[:, 1:]).double().mean()), rel_tol=1e-6)


def test_configurations_cover_every_range_and_share_what_is_common() -> None:
    for name, method in METHODS.items():
        made = [configuration(method, PART, k, 5) for k in range(5)]
        assert all(len({one[key] for one in made}) == 5 for key in made[0])
        plain = [configuration(METHODS["adamw"], PART, k, 5) for k in range(5)]
        for one, common in zip(made, plain, strict=True):
            assert {key: one[key] for key in common} == common
        wanted = {
            "dropout": method.dropout,
            "rho": method.sam,
            "strength": method.noise,
            "head_strength": method.head,
        }
        assert {key for key, value in wanted.items() if value} == set(made[0]) - {"lr", "weight_decay"}, name


def test_a_method_of_strength_0_trains_as_adamw() -> None:
    expected = run("adamw", HYPER)
    for name, extra in {
        "dropout": {"dropout": 0.0},
        "fam_noise": {"strength": 0.0},
        "fam_head": {"head_strength": 0.0},
    }.items():
        got = run(name, {**HYPER, **extra})
        for key in ("test", "final_test", "validation_3"):
            assert math.isclose(got[key], expected[key], rel_tol=1e-4), (name, key)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sam", {"rho": 0.2}),
        ("fam_noise", {"strength": 0.01}),
        ("fam_head", {"head_strength": 0.1}),
        ("dropout", {"dropout": 0.3}),
    ],
)
def test_every_method_changes_the_training(name: str, extra: dict[str, float]) -> None:
    assert abs(run(name, {**HYPER, **extra})["final_train"] - run("adamw", HYPER)["final_train"]) > 1e-3


def test_sam_takes_the_gradient_uphill_and_comes_back() -> None:
    """Against the definition, with a step of SGD."""
    torch.manual_seed(0)
    model, tokens = Transformer(20, CONTEXT), torch.randint(0, 20, (4, 9))
    batch = tokens[:, :-1], tokens[:, 1:]
    parameters = list(model.parameters())

    def gradient() -> list[Tensor]:
        loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
        return list(torch.autograd.grad(loss, parameters))

    start, first = [p.detach().clone() for p in parameters], gradient()
    norm = torch.sqrt(sum((g.square().sum() for g in first), torch.zeros(())))
    with torch.no_grad():
        for p, g in zip(parameters, first, strict=True):
            p += 0.3 * g / norm
    second = gradient()
    with torch.no_grad():
        for p, s in zip(parameters, start, strict=True):
            p.copy_(s)
    language_training._step(model, torch.optim.SGD(parameters, lr=0.1), {"rho": 0.3})(batch)
    for p, s, g in zip(parameters, start, second, strict=True):
        torch.testing.assert_close(p.detach(), s - 0.1 * g, rtol=1e-4, atol=1e-6)


def test_the_best_checkpoint_by_validation_counts() -> None:
    keep: dict[str, Tensor] = {}
    numbers = run("adamw", {**HYPER, "lr": 0.05}, keep=keep)
    validation = [numbers[f"validation_{k}"] for k in range(1, CHECKPOINTS + 1)]
    best = validation.index(min(validation)) + 1
    assert numbers["best_checkpoint"] == best and numbers["test"] == numbers[f"test_{best}"]
    assert numbers["final_test"] == numbers[f"test_{CHECKPOINTS}"] and set(numbers) == set(NUMBERS)
    model = Transformer(20, CONTEXT)
    model.load_state_dict(keep)
    assert math.isclose(mean_loss(model, text().test)[0], numbers["test"], rel_tol=1e-5)
    tuning = run("adamw", HYPER, testing=False)
    assert not any(key.startswith(("test", "train", "final")) for key in tuning)


def test_equal_time_and_the_table(tmp_path: Path) -> None:
    store = Store(tmp_path, "part", NUMBERS)
    for name, step in (("adamw", 10.0), ("sam", 20.0), ("sam_half_the_steps", 20.0)):
        for seed in range(3):
            numbers = {f"validation_{k}": 5.0 - k / 10 for k in range(1, 9)} | {
                f"test_{k}": 6.0 - k / 10 + seed for k in range(1, 9)
            }
            numbers |= {"test": 5.2 + seed, "train": 4.0, "final_test": 5.2, "accuracy": 0.1, "step_ms": step}
            store.add(Run(name, "test", seed, {}, numbers))
    lines = {str(line[0]): line for line in language_summary.rows(Store(tmp_path, "part", NUMBERS))}
    equal = language_summary.HEADER.index("equal time")
    assert [lines[n][equal] for n in ("adamw", "sam_half_the_steps")] == pytest.approx([6.2, 6.2])
    assert lines["sam"][equal] == pytest.approx(6.6)  # four of eight checkpoints
    assert lines["sam"][3] == pytest.approx(0.0) and lines["sam"][6] == pytest.approx(2.2)


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def start(*arguments: str) -> str:
        command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=600, check=True
        ).stdout

    assert "Not finished" in start("--minutes", "0.0001")
    done = start()
    assert "Not finished" not in done and "## topics" in done and "| fam_noise | 2 |" in done
    runs = {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    grid = language_model.QUICK
    for part in ("pretrain", "finetune", "topics"):
        assert len(list(csv.DictReader(runs[f"{part}.csv"].splitlines()))) == len(grid.methods) * (
            grid.configurations + grid.seeds
        )
    assert start("--part", "summary") == done and (tmp_path / "strength.png").exists()
    assert runs == {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
