"""Does relative flatness go with generalization? LeNet-5 on CIFAR10, trained in many ways to the same loss, and rescaled.

    python examples/paper/correlation_study.py            # 108 networks
    python examples/paper/correlation_study.py --smoke    # 8 networks on generated images

Networks differ in optimizer, learning rate, batch size, weight decay and initial weights, and each is trained until its training
loss is below --until, so that measures are compared at matched loss (Petzka et al. 2021 train to 0.1). The gap is the test loss
minus the training loss. Finished networks are kept in the log, and the same command goes on after them. Then the last two layers
of each network are rescaled by --factor, which changes no output: a measure of generalization should not change either.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import common
import image_data
import networks
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import fam_ext

LAYER = "hidden"  # 120 -> 84
MEASURES = ("neuronwise", "layerwise", "trace", "largest_eigenvalue")
NETWORK = ("fisher_rao", "sam_sharpness", "weight_norm")
MEASURED = 5000  # training images that measures are taken on
GRID: dict[str, tuple[Any, ...]] = {
    "optimizer": ("SGD", "Adam", "RMSprop"),
    "rate": (0.5, 1.0, 2.0),  # times the optimizer's own
    "batch": (64, 256),
    "weight_decay": (0.0, 5e-4),
    "start": (0, 1, 2),
}
RATES = {"SGD": 0.02, "Adam": 5e-4, "RMSprop": 3e-4}


def loss_on(model: nn.Module, data: Any) -> float:
    """Mean cross-entropy, in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(x.to(device)), y.to(device), reduction="sum")
            for x, y in DataLoader(data, 500)
        ]
    return float(torch.stack(losses).sum()) / len(data)


def trained(setting: dict[str, Any], parts: common.Parts, options: argparse.Namespace) -> nn.Module:
    """A network, trained until its mean loss over an epoch is below options.until, for options.epochs at most."""
    torch.manual_seed(setting["start"])
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    model = networks.LeNet5().to(device)
    kind = getattr(torch.optim, setting["optimizer"])
    rate = setting["rate"] * RATES[setting["optimizer"]]
    more = {"momentum": 0.9} if setting["optimizer"] == "SGD" else {}
    optimizer = kind(model.parameters(), rate, weight_decay=setting["weight_decay"], **more)
    loader = DataLoader(parts.train, setting["batch"], shuffle=True, num_workers=options.workers)
    for _ in range(options.epochs):
        losses = []
        for x, y in loader:
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x.to(device)), y.to(device)))
            losses[-1].backward()
            optimizer.step()
        if sum(loss.item() for loss in losses) / len(loader) < options.until:
            break
    return model


def measured(model: nn.Module, parts: common.Parts) -> dict[str, float]:
    device = next(model.parameters()).device
    part = Subset(parts.train, range(min(MEASURED, len(parts.train))))
    batches = [(x.to(device), y.to(device)) for x, y in DataLoader(part, 500)]
    report = fam_ext.measure(
        model, batches, LAYER, nn.CrossEntropyLoss(), (*MEASURES, *NETWORK), progress=False,
        generator=torch.Generator(device).manual_seed(0),
    )  # fmt: skip
    return report.values


def row_of(setting: dict[str, Any], parts: common.Parts, options: argparse.Namespace) -> dict[str, Any]:
    model = trained(setting, parts, options)
    example = next(iter(DataLoader(parts.train, 8)))[0].to(next(model.parameters()).device)
    rescaled = fam_ext.rescale(model, [(LAYER, "head")], options.factor, inputs=example)
    train_loss, test_loss = loss_on(model, parts.train), loss_on(model, parts.test)
    return {
        **setting,
        "train_loss": train_loss,
        "gap": test_loss - train_loss,
        **measured(model, parts),
        **{f"rescaled_{name}": value for name, value in measured(rescaled, parts).items()},
    }


def summary(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Correlations with the gap, overall and within optimizers, and what rescaling does to each measure."""
    names = (*MEASURES, *NETWORK)
    rows = [r for r in rows if all(math.isfinite(float(r[n])) for n in (*names, "gap"))]
    measures = {name: [float(row[name]) for row in rows] for name in names}
    result = fam_ext.correlation(
        measures, [float(row["gap"]) for row in rows], [row["optimizer"] for row in rows]
    )
    result.to_csv(options.out / "correlation.csv")
    ratios = {n: statistics.median(float(r[f"rescaled_{n}"]) / float(r[n]) for r in rows) for n in names}
    lines = [f"{name:20s} {ratio:10.4g}" for name, ratio in ratios.items()]
    title = f"ratio of each measure after rescaling by {options.factor:g}"
    return "\n".join([result.table(), "", title, *lines])


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    tqdm = common.need("tqdm", "tqdm", "The progress bar").tqdm
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    common.add_places(parser)
    parser.add_argument("--epochs", type=int, default=200, help="at most, for each network")
    parser.add_argument("--until", type=float, default=0.1, help="training loss of a finished network")
    parser.add_argument("--factor", type=float, default=5.0, help="of the rescaling")
    options = common.settled(parser, arguments)
    grid = GRID
    if options.smoke:
        varied = ("optimizer", "batch", "start")
        grid = {name: values[: 1 + (name in varied)] for name, values in GRID.items()}
        parts = common.generated((3, 32, 32), 10, samples=300)
    else:
        parts = image_data.load("cifar10", options, augment=False)
    path = options.out / "correlation_networks.csv"
    rows: list[dict[str, Any]] = []
    if path.exists():
        rows += csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    known = {tuple(str(row[name]) for name in GRID) for row in rows}
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for setting in tqdm(settings, unit="network"):
        if tuple(map(str, setting.values())) not in known:
            rows.append(row_of(setting, parts, options))
            common.write(path, rows)
    print(summary(rows, options))
    return rows


if __name__ == "__main__":
    main()
