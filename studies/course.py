"""How relative flatness moves while a network is trained: kappa of all layers by step, for a few methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from studies.comparison import write_csv
from studies.data import Split, load, split
from studies.methods import METHODS, Training, learning_rate
from studies.networks import NETWORKS
from studies.training import Budget, kappas

HYPER: dict[str, dict[str, float]] = {
    "weight_decay": {},
    "dropout": {"rate": 0.3},
    "sam": {"rho": 0.1},
    "fam_head": {"strength": 0.01},
    "fam_all_noise": {"strength": 1e-3},
    "fam_all_fisher": {"strength": 1e-3},
}
COMMON = {"lr": 0.05, "weight_decay": 1e-4}

Courses = Mapping[str, list[tuple[int, float]]]
"""(step, kappa of all layers) by method."""


def follow(name: str, data: Split, budget: Budget, every: int) -> list[tuple[int, float]]:
    """(step, the Gauss-Newton kappa of all layers on the training data) of one run, seed 0."""
    method, hyper = METHODS[name], {**COMMON, **HYPER[name]}
    torch.manual_seed(0)
    model = NETWORKS["mlp"](data.train_x.shape[1:], data.classes, method.noise(hyper))
    optimizer, step = method.build(Training(model, hyper, 0))
    order = torch.Generator().manual_seed(0)
    course = []
    for number in range(budget.steps + 1):
        if number % every == 0:
            training = model.training
            course.append((number, kappas(model.eval(), data)["kappa_all"]))
            model.train(training)
        rows = torch.randint(len(data.train_y), (budget.batch,), generator=order)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(hyper["lr"], number, budget.steps + 1)
        step(data.train_x[rows], data.train_y[rows])
    return course


def courses(data: str, folder: Path, quick: bool) -> Courses:
    """Those of every method in HYPER; also written as CSV."""
    parts = split(load(data), 0, 0.0, 200 if quick else 1000)
    budget, every = (Budget(20, 20), 10) if quick else (Budget(800, 50), 25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {name: follow(name, parts, budget, every) for name in HYPER}
    write_csv(
        folder / "course.csv", ("method", "step", "kappa_all"), ((n, *p) for n, c in made.items() for p in c)
    )
    return made
