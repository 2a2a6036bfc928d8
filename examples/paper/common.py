"""What the recipes share: the command line, the term, held-out data, the training loop and its log."""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import fam_ext

Log = list[dict[str, float]]
FORMS: dict[str, dict[str, Any]] = {
    "auto": {},  # closed form on a head; exact or Hutchinson's estimator inside
    "held": {"curvature_grad": False},  # the Hessian is a constant to the gradient, as the paper intends
    "fisher": {"curvature": "fisher"},
    "noise": {"method": "noise"},
}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the description keeps its lines."""


class Parts(NamedTuple):
    """Data sets of (input, target). `validation` is held out of the training data; `test` is looked at with --test only."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]


def need(module: str, package: str, what: str) -> Any:
    """The module, or an end of the program that names the package and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"{error}. {what} needs {package}:\n    pip install {package}")


def add_places(made: argparse.ArgumentParser) -> None:
    """Arguments of every recipe: seed, folders, smoke test."""
    made.add_argument("--seed", type=int, default=0, help="weights, batches, held-out part")
    made.add_argument("--data", type=Path, default=Path("datasets"), help="folder of the data")
    made.add_argument("--out", type=Path, default=Path("out/paper"), help="folder of the log")
    made.add_argument("--workers", type=int, default=2, help="processes that load data")
    made.add_argument("--smoke", action="store_true", help="a few steps of a small network on generated data")


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that all recipes have, with the published settings as defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=Help)
    made.add_argument("--epochs", type=int, default=defaults.pop("epochs"), help="passes over the data")
    made.add_argument("--batch", type=int, default=defaults.pop("batch"), help="batch size")
    made.add_argument("--lr", type=float, default=defaults.pop("lr"), help="learning rate")
    made.add_argument(
        "--weight-decay", type=float, default=defaults.pop("weight_decay"), help="of the optimizer"
    )
    made.add_argument(
        "--strength",
        type=float,
        default=defaults.pop("strength"),
        help="of kappa divided by the fan-in; 0: baseline",
    )
    made.add_argument(
        "--plain-kappa", action="store_true", help="strength is of kappa, not of kappa / fan-in"
    )
    made.add_argument("--layer", default=defaults.pop("layer", "head"), help="name or pattern")
    made.add_argument("--form", choices=FORMS, default="auto", help="of the term")
    made.add_argument("--test", action="store_true", help="look at the test data, once, after training")
    add_places(made)
    made.set_defaults(**defaults)
    return made


def settled(
    arguments: argparse.ArgumentParser, given: Sequence[str] | None, **smoke: Any
) -> argparse.Namespace:
    """The parsed arguments; with --smoke two epochs of small batches, and what else `smoke` says. Seeds torch."""
    options = arguments.parse_args(given)
    if options.smoke:
        vars(options).update({"epochs": 2, "batch": 4, "workers": 0, **smoke})
    torch.manual_seed(options.seed)
    return options


def fam_loss(criterion: Any, model: nn.Module, options: argparse.Namespace, **more: Any) -> fam_ext.FAMLoss:
    """The criterion with strength * kappa / fan-in (or kappa itself) of the chosen layer."""
    chosen = {"normalize": None if options.plain_kappa else "fan_in", **FORMS[options.form], **more}
    return fam_ext.FAMLoss.for_model(criterion, model, options.layer, strength=options.strength, **chosen)


def hold_out(
    train: Dataset[Any], plain: Dataset[Any], count: int, seed: int
) -> tuple[Subset[Any], Subset[Any]]:
    """(training part, validation part of `count` samples); `plain` is the same data without augmentation."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(train, order[count:]), Subset(plain, order[:count])


def generated(shape: Sequence[int], classes: int, samples: int = 8) -> Parts:
    """Stand-ins of the right shape: noise around a mean image for each class."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, *shape, generator=generator)
    parts = []
    for _ in Parts._fields:
        y = torch.randint(classes, (samples,), generator=generator)
        parts.append(TensorDataset(means[y] + torch.randn(samples, *shape, generator=generator), y))
    return Parts(*parts)


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset[Any], options: argparse.Namespace) -> float:
    """Share of right answers, in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    right = [
        (model(x.to(device)).argmax(1) == y.to(device)).sum()
        for x, y in DataLoader(data, options.batch, num_workers=options.workers)
    ]
    return float(torch.stack(right).sum()) / len(data)


def train(
    name: str,
    model: nn.Module,
    parts: Parts,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    options: argparse.Namespace,
    score: Callable[[nn.Module, Dataset[Any], argparse.Namespace], float] = accuracy,
) -> Log:
    """Train; one line of the log for each epoch, also written to <out>/<name>.csv.

    `criterion(outputs, targets)` holds the term, and `criterion.last` its numbers. `score` is taken on the validation part. With
    --test the last line has it on the test data too.
    """
    tqdm = need("tqdm", "tqdm", "The progress bar").tqdm
    device = next(model.parameters()).device
    loader = DataLoader(parts.train, options.batch, shuffle=True, num_workers=options.workers)
    log: Log = []
    with tqdm(total=options.epochs * len(loader), unit="step", desc=name, mininterval=1.0) as bar:
        for epoch in range(options.epochs):
            model.train()
            sums: dict[str, float] = {}
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x.to(device)), y.to(device)).backward()
                optimizer.step()
                for key, value in criterion.last.as_dict().items():
                    sums[key] = sums.get(key, 0.0) + float(value) / len(loader)
                bar.update()
            schedule.step()
            log.append({"epoch": epoch + 1, **sums, "validation": score(model, parts.validation, options)})
            bar.set_postfix({key: f"{value:.4g}" for key, value in log[-1].items()})
    if options.test:
        log[-1]["test"] = score(model, parts.test, options)
    write(options.out / f"{name}.csv", log)
    print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in log[-1].items())}")
    return log


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV; a column for every key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
