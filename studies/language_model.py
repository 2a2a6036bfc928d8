"""Whether FAM helps small language models: python studies/language_model.py, or the part of it that is not there yet.

    python studies/language_model.py --part pretrain     # or finetune, strength, longer, topics, summary; all in this order
    python studies/language_model.py --quick             # all of its code on a small scale, within seconds
    python studies/language_model.py --minutes 60        # stop starting runs then; the next start goes on

pretrain: a causal transformer on packages of the standard library, validated and tested on other packages. finetune: that model
on a little of PyTorch's sources. strength: FAM noise over strengths. longer: pre-training at a higher learning rate for twice as
many steps, until it overfits, nothing tuned. topics: a bidirectional transformer tells packages apart.
Rows and plots go to studies/results/language.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.append(
    str(Path(__file__).resolve().parents[1])
)  # the package `studies`; an installed fam_ext goes first

from studies import language_summary
from studies.language_data import Size, Windows, fingerprint, language, topics
from studies.language_training import METHODS, NUMBERS, Method, Part, configuration, run
from studies.methods import Range
from studies.store import RESULTS, Run, Store

TUNING_SEED = 10_000  # no seed of the tests
PARTS = ("pretrain", "finetune", "strength", "longer", "topics")
LONGER = {"lr": 2e-3, "weight_decay": 0.25}


class Grid(NamedTuple):
    """The parts, and how much is run of each."""

    parts: Mapping[str, Part]
    size: Size
    methods: Sequence[str]
    configurations: int
    seeds: int
    strengths: Sequence[float]  # of the curve
    longer: Mapping[str, Mapping[str, float]]  # what is added to AdamW, by name


FULL = Grid(
    {
        "pretrain": Part(600, 8, Range(1e-3, 1e-2)),
        "finetune": Part(120, 8, Range(1e-4, 4e-3)),
        "longer": Part(1200, 8, Range(1e-3, 1e-2)),
        "topics": Part(200, 12, Range(3e-4, 4e-3)),
    },
    Size(), tuple(METHODS), 5, 5, (0.0, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    {
        "adamw": {}, "fam_noise 0.0003": {"strength": 3e-4}, "dropout 0.2": {"dropout": 0.2},
        "fam_noise 0.001": {"strength": 1e-3}, "fam_head 0.001": {"head_strength": 1e-3},
    },
)  # fmt: skip
QUICK = Grid(
    {name: Part(8, 4, part.rates) for name, part in FULL.parts.items()},
    Size(3000, 2000, 1500, 1500, 300, 6, 3000), ("adamw", "sam", "fam_noise"), 1, 2, (0.0, 1e-3),
    {"adamw": {}, "fam_noise 0.001": {"strength": 1e-3}},
)  # fmt: skip


class Study:
    """A grid and the folder of its rows."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        self.stores = {part: Store(folder, part, NUMBERS) for part in PARTS}
        self._base: dict[str, Tensor] = {}

    def data(self, part: str) -> Windows:
        if part == "topics":
            return topics(self.grid.size)
        return language("finetune" if part == "finetune" else "pretrain", self.grid.size)

    def chosen(self, part: str, method: str) -> dict[str, float] | None:
        """The configuration with the lowest validation loss; None before all of them were tried."""
        tuned = self.stores[part].of(method, "tune")
        if len(tuned) < self.grid.configurations:
            return None
        return dict(min(tuned, key=lambda one: one.numbers.get("validation", float("inf"))).hyper)

    def wanted(self, part: str) -> Iterator[tuple[str, str, int]]:
        """(method, phase, number) of runs that are not there yet."""
        store = self.stores[part]
        if part in ("strength", "longer"):
            names = list(self.grid.longer) if part == "longer" else [f"{x:g}" for x in self.grid.strengths]
            yield from (
                (name, "test", k)
                for k in range(self.grid.seeds)
                for name in names
                if store.get(name, "test", k) is None
            )
            return
        for phase, count in (("tune", self.grid.configurations), ("test", self.grid.seeds)):
            for number in range(count):
                for method in self.grid.methods:
                    if store.get(method, phase, number) is None:
                        yield method, phase, number

    def take(self, part: str, name: str, phase: str, number: int) -> None:
        """One run: of the number-th configuration, or of the best one with a seed of the tests."""
        grid = self.grid
        if part == "strength":
            method, of = METHODS["fam_noise"], "pretrain"
            hyper = {**(self.chosen(of, "fam_noise") or {}), "strength": float(name)}
            if hyper["strength"] == 0:
                del hyper["strength"]
        elif part == "longer":
            method, of, hyper = Method(), part, {**LONGER, **grid.longer[name]}
        else:
            method, of = METHODS[name], part
            if phase == "test":
                hyper = self.chosen(part, name) or {}
            else:
                hyper = configuration(method, grid.parts[of], number, grid.configurations)
        seed = number if phase == "test" else TUNING_SEED
        start = self.base() if of == "finetune" else None
        numbers = run(
            method, grid.parts[of], hyper, self.data(of), grid.size.vocabulary, seed, phase == "test", start
        )
        self.stores[part].add(Run(name, phase, number, hyper, numbers))

    def base(self) -> Mapping[str, Tensor]:
        """The model that is fine-tuned: AdamW's, at the checkpoint with the lowest validation loss."""
        if not self._base:
            hyper = self.chosen("pretrain", "adamw")
            assert hyper is not None  # pretrain comes before
            part, size = self.grid.parts["pretrain"], self.grid.size
            run(
                Method(),
                part,
                hyper,
                self.data("pretrain"),
                size.vocabulary,
                TUNING_SEED,
                False,
                keep=self._base,
            )
        return self._base

    def run(self, part: str, until: float | None) -> bool:
        """Whether all runs of the part are there."""
        left = list(self.wanted(part))
        for name, phase, number in tqdm(left, unit="run", desc=part):
            if until is not None and time.monotonic() > until:
                return False
            self.take(part, name, phase, number)
        return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid into a folder of its own")
    parser.add_argument("--part", choices=("all", *PARTS, "summary"), default="all")
    parser.add_argument("--minutes", type=float, help="stop starting runs after this time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="default: studies/results/language, with --quick out/language"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    grid = QUICK if options.quick else FULL
    folder = options.out or (Path("out/language") if options.quick else RESULTS / "language")
    study = Study(grid, folder)
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    finished = True
    for part in PARTS:
        if finished and options.part in ("all", part):
            finished = study.run(part, until)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, text {fingerprint(grid.size)}"
    print(language_summary.write(study.stores, folder, versions))
    if not finished:
        print("Not finished: run the same command again to go on.")


if __name__ == "__main__":
    main()
