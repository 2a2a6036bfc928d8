"""The study's data, methods, training, store and statistics; the study itself on a small scale is in test_run.py."""

from __future__ import annotations

import csv
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from studies import comparison, cost, course, figures
from studies.data import POOL_SEED, Raw, Split, split, wrong_labels
from studies.grids import CORE_METHODS
from studies.methods import CHOICES, METHODS, Method, Training, learning_rate
from studies.networks import NETWORKS, layer_names
from studies.store import Run, Store, Task, best
from studies.training import Budget, run, scores, train

TASK = Task("set", "mlp", 0.4, 60)


def raw(*shape: int, samples: int = 300, classes: int = 3) -> Raw:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(samples) % classes
    return Raw(torch.randn(samples, *shape, generator=generator) + y.reshape(-1, *(1,) * len(shape)), y)


def small() -> Split:
    return split(raw(6), 0, 0.0, 80)


# data


@pytest.mark.parametrize("shape", [(5,), (1, 4, 4), (2, 9)])
def test_a_split_keeps_its_parts_apart(shape: tuple[int, ...]) -> None:
    x = torch.arange(300.0).reshape(-1, *(1,) * len(shape)).expand(300, *shape)
    source = Raw(x, torch.arange(300) % 3)
    seen = []
    for seed in range(3):
        data = split(source, seed, 0.0, 50)
        first, last = (int(d) for d in (len(data.train_y), len(data.test_y)))
        assert (first, len(data.validation_y), last) == (50, 50, 120)
        parts = [p.flatten(1)[:, 0] for p in (data.train_x, data.validation_x, data.test_x)]
        assert len(set(torch.cat(parts).tolist())) == 220  # no sample is in two parts
        torch.testing.assert_close(data.train_x.mean(), torch.zeros(()), atol=1e-4, rtol=0)
        seen.append((data.train_y, data.test_y))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])  # tested on the same samples for every seed


def test_a_column_that_is_constant_in_training_stays_small_elsewhere() -> None:
    source = raw(4)
    source.x[:, 2] = 5.0
    order = torch.randperm(300, generator=torch.Generator().manual_seed(POOL_SEED))
    source.x[order[:3], 2] = 7.0  # tested samples
    data = split(source, 0, 0.0, 80)
    assert bool((data.train_x[:, 2] == 0).all()) and data.test_x[:, 2].unique().tolist() == [0.0, 2.0]


def test_wrong_labels_are_wrong_and_as_many_as_asked_for() -> None:
    y = torch.arange(1000) % 4
    noisy = wrong_labels(y, 0.4, 4, torch.Generator().manual_seed(0))
    wrong = noisy != y
    assert int(wrong.sum()) == 400 and torch.equal(y, torch.arange(1000) % 4)
    assert ((noisy - y)[wrong] % 4).bincount().tolist()[1:] == pytest.approx([133, 133, 133], abs=35)


def test_test_labels_are_never_wrong() -> None:
    clean, noisy = (split(raw(6), 1, noise, 80) for noise in (0.0, 0.4))
    assert torch.equal(clean.test_y, noisy.test_y) and torch.equal(clean.train_x, noisy.train_x)
    assert int((clean.train_y != noisy.train_y).sum()) == 32
    assert int((clean.validation_y != noisy.validation_y).sum()) == 32


def numbers(samples: int = 300) -> Raw:
    source = raw(6, samples=samples)
    return Raw(source.x, source.x[:, :2].sum(1, keepdim=True) * 7 + 40)


def test_a_regressions_target_is_scaled_by_the_training_part() -> None:
    source = numbers()
    data = split(source, 0, 0.0, 80)
    assert (source.classes, source.guessing, data.classes) == (1, 1.0, 1)
    torch.testing.assert_close(data.train_y.mean(), torch.zeros(()), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_y.var(), torch.ones(()))
    assert abs(float(data.test_y.mean())) > 1e-4  # not by itself
    with pytest.raises(ValueError, match="noise must be 0 for a regression"):
        split(source, 0, 0.4, 80)


