"""What is compared on what: the study's grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from studies.data import SERIES, TABLES
from studies.methods import METHODS
from studies.store import Task
from studies.training import Budget

BASELINE = "weight_decay"
CORE_METHODS = (
    "weight_decay", "dropout", "feature_noise", "sam", "fam_head", "fam_all_fisher", "fam_all_noise", "adamw",
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
        "full": Grid(full, tuple(METHODS), 12, 10, Budget()),
        "quick": Grid(
            [Task("digits", "mlp", 0.0, 200), Task("digits", "cnn", 0.4, 100)],
            ("weight_decay", "sam", "fam_head", "fam_all_fisher"), 2, 2, Budget(40, 20),
        ),
    }  # fmt: skip
