"""`python studies/run.py --quick` from start to end, stopped and started again."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("pytorch_optimizer")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

sys.path.append(str(Path(__file__).parents[2]))
SCRIPT = Path(__file__).parents[2] / "studies" / "run.py"


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=True)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    part = start(tmp_path, "--minutes", "0.0001", "--part", "comparison")
    assert "Not finished" in part.stdout
    done = start(tmp_path, "--part", "comparison")
    assert "Not finished" not in done.stdout and "### All tasks (2)" in done.stdout
    runs = {path: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert len(runs) == 2
    for text in runs.values():
        assert len(list(csv.DictReader(text.splitlines()))) == 4 * (2 + 2)
    again = start(tmp_path, "--part", "summary")
    assert again.stdout == done.stdout
    assert runs == {path: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert (tmp_path / "ranks.png").exists() and (tmp_path / "summary.md").read_text() in again.stdout


def test_more_configurations_take_the_tests_of_another_best_one_again(tmp_path: Path) -> None:
    from studies import run
    from studies.store import Run, Store

    grid = run.grids()["quick"]._replace(methods=["sam"])
    task = grid.tasks[0]
    grid = grid._replace(tasks=[task])
    store = Store(tmp_path, task)

    def add(phase: str, number: int, accuracy: float) -> None:
        hyper = {"rho": float(number)} if phase == "tune" else {"rho": 1.0}
        numbers = {"validation_accuracy": accuracy, "validation_nll": 1.0, "train_nll": 0.1, "step_ms": 1.0}
        store.add(Run("sam", phase, number, hyper, numbers))

    def left() -> list[tuple[str, int]]:
        return [(phase, number) for *_, phase, number in run.wanted(grid, tmp_path)]

    assert left() == [("tune", 0), ("tune", 1), ("test", 0), ("test", 1)]
    for number, accuracy in ((0, 0.5), (1, 0.6)):
        add("tune", number, accuracy)
        add("test", number, accuracy)
    assert left() == []
    grid = grid._replace(configurations=3)
    assert left() == [("tune", 2)]
    add("tune", 2, 0.55)
    assert left() == []
    add("tune", 2, 0.9)
    assert left() == [("test", 0), ("test", 1)]


def test_a_configuration_that_fails_on_a_seed_is_left_for_the_next_best(tmp_path: Path) -> None:
    from studies import run
    from studies.store import Run, Store

    grid = run.grids()["quick"]._replace(methods=["sam"], configurations=3, seeds=3)
    task = grid.tasks[0]
    grid = grid._replace(tasks=[task])
    store = Store(tmp_path, task)

    def add(phase: str, number: int, rho: float, accuracy: float, train_nll: float) -> None:
        numbers = {
            "validation_accuracy": accuracy,
            "validation_nll": 1.0,
            "train_nll": train_nll,
            "step_ms": 1.0,
        }
        store.add(Run("sam", phase, number, {"rho": rho}, numbers))

    for number, (accuracy, train_nll) in enumerate(((0.7, 0.1), (0.9, 0.1), (0.95, float("nan")))):
        add("tune", number, float(number), accuracy, train_nll)
    assert run.chosen(store, "sam", grid) == {"rho": 1.0}  # not the one that diverged
    done = []
    for store, _, _, _, number in run.wanted(grid, tmp_path):
        rho = run.chosen(store, "sam", grid)["rho"]
        done.append((number, rho))
        failing = (number, rho) == (1, 1.0)
        add("test", number, rho, 0.5, 2.3 if failing else 0.1)  # log(10) is 2.303
    assert done == [(0, 1.0), (1, 1.0), (0, 0.0), (1, 0.0), (2, 0.0)]
    again = Store(tmp_path, task)
    assert run.chosen(again, "sam", grid) == {"rho": 0.0} and not list(run.outdated(again, "sam", grid))


def test_bad_names_are_told() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--methods", "magic"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "invalid choice: 'magic'" in done.stderr