# networks and methods


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ("mlp", (6,)),
        ("mlp_bottleneck", (6,)),
        ("cnn", (1, 8, 8)),
        ("cnn", (2, 50)),
        ("transformer", (1, 8, 8)),
        ("transformer", (3, 25)),
    ],
)
def test_every_layer_of_a_network_can_be_regularized(network: str, shape: tuple[int, ...]) -> None:
    data = split(raw(*shape), 0, 0.0, 40)
    model = NETWORKS[network](data.train_x.shape[1:], 3)
    names = layer_names(model, "all")
    assert layer_names(model, "inner") == names[1:] and layer_names(model, "head") == names[-1:]
    method = METHODS["fam_all_fisher"]
    before = model.state_dict()
    _, step = method.build(Training(model, {**method.configuration(0), "strength": 1.0}, 0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step(data.train_x[:10], data.train_y[:10])
    assert all(
        not torch.equal(before[f"{name}.weight"], model.state_dict()[f"{name}.weight"]) for name in names
    )


def known(method: Method) -> bool:
    """Whether this build has the method's form of FAM."""
    try:
        method.build(Training(NETWORKS["mlp"](torch.Size([6]), 3), method.configuration(0), 0))
    except (ValueError, ImportError):
        return False
    return True


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns(name: str) -> None:
    method = METHODS[name]
    if not known(method):
        pytest.skip("needs a package or a form of FAM that is not here")
    hyper = {k: v.at(0.3) for k, v in {**method.common, **method.own}.items()}
    data = small()
    model, milliseconds = train(method, "mlp", hyper, data, 0, Budget(60, 20))
    assert scores(model, data.train_x, data.train_y)["accuracy"] > 0.8
    assert milliseconds > 0 and not model.training


@pytest.mark.parametrize("name", sorted({*CORE_METHODS, *CHOICES, "gsam", "nso"}))
def test_a_method_learns_a_regression(name: str) -> None:
    method = METHODS[name]
    hyper = {k: v.at(0.2) for k, v in {**method.common, **method.own}.items()}
    data = split(numbers(), 0, 0.0, 80)
    model, _ = train(method, "mlp", hyper, data, 0, Budget(60, 20))
    found = scores(model, data.test_x, data.test_y)
    error = (model(data.test_x) - data.test_y).square().mean()
    assert found["nll"] == pytest.approx(float(error), rel=1e-5)
    assert found["accuracy"] == pytest.approx(1 - float(error / data.test_y.var(correction=0)), abs=1e-5)
    assert found["accuracy"] > 0.7 and math.isnan(found["ece"])


def test_methods_start_alike_and_share_their_draws() -> None:
    data, weights = small(), []
    for name in ("sgd", "dropout", "fam_head"):
        hyper = {**METHODS[name].configuration(0), "lr": 0.0, "weight_decay": 0.0}
        weights.append(train(METHODS[name], "mlp", hyper, data, 5, Budget(2, 20))[0].state_dict())
    assert all(
        torch.equal(a, b) for w in weights[1:] for a, b in zip(weights[0].values(), w.values(), strict=True)
    )
    configurations = [
        METHODS[name].configuration(4) for name in ("weight_decay", "dropout", "sam", "fam_head")
    ]
    assert len({c["lr"] for c in configurations}) == len({c["weight_decay"] for c in configurations}) == 1
    several = [METHODS["sam"].configuration(k) for k in range(12)]
    assert len({c["rho"] for c in several}) == 12
    for c in several:
        assert all(
            v.low <= c[k] <= v.high for k, v in {**METHODS["sam"].common, **METHODS["sam"].own}.items()
        )


def test_a_run_repeats() -> None:
    method, data = METHODS["dropout"], small()
    hyper = method.configuration(1)
    first, second = (run(method, "mlp", hyper, data, 3, Budget(20, 20), True) for _ in range(2))
    assert {k: v for k, v in first.items() if k != "step_ms"} == {
        k: v for k, v in second.items() if k != "step_ms"
    }
    assert "test_accuracy" in first and first["kappa_all"] > first["kappa_head"] > 0
    assert not any(k.startswith("test") for k in run(method, "mlp", hyper, data, 3, Budget(2, 20), False))


def test_a_run_of_a_regression() -> None:
    hyper = {**METHODS["fam_all_fisher"].configuration(0), "lr": 0.02}
    found = run(
        METHODS["fam_all_fisher"], "mlp", hyper, split(numbers(), 0, 0.0, 40), 0, Budget(20, 20), True
    )
    assert 0 < found["kappa_head"] < found["kappa_all"] and found["test_accuracy"] < 1


def test_noise_stability_steps_with_the_mean_of_both_sides() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    before = model[1].weight.detach().clone()
    training = Training(model, {"lr": 0.5, "weight_decay": 0.0, "sigma": 0.3}, 7)
    _, step = METHODS["nso"].build(training)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    noise = 0.3 * torch.randn(before.shape, generator=torch.Generator().manual_seed(7))
    gradient = torch.zeros_like(before)
    for sign in (1, -1):
        w = (before + sign * noise).requires_grad_()
        gradient += torch.autograd.grad(nn.functional.cross_entropy(x @ w.T, y), w)[0] / 2
    step(x, y)
    torch.testing.assert_close(model[1].weight.detach(), before - 0.5 * gradient)


def test_learning_rate_is_a_cosine() -> None:
    assert learning_rate(0.2, 0, 10) == 0.2 and learning_rate(0.2, 5, 10) == pytest.approx(0.1)


def test_scores_by_hand() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.35, 0.65]]).log()
    got = scores(Fixed(), logits, torch.tensor([0, 1, 1]))
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["nll"] == pytest.approx(-math.log(0.8 * 0.2 * 0.65) / 3, rel=1e-6)
    assert got["ece"] == pytest.approx((abs(0.5 - 0.8) * 2 + abs(1 - 0.65)) / 3, rel=1e-6)
    assert math.isnan(scores(Fixed(), logits * math.nan, torch.tensor([0, 1, 1]))["accuracy"])


