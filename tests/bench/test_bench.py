"""The benchmarks measure what they say: counts, rounds, statistics, comparison of runs, exponents; smallest cases are right."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import bench_accuracy  # noqa: E402
import bench_curvature  # noqa: E402
import bench_scaling  # noqa: E402
import common  # noqa: E402
import compare  # noqa: E402
import counts  # noqa: E402
import fit  # noqa: E402
import plots  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
from rich.console import Console  # noqa: E402

BENCHMARKS = run.benchmarks()


def counted(step: Any) -> int:
    """FLOPs of the matrix products of a step, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def test_flops_of_a_linear_step() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    expected = counted(lambda: torch.autograd.grad(F.linear(x, w).sum(), (x, w)))
    assert counts.linear_step(5, 7, 3) == expected
    assert counts.linear_cross_entropy_step(5, 7, 3) == 2 * expected


def test_flops_of_the_trace_are_the_cheaper_form_s() -> None:
    assert counts.trace_step(1000, 64, 10) == 4 * 100 * (64 + 1000)  # pairwise
    assert counts.trace_step(2, 64, 100) == 6 * 2 * 64 * 100  # shifted: three products
    assert counts.head_step(2, 64, 100) == 2 * counts.linear_step(2, 64, 100)


def test_flops_of_the_gram_forms() -> None:
    phi, s, w = torch.randn(9, 4), torch.randn(9, 6), torch.randn(6, 4)
    assert counts.gram_direct(9, 4, 6) == counted(lambda: w @ (s.T @ phi).T)
    assert counts.gram_gram(9, 4, 6) == counted(lambda: (phi @ phi.T, (s @ (w @ w.T)) @ s.T)) - 2 * 6 * 6 * 4
    assert counts.gram_gram(9, 4, 6, 3) - counts.gram_gram(9, 4, 6, 2) == 2 * 9 * 6 * 6 + 2 * 9 * 9 * 6


def test_bytes_of_patches() -> None:
    x, norms = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 6, 6)
    assert counts.patch_bytes(x.numel(), norms.numel(), train=False) == x.nbytes + norms.nbytes
    assert counts.patch_bytes(x.numel(), norms.numel(), train=True) == 3 * x.nbytes + 2 * norms.nbytes


def fakes(
    monkeypatch: Any, costs: dict[str, float], thin: tuple[str, ...] = ()
) -> tuple[list[Any], list[str]]:
    """Variants whose time is known, and the order in which samples of them are taken."""
    samples: list[str] = []

    def of(name: str) -> Any:
        return SimpleNamespace(name=name, step=lambda: name, thin=name in thin)

    def seconds_per_call(step: Any, calls: int) -> float:
        samples.append(step())
        return costs[step()]

    monkeypatch.setattr(timing, "seconds_per_call", seconds_per_call)
    return [of(name) for name in costs], samples


