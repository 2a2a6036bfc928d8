"""What is compared on what: the study's grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from studies.data import SERIES, TABLES
from studies.methods import CHOICES, METHODS
from studies.store import Task
from studies.training import Budget

BASELINE = "weight_decay"
CORE_METHODS = (
    "weight_decay", "dropout", "feature_noise", "sam", "fam_head", "fam_all_fisher", "fam_all_noise", "adamw",
)  # fmt: skip
FORMS = (
    "fam_hidden_hutchinson", "fam_hidden_fisher", "fam_hidden_noise", "fam_all_fisher", "fam_all_empirical_fisher",
    "fam_all_noise",
)  # fmt: skip


class Grid(NamedTuple):
    """What is compared: tasks, methods, random configurations for each, and seeds of the tests."""

    tasks: Sequence[Task]
    methods: Sequence[str]
    configurations: int
    seeds: int
    budget: Budget


def grids() -> dict[str, Grid]:
    sets = ("letter", "satimage", "texture", "mnist", "spambase", "penbased")
    core = [Task(data, "mlp", noise, 1000) for data in sets for noise in (0.0, 0.4)]
    tables = [name for name in TABLES if name not in sets]
    full = [
        *core,
        *(Task(data, "mlp", 0.2, 1000) for data in sets),
        *(Task(data, "mlp", noise, 1000) for data in tables for noise in (0.0, 0.2, 0.4)),
        *(Task(data, "mlp", 0.0, 200) for data in sets),
        *(Task(data, "cnn", noise, 500) for data in ("digits", "mnist", *SERIES) for noise in (0.0, 0.4)),
        *(
            Task(data, "transformer", noise, 500)
            for data in ("digits", "JapaneseVowels")
            for noise in (0.0, 0.4)
        ),
    ]
    return {
        "core": Grid(core, CORE_METHODS, 12, 10, Budget()),
        "full": Grid(full, tuple(m for m in METHODS if m not in CHOICES), 12, 10, Budget()),
        "choices": Grid(
            [Task("mnist", "mlp", 0.0, 1000), Task("mnist", "mlp", 0.4, 1000), Task("letter", "mlp", 0.4, 1000)],
            (BASELINE, "fam_head", *FORMS, *CHOICES), 12, 10, Budget(),
        ),
        "bottleneck": Grid(
            [Task(data, "mlp_bottleneck", noise, 1000) for data in ("mnist", "letter") for noise in (0.0, 0.4)],
            (BASELINE, "fam_head", "fam_all_noise"), 12, 10, Budget(),
        ),
        "regression": Grid([Task("diabetes", "mlp", 0.0, 200)], CORE_METHODS, 12, 10, Budget()),
        "quick": Grid(
            [Task("digits", "mlp", 0.0, 200), Task("digits", "cnn", 0.4, 100)],
            ("weight_decay", "sam", "fam_head", "fam_all_fisher"), 2, 2, Budget(40, 20),
        ),
    }  # fmt: skip