# store


def a_run(number: int, accuracy: float, nll: float = 1.0, phase: str = "tune") -> Run:
    numbers = {"validation_accuracy": accuracy, "validation_nll": nll, "step_ms": 2.5}
    return Run("sam", phase, number, {"rho": 0.1 * number}, numbers)


def test_a_store_goes_on_where_it_stopped(tmp_path: Path) -> None:
    store = Store(tmp_path, TASK)
    for k in range(3):
        store.add(a_run(k, 0.5))
    with open(store.path, "a") as file:
        file.write('sam,tune,3,"{""rho"": 0.3}",0.1')  # cut off
    again = Store(tmp_path, TASK)
    assert again.of("sam", "tune") == [a_run(k, 0.5) for k in range(3)]
    assert again.get("sam", "tune", 3) is None and again.get("sam", "test", 0) is None
    assert again.path.name == "set-mlp-40-60.csv"


def test_a_run_is_kept_as_a_later_start_reads_it(tmp_path: Path) -> None:
    store = Store(tmp_path, TASK)
    store.add(a_run(0, 2 / 3, nll=math.pi * 1e-5, phase="test"))
    assert store.rows == Store(tmp_path, TASK).rows and store.every == Store(tmp_path, TASK).every


def test_the_best_configuration() -> None:
    assert best([a_run(1, 0.7), a_run(2, 0.9, 2.0), a_run(3, 0.9, 1.0), a_run(4, math.nan)]) == {
        "rho": 0.1 * 3
    }


# statistics


def test_paired_differences_have_students_interval() -> None:
    method, baseline = {0: 0.9, 1: 0.8, 2: 0.85, 7: 0.1}, {0: 0.8, 1: 0.78, 2: 0.8}
    d = comparison.difference(method, baseline)
    pairs = [0.1, 0.02, 0.05]
    half = 4.302652729911275 * statistics.stdev(pairs) / 3**0.5
    mean = statistics.fmean(pairs)
    assert d is not None and d == pytest.approx((mean, mean - half, mean + half, 3))
    assert d.verdict == "tie"
    assert comparison.difference(method, {9: 1.0}) is None


def test_holm() -> None:
    got = comparison.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    assert (
        got["a"] == pytest.approx(0.03)
        and got["c"] == got["b"] == pytest.approx(0.06)
        and math.isnan(got["d"])
    )


def three_tasks() -> dict[Task, dict[str, dict[int, float]]]:
    values = {"base": (0.5, 0.6, 0.7), "good": (0.6, 0.7, 0.8), "same": (0.5, 0.6, 0.7)}
    return {
        Task("set", "mlp", 0.0, k): {m: {s: v[k] + 0.001 * s * (m == "good") for s in range(3)} for m, v in values.items()}
        for k in range(3)
    }  # fmt: skip


def test_ranks_share_ties_and_need_all_methods() -> None:
    tasks = three_tasks()
    tasks[Task("other", "mlp", 0.0, 1)] = {"good": {0: 0.1}}
    ranks, n = comparison.mean_ranks(tasks)
    assert n == 3 and ranks == {"base": 2.5, "good": 1.0, "same": 2.5}
    # Demsar 2006, table 5: q = 2.343 for 3 methods
    assert comparison.critical_difference(3, 20) == pytest.approx(2.343 * (3 * 4 / 120) ** 0.5, rel=1e-3)


