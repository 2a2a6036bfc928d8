"""The benchmark of ways to kappa inside a network: every way's number is held against float64 before it is timed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_optimizer")

import bench_curvature


def test_curvature_of_the_hidden_layer_agrees_with_float64() -> None:
    problem = bench_curvature.perceptron()
    values = bench_curvature.references(problem, 1)
    for way in (bench_curvature.EXACT, bench_curvature.GGN):
        step = bench_curvature.value_only(problem, way)
        assert bench_curvature.check(problem, way, step, values, 1) == 0.0
    fisher = bench_curvature.value_only(problem, bench_curvature.FISHER)
    assert bench_curvature.check(problem, bench_curvature.FISHER, fisher, values, 8) > 0.0
    with pytest.raises(RuntimeError, match="instead of"):
        bench_curvature.check(problem, bench_curvature.HUTCHINSON, lambda: (torch.zeros(()),), values, 2)
    with pytest.raises(RuntimeError, match="instead of"):
        twice = lambda: (2 * fisher()[0],)  # noqa: E731
        bench_curvature.check(problem, bench_curvature.EMPIRICAL, twice, values, 1)


def test_noise_reaches_its_own_way_alone_and_its_mean_is_the_hessians() -> None:
    problem = bench_curvature.perceptron()
    loss = float(problem.plain().detach())
    steps, missing = bench_curvature.steps(problem)
    assert not missing
    torch.manual_seed(0)
    assert float(steps[bench_curvature.PLAIN]()[0]) == loss
    assert float(problem.plain().detach()) == loss
    values = bench_curvature.references(problem, 1)
    assert (
        bench_curvature.check(problem, bench_curvature.NOISE, steps[bench_curvature.NOISE], values, 100) > 0.0
    )


def test_the_batch_s_own_labels_in_float64() -> None:
    """Sample by sample: the squared norm of W^T times the gradient of the weight."""
    problem = bench_curvature.perceptron()
    x, y = problem.x[:3].double(), problem.y[:3]
    model = problem.model.double()
    small = bench_curvature.Problem("small", model, problem.layer, x, y, False)
    expected = 0.0
    for k in range(3):
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]), problem.layer.weight
        )
        expected += float((problem.layer.weight.T @ gradient).detach().square().sum()) / 3
    assert bench_curvature.own_labels(small) == pytest.approx(expected, rel=1e-12)
