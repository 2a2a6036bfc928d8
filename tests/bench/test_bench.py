"""The benchmarks measure what they say: counts, rounds, statistics, exponents, tables; smallest cases are right."""

from __future__ import annotations

import ast
import graphlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_optimizer")

import baselines  # noqa: E402
import bench_accuracy  # noqa: E402
import bench_scaling  # noqa: E402
import bench_training  # noqa: E402
import case as cases  # noqa: E402
import counts  # noqa: E402
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


def test_quantiles() -> None:
    assert timing.quantiles([5.0, math.nan, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)
    assert timing.ratios([2.0, 6.0], [1.0, 2.0], 0.5) == [1.0, 1.5]


def test_a_wrong_variant_is_never_timed() -> None:
    exact = (torch.ones(3, dtype=torch.float64),)
    assert cases.Variant("right", lambda: (torch.ones(3),), "right", 1e-6, exact).check() == 0.0
    wrong = cases.Variant("wrong", lambda: (torch.ones(3) * 1.01,), "right", 1e-6, exact)
    calls: list[int] = []
    other = cases.Variant("right", lambda: calls.append(1) or (torch.ones(3),), "right", 1e-6, exact)
    with pytest.raises(RuntimeError, match=r"wrong: relative error 1\.0e-02 exceeds"):
        cases.measure("op", cases.Case("case", [other, wrong]), cases.QUICK)
    assert len(calls) == 1  # its check
    nothing = cases.Variant("nan", lambda: (torch.full((3,), math.nan),), "right", 1e-6, exact)
    with pytest.raises(RuntimeError, match="nan"):
        nothing.check()


def test_results_relate_to_the_baseline_and_the_ceilings(monkeypatch: Any) -> None:
    monkeypatch.setattr(cases, "ceilings", lambda threads, device: (10.0, 100.0))  # GB/s, GFLOP/s
    variants = [
        cases.Variant("plain", lambda: (), "plain"),
        cases.Variant("ours", lambda: (), "plain", flops=4e9),
        cases.Variant("few probes", lambda: (), "plain", scale=10.0),
    ]
    monkeypatch.setattr(cases, "peak_megabytes", lambda step: 7.0)
    case = cases.Case("case", variants, flops=2e9)
    times = {"plain": [0.1, 0.2, 0.4], "ours": [0.2, 0.4, 0.8], "few probes": [0.1, math.nan, 0.4]}
    zero = dict.fromkeys(times, 0.0)
    plain, ours, probes = cases.results("op", case, times, zero)
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


def test_pytest_benchmark_keeps_runs_and_compares_them(tmp_path: Path) -> None:
    # pytest-benchmark times nothing in a worker of pytest-xdist, which this process may be
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    short = (
        "--benchmark-max-time=0.01",
        "--benchmark-min-rounds=1",
        "-p",
        "no:cacheprovider",
        "-k",
        "patch_sqnorm and small",
    )
    python(
        "pytest",
        "bench",
        "--benchmark-only",
        f"--benchmark-storage={tmp_path}",
        "--benchmark-autosave",
        *short,
    )
    (kept,) = tmp_path.rglob("*.json")
    benchmarks = json.loads(kept.read_text())["benchmarks"]
    assert {b["group"] for b in benchmarks} == {"patch_sqnorm: small training"}
    assert all(b["extra_info"]["error"] <= 2e-6 for b in benchmarks)
    compared = python("pytest_benchmark", f"--storage={tmp_path}", "compare", "--group-by=group,name")
    assert all(b["name"] in compared for b in benchmarks)


def test_fitted_exponents() -> None:
    sizes = [10.0, 20.0, 40.0, 80.0]
    power, error = bench_scaling.exponent(sizes, [3 * s**1.5 for s in sizes])
    assert power == pytest.approx(1.5)
    assert error == pytest.approx(0.0, abs=1e-6)
    factors = (1.1, 0.9, 1.1)
    power, error = bench_scaling.exponent(
        sizes[1:], [3 * s**1.5 * f for s, f in zip(sizes[1:], factors, strict=True)]
    )
    assert 0 < abs(power - 1.5) < 2 * error
    # what a call costs at any size must not flatten the exponent
    sizes = [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]
    assert bench_scaling.exponent(sizes, [100 + s for s in sizes])[0] > 0.95
    assert math.isnan(bench_scaling.exponent([1, 2, 4], [1.0, -1.0, 3.0])[0])


@pytest.mark.parametrize("op", [op for op, module in BENCHMARKS.items() if hasattr(module, "cases")])
def test_smallest_case_agrees_with_float64(op: str) -> None:
    case = BENCHMARKS[op].cases(True)[0](False)
    assert all(v.exact for v in case.variants)
    assert {v.baseline for v in case.variants} <= {v.name for v in case.variants}
    for variant in case.variants:
        variant.check()


def test_ways_to_train_agree_with_float64() -> None:
    prepared = bench_training.prepare(bench_training.QUICK[1])
    names = {v.name for v in prepared.case.variants}
    assert {bench_training.PLAIN, bench_training.HEAD, bench_training.PAPER, bench_training.LOOKSAM} <= names
    for variant in prepared.case.variants:
        assert variant.check() <= variant.tolerance  # at any step, not the first one alone
    assert names | set(prepared.missing) >= set(bench_training.INSIDE)
    names = {v.name for v in bench_training.prepare(bench_training.QUICK[2]).case.variants}
    assert bench_training.FEATURES in names


def test_a_way_that_is_not_available_is_named(monkeypatch: Any) -> None:
    inside = {"new": ("middle", {"method": "not yet"}), "one probe": ("middle", {"method": "hutchinson"})}
    monkeypatch.setattr(bench_training, "INSIDE", inside)
    prepared = bench_training.prepare(bench_training.QUICK[0])
    assert "not yet" in prepared.missing["new"]
    assert "one probe" in {v.name for v in prepared.case.variants}
    inside["broken"] = ("middle", {"probe": 1})  # a mistake of the benchmark itself is no missing option
    with pytest.raises(TypeError, match="probe"):
        bench_training.prepare(bench_training.QUICK[0])


def test_looksam_takes_two_passes_in_one_of_five_steps() -> None:
    prepared = bench_training.prepare(bench_training.QUICK[0])
    variant = next(v for v in prepared.case.variants if v.name == bench_training.LOOKSAM)
    passes: list[int] = []
    way = variant.step.__self__
    way.model.register_forward_hook(lambda *_: passes.append(1))
    variant.step()
    assert (len(passes), variant.scale) == (6, 0.2)


def test_momentum_sam_takes_its_gradients_along_the_momentum() -> None:
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = baselines.MomentumSAM([w], rho=0.5, lr=0.1, momentum=0.9)
    point, momentum, moved = w.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for _ in range(4):
        optimizer.zero_grad()
        (curvature * w.square()).sum().backward()
        optimizer.step()
        momentum = 0.9 * momentum + 2 * curvature * (point + moved)
        point = point - 0.1 * momentum
        moved = 0.5 * momentum / momentum.norm()
        torch.testing.assert_close(w.detach(), point + moved)


@pytest.mark.parametrize("sweep", bench_scaling.SWEEPS, ids=lambda s: s.letter)
def test_smallest_sweep_agrees_with_float64(sweep: Any) -> None:
    variants = sweep.build(sweep.sizes[0])
    assert {v.name for v in variants} <= set(sweep.law(sweep.sizes[0]))
    for variant in variants:
        variant.check()


def test_scaling_writes_a_plot(tmp_path: Path) -> None:
    sweep = bench_scaling.SWEEPS[0]
    small = bench_scaling.Sweep(sweep.title, sweep.letter, (16, 32, 64), sweep.build, sweep.law)
    settings = cases.Settings(quick=True, seconds=0.0, threads=(1,), out=tmp_path)
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


def test_readme_table_is_made_from_the_csv(tmp_path: Path) -> None:
    def of(op: str, case: str, variant: str, ratio: float) -> report.Result:
        numbers = (100.0, 99.0, 101.0, ratio, ratio, ratio, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        return report.Result(op, case, 1, variant, "plain", *numbers)

    heads = [("linear + CE (functions)", 1.0), ("FAMLoss", 1.234), ("Hutchinson to 1 % (9 probes)", 88.8)]
    report.write_results(tmp_path / "head_cross_entropy.csv", [of("head", "N=1 I=2 O=3", *h) for h in heads])
    ways = [("plain", 1.0), ("FAM (head)", 1.002), ("FAM (head), by parts", 1.001), ("SAM", 2.0)]
    training = [of("training", "net", *w) for w in ways] + [of("training", "other", "plain", 1.0)]
    report.write_results(tmp_path / "training.csv", training)
    language = [of("language_model", "GPT", *w) for w in (("plain", 1.0), ("SAM", 2.04))]
    report.write_results(tmp_path / "language_model.csv", language)
    lines = readme.text(tmp_path).splitlines()
    assert "| N, I, O | linear + CE (functions) | `FAMLoss` | Hutchinson to 1 % |" in lines
    assert "| N=1 I=2 O=3 | 100 µs | 1.23 | 88.8 |" in lines
    assert "| net | 100 µs | 1.002 | 1.001 | 2.00 |" in lines
    assert "| other | 100 µs |  |  |  |" in lines
    assert "| GPT | 100 µs (1 MB) | 2.04 (1 MB) |" in lines


def test_a_part_of_a_run_replaces_its_own_lines(tmp_path: Path) -> None:
    """bench/run.py training --only: other networks' lines stay as they are, the machine of their run included."""
    path = tmp_path / "training.csv"
    first = [replace(result("plain", us), case=case) for case, us in (("a", 10.0), ("b", 20.0), ("c", 30.0))]
    report.replace_cases(path, first, "abc")
    lines = report.read_csv(path)
    path.write_text(path.read_text().replace(lines[0]["machine"], "another"))
    report.replace_cases(path, [replace(first[1], median_us=21.0), replace(first[1], variant="new")], "abc")
    kept = [
        (r["case"], r["variant"], float(r["median_us"]), r["machine"] == "another")
        for r in report.read_csv(path)
    ]
    assert kept == [
        ("a", "plain", 10, True), ("b", "plain", 21, False), ("b", "new", 20, False), ("c", "plain", 30, True)
    ]  # fmt: skip


def test_page_shows_the_committed_run() -> None:
    before, shown, after = readme.split((ROOT / readme.PAGE).read_text())
    assert before.endswith(readme.MARKS[0])
    assert after.startswith(readme.MARKS[1])
    assert shown.strip("\n") == readme.text(ROOT / readme.RESULTS)


def test_terminal_shows_one_table_for_an_operation(capsys: Any) -> None:
    report.show(Console(width=190), [result("plain", 100), result("ours", 1.05e5)])
    shown = capsys.readouterr().out
    assert shown.count("relative") == 1
    assert "105 ms" in shown


def test_the_faster_form_is_told_for_each_number_of_threads() -> None:
    """Here `auto` takes the slower one with one thread; other backends are no matter."""
    own = [result("native a (auto)", 120), result("native b", 100), result("reference a", 5)]
    more = [replace(r, threads=2, median_us=50.0) for r in own[:1]] + [replace(own[1], threads=2)]
    assert report.faster_form([*own, *more]).splitlines() == [
        "1 thread(s): auto takes a, b is faster; auto/fastest 1.20",
        "2 thread(s): auto takes a, a is faster; auto/fastest 1.00",
    ]
    assert report.faster_form(own[2:]) == ""


def test_no_circle_among_the_benchmarks_imports() -> None:
    files = {path.stem: path for path in (ROOT / "bench").glob("*.py")}
    imports: dict[str, set[str]] = {}
    for name, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imports[name] = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        imports[name] |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    own = {name: used & set(files) for name, used in imports.items()}
    assert list(graphlib.TopologicalSorter(own).static_order())  # CycleError names the circle
    assert "memory" in own["case"]