def test_comparison_counts_wins(tmp_path: Path) -> None:
    tasks = three_tasks()
    lines = comparison.compare(tasks, "base")
    good = lines[0]
    assert (good.method, good.tasks, good.wins, good.ties, good.losses) == ("good", 3, 3, 0, 0)
    assert good.mean_difference == pytest.approx(0.101)
    assert "| +10.10 | 3 / 0 / 0 |" in comparison.table(tasks, "base")
    assert comparison.by_task(tasks).count("**") == 6  # the best of each task
    header, rows = comparison.means(tasks)
    comparison.write_csv(tmp_path / "m.csv", header, rows)
    with open(tmp_path / "m.csv") as file:
        assert next(csv.reader(file)) == ["task", "base", "good", "same"]


def test_wilcoxon_is_scipys() -> None:
    from scipy.stats import wilcoxon

    d = [0.1, 0.2, -0.05, 0.3, 0.15, 0.02]
    assert comparison.wilcoxon(d) == pytest.approx(wilcoxon(d).pvalue)
    assert math.isnan(comparison.wilcoxon([0.0, 0.0, 0.1]))


def test_plots_are_written(tmp_path: Path) -> None:
    tasks: Any = three_tasks()
    figures.rank_plot(tasks, tmp_path / "r.png")
    figures.difference_plot(tasks, "base", tmp_path / "d.png")
    figures.gap_plot({"kappa": [1.0, 2.0, 0.0]}, [0.1, 0.2, 0.3], ["a", "b", "a"], tmp_path / "g.png")
    figures.strength_plot({"fam": [(0.01, 0.1, 0.0), (0.1, -0.1, 0.4)], "other": []}, tmp_path / "s.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "rdgs")


def test_divergence_counts_as_nothing_right(tmp_path: Path) -> None:
    store = Store(tmp_path, TASK)
    for seed, accuracy in enumerate((0.8, math.nan)):
        store.add(
            Run("m", "test", seed, {}, {"test_accuracy": accuracy, "test_nll": accuracy, "step_ms": 1.0})
        )
    assert comparison.collect(tmp_path, [TASK], "test_accuracy") == {TASK: {"m": {0: 0.8, 1: 0.0}}}
    assert comparison.collect(tmp_path, [TASK], "test_nll") == {TASK: {"m": {0: 0.8}}}
    scores = comparison.collect(tmp_path, [TASK], "test_accuracy")
    assert comparison.finished(scores, ["m"], 2) == scores
    assert comparison.finished(scores, ["m"], 3) == comparison.finished(scores, ["m", "other"], 1) == {}


def test_gains_pair_configurations_of_one_number(tmp_path: Path) -> None:
    store = Store(tmp_path, TASK)
    for method, hyper, accuracies in (("base", {}, (0.5, math.nan)), ("fam", {"strength": 0.1}, (0.7, 0.6))):
        for number, accuracy in enumerate(accuracies):
            store.add(Run(method, "tune", number, hyper, {"validation_accuracy": accuracy, "step_ms": 1.0}))
    gains = comparison.gains(tmp_path, [TASK], "fam", "base")
    assert gains == [(0.1, pytest.approx(0.2), 0.4), (0.1, pytest.approx(0.6), 0.4)]


def test_costs_are_ratios_to_the_baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost, "load", lambda name: raw(6))
    costs = cost.measure("set", "mlp", ["dropout"], "weight_decay", rounds=3)
    assert [c.method for c in costs] == ["weight_decay", "dropout"] and costs[0].ratio == 1.0
    assert "| dropout |" in cost.table(costs)
    cost.write(tmp_path, costs)
    assert [(c.method, c.network) for c in cost.read(tmp_path)] == [
        ("weight_decay", "mlp"),
        ("dropout", "mlp"),
    ]
    assert cost.read(tmp_path / "nothing") == []


def test_the_course_of_kappa_is_that_of_a_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(course, "load", lambda name: raw(6))
    made = course.courses("set", tmp_path, quick=True)
    assert made.keys() == course.HYPER.keys()
    assert all([step for step, _ in points] == [0, 10, 20] for points in made.values())
    starts = {name: points[0][1] for name, points in made.items()}
    assert len(set(starts.values())) == 1  # the same network to begin with
    assert made["fam_all_noise"][-1][1] != made["weight_decay"][-1][1]
    figures.course_plot(made, tmp_path / "c.png")
    figures.cost_plot({"sam": 0.1, "fam_head": 0.2}, {"sam": 2.0, "fam_head": 1.0}, tmp_path / "a.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "ca")