def test_every_round_holds_every_variant_once_in_changing_order(monkeypatch: Any) -> None:
    variants, samples = fakes(monkeypatch, {"a": 1e-4, "b": 2e-4, "c": 3e-4})
    times = timing.interleaved(variants, rounds=20)
    assert times == {"a": [1e-4] * 20, "b": [2e-4] * 20, "c": [3e-4] * 20}
    rounds = [tuple(samples[k : k + 3]) for k in range(len(samples) - 60, len(samples), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_rounds_end_in_time_but_not_before_the_least(monkeypatch: Any) -> None:
    variants, _ = fakes(monkeypatch, {"a": 1e-4, "b": 1e-4})
    assert len(timing.interleaved(variants, rounds=50, least=3, seconds=0.0)["a"]) == 3


def test_slow_variants_sit_out_and_ratios_skip_those_rounds(monkeypatch: Any) -> None:
    variants, _ = fakes(monkeypatch, {"fast": 1e-3, "slow": 0.5}, thin=("slow",))
    times = timing.interleaved(variants, rounds=40, seconds=10.0)
    ran = [k for k, value in enumerate(times["slow"]) if not math.isnan(value)]
    assert ran == [0, 1, 4, 8, 12, 16, 20, 24, 28, 32, 36]  # half of 10 s: 10 of 40 rounds
    assert len(times["fast"]) == 40
    assert timing.quantiles(timing.ratios(times["slow"], times["fast"])) == (500.0, 500.0, 500.0)


def test_steps_that_are_warm_are_not_warmed_up(monkeypatch: Any) -> None:
    variants, samples = fakes(monkeypatch, {"a": 2.0, "b": 3.0})
    timing.interleaved(variants, rounds=1, known={"a": 2.0, "b": 3.0})
    assert sorted(samples) == ["a", "b"]


def test_quantiles() -> None:
    assert timing.quantiles([5.0, math.nan, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
    assert timing.ratios([2.0, 6.0], [1.0, 2.0], 0.5) == [1.0, 1.5]


def test_a_wrong_variant_is_never_timed() -> None:
    exact = (torch.ones(3, dtype=torch.float64),)
    assert common.Variant("right", lambda: (torch.ones(3),), "right", 1e-6, exact).check() == 0.0
    wrong = common.Variant("wrong", lambda: (torch.ones(3) * 1.01,), "right", 1e-6, exact)
    calls: list[int] = []
    other = common.Variant("right", lambda: calls.append(1) or (torch.ones(3),), "right", 1e-6, exact)
    with pytest.raises(RuntimeError, match=r"wrong: relative error 1\.0e-02 exceeds"):
        common.measure("op", common.Case("case", [other, wrong]), common.QUICK)
    assert len(calls) == 1  # its check
    nothing = common.Variant("nan", lambda: (torch.full((3,), math.nan),), "right", 1e-6, exact)
    with pytest.raises(RuntimeError, match="nan"):
        nothing.check()


def test_results_relate_to_the_baseline_and_the_ceilings(monkeypatch: Any) -> None:
    monkeypatch.setattr(common, "ceilings", lambda threads, device: (10.0, 100.0))  # GB/s, GFLOP/s
    variants = [
        common.Variant("plain", lambda: (), "plain"),
        common.Variant("ours", lambda: (), "plain", flops=4e9),
        common.Variant("few probes", lambda: (), "plain", scale=10.0),
    ]
    case = common.Case("case", variants, flops=2e9)
    times = {"plain": [0.1, 0.2, 0.4], "ours": [0.2, 0.4, 0.8], "few probes": [0.1, math.nan, 0.4]}
    zero = dict.fromkeys(times, 0.0)
    plain, ours, probes = common.results("op", case, times, zero, dict.fromkeys(times, 7.0))
    assert (plain.ratio, ours.ratio, probes.ratio) == (1.0, 2.0, 10.0)
    assert plain.percent_of_matmul == pytest.approx(10.0)  # 2 GFLOP in 0.2 s of 100 GFLOP/s
    assert ours.percent_of_matmul == pytest.approx(10.0)
    assert probes.median_us == pytest.approx(2.5e6)
    assert ours.peak_mb == 7.0


def result(variant: str, median: float, spread: float = 0.01, baseline: float = 100.0) -> report.Result:
    low, high = median * (1 - spread), median * (1 + spread)
    ratio = [v / baseline for v in (median, low, high)]
    return report.Result(
        "op", "case", 1, variant, "plain", median, low, high, *ratio, 1e-7, 0.0, 0.0, 0.0, 0.0, 1.0
    )  # fmt: skip


def rows(
    tmp_path: Path, results: list[report.Result], machine: str = "cpu; torch 2; commit a"
) -> list[dict[str, str]]:
    report.write_csv(tmp_path / "op.csv", results)
    return [{**r, "machine": machine} for r in report.read_csv(tmp_path)]


def test_comparison_says_what_moved(tmp_path: Path) -> None:
    old = rows(
        tmp_path, [result("plain", 100), result("ours", 110), result("noisy", 200, 0.3), result("gone", 5)]
    )
    new = rows(
        tmp_path,
        [result("plain", 101), result("ours", 150), result("noisy", 260, 0.3), result("new", 5)],
        "cpu; torch 2; commit b",
    )
    moves, one_machine = compare.moves(old, new)
    assert one_machine
    assert {m.key[3]: m.moved for m in moves} == {"plain": False, "ours": True, "noisy": False}
    assert next(m.factor for m in moves if m.moved) == pytest.approx(150 / 110, rel=1e-4)


def test_comparison_of_two_machines_is_of_ratios(tmp_path: Path) -> None:
    old = rows(tmp_path, [result("plain", 100), result("ours", 110)])
    faster = [result("plain", 50, baseline=50), result("ours", 55, baseline=50)]
    moves, one_machine = compare.moves(old, rows(tmp_path, faster, "another cpu; torch 2; commit a"))
    assert not one_machine
    assert not any(m.moved for m in moves)
    worse = [result("plain", 50, baseline=50), result("ours", 75, baseline=50)]
    moves, _ = compare.moves(old, rows(tmp_path, worse, "another cpu; torch 2; commit a"))
    assert [m.key[3] for m in moves if m.moved] == ["ours"]


def test_compare_from_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    report.write_csv(tmp_path / "old" / "op.csv", [result("plain", 100), result("ours", 110)])
    report.write_csv(tmp_path / "new" / "op.csv", [result("plain", 100), result("ours", 55)])
    report.write_rows(tmp_path / "new" / "accuracy.csv", [{"table": "no times here"}])
    arguments = ["--no-run", "--compare", str(tmp_path / "old" / "op.csv"), "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    run.main()
    shown = capsys.readouterr().out
    assert "0.50" in shown
    assert "2 compared by times: 1 moved" in shown
    monkeypatch.setattr(sys, "argv", ["run.py", "--compare", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):  # the old results would be overwritten
        run.main()


def test_fitted_exponents() -> None:
    sizes = [10.0, 20.0, 40.0, 80.0]
    power, error = fit.exponent(sizes, [3 * s**1.5 for s in sizes])
    assert power == pytest.approx(1.5)
    assert error == pytest.approx(0.0, abs=1e-9)
    noisy = [3 * s**1.5 * factor for s, factor in zip(sizes, (1.1, 0.9, 1.1, 0.9), strict=True)]
    power, error = fit.exponent(sizes, noisy)
    assert 0 < abs(power - 1.5) < 2 * error
    with pytest.raises(ValueError, match="three different sizes"):
        fit.exponent([1.0, 2.0, 2.0], [1.0, 2.0, 2.0])
    # what a call costs at any size must not flatten the exponent
    sizes = [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]
    flat = [100 + s for s in sizes]
    assert fit.exponent(*fit.larger_half(sizes, flat))[0] > 0.95 > fit.exponent(sizes, flat)[0]
    assert math.isnan(bench_scaling.fits([1, 2, 4], [1.0, -1.0, 3.0], [1.0, 2.0, 4.0])[0])


@pytest.mark.parametrize("op", [op for op, module in BENCHMARKS.items() if hasattr(module, "cases")])
def test_smallest_case_agrees_with_float64(op: str) -> None:
    case = BENCHMARKS[op].cases(True)[0](False)
    assert all(v.exact for v in case.variants)
    assert {v.baseline for v in case.variants} <= {v.name for v in case.variants}
    for variant in case.variants:
        variant.check()


def test_smallest_training_step_agrees_with_float64() -> None:
    module = BENCHMARKS["training"]
    case, ways = module.case(module.QUICK[1])
    assert {module.PLAIN, module.HEAD, module.MIDDLE, module.SAM} <= set(ways)
    for variant in case.variants:
        variant.check()
    case, ways = module.case(module.QUICK[0])
    next(v for v in case.variants if v.name == module.PAPER).check()


@pytest.mark.parametrize("sweep", bench_scaling.SWEEPS, ids=lambda s: s.letter)
def test_smallest_sweep_agrees_with_float64(sweep: Any) -> None:
    variants = sweep.build(sweep.sizes[0])
    assert {v.name for v in variants} <= set(sweep.law(sweep.sizes[0]))
    for variant in variants:
        variant.check()


def test_scaling_writes_a_plot(tmp_path: Path) -> None:
    sweep = bench_scaling.SWEEPS[0]
    small = bench_scaling.Sweep(sweep.title, sweep.letter, (16, 32, 64), sweep.build, sweep.law)
    settings = common.Settings(quick=True, seconds=0.0, threads=(1,), out=tmp_path)
    found = bench_scaling.measure(small, settings, 0.0)
    assert {r["size"] for r in found} == {16, 32, 64}
    assert all(r["law_exponent"] == pytest.approx(1.0, abs=0.2) for r in found)
    plots.scaling(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_is_that_of_the_stable_forms() -> None:
    for name, trace in bench_accuracy.methods().items():
        value, gradient = bench_accuracy.errors(trace, 1e-6, torch.float32)
        if name == bench_accuracy.TEXTBOOK:
            assert value > 1e-3
        else:
            assert max(value, gradient) < 2e-6
            bench_accuracy.check(name, torch.float32, 1e-6, (value, gradient))
    with pytest.raises(RuntimeError, match="exceed"):
        bench_accuracy.check("native shifted", torch.float32, 1e-6, (1e-3, 0.0))


def test_curvature_of_the_hidden_layer_agrees_with_float64() -> None:
    problem = bench_curvature.perceptron()
    kappa, error = bench_curvature._reference(problem, 1)
    assert error == 0.0
    got = bench_curvature.value_only(problem, {"method": "exact", "max_bytes": 2**34})()[0]
    assert float(got) == pytest.approx(kappa, rel=1e-4)


def test_readme_table_is_made_from_the_csv(tmp_path: Path) -> None:
    def of(op: str, case: str, variant: str, ratio: float) -> report.Result:
        numbers = (100.0, 99.0, 101.0, ratio, ratio, ratio, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        return report.Result(op, case, 1, variant, "plain", *numbers)

    heads = [("linear + CE (functions)", 1.0), ("FAMLoss", 1.234), ("Hutchinson to 1 % (9 probes)", 88.8)]
    report.write_csv(tmp_path / "head_cross_entropy.csv", [of("head", "N=1 I=2 O=3", *h) for h in heads])
    ways = [("plain", 1.0), ("FAM (head)", 1.002), ("FAM (head), by parts", 1.001), ("SAM", 2.0)]
    report.write_csv(tmp_path / "training.csv", [of("training", "net", *w) for w in ways])
    lines = readme.text(tmp_path).splitlines()
    assert "| N=1 I=2 O=3 | 100 µs |  | 1.23 |  |  |  |  |  | 88.8 |" in lines
    assert "| net | 100 µs | 1.002 | 1.001 |  |  | 2.00 |  |" in lines


def test_page_shows_the_committed_run() -> None:
    before, shown, after = readme.split((ROOT / readme.PAGE).read_text())
    assert before.endswith(readme.MARKS[0])
    assert after.startswith(readme.MARKS[1])
    if list((ROOT / readme.RESULTS).glob("*.csv")):
        assert shown.strip("\n") == readme.text(ROOT / readme.RESULTS)


def test_terminal_shows_one_table_for_an_operation(capsys: Any) -> None:
    report.show(Console(width=190), [result("plain", 100), result("ours", 1.05e5)])
    shown = capsys.readouterr().out
    assert shown.count("relative") == 1
    assert "105 ms" in shown
